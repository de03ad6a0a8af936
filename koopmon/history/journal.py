"""A history file open for writing: lock, transaction, and recovery from disk errors.

Writes gather in a transaction that `commit` closes. A full or read-only disk pauses recording, with one log line, until
a retry succeeds. After `open`, nothing here raises. While recording is paused, decisions and their acks wait in memory.
They are written first after the pause.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeVar, cast

import msgspec

from koopmon.config import StoreConfig
from koopmon.errors import StoreError, one_line
from koopmon.files import is_still_there
from koopmon.history.database import (
    is_damage,
    lock_file,
    name_owner,
    open_database,
    release_lock,
    set_aside,
    take_lock,
)
from koopmon.history.launches import Launches
from koopmon.history.retention import Retention
from koopmon.history.schema import SCHEMA_VERSION, SQLITE_ERRORS

logger = logging.getLogger(__name__)

LEAST_PAGE_BYTES = 512
"""Size of the smallest page of SQLite: a shorter file is none of its own."""
MAX_BACKLOG = 10_000
"""Maximum number of decisions and acks in memory while recording is paused; above it the oldest are dropped."""
MIN_FREE_BYTES = 4 << 20
"""Free bytes that a paused store requires before it retries. Without this margin it would pause again after a few rows.
"""
RECORD_ERRORS = (
    *(sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError),
    *(ArithmeticError, LookupError, TypeError, ValueError, msgspec.MsgspecError),
)
"""Errors caused by one record: a conflict with other records, or a value that SQLite or JSON cannot store."""
UPKEEP_SECONDS = 60.0
BUSY_UPKEEP_SECONDS = 1.0
F = TypeVar("F", bound=Callable[..., None])


def records(*, commit: bool = False, remember: Callable[..., None] | None = None) -> Callable[[F], F]:
    """Decorator for methods that write.

    With `commit`, the record is on disk when the method returns, or waits in memory while recording is paused.
    `remember` is the method of `Launches` that keeps it for later hellos.
    """

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def write(self: Journal, /, *args: Any, **kwargs: Any) -> None:
            if remember is not None:
                remember(self.launches, *args, **kwargs)
            self._write(functools.partial(method, self, *args, **kwargs), must=commit)

        return cast(F, write)

    return decorate


@dataclass(eq=False)
class Journal:
    """The only writer of a history file; `recording` is False while disk errors pause it."""

    _path: Path
    _database: sqlite3.Connection
    _lock: IO[bytes]
    _config: StoreConfig
    _clock: Callable[[], float]
    _wall: Callable[[], float]

    def __post_init__(self) -> None:
        self._ids: dict[tuple[str, str], int] = {}
        self._backlog: deque[Callable[[], None]] = deque()
        self._lost = self._told = 0
        self._paused_at: float | None = None
        self._still_paused = ""
        """Last reason in the log why a retry failed."""
        self._left_out_at = -math.inf
        self._damaged = False
        # Retention uses this clock and does not read the calendar again, because the calendar time may jump.
        self._epoch = self._wall() - self._clock()
        self._upkeep_at = self._clock() + BUSY_UPKEEP_SECONDS
        self._use(self._database)
        self.launches = Launches.read(self._database)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: StoreConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> Self:
        """Open for writing; create the file if missing and rename a damaged store.

        Raises StoreError for an unusable path, a file that another process uses, a newer schema, and a file that is not
        a store.
        """
        path = Path(path).resolve()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = take_lock(path)
        except OSError as error:
            raise StoreError(f"store {path}: {error.strerror}: choose another place with --store") from None
        try:
            return cls(path, open_database(path), lock, config or StoreConfig(), clock, wall)
        except BaseException:
            release_lock(path, lock)
            raise

    @property
    def recording(self) -> bool:
        return self._paused_at is None

    def served_at(self, page: str) -> None:
        """Tell other monitors that want this file the address of the page of this one."""
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a lock that is closed
            name_owner(self._lock, page)

    def take_lost(self) -> int:
        """Return the number of records lost since the last call."""
        # Another thread may count at the same time.
        lost = self._lost - self._told
        self._told += lost
        return lost

    def close(self) -> None:
        """Commit the open transaction and merge the write-ahead log into the file. Idempotent."""
        if self._lock.closed:
            return
        self._try_again(now=True)
        if self._backlog:
            logger.error("store: %d decisions and answers could not be written", len(self._backlog))
        self._commit()
        try:
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except SQLITE_ERRORS as error:
            logger.warning("store: the last checkpoint failed: %s", one_line(error))
        self._database.close()
        release_lock(self._path, self._lock)

    def commit(self) -> None:
        """Commit all records so far, so that they survive the process."""
        self._commit()

    def _commit(self) -> None:
        try:
            if self._database.in_transaction:
                self._database.execute("COMMIT")
        except SQLITE_ERRORS as error:
            self._pause(error)

    def upkeep(self, live: Collection[str]) -> None:
        """Retry while paused, and prune. Call it about once a second; `live` names the runs in progress."""
        self._try_again()
        now = self._clock()
        if self.recording and self._moved():
            self._pause(sqlite3.OperationalError(f"{self._path} was moved or removed"), damaged=True)
            self._try_again(now=True)
        elif self.recording and self._emptied():
            self._pause(sqlite3.OperationalError(f"{self._path} was emptied"), damaged=True)
            self._try_again(now=True)
        elif self.recording and self._log_removed():
            self._reopen()
        if not self.recording or now < self._upkeep_at:
            return
        was_stuck, more = self._retention.stuck, False
        try:
            self._begin()
            more = self._retention.prune(self._epoch + now, live)
            self._database.execute("COMMIT")
            more = self._retention.shrink() or more
        except SQLITE_ERRORS as error:
            self._pause(error)
        if self._retention.forgotten:
            self._ids.clear()
            self._retention.forgotten = False
        if self._retention.stuck and not was_stuck:
            logger.warning("store: larger than [store] max_bytes, with decisions alone: nothing more is deleted")
        self._upkeep_at = now + (BUSY_UPKEEP_SECONDS if more else UPKEEP_SECONDS)

    def _use(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._retention = Retention(database, self._config)
        # SQLite creates its log with the first write.
        self._inode = os.stat(self._path).st_ino
        self._log_inode: int | None = None
        self._ids.clear()

    def _moved(self) -> bool:
        try:
            return os.stat(self._path).st_ino != self._inode
        except OSError:
            return True

    def _emptied(self) -> bool:
        """Return True if another program has cut the file. Its size is enough: to open and close the file here would
        release SQLite's locks on it.
        """
        try:
            return os.stat(self._path).st_size < LEAST_PAGE_BYTES
        except OSError:
            return False

    def _log_removed(self) -> bool:
        """Return True if SQLite's log was removed or replaced while it is open: its rows would be lost."""
        try:
            found = os.stat(f"{self._path}-wal").st_ino
        except OSError:
            return self._log_inode is not None
        if self._log_inode is None:
            self._log_inode = found
        return found != self._log_inode

    def _reopen(self) -> None:
        """Merge the removed log, which is still open, into the file, and open the file again."""
        logger.error("store %s: its log (-wal) was removed while open: merged into the file", self._path)
        try:
            self._commit()
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._database.close()
            self._use(open_database(self._path))
        except (*SQLITE_ERRORS, OSError, StoreError) as error:
            self._pause(error, damaged=True)

    def _begin(self) -> None:
        if not self._database.in_transaction:
            self._database.execute("BEGIN IMMEDIATE")

    def _write(self, entry: functools.partial[None], *, must: bool) -> None:
        self._try_again()
        if self.recording:
            try:
                self._begin()
                self._apply(entry)
                if must:
                    self._database.execute("COMMIT")
            except SQLITE_ERRORS as error:
                self._pause(error)
            else:
                return
        if must:
            self._backlog.append(entry)
        if not must or len(self._backlog) > MAX_BACKLOG:
            self._lost += 1
        if len(self._backlog) > MAX_BACKLOG:
            self._backlog.popleft()

    def _apply(self, entry: Callable[[], None]) -> None:
        try:
            entry()
        except UnicodeDecodeError:  # the file is damaged: see SQLITE_ERRORS
            raise
        except RECORD_ERRORS as error:
            # The record caused the error, not the disk: a retry would fail again and delay all other records.
            self._lost += 1
            now = self._clock()
            if now - self._left_out_at >= UPKEEP_SECONDS:
                self._left_out_at = now
                logger.error("store: a record that cannot be written is left out", exc_info=error)

    def _pause(self, error: Exception, *, damaged: bool = False) -> None:
        if self._paused_at is None:
            logger.error(
                "store: recording paused, monitoring goes on: %s; next try in %.0f s",
                one_line(error),
                self._config.retry_seconds,
            )
        self._paused_at = self._clock()
        self._damaged = self._damaged or damaged or is_damage(error)
        self._ids.clear()
        try:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
        except SQLITE_ERRORS as failure:
            logger.debug("store: rollback failed: %s", failure)

    def _try_again(self, *, now: bool = False) -> None:
        """While paused: write the waiting records when a retry is due, and resume recording if that succeeds."""
        if self._paused_at is None or not (now or self._clock() - self._paused_at >= self._config.retry_seconds):
            return
        self._paused_at = self._clock()
        try:
            # Another program may replace the file during the pause too.
            self._damaged = self._damaged or self._moved() or self._emptied()
            if self._damaged:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            room = os.statvfs(self._path.parent)
            if room.f_bavail * room.f_frsize < MIN_FREE_BYTES and not now:
                return
            if self._damaged:
                self._start_over()
            self._begin()
            # Write even when no record waits, to detect a disk that rejects writes.
            self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            for entry in self._backlog:
                self._apply(entry)
            self._database.execute("COMMIT")
        except SQLITE_ERRORS as error:
            self._pause(error)
        except (OSError, StoreError) as error:
            if (reason := one_line(error)) != self._still_paused:
                self._still_paused = reason
                logger.error("store: still paused: %s", reason)
        else:
            self._backlog.clear()
            self._paused_at, self._still_paused = None, ""
            logger.warning("store: recording again")

    def _start_over(self) -> None:
        """Rename a file that was damaged or deleted while open, and create a new one. Raises OSError, StoreError."""
        self._database.close()
        if not is_still_there(lock_file(self._path), self._lock):  # removed with the directory
            lock = take_lock(self._path)  # raises while another monitor holds it
            self._lock.close()
            self._lock = lock
        if not self._moved():
            kept = set_aside(self._path)
            logger.error("store %s: damaged: kept as %s, a new one is begun", self._path, kept.name)
        self._use(open_database(self._path))
        self._damaged = False
