"""Prune a history file by age and by size, in small batches that do not block the monitor.

A run in progress keeps all its decisions, commands and acks, including those of earlier launches. The size limit
deletes no decision of any run: decisions are small, and a restart needs the values in force. Launches without one go
last: a peer can start many.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection

from koopmon.config import StoreConfig

BULK = ("profiles", "observations", "heartbeats")
BATCH_ROWS = 64
BATCH_PAGES = 128
SLICE_SECONDS = 0.02
DAY_SECONDS = 86_400.0
LOW_WATER = 0.9
"""Fraction of `max_bytes` to which a file above the limit is reduced."""
UNHEARD_SECONDS = 86_400.0
"""Age in seconds below which a run recorded as running is kept: its agents may still reconnect to a new monitor."""

_LIVE = (
    " (SELECT id FROM runs WHERE name IN (SELECT value FROM json_each(:live))"
    " OR (state = 1 AND last_seen >= :heard_since))"
)
_OVER_AT = (
    "coalesce(ended, (SELECT min(started) FROM incarnations AS later"
    " WHERE later.run_id = t.run_id AND later.id > t.id), last_seen)"
)

_IDLE = (
    "SELECT id FROM incarnations AS t WHERE NOT EXISTS (SELECT 1 FROM decisions WHERE incarnation_id = t.id)"
    f" AND (run_id NOT IN{_LIVE} OR id < (SELECT max(id) FROM incarnations WHERE run_id = t.run_id))"
    f" ORDER BY id LIMIT {BATCH_ROWS}"
)
"""The oldest launches without a decision, but for the last one of a run in progress."""


class Retention:
    """Prunes one open database. `at` is the current time in Unix seconds."""

    def __init__(self, database: sqlite3.Connection, config: StoreConfig) -> None:
        self._database = database
        self._config = config
        self._shrinking = False
        self.forgotten = False
        """True after rows of whole launches were deleted: stored row numbers of them are invalid."""
        self.stuck = False
        """True while the file is too large and nothing more may be deleted."""

    def prune(self, at: float, live: Collection[str]) -> bool:
        """Delete due rows in the open transaction for up to SLICE_SECONDS; True if more remain. Raises sqlite3.Error.

        `live` names the runs in progress.
        """
        values = {"live": json.dumps([*live]), "heard_since": at - UNHEARD_SECONDS}
        cutoff = at - self._config.max_age_days * DAY_SECONDS
        until = time.monotonic() + SLICE_SECONDS
        while more := self._too_old(cutoff, values) or self._too_much(values):
            if time.monotonic() >= until:
                break
        return more

    def shrink(self) -> bool:
        """Return some freed pages to the file system; True if many were free. Call it outside transactions."""
        free = self._pragma("freelist_count")
        much = free > max(BATCH_PAGES, self._pragma("page_count") // 8)
        if much:
            self._database.executescript(f"PRAGMA incremental_vacuum({BATCH_PAGES})")  # `execute` frees only one page
        return much and self._pragma("freelist_count") < free

    def _too_old(self, cutoff: float, values: dict[str, object]) -> bool:
        query = f"SELECT t.id FROM incarnations AS t JOIN runs ON runs.id = run_id WHERE run_id NOT IN{_LIVE}"
        over = self._database.execute(
            f"{query} AND {_OVER_AT} < :cutoff ORDER BY t.id LIMIT 1", {**values, "cutoff": cutoff}
        ).fetchone()
        if over is not None:
            if not self._delete("incarnation_id = :over", {"over": over[0]}):
                self._forget(over[0])
            return True
        return self._delete("time < :cutoff", {"cutoff": cutoff}, oldest=True)

    def _too_much(self, values: dict[str, object]) -> bool:
        used = (self._pragma("page_count") - self._pragma("freelist_count")) * self._pragma("page_size")
        limit = self._config.max_bytes
        self._shrinking = used > (limit * LOW_WATER if self._shrinking else limit)
        if not self._shrinking:
            self.stuck = False
            return False
        over = f"incarnation_id NOT IN (SELECT id FROM incarnations WHERE run_id IN{_LIVE})"
        if self._delete(over, values) or self._delete("1", {}):
            return True
        idle = self._database.execute(_IDLE, values).fetchall()
        for (launch,) in idle:
            self._forget(launch)
        if idle:
            return True
        self._shrinking, self.stuck = False, True
        return False

    def _delete(self, where: str, values: dict[str, object], *, oldest: bool = False) -> bool:
        """Delete a batch of rows from each bulky table; True if any was deleted.

        With `oldest`, only the first rows of each table are considered.
        """
        count = 0
        for table in BULK:
            source = f"(SELECT * FROM {table} ORDER BY id LIMIT {BATCH_ROWS})" if oldest else table
            rows = f"SELECT id FROM {source} WHERE {where} ORDER BY id LIMIT {BATCH_ROWS}"
            count += self._database.execute(f"DELETE FROM {table} WHERE id IN ({rows})", values).rowcount
        return count > 0

    def _forget(self, incarnation: int) -> None:
        decisions = "SELECT id FROM decisions WHERE incarnation_id = ?"
        commands = f"SELECT id FROM commands WHERE decision_id IN ({decisions})"
        for statement in (
            f"DELETE FROM acks WHERE command_id IN ({commands})",
            f"DELETE FROM commands WHERE decision_id IN ({decisions})",
            "DELETE FROM decisions WHERE incarnation_id = ?",
            "DELETE FROM incarnations WHERE id = ?",
        ):
            self._database.execute(statement, (incarnation,))
        self._database.execute("DELETE FROM runs WHERE id NOT IN (SELECT run_id FROM incarnations)")
        self.forgotten = True

    def _pragma(self, name: str) -> int:
        (value,) = self._database.execute(f"PRAGMA {name}").fetchone()
        return int(value)
