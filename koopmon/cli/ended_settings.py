"""The settings in force of a training that left in order although its job failed, or got a signal to end.

A script may catch its exception and exit with a status, or write a checkpoint at SIGTERM and exit with 0. To the agent
that is the end of the training, and it sets the settings aside (`koopmon/agent/control/kept_settings.py`). One that
ends by `os._exit(0)` sets nothing aside, although it has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from koopmon.files import open_regular
from koopmon.run_names import file_name

MAX_BYTES = 4096
"""Largest size of such a file."""
ENDS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})


def run_with_settings(directory: str | None, name: str | None, run: Callable[[set[signal.Signals]], int]) -> int:
    """Return the exit status of `run`, which adds the signals that the job got to its argument.

    If the job failed or got a signal to end, its next launch of the run `name`, and of its further models, begins with
    the settings of this one. `directory` has the files.
    """
    received: set[signal.Signals] = set()
    status = run(received)
    if directory is None or name is None:
        return status
    if status or received & ENDS:
        for ended in _files(directory, name, "ended"):
            with contextlib.suppress(OSError):
                ended.replace(ended.with_suffix(".settings"))
    else:
        for kept in _files(directory, name, "settings"):
            # The status of a shell, or of a pipeline, is not that of the training.
            if _writers_parent(kept) == os.getpid():
                with contextlib.suppress(OSError):
                    kept.unlink()
    for claims in _files(directory, name, "trainings"):  # of `koopmon.agent.run_claims`
        with contextlib.suppress(OSError):
            claims.unlink()
    return status


def _files(directory: str, name: str, suffix: str) -> list[Path]:
    """Return the files of the run `name`, and of its further models."""
    return [each for each in Path(directory).glob(f"*.{suffix}") if each.name.startswith(f"{file_name(name)}.")]


def _writers_parent(kept: Path) -> int | None:
    """Return the process that started the training which wrote this file; None if unknown."""
    try:
        with open_regular(kept) as file:
            return int(json.loads(file.read(MAX_BYTES))["writer"][2])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
