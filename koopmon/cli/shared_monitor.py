"""The part of `koopmon run` that the agent's install can do: a job that reports to a monitor that runs already."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from koopmon.agent.autoload import python_path
from koopmon.cli.console import is_quiet, say, warn
from koopmon.cli.ended_settings import run_with_settings
from koopmon.cli.launch_inspection import isolation, run_store, script_name, spread
from koopmon.cli.supervise import check_command, run_job, signals_held
from koopmon.config import Config
from koopmon.errors import NOT_WATCHED
from koopmon.run_names import new_run_name
from koopmon.wire.auth_policy import PLAINTEXT_VARIABLE, make_auth_policy

ANSWER_SECONDS = 2.0
NOTICES = "KOOPMON_NOTICES"
"""The variable of `koopmon.agent.notices`, which imports torch."""
KEPT_SETTINGS = "KOOPMON_KEPT_SETTINGS"
"""The variable of `koopmon.agent.control.kept_settings`, which imports torch."""


def describe_job(command: list[str], name: str | None, config: Path | None) -> dict[str, str | None]:
    """Return the variables that every agent of the job needs. A line names an option of Python that keeps them out."""
    if option_of_python := isolation(command):
        say(
            f"python {option_of_python} attaches nothing by itself: call koopmon.attach(model, optimizer) in the script"
        )
    return {
        "KOOPMON_RUN": name or new_run_name(script_name(command)),
        "KOOPMON_CONFIG": None if config is None else str(config.resolve()),
        NOTICES: "none" if is_quiet() else None,
    }


def guarded(endpoint: str, for_agents: Mapping[str, str | None]) -> dict[str, str]:
    """Return the job's environment: the monitor's endpoint, and the directory that attaches every rank."""
    # These are the monitor's secrets.
    secrets = ("KOOPMON_HTTP_", "KOOPMON_NOTIFY_")
    job = {key: value for key, value in os.environ.items() if not key.startswith(secrets)}
    job |= {key: value for key, value in for_agents.items() if value is not None}
    return job | {"KOOPMON_ENDPOINT": endpoint, "PYTHONPATH": python_path(os.environ)}


def run_with_shared_monitor(
    command: list[str],
    monitor: str,
    settings: Config,
    *,
    name: str | None,
    config: Path | None,
    keys: Path | None,
    insecure_plaintext_tcp: bool,
) -> int:
    """Run the job, whose agents report to `monitor`, and return its exit status. Raises KoopmonError before it starts.

    `name`, `config`, `keys` and `insecure_plaintext_tcp` are the options of the command line.
    """
    for_agents = describe_job(command, name, config)
    trust = make_auth_policy(**msgspec.structs.asdict(settings.security), environ=os.environ)
    for_agents["KOOPMON_KEYS"] = None if keys is None else str(keys.absolute())
    for_agents[PLAINTEXT_VARIABLE] = "1" if insecure_plaintext_tcp else None
    named = for_agents["KOOPMON_RUN"]
    if spread(command, os.environ) is not None:
        # Ranks on other nodes have their own launchers, so the agents of the job agree on a name themselves.
        named = for_agents["KOOPMON_RUN"] = name
    elif named is not None:
        for_agents[KEPT_SETTINGS] = str(default_store(named).parent)
    check_command(command)
    # Imported late because it imports zmq.
    from koopmon.wire.probe import probe

    endpoint = trust.check(monitor)
    trust.check_agent_keys(endpoint)
    whose = "" if named is None else f"run {named}: "
    found = probe(endpoint, trust, timeout_seconds=ANSWER_SECONDS)
    if found.reply is None and not found.refused:
        because = f" ({found.failure})" if found.failure else ""
        advice = f"the job is guarded once `koopmon monitor --bind {endpoint}` runs; `koopmon doctor` finds the reason"
        warn(f"{whose}no monitor answers at {endpoint}{because}: {advice}")
    else:
        say(f"{whose}the job starts, and reports to the monitor at {endpoint}")
    with signals_held() as mask:
        job = guarded(endpoint, for_agents)
        directory = for_agents.get(KEPT_SETTINGS)
        status = run_with_settings(directory, named, lambda got: run_job(command, job, mask, received=got))
    if named is not None and found.reply is not None:
        ended = probe(endpoint, trust, run=named, timeout_seconds=ANSWER_SECONDS).reply
        if ended is not None and ended.run_state is None:
            warn(f"{whose}{NOT_WATCHED}")
    return status


def default_store(name: str) -> Path:
    """Return a history path for this run, in a temporary directory when the state directory is not writable."""
    store = run_store(name)
    try:
        store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store.parent):
            return store
    except OSError:
        return Path(tempfile.mkdtemp(prefix="koopmon-history-")) / store.name
