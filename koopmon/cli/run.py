"""`koopmon run`: guards an unchanged training job."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from koopmon.agent.autoload import python_path
from koopmon.cli.console import say
from koopmon.cli.embedded import POLL_SECONDS, EmbeddedMonitor, MonitorNotReadyError
from koopmon.cli.launch_inspection import run_store, script_name, spread
from koopmon.cli.options import ConfigFile, DryRun, KeysDirectory, PlaintextTcp, Policy, option, overrides
from koopmon.cli.supervise import run_job, signals_held
from koopmon.config import load
from koopmon.errors import ConfigError, KoopmonError
from koopmon.run_names import check_run_name, new_run_name
from koopmon.wire.auth_policy import PLAINTEXT_VARIABLE, AuthPolicy, make_auth_policy

ANSWER_SECONDS = 2.0
KEPT_SETTINGS = "KOOPMON_KEPT_SETTINGS"
"""The variable of `koopmon.agent.control.kept_settings`, which imports torch."""


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
    json_file: Annotated[
        Path | None, option("FILE", "Write the closing summary to this file, as JSON.", "--json")
    ] = None,
) -> int:
    """Guard an unchanged training job, on one node with a monitor of its own.

    koopmon does not touch the job's output. It forwards signals, and returns the job's exit status (128 + n after
    signal n).

    The job starts at once, and its monitor beside it. If the monitor does not start, one line says so, and the job runs
    unguarded. A mistake on this command line is refused before the job starts.
    """
    if not hasattr(signal, "sigwaitinfo"):
        raise KoopmonError("koopmon needs Linux")
    given = overrides("policy", name=policy, dry_run=dry_run)
    given |= overrides("security", keys=keys, insecure_plaintext_tcp=insecure_plaintext_tcp)
    settings = load(config, overrides=given)
    if name is not None:
        check_run_name(name, "--run")
    where = spread(command, os.environ)
    named = name or new_run_name(script_name(command))
    for_agents = {"KOOPMON_RUN": named, "KOOPMON_CONFIG": None if config is None else str(config.resolve())}
    of_monitor = {"--policy": policy, "--dry-run": dry_run or None, "--http": http, "--store": store}
    if monitor is not None:
        _refuse(of_monitor, "belongs to the monitor: give it to `koopmon monitor`, not beside --monitor")
        _refuse({"--json": json_file}, "with --monitor the monitor has the history: use `koopmon report`")
        trust = make_auth_policy(**msgspec.structs.asdict(settings.security), environ=os.environ)
        for_agents["KOOPMON_KEYS"] = None if keys is None else str(keys.absolute())
        for_agents[PLAINTEXT_VARIABLE] = "1" if insecure_plaintext_tcp else None
        if where is not None:
            # Ranks on other nodes have their own launchers, so the agents of the job agree on a name themselves.
            for_agents["KOOPMON_RUN"] = name
        else:
            for_agents[KEPT_SETTINGS] = str(_default_store(named).parent)
        return _run_with_shared_monitor(command, monitor, trust, for_agents)
    only_shared = {"--keys": keys, "--insecure-plaintext-tcp": insecure_plaintext_tcp or None}
    _refuse(only_shared, "needs --monitor: only this user reaches the job's own monitor")
    if where is not None:
        raise ConfigError(
            f"the job is on other nodes too, or this is one of its ranks ({where}): start `koopmon monitor` where all "
            "ranks reach it, and give its endpoint with --monitor"
        )
    options = {"--http": http or "127.0.0.1:0", "--policy": policy, "--config": None if config is None else str(config)}
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    words += ["--dry-run"] if dry_run else []
    store = store or _default_store(named)
    for_agents[KEPT_SETTINGS] = str(store.absolute().parent)
    status, served = _run_with_own_monitor(command, named, store, words, for_agents)
    _close_with_summary(store, named, status, json_file, served=served)
    return status


def _guarded(endpoint: str, for_agents: Mapping[str, str | None]) -> dict[str, str]:
    """Return the job's environment: the monitor's endpoint, and the directory that attaches every rank."""
    # KOOPMON_HTTP_* are the monitor's secrets.
    job = {key: value for key, value in os.environ.items() if not key.startswith("KOOPMON_HTTP_")}
    job |= {key: value for key, value in for_agents.items() if value is not None}
    return job | {"KOOPMON_ENDPOINT": endpoint, "PYTHONPATH": python_path(os.environ)}


def _run_with_shared_monitor(
    command: list[str], monitor: str, trust: AuthPolicy, for_agents: Mapping[str, str | None]
) -> int:
    # Imported late because it imports zmq.
    from koopmon.wire.probe import probe

    endpoint = trust.check(monitor)
    trust.check_agent_keys(endpoint)
    found = probe(endpoint, trust, timeout_seconds=ANSWER_SECONDS)
    if found.reply is None and not found.refused:
        because = f" ({found.failure})" if found.failure else ""
        advice = f"the job is guarded once `koopmon monitor --bind {endpoint}` runs; `koopmon doctor` finds the reason"
        say(f"no monitor answers at {endpoint}{because}: {advice}")
    with signals_held() as mask:
        return run_job(command, _guarded(endpoint, for_agents), mask)


def _run_with_own_monitor(
    command: list[str], name: str, store: Path, options: list[str], for_agents: Mapping[str, str | None]
) -> tuple[int, bool]:
    """Run the job beside its monitor. Return the job's exit status, and True if the monitor served the job."""
    environ = {key: value for key, value in os.environ.items() if key != "KOOPMON_RUN"}
    with signals_held() as mask:
        try:
            embedded = EmbeddedMonitor(store, environ, mask, options)
        except MonitorNotReadyError as error:
            _say_unguarded(error)
            return run_job(command, os.environ, mask), False
        say(f"run {name}: the job starts, and its monitor beside it")
        watch = _Watch(embedded, name)
        try:
            status = run_job(command, _guarded(embedded.endpoint, for_agents), mask, watch)
            watch()
        finally:
            embedded.close(lambda: say("the monitor writes the received snapshots to its history"))
    if not embedded.page and not watch.failed:
        say(f"run {name}: the job ended before its monitor was ready, and was not watched")
    return status, bool(embedded.page)


class _Watch:
    """Prints one line when the monitor serves, and one when it does not start or dies. See `run_job` for its call."""

    def __init__(self, embedded: EmbeddedMonitor, name: str) -> None:
        self.failed = False
        self._embedded = embedded
        self._name = name

    def __call__(self) -> float | None:
        if self.failed:
            return None
        embedded = self._embedded
        if embedded.page:
            if not embedded.alive:
                self.failed = True
                say(f"the monitor died, the job goes on as it is, unguarded; its log is {embedded.log}")
            return None
        try:
            if not embedded.ready():
                return POLL_SECONDS
        except MonitorNotReadyError as error:
            self.failed = True
            _say_unguarded(error)
        else:
            say(f"run {self._name}: guarded; live page at {embedded.page}, metrics at {embedded.page}metrics")
        return None


def _say_unguarded(error: MonitorNotReadyError) -> None:
    say(f"the job runs unguarded, because its monitor did not start: {error}")


def _default_store(name: str) -> Path:
    """Return a history path for this run, in a temporary directory when the state directory is not writable."""
    store = run_store(name)
    try:
        store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store.parent):
            return store
    except OSError:
        return Path(tempfile.mkdtemp(prefix="koopmon-history-")) / store.name


def _refuse(given: Mapping[str, object], why: str) -> None:
    """Raise ConfigError if any of these options was given."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} {why}")


def _close_with_summary(store: Path, name: str, status: int, json_file: Path | None, *, served: bool) -> None:
    # Imported late because the job waits for every import above. A history may be that of earlier launches only.
    from koopmon.views.run_summary import summarise, summarise_beside

    summary = summarise(store, name) if served else None
    if summary is not None:
        for line in summary.lines():
            say(line)
        for other in summarise_beside(store, name):
            say(other.beside_line())
    elif served:
        say(f"run {name}: no history was written")
    if json_file is not None:
        result = {"run": name, "exit_status": status} | ({} if summary is None else asdict(summary))
        try:
            json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            say(f"--json {json_file}: {error.strerror}")
