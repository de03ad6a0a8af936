"""A history file open for writing: its lock, its transaction, and what happens when the disk fails.

Writes gather in a transaction that `commit` closes. A disk that is full or read-only pauses recording, with one log
line, until a later try succeeds: nothing here raises after `open`.
"""

from __future__ import annotations

import functools
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, Self, TypeAlias, TypeVar

from koopmon.errors import StoreError
from koopmon.monitor.lock import take_lock
from koopmon.monitor.schema import prepare

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
P = ParamSpec("P")
J = TypeVar("J", bound="Journal")
Write: TypeAlias = Callable[Concatenate[J, P], None]


def records(*, commit: bool = False) -> Callable[[Write[J, P]], Write[J, P]]:
    """A method that writes: skipped while recording is paused, and pausing it when SQLite fails."""

    def decorate(method: Write[J, P]) -> Write[J, P]:
        @functools.wraps(method)
        def write(self: J, /, *args: P.args, **kwargs: P.kwargs) -> None:
            if not self._ready_to_write():
                return
            try:
                if not self._database.in_transaction:
                    self._database.execute("BEGIN IMMEDIATE")
                method(self, *args, **kwargs)
                if commit or self._paused_at is not None:
                    self._database.execute("COMMIT")
            except sqlite3.Error as error:
                self._pause(error)
            else:
                self._resumed()

        return write

    return decorate


class Journal:
    """The one writer of a history file; `recording` is False while a failing disk pauses it."""

    def __init__(self, database: sqlite3.Connection, lock: IO[str], clock: Callable[[], float]) -> None:
        self._database = database
        self._lock = lock
        self._clock = clock
        self._ids: dict[tuple[str, str], int] = {}
        self._paused_at: float | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.monotonic) -> Self:
        """Open for writing, made when missing. Raises StoreError: in use elsewhere, unknown schema, unusable path."""
        path = Path(path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = take_lock(path)
        except OSError as error:
            raise StoreError(f"store {path}: {error.strerror}: choose another place with --store") from None
        try:
            database = sqlite3.connect(path, timeout=2.0, isolation_level=None)
            prepare(database, path)
        except sqlite3.Error as error:
            lock.close()
            raise StoreError(f"store {path}: {error}: choose another file with --store") from None
        except BaseException:
            lock.close()
            raise
        return cls(database, lock, clock)

    @property
    def recording(self) -> bool:
        return self._paused_at is None

    def close(self) -> None:
        """Commit what is open and hand the file over whole: the write-ahead log is folded in. Idempotent."""
        if self._lock.closed:
            return
        self.commit()
        try:
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            logger.warning("store: the last checkpoint failed: %s", error)
        self._database.close()
        self._lock.close()

    def commit(self) -> None:
        """Make everything recorded so far survive the process."""
        if self._database.in_transaction:
            try:
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                self._pause(error)

    def _read(self, query: str, *values: str) -> list[Any]:
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            logger.warning("store: cannot be read: %s", error)
            return []

    def _ready_to_write(self) -> bool:
        return self._paused_at is None or self._clock() - self._paused_at >= RETRY_SECONDS

    def _pause(self, error: sqlite3.Error) -> None:
        if self._paused_at is None:
            logger.error("store: recording paused, monitoring goes on: %s; next try in %.0f s", error, RETRY_SECONDS)
        self._paused_at = self._clock()
        self._ids.clear()
        try:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
        except sqlite3.Error as failure:
            logger.debug("store: rollback failed: %s", failure)

    def _resumed(self) -> None:
        if self._paused_at is not None:
            self._paused_at = None
            logger.warning("store: recording again")
