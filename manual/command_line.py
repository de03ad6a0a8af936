"""Command line reference, generated from the options of typer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, TypeGuard

import typer

from koopmon import errors
from koopmon.cli.app import make_app
from koopmon.errors import KoopmonError
from manual.cells import cell

EXAMPLE = "Example: "
LEFT_OUT = ("--help", "--install-completion", "--show-completion")
VARIABLES = {
    "KOOPMON_ENDPOINT": "Endpoint of the monitor for an agent; `koopmon run` sets it for the job",
    "KOOPMON_RUN": "Name of the run. Absent: the script's name and 8 hex digits",
    "KOOPMON_TABLE__KEY": "Value of `[table] key` in the configuration, as KOOPMON_MODEL__STACK; an option replaces it",
    "KOOPMON_NOTICES": "Lines of rank 0 on standard error: `all`, `changes` without the closing line, or `none`",
    "KOOPMON_CONFIG": "Configuration file if `--config` is absent",
    "KOOPMON_KEYS": "Directory of the key files if `--keys` and `[security] keys` are absent",
    "KOOPMON_HTTP_TOKEN": "Bearer token for the monitor's pages, instead of `[http] token_file`",
    "KOOPMON_HTTP_PASSWORD": "Password for the monitor's pages, instead of `[http] password_file`",
    "KOOPMON_GRAFANA_URL": "Address of Grafana for `koopmon grafana push`, instead of `--url` and `[grafana] url`",
    "KOOPMON_GRAFANA_TOKEN": "Token of a service account of Grafana, instead of `[grafana] token_file`",
    "KOOPMON_NOTIFY_WEBHOOK": "Address of a webhook without `url` and `url_file` in `[[notify.webhooks]]`",
    "KOOPMON_NOTIFY_PASSWORD": "Password at the mail server, instead of `password_file` in `[[notify.mail]]`",
    "XDG_STATE_HOME": "Parent directory of `koopmon`, which has the histories. Absent: `~/.local/state`",
    "XDG_CONFIG_HOME": "Parent directory of `koopmon/keys`, which has the key files. Absent: `~/.config`",
}
STATUSES = {
    0: "Success. For `koopmon monitor` also the end by SIGTERM or SIGINT, after it has recorded everything.",
    2: "Unknown option or argument, or one that the verb does not allow.",
    70: "`koopmon run --allow-stop` ended the job, because its training was ruined.",
    130: "Ctrl-C, in every verb except `run` and `monitor`; also the end of the input at a question.",
    141: "The reader of the output closed the pipe, as `head` does.",
}
"""Exit statuses beside those of the exceptions."""


def verbs(command: Any = None, name: str = "koopmon") -> Iterator[tuple[str, Any]]:
    """Return every verb and group as (words, command), depth first in the order of `koopmon --help`."""
    command = typer.main.get_command(make_app()) if command is None else command
    yield name, command
    for child, below in getattr(command, "commands", {}).items():
        yield from verbs(below, f"{name} {child}")


def example(command: Any) -> str:
    """Return the example at the end of the verb's help; empty if it has none."""
    epilog = command.epilog or ""
    return epilog.removeprefix(EXAMPLE) if epilog.startswith(EXAMPLE) else ""


def page() -> str:
    """Return the page as Markdown."""
    parts = [
        "# Command line",
        "",
        "`--help` prints the text of each verb. Results go to standard output, messages to standard error. A mistake on"
        " the command line ends the verb with one line and without a traceback, before any action.",
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
        lines += ["| option | description | default |", "|---|---|---|", *map(_row, shown), ""]
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
    """Convert help to Markdown with one line per paragraph and escaped stars."""
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
        "`koopmon run` returns the status of the job, or 128 + n after signal n. It returns 126 or 127, as a shell"
        " does, if the job cannot start, and 2 if it refuses its command line. `koopmon adapters check` returns 1 if a"
        " check failed, `koopmon demo` 1 if the training was not saved, and `koopmon doctor` 3 if a check failed. The"
        " other statuses are:",
        "",
        "| status | condition |",
        "|---|---|",
        *(f"| {status} | {cell('<br>'.join(texts))} |" for status, texts in sorted(said.items())),
        "",
    ]


def _is_error(value: object) -> TypeGuard[type[KoopmonError]]:
    return inspect.isclass(value) and issubclass(value, KoopmonError)


def _variables() -> list[str]:
    rows = [f"| `{name}` | {text} |" for name, text in VARIABLES.items()]
    return ["## Environment", "", "| variable | meaning |", "|---|---|", *rows, ""]
