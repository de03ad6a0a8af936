"""Exclusive use of a file by one process: an advisory lock file beside it.

The operating system releases the lock when the process ends, also after a crash.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from koopmon.errors import StoreError


def take_lock(path: Path) -> IO[str]:
    """Hold the lock file `path`.lock until it is closed.

    Raises StoreError if another process holds it, OSError as open() does.
    """
    lock = open(path.with_name(path.name + ".lock"), "a+", encoding="ascii")  # noqa: SIM115 - the caller holds it open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise StoreError(f"store {path}: in use by another monitor (pid {owner}): choose another file") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock
