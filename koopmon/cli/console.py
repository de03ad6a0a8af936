"""koopmon's own messages go to standard error, because standard output is for results and the guarded job."""

from __future__ import annotations

import logging
import sys


def say(text: str) -> None:
    """Print one line with the prefix `koopmon:` on standard error. A closed standard error is ignored."""
    try:
        print(f"koopmon: {text}", file=sys.stderr, flush=True)  # noqa: T201 - standard error of the command line
    except (OSError, ValueError):
        return


def configure_logging(level: int = logging.INFO) -> None:
    """Send the log to standard error. Only the command line does this; a library leaves logging to its user."""
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
