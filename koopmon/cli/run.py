"""`koopmon run`: guards an unchanged training job."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from koopmon.agent.autoload import python_path
from koopmon.cli.console import say
from koopmon.cli.embedded import READY_SECONDS, EmbeddedMonitor, MonitorNotReadyError
from koopmon.cli.launch_inspection import run_store, script_name, spread
from koopmon.cli.options import (
    ConfigFile,
    DryRun,
    KeysDirectory,
    PlaintextTcp,
    Policy,
    policy_overrides,
    security_overrides,
)
from koopmon.cli.supervise import run_job, signals_held, take_signal
from koopmon.config import load
from koopmon.errors import ConfigError, KoopmonError
from koopmon.run_names import check_run_name, new_run_name
from koopmon.views.run_summary import summarise
from koopmon.wire.auth_policy import PLAINTEXT_VARIABLE, AuthPolicy, make_auth_policy

ANSWER_SECONDS = 2.0


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The job's command.")],
    monitor: Annotated[
        str | None,
        typer.Option(metavar="ENDPOINT", help="Endpoint of a running monitor. Default: the job starts its own."),
    ] = None,
    policy: Policy = None,
    dry_run: DryRun = False,
    config: ConfigFile = None,
    keys: KeysDirectory = None,
    insecure_plaintext_tcp: PlaintextTcp = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="NAME",
            envvar="KOOPMON_RUN",
            help="Name of the run. Default: the script's and 8 hex digits. A restarted job keeps its name.",
        ),
    ] = None,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address of the own monitor's pages. Default: a free port.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The job's history. Default: under XDG_STATE_HOME.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the closing summary to this file, as JSON.")
    ] = None,
) -> int:
    """Guard an unchanged training job, on one node with a monitor of its own.

    koopmon does not touch the job's output. It forwards signals, and returns the job's exit status (128 + n after
    signal n).

    A mistake on this command line is refused before the job starts. If the monitor does not start, one line says so,
    and the job runs unguarded.
    """
    if not hasattr(signal, "sigwaitinfo"):
        raise KoopmonError("koopmon needs Linux")
    overrides = policy_overrides(policy, dry_run) | security_overrides(keys, insecure_plaintext_tcp)
    settings = load(config, overrides=overrides)
    if name is not None:
        check_run_name(name, "--run")
    job = JobRequest(command, name, config, dict(os.environ))
    of_monitor = {"--policy": policy, "--dry-run": dry_run or None, "--http": http, "--store": store}
    if monitor is not None:
        _refuse(of_monitor, "belongs to the monitor: give it to `koopmon monitor`, not beside --monitor")
        _refuse({"--json": json_file}, "with --monitor the monitor has the history: use `koopmon report`")
        trust = make_auth_policy(**msgspec.structs.asdict(settings.security), environ=job.environ)
        return _run_with_shared_monitor(job, monitor, trust, _security_environment(keys, insecure_plaintext_tcp))
    only_shared = {"--keys": keys, "--insecure-plaintext-tcp": insecure_plaintext_tcp or None}
    _refuse(only_shared, "needs --monitor: only this user reaches the job's own monitor")
    options = [] if policy is None else ["--policy", policy]
    return _run_with_own_monitor(job, [*options, *(["--dry-run"] if dry_run else [])], http, store, json_file)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """The job to guard: its command, the name and the configuration that the user gave, and its environment."""

    command: list[str]
    name: str | None
    config: Path | None
    environ: dict[str, str]

    def run_name(self) -> str:
        return self.name or new_run_name(script_name(self.command))

    def guarded_by(self, endpoint: str, name: str | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the job's environment: the monitor's endpoint, and the directory that attaches every rank."""
        # KOOPMON_HTTP_* are the monitor's secrets.
        job = {key: value for key, value in self.environ.items() if not key.startswith("KOOPMON_HTTP_")}
        job |= {"KOOPMON_ENDPOINT": endpoint, **(more or {})}
        if name is not None:
            job["KOOPMON_RUN"] = name
        if self.config is not None:
            job["KOOPMON_CONFIG"] = str(self.config.resolve())
        job["PYTHONPATH"] = python_path(self.environ)
        return job


def _run_with_shared_monitor(job: JobRequest, monitor: str, trust: AuthPolicy, security: Mapping[str, str]) -> int:
    endpoint = trust.check(monitor)
    trust.check_agent_keys(endpoint)
    # Ranks on other nodes have their own launchers, so the agents of a multi-node job agree on a name themselves.
    name = job.name if spread(job.command, job.environ) else job.run_name()
    if (why := _why_silent(endpoint, trust)) is not None:
        because = f" ({why})" if why else ""
        advice = f"the job is guarded once `koopmon monitor --bind {endpoint}` runs; `koopmon doctor` finds the reason"
        say(f"no monitor answers at {endpoint}{because}: {advice}")
    with signals_held() as mask:
        return run_job(job.command, job.guarded_by(endpoint, name, security), mask)


def _run_with_own_monitor(
    job: JobRequest, options: list[str], http: str | None, store: Path | None, json_file: Path | None
) -> int:
    if (where := spread(job.command, job.environ)) is not None:
        raise ConfigError(
            f"the job is on other nodes too, or this is one of its ranks ({where}): start `koopmon monitor` where all "
            "ranks reach it, and give its endpoint with --monitor"
        )
    name = job.run_name()
    store = store or _default_store(name)
    if job.config is not None:
        options = ["--config", str(job.config), *options]
    embedded = EmbeddedMonitor(store, http=http or "127.0.0.1:0", options=options)
    with signals_held() as mask, contextlib.ExitStack() as stack:
        stack.callback(embedded.close)
        try:
            stopped = _await_monitor(embedded, job.environ, mask)
        except MonitorNotReadyError as error:
            say(f"the job runs unguarded, because its monitor did not start: {error}")
            embedded.close()
            return run_job(job.command, job.environ, mask)
        if stopped is not None:
            say("stopped before the job was started")
            return 128 + stopped
        say(f"run {name}: guarded; live page at {embedded.page}, metrics at {embedded.url}")
        status = run_job(job.command, job.guarded_by(embedded.endpoint, name), mask, _Watcher(embedded))
        embedded.close(lambda: say("the monitor writes the received snapshots to its history"))
    _close_with_summary(store, name, status, json_file)
    return status


def _await_monitor(
    embedded: EmbeddedMonitor, environ: Mapping[str, str], mask: set[signal.Signals]
) -> signal.Signals | None:
    """Wait for the monitor; return None, or the signal that ended the wait. Raises MonitorNotReadyError."""
    say("starting the monitor")
    embedded.start({key: value for key, value in environ.items() if key != "KOOPMON_RUN"}, mask)
    deadline = time.monotonic() + READY_SECONDS
    while not embedded.ready():
        if time.monotonic() > deadline:
            raise MonitorNotReadyError(f"not ready after {READY_SECONDS:.0f} s; its log is {embedded.log}")
        if (number := take_signal(0.05)) is not None:
            return number
    return None


class _Watcher:
    """Prints one message when the monitor dies while the job runs."""

    def __init__(self, embedded: EmbeddedMonitor) -> None:
        self._embedded = embedded
        self._said = False

    def __call__(self) -> None:
        if not self._said and not self._embedded.alive:
            self._said = True
            say(f"the monitor died, the job goes on as it is, unguarded; its log is {self._embedded.log}")


def _security_environment(keys: Path | None, plaintext_tcp: bool) -> dict[str, str]:
    """Return the command-line key settings for the agents in the job: a directory, never a key."""
    named = {} if keys is None else {"KOOPMON_KEYS": str(keys.absolute())}
    return named | ({PLAINTEXT_VARIABLE: "1"} if plaintext_tcp else {})


def _default_store(name: str) -> Path:
    """Return a history path for this run, in a temporary directory when the state directory is not writable."""
    store = run_store(name)
    try:
        store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store.parent):
            return store
    except OSError:
        return Path(tempfile.mkdtemp(prefix="koopmon-history-")) / store.name


def _why_silent(endpoint: str, trust: AuthPolicy) -> str | None:
    """Return the reason, possibly empty, why no monitor answers at a checked endpoint; None when one answers."""
    from koopmon.wire.probe import probe

    found = probe(endpoint, trust, timeout_seconds=ANSWER_SECONDS)
    return None if found.reply is not None or found.refused else found.failure


def _refuse(given: Mapping[str, object], why: str) -> None:
    """Raise ConfigError if any of these options was given."""
    for option, value in given.items():
        if value is not None:
            raise ConfigError(f"{option} {why}")


def _close_with_summary(store: Path, name: str, status: int, json_file: Path | None) -> None:
    summary = summarise(store, name)
    if summary is None:
        say(f"run {name}: no history was written")
    else:
        for line in summary.lines():
            say(line)
    if json_file is not None:
        result = {"run": name, "exit_status": status} | ({} if summary is None else asdict(summary))
        try:
            json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            say(f"--json {json_file}: {error.strerror}")
