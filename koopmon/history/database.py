"""Open the history file for writing, for this process alone.

A damaged store is renamed. It is never written to or overwritten.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import sqlite3
import stat
import struct
from pathlib import Path
from typing import IO

from koopmon.errors import StoreError, one_line
from koopmon.files import is_locked, locked, open_private
from koopmon.history.schema import APPLICATION_ID, SQLITE_ERRORS, prepare

logger = logging.getLogger(__name__)

MAGIC = b"SQLite format 3\0"
SIGNATURE = b"CREATE TABLE incarnations"
"""Bytes in the first pages of every store. They identify a store with a damaged header."""
HEAD_BYTES = 1 << 16
COMPANIONS = ("-wal", "-shm")
CLAIMED_BYTE = 1 << 62
"""Position of the byte that a monitor locks. SQLite locks the bytes from 1 << 30 on."""
BUSY_SECONDS = 5.0
"""Longest wait for another process that holds the file's write lock, such as a backup."""


class DamageError(sqlite3.DatabaseError):
    """SQLite's integrity check failed."""


def take_lock(path: Path) -> IO[bytes]:
    """Hold the lock file `path`.lock until it is closed. The system releases it when the process ends, also in a crash.

    `path` is free of symbolic links, so that one file has one lock. Raises StoreError if another process holds the
    lock, or if the file has a second name (a hard link), which would have a lock and a log of its own. Raises OSError
    as `open_private` does.
    """
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            raise StoreError(f"store {path}: has a second name (a hard link): remove one, or choose another file")
    place = lock_file(path)
    try:
        lock = locked(place)
    except BlockingIOError:
        owner, _, page = place.read_text(encoding="utf-8", errors="replace").partition("\n")
        where = f", its page is {one_line(page.strip(), 200)}" if page.strip() else ""
        owner = one_line(owner, 20) or "unknown"
        raise StoreError(f"store {path}: in use by another monitor (pid {owner}){where}: choose another file") from None
    name_owner(lock)
    return lock


def name_owner(lock: IO[bytes], page: str = "") -> None:
    """Write the process id of this monitor and the address of its `page` into the lock file, for others that start."""
    lock.seek(0)
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n{page}\n".encode())
    lock.flush()


def release_lock(path: Path, lock: IO[bytes]) -> None:
    """Remove the lock file of the store `path`, and then release it: a store at rest is one file."""
    with contextlib.suppress(OSError):
        lock_file(path).unlink(missing_ok=True)
    lock.close()


def lock_file(path: Path) -> Path:
    """Return the path of the lock file of the store `path`."""
    return path.with_name(f"{path.name}.lock")


def is_held(path: Path) -> bool:
    """Return True if a monitor has the store at `path` open for writing. Raises OSError."""
    return is_locked(lock_file(path))


def open_database(path: Path) -> sqlite3.Connection:
    """Open the store at `path`; create it if missing, migrate it to this schema, and check its integrity.

    A damaged store is renamed with a log line, and a new one is created. Raises StoreError for a newer schema, for a
    file that is not a koopmon store, and if no file can be created.
    """
    try:
        try:
            return _opened(path)
        except SQLITE_ERRORS as error:
            if not is_damage(error) or not _ours(path):
                raise
            kept = set_aside(path)
            logger.error("store %s: damaged (%s): kept as %s, a new one is begun", path, one_line(error), kept.name)
            return _opened(path)
    except SQLITE_ERRORS as error:
        raise StoreError(f"store {path}: {one_line(error)}: choose another file with --store") from None
    except OSError as error:
        raise StoreError(f"store {path}: {error.strerror}: choose another file with --store") from None


def is_damage(error: BaseException) -> bool:
    """Return True if the content of the file caused `error`, False for errors of the disk or of a lock."""
    code = getattr(error, "sqlite_errorcode", None)
    damaged = code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return damaged or isinstance(error, (DamageError, UnicodeDecodeError))


def set_aside(path: Path) -> Path:
    """Rename the file and SQLite's companion files. Returns the new name. Raises OSError."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    kept, count = path.with_name(f"{path.name}.damaged-{stamp}"), 1
    while kept.exists():
        kept, count = path.with_name(f"{path.name}.damaged-{stamp}-{count}"), count + 1
    for suffix in ("", *COMPANIONS):
        if (old := path.with_name(path.name + suffix)).exists():
            old.rename(kept.with_name(kept.name + suffix))
    return kept


def _opened(path: Path) -> sqlite3.Connection:
    _check_beginning(path)
    if not path.exists():
        open_private(path).close()  # SQLite gives its log the mode of the file
    claim = claim_file(path)
    try:
        # The thread that opens the store is not the one that writes it; only one of them uses it at a time.
        database = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, factory=_ClaimedConnection
        )
    except BaseException:
        os.close(claim)
        raise
    database.claim = claim
    try:
        # Check before the first write, so that a damaged file is kept unchanged.
        found = database.execute("PRAGMA quick_check(1)").fetchone()
        if found != ("ok",):
            raise DamageError(str(found[0]).rstrip().splitlines()[-1])
        prepare(database, path)
    except BaseException:
        database.close()
        raise
    return database


class _ClaimedConnection(sqlite3.Connection):
    """A connection to a file that no other monitor has open."""

    claim: int | None = None
    """Descriptor of the file. It is closed last: the locks of SQLite end when the process closes any descriptor."""

    def close(self) -> None:
        super().close()
        claim, self.claim = self.claim, None
        if claim is not None:
            os.close(claim)


def claim_file(path: Path) -> int:
    """Return a descriptor that locks the file `path` under all of its names, until it is closed.

    A file may be mounted elsewhere, or moved behind a link while it is open: `take_lock` then locks another name. The
    lock is one byte far behind those of SQLite. It belongs to the descriptor, so that SQLite cannot release it. Raises
    StoreError if another process has the file.
    """
    number = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.fcntl(number, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, CLAIMED_BYTE, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(number)
            raise StoreError(
                f"store {path}: in use by another monitor under another name: choose another file"
            ) from None
        logger.debug("store %s: the file system has no locks: %s", path, error)
    return number


def _check_beginning(path: Path) -> None:
    """Raise DamageError for an empty file with a non-empty log, and OSError for a link, a pipe or a directory.

    SQLite treats the empty file as a new database and deletes the log, which may hold the only remaining data. The path
    had no link when the monitor started: a later one leads to a file that someone else chose.
    """
    log = path.with_name(path.name + "-wal")
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "a link or no regular file", str(path))
        if not status.st_size and log.exists() and log.stat().st_size > 0:
            raise DamageError("the file is empty, its log is not")


def _ours(path: Path) -> bool:
    """Return True if a file that SQLite cannot read was a koopmon store.

    A file of zeros counts as one: a power failure can leave such a file.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    marked = head.startswith(MAGIC) and head[68:72] == APPLICATION_ID.to_bytes(4, "big")
    return marked or SIGNATURE in head or not head.strip(b"\0")
