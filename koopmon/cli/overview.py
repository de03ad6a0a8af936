"""The help of `koopmon` itself, without the import of an option parser, which takes longer than all else."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping

HELP = "Detect training divergence early, in the spectrum of the residual stream, and prevent it."
EPILOG = "Example: koopmon run -- torchrun --nproc-per-node 2 train.py"
OPTIONS = {
    "-q, --quiet": "Print results, warnings and errors only.",
    "-v, --verbose": "Print koopmon's whole log too.",
    "--version": "Print the version and exit.",
    "--install-completion": "Install completion for the current shell.",
    "--show-completion": "Show completion for the current shell, to copy it or customize the installation.",
    "-h, --help": "Show this message and exit.",
}
MAX_WIDTH, MIN_WIDTH = 80, 50


def overview(verbs: Mapping[str, str]) -> str:
    """Return the text that typer prints for `koopmon --help`; `verbs` has one sentence for each verb."""
    width = max(min(shutil.get_terminal_size().columns, MAX_WIDTH) - 2, MIN_WIDTH)
    lines = ["Usage: koopmon [OPTIONS] COMMAND [ARGS]...", "", *_wrapped(HELP, width), ""]
    for title, rows in (("Options:", OPTIONS), ("Commands:", verbs)):
        lines += [title, *_columns(rows.items(), width), ""]
    return "\n".join([*lines, *_wrapped(EPILOG, width)])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ")


def _columns(rows: Iterable[tuple[str, str]], width: int) -> Iterator[str]:
    known = list(rows)
    indent = max(len(name) for name, _ in known) + 4
    for name, text in known:
        first, *others = textwrap.wrap(text, width - indent)
        yield f"  {name}".ljust(indent) + first
        yield from (" " * indent + other for other in others)
