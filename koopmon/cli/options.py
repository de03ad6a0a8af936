"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from koopmon.config import PolicyName

POLICIES: tuple[str, ...] = get_args(PolicyName)


def option(metavar: str, help_text: str, *names: str, **settings: Any) -> Any:
    """Return an option with a value; `names` replace the parameter's own name, `settings` are those of typer."""
    return typer.Option(*names, metavar=metavar, help=help_text, **settings)


def _known_policy(name: str | None) -> str | None:
    if name is not None and name not in POLICIES:
        file = "; a configuration file is for --config" if name.endswith(".toml") or "/" in name else ""
        raise typer.BadParameter(f"{name!r}: allowed are {', '.join(POLICIES)}{file}")
    return name


def run_names(incomplete: str) -> list[str]:
    """Return the names of known runs for the completion of a shell."""
    # Imported late, because only the completion needs the histories.
    from koopmon.cli.find_history import complete_run

    return complete_run(incomplete)


ConfigFile = Annotated[Path | None, option("FILE", "Configuration, TOML. Default: KOOPMON_CONFIG.")]
Policy = Annotated[
    str | None, option("|".join(POLICIES), "Allowed actions. Default: the configuration's.", callback=_known_policy)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="Name of the run, as `koopmon runs` lists it. Default: the latest.",
        autocompletion=run_names,
    ),
]
HistoryFile = Annotated[Path | None, option("FILE", "History, SQLite. Default: the run's own, else the monitor's.")]
TargetsDirectory = Annotated[
    Path | None,
    option(
        "DIR",
        "Directory for the target file that Prometheus (file_sd) reads. Default: under XDG_STATE_HOME.",
        "--sd-directory",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Decide and record, but send no command.")]
KeysDirectory = Annotated[
    Path | None, option("DIR", "Key files. Default: KOOPMON_KEYS, else under XDG_CONFIG_HOME.", "--keys")
]
PlaintextTcp = Annotated[
    bool,
    typer.Option(
        "--insecure-plaintext-tcp",
        help="No keys on tcp: anyone who reaches it can read and control the training. Set it on both sides.",
    ),
]


def overrides(section: str, **values: str | Path | bool | None) -> dict[str, Any]:
    """Return the options that were given (neither None nor False) as overrides of one section of the configuration."""
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    table = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return {section: table} if table else {}
