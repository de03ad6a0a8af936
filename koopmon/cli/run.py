"""`koopmon run`: guards an unchanged training job."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from koopmon.agent.autoload import DIRECTORY
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
EPILOG = "Example: koopmon run -- torchrun --nproc-per-node 2 train.py --lr 0.003"


class _EndedEarlyError(Exception):
    """A signal arrived before the job was started."""


def add_to(app: typer.Typer) -> None:
    settings = {"allow_interspersed_args": False}
    app.command("run", epilog=EPILOG, no_args_is_help=True, context_settings=settings)(run)


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The job, as you start it today.")],
    monitor: Annotated[
        str | None,
        typer.Option(metavar="ENDPOINT", help="A monitor that runs already. Default: one of the job's own."),
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
            help="The run's name. Default: the script's and 8 hex digits. A restarted job keeps its name.",
        ),
    ] = None,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the job's own monitor serves. Default: a free port.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The job's history. Default: under XDG_STATE_HOME.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the closing summary there, as JSON.")
    ] = None,
) -> int:
    """Guard an unchanged training job, on one node with a monitor of its own.

    The job's output is its own, byte for byte; signals are passed on; its exit status is returned (128 + n after
    signal n).

    A mistake on this command line is refused before the job starts. A monitor that does not come up is one line, and
    the job runs unguarded: what was made to protect a training must not prevent it.
    """
    if not hasattr(signal, "sigwaitinfo"):
        raise KoopmonError("koopmon run needs Linux: elsewhere call koopmon.attach() in the script")
    overrides = policy_overrides(policy, dry_run)
    settings = load(config, overrides=overrides | security_overrides(keys, insecure_plaintext_tcp))
    if name is not None:
        check_run_name(name, "--run")
    environ = dict(os.environ)
    if monitor is not None:
        _refuse_beside_monitor({"--policy": policy, "--dry-run": dry_run or None, "--http": http, "--store": store})
        if json_file is not None:
            raise ConfigError("--json: with --monitor the history is the monitor's; ask it there")
        trust = make_auth_policy(**msgspec.structs.asdict(settings.security), environ=environ)
        endpoint = trust.check(monitor)
        trust.check_agent_keys(endpoint)
        environ |= _security_environment(keys, insecure_plaintext_tcp)
        # Ranks on other nodes have their own launchers, so the agents of a multi-node job agree on a name themselves.
        shared = name if name is not None or spread(command, environ) else new_run_name(script_name(command))
        if (why := _why_silent(endpoint, trust)) is not None:
            because = f" ({why})" if why else ""
            advice = f"the job is guarded once `koopmon monitor --bind {endpoint}` runs; `koopmon doctor` says more"
            say(f"no monitor answers at {endpoint}{because}: {advice}")
        with signals_held() as mask:
            return run_job(command, _job_environment(environ, endpoint, shared, config), mask)
    for option, given in {"--keys": keys, "--insecure-plaintext-tcp": insecure_plaintext_tcp or None}.items():
        if given is not None:
            raise ConfigError(f"{option} goes with --monitor: a monitor of the job's own is reached by its user alone")
    where = spread(command, environ)
    if where is not None:
        raise ConfigError(
            f"the job is on other nodes too, or this is one of its ranks ({where}): start `koopmon monitor` where all "
            "ranks reach it, and give its endpoint with --monitor"
        )
    return _run_with_own_monitor(
        command, environ, name or new_run_name(script_name(command)), config, overrides, http, store, json_file
    )


def _run_with_own_monitor(
    command: list[str],
    environ: dict[str, str],
    name: str,
    config: Path | None,
    overrides: Mapping[str, Any],
    http: str | None,
    store: Path | None,
    json_file: Path | None,
) -> int:
    store = store or _default_store(name)
    options: list[str] = [] if config is None else ["--config", str(config)]
    table = overrides.get("policy", {})
    options += ["--policy", table["name"]] if "name" in table else []
    options += ["--dry-run"] if table.get("dry_run") else []
    embedded = EmbeddedMonitor(store, http=http or "127.0.0.1:0", options=options)
    with signals_held() as mask, contextlib.ExitStack() as stack:
        stack.callback(embedded.close)
        guarded = True
        try:
            _await_monitor(embedded, environ, mask)
            say(f"run {name}: guarded; live page at {embedded.page}, metrics at {embedded.url}")
        except MonitorNotReadyError as error:
            say(f"the job runs unguarded, because its monitor did not start: {error}")
            guarded = False
        except _EndedEarlyError as ended:
            say("stopped before the job was started")
            return 128 + int(ended.args[0])
        if not guarded:
            embedded.close()
            return run_job(command, environ, mask)
        status = run_job(command, _job_environment(environ, embedded.endpoint, name, config), mask, _Watcher(embedded))
        embedded.close(lambda: say("the monitor is writing down what it has received"))
    _close_with_summary(store, name, status, json_file)
    return status


def _await_monitor(embedded: EmbeddedMonitor, environ: Mapping[str, str], mask: set[signal.Signals]) -> None:
    """Wait for the monitor. Raises MonitorNotReadyError, or _EndedEarlyError after a signal."""
    say("starting the monitor")
    embedded.start({key: value for key, value in environ.items() if key != "KOOPMON_RUN"}, mask)
    deadline = time.monotonic() + READY_SECONDS
    while not embedded.ready():
        if time.monotonic() > deadline:
            raise MonitorNotReadyError(f"not ready after {READY_SECONDS:.0f} s; its log is {embedded.log}")
        if (number := take_signal(0.05)) is not None:
            raise _EndedEarlyError(number)


class _Watcher:
    """Prints one message when the monitor dies while the job runs."""

    def __init__(self, embedded: EmbeddedMonitor) -> None:
        self._embedded = embedded
        self._said = False

    def __call__(self) -> None:
        if not self._said and not self._embedded.alive:
            self._said = True
            say(f"the monitor died, the job goes on as it is, unguarded; its log is {self._embedded.log}")


def _job_environment(
    environ: Mapping[str, str], endpoint: str, name: str | None, config: Path | None
) -> dict[str, str]:
    """Return the environment of the job: the monitor's endpoint, and the directory that attaches every rank."""
    job = {key: value for key, value in environ.items() if not key.startswith("KOOPMON_HTTP_")}  # the monitor's secrets
    job["KOOPMON_ENDPOINT"] = endpoint
    if name is not None:
        job["KOOPMON_RUN"] = name
    if config is not None:
        job["KOOPMON_CONFIG"] = str(config.resolve())
    before = environ.get("PYTHONPATH", "")
    job["PYTHONPATH"] = f"{DIRECTORY}{os.pathsep}{before}" if before else str(DIRECTORY)
    return job


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


def _refuse_beside_monitor(given: Mapping[str, object]) -> None:
    for option, value in given.items():
        if value is not None:
            raise ConfigError(f"{option} belongs to the monitor: give it to `koopmon monitor`, not beside --monitor")


def _close_with_summary(store: Path, name: str, status: int, json_file: Path | None) -> None:
    summary = summarise(store, name)
    if summary is None:
        say(f"run {name}: no history was written")
    else:
        for line in summary.lines():
            say(line)
    if json_file is not None:
        result = {"run": name, "exit_status": status} | ({} if summary is None else summary.to_dict())
        try:
            json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            say(f"--json {json_file}: {error.strerror}")
