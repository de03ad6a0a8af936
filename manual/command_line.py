"""The reference of the command line, from its options as typer knows them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, TypeGuard

import typer

from koopmon import errors
from koopmon.cli import app
from koopmon.errors import KoopmonError
from manual.cells import cell

EXAMPLE = "Example: "
LEFT_OUT = ("--help", "--install-completion", "--show-completion")
VARIABLES = {
    "KOOPMON_ENDPOINT": "Where the monitor is, for an agent; `koopmon run` sets it for the job",
    "KOOPMON_RUN": "The run's name; absent: the script's and 8 hex digits",
    "KOOPMON_CONFIG": "The configuration file, where no `--config` names one",
    "KOOPMON_KEYS": "The directory of the key files, where neither `--keys` nor `[security] keys` names one",
    "KOOPMON_HTTP_TOKEN": "The bearer token that opens the monitor's pages, in place of `[http] token_file`",
    "KOOPMON_HTTP_PASSWORD": "The password that opens them, in place of `[http] password_file`",
    "KOOPMON_GRAFANA_URL": "Grafana's address for `koopmon grafana push`, in place of `--url` and `[grafana] url`",
    "KOOPMON_GRAFANA_TOKEN": "The token of a service account there, in place of `[grafana] token_file`",
    "XDG_STATE_HOME": "Histories are in `koopmon` below it; absent: `~/.local/state`",
    "XDG_CONFIG_HOME": "Key files are in `koopmon/keys` below it; absent: `~/.config`",
}
STATUSES = {
    0: "Success. Of `koopmon monitor` also the end by SIGTERM or SIGINT, with everything recorded.",
    2: "An option or argument that the verb does not know or allow.",
    130: "Ctrl-C, in every verb but `run` and `monitor`.",
    141: "The reader of the output left, as `head` does.",
}
"""Beside those of the errors."""


def verbs(command: Any = None, name: str = "koopmon") -> Iterator[tuple[str, Any]]:
    """Every verb and group as (its words, its command), depth first in the order of `koopmon --help`."""
    command = typer.main.get_command(app) if command is None else command
    yield name, command
    for child, below in getattr(command, "commands", {}).items():
        yield from verbs(below, f"{name} {child}")


def example(command: Any) -> str:
    """The example that the verb's help ends with; empty when it has none."""
    epilog = command.epilog or ""
    return epilog.removeprefix(EXAMPLE) if epilog.startswith(EXAMPLE) else ""


def page() -> str:
    """The whole page, Markdown."""
    parts = [
        "# Command line",
        "",
        "Every verb says the same with `--help`. Results are on standard output, koopmon's own words on standard error;"
        " a mistake is one line, without a traceback, before anything is done.",
        "",
    ]
    for name, command in verbs():
        parts += _verb(name, command) if name != "koopmon" else []
    return "\n".join([*parts, *_statuses(), *_variables()])


def _verb(name: str, command: Any) -> list[str]:
    shown = [parameter for parameter in command.params if not _hidden(parameter)]
    words = [name, *filter(None, map(_usage, shown))]
    if hasattr(command, "commands"):
        words.append("[VERB...]" if command.invoke_without_command else "VERB...")
    lines = [f"{'#' * len(name.split())} {name}", "", "```text", " ".join(words), "```", ""]
    lines += [_prose(command.help or ""), ""]
    if shown:
        lines += ["| option | what | default |", "|---|---|---|", *map(_row, shown), ""]
    if example(command):
        lines += ["```sh", example(command), "```", ""]
    return lines


def _hidden(parameter: Any) -> bool:
    return bool(getattr(parameter, "hidden", False)) or any(option in LEFT_OUT for option in parameter.opts)


def _usage(parameter: Any) -> str:
    if parameter.param_type_name != "argument":
        return f"{parameter.opts[-1]} {parameter.metavar}" if parameter.required else ""
    named = str(parameter.metavar or parameter.name.upper())
    return named if parameter.required or named.startswith("[") else f"[{named}]"


def _row(parameter: Any) -> str:
    named = parameter.metavar or ("" if getattr(parameter, "is_flag", False) else parameter.name.upper())
    left = f"`{named}`" if parameter.param_type_name == "argument" else _option(parameter.opts, named)
    text = (parameter.help or "").strip()
    if parameter.envvar:
        names = [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar
        text += f" Environment: {', '.join(f'`{each}`' for each in names)}."
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if low is not None:
        text += f" At least {low:g}." if high is None else f" {low:g} to {high:g}."
    return f"| {cell(left)} | {cell(text.strip())} | {_default(parameter)} |"


def _option(names: list[str], value: str) -> str:
    return " ".join(f"`{name}`" for name in names) + (f" `{value}`" if value else "")


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    return "" if value is None or value is False or callable(value) else f"`{value}`"


def _prose(text: str) -> str:
    """Help as Markdown: each paragraph one line, and a star no emphasis."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()).replace("*", "\\*") for paragraph in paragraphs)


def _statuses() -> list[str]:
    said: dict[int, list[str]] = {status: [text] for status, text in STATUSES.items()}
    for error in filter(_is_error, vars(errors).values()):
        summary = (error.__doc__ or "").strip().split("\n")[0]
        said.setdefault(error.exit_status, []).append(f"`{error.__name__}`: {summary}")
    return [
        "## Exit statuses",
        "",
        "`koopmon run` returns the job's own, or 128 + n when signal n ended it; 126 and 127 as a shell does, when the"
        " job cannot be started; 2 when it refuses its command line. `koopmon adapters check` and `koopmon demo` return"
        " 1 when a check failed or the training was not saved, `koopmon doctor` 3 when it found something. Else:",
        "",
        "| status | when |",
        "|---|---|",
        *(f"| {status} | {cell('<br>'.join(texts))} |" for status, texts in sorted(said.items())),
        "",
    ]


def _is_error(value: object) -> TypeGuard[type[KoopmonError]]:
    return inspect.isclass(value) and issubclass(value, KoopmonError)


def _variables() -> list[str]:
    rows = [f"| `{name}` | {text} |" for name, text in VARIABLES.items()]
    return ["## Environment", "", "| variable | what |", "|---|---|", *rows, ""]
