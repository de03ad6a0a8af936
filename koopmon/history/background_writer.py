"""A history that a thread of its own writes: the monitor's loop never waits for the disk."""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection

from koopmon.history.plain_profile import PlainProfile
from koopmon.history.writer import HistoryWriter
from koopmon.logs import LogLimit

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 64 << 20
"""Bytes of the records that wait for the disk; beyond half of it only decisions, acks and hellos are taken."""
RECORD_BYTES = 2048
"""Bytes of a record in memory without its profile, at least. Estimated by hand."""
FLUSH_SECONDS = 0.25
"""Longest wait for a decision, an ack or a hello to be on disk. SQLite writes one in a millisecond, to the cache."""
STALLED_SECONDS = 10.0
"""Time in seconds without an answer of the disk after which the history counts as not recording."""
CLOSE_SECONDS = 15.0
"""Longest time for the records that still wait at the end."""


class BackgroundWriter(HistoryWriter):
    """Takes records at once, and writes them in their order in a thread.

    Records that must be committed are on disk when their method returns, except while the disk is slow (`flush`).
    Records beyond MAX_WAITING_BYTES are dropped and counted, with a log line once a minute.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._changed = threading.Condition()
        self._entries: deque[tuple[functools.partial[None], bool, int]] = deque()
        self._waiting_bytes = 0
        self._added = 0
        self._done = 0
        self._is_behind = False
        self._commit_due = False
        self._upkeep_for: Collection[str] | None = None
        self._closing = False
        self._since = self._clock()
        self._dropped = 0
        self._log_limit = LogLimit()
        self._thread = threading.Thread(target=self._work, name="koopmon-history", daemon=True)
        self._thread.start()

    @property
    def recording(self) -> bool:
        """False while disk errors pause the history, and while the disk does not answer."""
        waiting = self._done < self._added and self._clock() - self._since > STALLED_SECONDS
        return super().recording and not waiting

    def take_lost(self) -> int:
        dropped, self._dropped = self._dropped, 0
        return super().take_lost() + dropped

    def commit(self) -> None:
        with self._changed:
            self._commit_due = True
            self._changed.notify_all()

    def upkeep(self, live: Collection[str]) -> None:
        with self._changed:
            self._upkeep_for = live
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until the records so far are on disk, for at most FLUSH_SECONDS.

        Once that was not enough, return at once until the thread has caught up.
        """
        with self._changed:
            goal = self._added
            if not self._is_behind:
                self._is_behind = not self._changed.wait_for(lambda: self._done >= goal, FLUSH_SECONDS)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            lost = self._added - self._done
            logger.error("store: the disk does not answer: %d records of the last minutes may be lost", lost)

    def _write(self, entry: functools.partial[None], *, must: bool) -> None:
        size = RECORD_BYTES + sum(map(_size, (*entry.args, *entry.keywords.values())))
        with self._changed:
            if self._waiting_bytes + size <= (MAX_WAITING_BYTES if must else MAX_WAITING_BYTES // 2):
                if self._done == self._added:
                    self._since = self._clock()
                self._entries.append((entry, must, size))
                self._waiting_bytes += size
                self._added += 1
                self._changed.notify_all()
                is_taken = True
            else:
                self._dropped += 1
                is_taken = False
        if is_taken and must:
            self.flush()
        elif not is_taken and (more := self._log_limit.admit(self._clock())) is not None:
            logger.error("store: the disk is too slow: records are left out, monitoring goes on%s", more)

    def _work(self) -> None:
        while self._turn():
            pass
        super().close()

    def _turn(self) -> bool:
        """Write what waits; False at the end."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            entries, self._entries = self._entries, deque()
            commit, self._commit_due = self._commit_due, False
            live, self._upkeep_for = self._upkeep_for, None
            closing = self._closing
        for entry, must, size in entries:
            self._safely(functools.partial(super()._write, entry, must=must))
            with self._changed:
                self._done += 1
                self._waiting_bytes -= size
                self._since = self._clock()
                self._is_behind = self._is_behind and self._done < self._added
                self._changed.notify_all()
        if commit:
            self._safely(self._commit)
        if live is not None:
            self._safely(functools.partial(super().upkeep, live))
        return not closing

    def _has_work(self) -> bool:
        return bool(self._entries or self._commit_due or self._upkeep_for is not None or self._closing)

    def _safely(self, work: Callable[[], None]) -> None:
        """Do `work`. An error that the journal does not expect ends neither the thread nor the monitor."""
        try:
            work()
        except Exception as error:
            self._lost += 1
            logger.error("store: a record that cannot be written is left out", exc_info=error)


def _size(value: object) -> int:
    return value.num_bytes if isinstance(value, PlainProfile) else len(value) if isinstance(value, bytes) else 0
