"""Output of the commands: results go to standard output, koopmon's own messages to standard error."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Literal

from koopmon.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console

Verbosity = Literal["quiet", "normal", "verbose"]
_LEVELS = {"quiet": logging.WARNING, "verbose": logging.DEBUG}
MAX_LINE = 10_000
"""Largest number of characters of a message."""
_verbosity: Verbosity = "normal"


def set_verbosity(verbosity: Verbosity) -> None:
    """Set the amount of output of this process: "quiet" has no messages, "verbose" the whole log."""
    global _verbosity
    _verbosity = verbosity
    if verbosity == "verbose":
        configure_logging()


def is_quiet() -> bool:
    return _verbosity == "quiet"


def say(text: str) -> None:
    """Print a message about the progress: one line with the prefix `koopmon:` on standard error."""
    if _verbosity != "quiet":
        warn(text)


def warn(text: str) -> None:
    """Print a warning or an error, which `koopmon -q` prints too. A closed standard error is ignored.

    The text may quote a peer or a file: it is made one printable line.
    """
    if sys.stderr is None:
        return  # print() would write to standard output, which belongs to the job
    try:
        print(f"koopmon: {one_line(text, MAX_LINE)}", file=sys.stderr, flush=True)  # noqa: T201 - standard error of the command line
    except (OSError, ValueError):
        return


def print_json(result: object) -> None:
    """Print a result on standard output as one line of JSON. It may contain dataclasses and structs."""
    # Imported late, as rich is below, because every verb imports this file.
    import json

    import msgspec

    print(json.dumps(result, default=msgspec.to_builtins))  # noqa: T201 - standard output of the command line


def results(width: int = 120) -> Console:
    """Return a console on standard output. Without a terminal rich assumes 80 columns and would fold tables."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, highlight=False, markup=False)


def configure_logging(level: int = logging.INFO) -> None:
    """Send the log from `level` on to standard error; -q and -v of the command line replace the level.

    Only the command line does this; a library leaves logging to its user.
    """
    logging.basicConfig(
        level=_LEVELS.get(_verbosity, level),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
