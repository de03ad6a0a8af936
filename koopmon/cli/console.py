"""What koopmon itself says: on standard error, since standard output belongs to results and to the guarded job."""

from __future__ import annotations

import logging
import sys


def say(text: str) -> None:
    """One line on standard error, with koopmon's name before it. A closed standard error is no reason to fail."""
    try:
        print(f"koopmon: {text}", file=sys.stderr, flush=True)  # noqa: T201 - this is the command line's voice
    except (OSError, ValueError):
        return


def configure_logging(level: int = logging.INFO) -> None:
    """Send the log to standard error. Only the command line does this: a library leaves logging to its user."""
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
