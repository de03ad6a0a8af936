"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from koopmon.config import PolicyName

POLICIES: tuple[str, ...] = get_args(PolicyName)


def _known_policy(name: str | None) -> str | None:
    if name is not None and name not in POLICIES:
        raise typer.BadParameter(f"{name!r}: allowed are {', '.join(POLICIES)}")
    return name


ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Configuration, TOML. Default: KOOPMON_CONFIG.")]
Policy = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(POLICIES), callback=_known_policy, help="Allowed actions. Default: the configuration's."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run, as `koopmon run` printed it.")]
HistoryFile = Annotated[
    Path | None,
    typer.Option("--store", metavar="FILE", help="History, SQLite. Default: the run's own, else the monitor's."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Decide and record, but send no command.")]
KeysDirectory = Annotated[
    Path | None,
    typer.Option("--keys", metavar="DIR", help="Key files. Default: KOOPMON_KEYS, else under XDG_CONFIG_HOME."),
]
PlaintextTcp = Annotated[
    bool,
    typer.Option(
        "--insecure-plaintext-tcp",
        help="No keys on tcp: anyone who reaches it can read and control the training. Set it on both sides.",
    ),
]


def security_overrides(keys: Path | None, plaintext_tcp: bool) -> dict[str, Any]:
    """Return the command-line values of `[security]` as configuration overrides."""
    directory = None if keys is None else str(keys.absolute())
    return _given("security", keys=directory, insecure_plaintext_tcp=plaintext_tcp or None)


def policy_overrides(policy: str | None, dry_run: bool) -> dict[str, Any]:
    """Return the command-line values of `[policy]` as configuration overrides."""
    return _given("policy", name=policy, dry_run=dry_run or None)


def grafana_overrides(url: str | None, token_file: Path | None) -> dict[str, Any]:
    """Return the command-line values of `[grafana]` as configuration overrides."""
    file = None if token_file is None else str(token_file)
    return _given("grafana", url=url, token_file=file)


def _given(section: str, **values: object) -> dict[str, Any]:
    table = {name: value for name, value in values.items() if value is not None}
    return {section: table} if table else {}
