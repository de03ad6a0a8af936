"""Names of trainings that run at the same time under one name, such as two scripts in one `koopmon run`.

The first one has the name, and each further one a number behind it. A lock on one byte of a file stands for each: the
system frees it at the end of the process, and a forked child does not have it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from koopmon.logs import log_for_job
from koopmon.run_names import file_name, stack_run_name

logger = logging.getLogger("koopmon.agent")

MAX_TRAININGS = 64
"""Trainings at the same time under one name. Those beyond share it."""
SUFFIX = ".trainings"
"""End of the names of the files. `koopmon run` removes them at the end of the job."""
_files: dict[Path, int] = {}
"""Descriptors of the files. They stay open: the locks of a process end when it closes one of them."""
_told: set[str] = set()


def claim(directory: str, run: str) -> str:
    """Return the name for a training of this process in the job `run`, and log one line if it has a number.

    `directory` has the files. Where they cannot be written the name is `run`.
    """
    path = Path(directory, f"{file_name(run)}{SUFFIX}")
    try:
        if path not in _files:
            _files[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        number = next((each for each in range(MAX_TRAININGS) if _lock(_files[path], each)), 0)
    except OSError:
        return run
    if number == 0:
        return run
    name = stack_run_name(run, str(number + 1))
    if name not in _told:
        _told.add(name)
        log_for_job(logger, f"another training of run {run} goes on beside this one, which is run {name}")
    return name


def _lock(file: int, byte: int) -> bool:
    """Return True if this process has the byte."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        return False
    return True
