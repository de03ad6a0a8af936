"""`koopmon run`: guards an unchanged training job."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from koopmon.agent.comms.monitor_start import VARIABLE as READY_FILE
from koopmon.cli.console import say, set_verbosity, warn
from koopmon.cli.embedded import POLL_SECONDS, EmbeddedMonitor, MonitorNotReadyError
from koopmon.cli.ended_settings import run_with_settings
from koopmon.cli.job_stop import ENDED_BY_KOOPMON, JobStop
from koopmon.cli.job_stop import POLL_SECONDS as STOP_POLL_SECONDS
from koopmon.cli.launch_inspection import spread
from koopmon.cli.options import (
    ConfigFile,
    DryRun,
    KeysDirectory,
    PlaintextTcp,
    Policy,
    TargetsDirectory,
    option,
    overrides,
)
from koopmon.cli.shared_monitor import (
    KEPT_SETTINGS,
    NOTICES,
    default_store,
    describe_job,
    guarded,
    run_with_shared_monitor,
)
from koopmon.cli.supervise import check_command, run_job, signals_held
from koopmon.config import Config, load
from koopmon.errors import ConfigError, KoopmonError
from koopmon.monitor.http.address import listen
from koopmon.run_names import check_run_name

BRIEF_SECONDS = 2.0
"""An agent reaches a new monitor in this time."""


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The job's command.")],
    monitor: Annotated[
        str | None, option("ENDPOINT", "Endpoint of a running monitor. Default: the job starts its own.")
    ] = None,
    policy: Policy = None,
    dry_run: DryRun = False,
    config: ConfigFile = None,
    keys: KeysDirectory = None,
    insecure_plaintext_tcp: PlaintextTcp = False,
    name: Annotated[
        str | None,
        option(
            "NAME",
            "Name of the run. Default: the script's and 8 hex digits. A restarted job keeps its name.",
            "--run",
            envvar="KOOPMON_RUN",
        ),
    ] = None,
    http: Annotated[
        str | None, option("HOST:PORT", "Address of the own monitor's pages. Default: a free port.")
    ] = None,
    store: Annotated[Path | None, option("FILE", "The job's history. Default: under XDG_STATE_HOME.")] = None,
    sd_directory: TargetsDirectory = None,
    summary: Annotated[Path | None, option("FILE", "Write the closing summary to this file, as JSON.")] = None,
    allow_stop: Annotated[
        bool,
        typer.Option("--allow-stop", help="End the job, with status 70, if its training is ruined ([policy] stop)."),
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait", help="Let the training begin when its own monitor serves, or has failed to start."
        ),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print faults only.")] = False,
) -> int:
    """Guard an unchanged training job, on one node with a monitor of its own.

    koopmon does not touch the job's output. It forwards signals, and returns the job's exit status (128 + n after
    signal n). With `--allow-stop` it sends SIGTERM to a job that ignores the monitor's request to stop.

    The job starts at once, and its monitor beside it. The training waits for it where it makes its first optimizer, at
    most a minute; with `--no-wait` its first steps may be unguarded. If the monitor does not start, one line says so,
    and the job runs unguarded. A mistake on this command line is refused before the job starts.
    """
    if not hasattr(signal, "sigwaitinfo"):
        raise KoopmonError("koopmon needs Linux")
    given = overrides("policy", name=policy, dry_run=dry_run, stop=allow_stop)
    given |= overrides("security", keys=keys, insecure_plaintext_tcp=insecure_plaintext_tcp)
    settings = load(config, overrides=given)
    if name is not None:
        check_run_name(name, "--run")
    if allow_stop and settings.policy.name == "observe":
        raise ConfigError("--allow-stop: the policy observe only watches, and stops no training")
    if quiet:
        set_verbosity("quiet")
    of_monitor = {"--policy": policy, "--dry-run": dry_run or None, "--http": http, "--store": store}
    of_monitor["--sd-directory"] = sd_directory
    if monitor is not None:
        _refuse(of_monitor, "belongs to the monitor: give it to `koopmon monitor`, not beside --monitor")
        _refuse(
            {"--allow-stop": allow_stop or None}, "needs the job's own monitor; give [policy] stop to the other one"
        )
        _refuse({"--no-wait": None if wait else True}, "needs the job's own monitor")
        _refuse({"--summary": summary}, "with --monitor the monitor has the history: use `koopmon report`")
        return run_with_shared_monitor(
            command,
            monitor,
            settings,
            name=name,
            config=config,
            keys=keys,
            insecure_plaintext_tcp=insecure_plaintext_tcp,
        )
    only_shared = {"--keys": keys, "--insecure-plaintext-tcp": insecure_plaintext_tcp or None}
    _refuse(only_shared, "needs --monitor: only this user reaches the job's own monitor")
    if (where := spread(command, os.environ)) is not None:
        raise ConfigError(
            f"the job is on other nodes too, or this is one of its ranks ({where}): start `koopmon monitor` where all "
            "ranks reach it, and give its endpoint with --monitor"
        )
    _check_options(settings, http, store, summary)
    check_command(command)
    for_agents = describe_job(command, name, config)
    named = str(for_agents["KOOPMON_RUN"])
    options = {"--http": http or "127.0.0.1:0", "--policy": policy, "--config": None if config is None else str(config)}
    options |= {"--sd-directory": None if sd_directory is None else str(sd_directory), "--sd-run": named}
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    words += ["--dry-run"] * dry_run + ["--allow-stop"] * allow_stop
    for_agents[NOTICES] = for_agents[NOTICES] or "changes"
    store = store or default_store(named)
    for_agents[KEPT_SETTINGS] = str(store.absolute().parent)
    mode = ""
    if settings.policy.name == "observe" or settings.policy.dry_run:
        mode = "; it only watches: " + ("policy observe" if settings.policy.name == "observe" else "dry run")
    since = time.time()
    job_stop = JobStop(store, named) if allow_stop else None
    status, served_seconds = _run_with_own_monitor(command, named, store, words, for_agents, job_stop, mode, wait=wait)
    _close_with_summary(store, named, status, summary, since, served_seconds)
    if job_stop is not None and job_stop.due:
        warn(f"run {named}: koopmon ended the job, which had status {status}: {job_stop.reason}")
        return ENDED_BY_KOOPMON
    return status


def _check_options(settings: Config, http: str | None, store: Path | None, summary: Path | None) -> None:
    """Refuse values that the own monitor, or the end of the job, would fail on. Raises KoopmonError."""
    if http is not None:
        listen(http, exposed=settings.http.insecure_plaintext or bool(settings.http.tls_certificate)).close()
    if store is not None:
        _check_store(store)
    if summary is not None:
        _check_writable(summary, "--summary")


def _check_store(store: Path) -> None:
    try:
        store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--store {store}: {error.filename}: {error.strerror}") from None
    _check_writable(store, "--store")
    if store.exists() and store.stat().st_size:
        from koopmon.history.reader import HistoryReader

        HistoryReader.open(store).close()


def _check_writable(path: Path, name: str) -> None:
    """Raise ConfigError if no file can be written at `path`. An existing file keeps its content."""
    if path.is_dir():
        raise ConfigError(f"{name} {path}: a directory, expected a file")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise ConfigError(f"{name} {path}: {error.strerror}") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{name} {path}: not writable")


def _run_with_own_monitor(
    command: list[str],
    name: str,
    store: Path,
    options: list[str],
    for_agents: Mapping[str, str | None],
    job_stop: JobStop | None,
    mode: str,
    *,
    wait: bool,
) -> tuple[int, float | None]:
    """Run the job beside its monitor. Return the job's exit status, and how long the monitor served it; None if not."""
    # A unit of systemd around this command is ready when the job says so, not its monitor.
    left_out = ("KOOPMON_RUN", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    environ = {key: value for key, value in os.environ.items() if key not in left_out}
    with signals_held() as mask:
        try:
            embedded = EmbeddedMonitor(name, store, environ, mask, options)
        except MonitorNotReadyError as error:
            _say_unguarded(error)
            return run_job(command, os.environ, mask), None
        say(f"run {name}: the job starts, and its monitor beside it")
        watch = _Watch(embedded, name, job_stop, mode)
        if wait:
            for_agents = {**for_agents, READY_FILE: str(embedded.ready_file)}
        try:
            job = guarded(embedded.endpoint, for_agents)
            must_end = job_stop or (lambda: False)
            status = run_with_settings(
                for_agents[KEPT_SETTINGS], name, lambda got: run_job(command, job, mask, watch, must_end, got)
            )
            watch()
            served_seconds = watch.served_seconds()
        finally:
            embedded.close(lambda: say("the monitor writes the received snapshots to its history"))
    if not watch.failed and (failure := embedded.failure) is not None:
        _say_unguarded(failure)
    elif not embedded.page and not watch.failed:
        warn(f"run {name}: the job ended before its monitor was ready, and was not watched")
    return status, served_seconds


class _Watch:
    """Prints one line when the monitor serves, and one when it does not start or dies. See `run_job` for its call."""

    def __init__(self, embedded: EmbeddedMonitor, name: str, job_stop: JobStop | None, mode: str) -> None:
        self.failed = False
        self._embedded = embedded
        self._name = name
        self._job_stop = job_stop
        self._mode = mode
        self._served_since: float | None = None

    def served_seconds(self) -> float | None:
        """Return the time since the monitor served; None if it did not."""
        return None if self._served_since is None else time.monotonic() - self._served_since

    def __call__(self) -> float | None:
        seconds = self._look()
        if seconds is None and self._job_stop is not None and not self._job_stop.due:
            return STOP_POLL_SECONDS
        return seconds

    def _look(self) -> float | None:
        if self.failed:
            return None
        embedded = self._embedded
        if embedded.page:
            if not embedded.alive:
                self.failed = True
                warn(f"the monitor died, the job goes on as it is, unguarded; its log is {embedded.log}")
            return None
        try:
            if not embedded.ready():
                return POLL_SECONDS
        except MonitorNotReadyError as error:
            self.failed = True
            _say_unguarded(error)
        else:
            page, self._served_since = embedded.page, time.monotonic()
            say(f"run {self._name}: its monitor serves{self._mode}; live page at {page}, metrics at {page}metrics")
            import_module("koopmon.views.run_summary")  # for the end of the job, while nobody waits
        return None


def _say_unguarded(error: MonitorNotReadyError) -> None:
    warn(f"the job runs unguarded, because its monitor did not start: {error}")


def _refuse(given: Mapping[str, object], why: str) -> None:
    """Raise ConfigError if any of these options was given."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} {why}")


def _close_with_summary(
    store: Path,
    name: str,
    status: int,
    summary_file: Path | None,
    since: float,
    served_seconds: float | None,
) -> None:
    # Imported late because the job waits for every import above. A history may be that of earlier launches only.
    from koopmon.views.run_summary import summarise, summarise_beside

    served = served_seconds is not None
    summary = summarise(store, name) if served else None
    if summary is not None:
        for line in summary.lines(since, brief=served_seconds is not None and served_seconds < BRIEF_SECONDS):
            (warn if "NOT " in line else say)(line)
        for other in summarise_beside(store, name):
            say(other.beside_line())
    elif served:
        warn(f"run {name}: no history was written")
    if summary_file is not None:
        result = {"run": name, "exit_status": status} | ({} if summary is None else asdict(summary))
        try:
            summary_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            warn(f"--summary {summary_file}: {error.strerror}")
