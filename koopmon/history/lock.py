"""One process at a time for a file: an advisory lock beside it, gone with the process however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from koopmon.errors import StoreError


def take_lock(path: Path) -> IO[str]:
    """Hold the file `path`.lock until it is closed. Raises StoreError when another process does, OSError as open()."""
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
