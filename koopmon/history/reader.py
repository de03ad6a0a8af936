"""Read access to a history store for `report`, `replay` and tests. Safe while a monitor writes."""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import msgspec

from koopmon.errors import StoreError, one_line
from koopmon.history.database import is_held
from koopmon.history.rows import (
    AssessmentRow,
    DecisionRow,
    HeartbeatRow,
    IncarnationRow,
    ObservationRow,
    ProfileHead,
    ProfileRow,
    RunOverview,
    RunRow,
    assessment_row,
    observation_of,
    profile_head,
    profile_row,
    row_of,
    training_of,
)
from koopmon.history.schema import SQLITE_ERRORS, check, from_scalar
from koopmon.wire.messages import Applied, Command, Hello, RunName

_OF_RUN = " JOIN incarnations ON incarnations.id = t.incarnation_id JOIN runs ON runs.id = run_id WHERE name = ?"

_LAUNCHES = "incarnation_id IN (SELECT id FROM incarnations WHERE run_id = runs.id)"
_OVERVIEW = f"""
SELECT runs.*,
  (SELECT count(*) FROM incarnations WHERE run_id = runs.id) AS num_launches,
  (SELECT count(*) FROM observations WHERE {_LAUNCHES}) AS num_snapshots,
  (SELECT max(step) FROM (
    SELECT max(step) AS step FROM observations WHERE {_LAUNCHES}
    UNION ALL SELECT max(step) FROM heartbeats WHERE {_LAUNCHES})) AS last_step,
  (SELECT max(risk) FROM observations WHERE {_LAUNCHES}) AS max_risk,
  (SELECT loss FROM observations WHERE {_LAUNCHES} AND loss IS NOT NULL ORDER BY id DESC LIMIT 1) AS loss,
  coalesce((SELECT lr_scale FROM observations WHERE {_LAUNCHES} ORDER BY id DESC LIMIT 1), 1.0) AS lr_scale
FROM runs ORDER BY first_seen, runs.id
"""


class HistoryReader:
    """A store opened for reading.

    Rows come in the order of writing: all of them, or the newest `last`. The content of a damaged or forged file is
    validated on reading: every method raises StoreError only.
    """

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self._database = database
        self._database.row_factory = sqlite3.Row
        self._path = path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the store.

        Raises StoreError if the file is missing, unreadable, not a store, or of a newer schema.
        """
        path = Path(path)
        if not path.is_file():
            raise StoreError(f"store {path}: no such file")
        try:
            database = sqlite3.connect(_address(path, "ro"), uri=True, timeout=5.0)
            try:
                check(database, path)
            except BaseException:
                database.close()
                raise
        except SQLITE_ERRORS as error:
            raise StoreError(f"store {path}: {one_line(error)}") from None
        return cls(database, path)

    def close(self) -> None:
        """Close the store, and let SQLite remove its companion files if this was the last reader at rest."""
        self._database.close()
        _tidy(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def runs(self) -> list[str]:
        """Names of all runs, oldest first."""
        with self._reading("runs"):
            rows = self._database.execute("SELECT name FROM runs ORDER BY first_seen, id").fetchall()
            return msgspec.convert([row["name"] for row in rows], list[RunName])

    def run(self, name: str) -> RunRow | None:
        """Return the row of one run; None when the store does not hold it."""
        with self._reading("runs"):
            row = self._database.execute("SELECT * FROM runs WHERE name = ?", (name,)).fetchone()
            return None if row is None else row_of(row, RunRow)

    def recent_runs(self, most: int) -> list[RunRow]:
        """Return the `most` runs with the latest activity, latest first."""
        query = "SELECT * FROM runs ORDER BY last_seen DESC, id DESC LIMIT ?"
        with self._reading("runs"):
            return [row_of(row, RunRow) for row in self._database.execute(query, (most,))]

    def overview(self) -> list[RunOverview]:
        """Return all runs with their counts and extremes, oldest first. No profile and no observation is decoded."""
        with self._reading("runs"):
            rows = self._database.execute(_OVERVIEW).fetchall()
            return [row_of(row, RunOverview, loss=from_scalar(row["loss"])) for row in rows]

    def incarnations(self, run: str) -> list[IncarnationRow]:
        query = (
            "SELECT t.*, name AS run FROM incarnations AS t JOIN runs ON runs.id = run_id WHERE name = ? ORDER BY t.id"
        )
        with self._reading("incarnations"):
            return [
                row_of(
                    row,
                    IncarnationRow,
                    hello=None if row["hello"] is None else msgspec.json.decode(row["hello"], type=Hello),
                    applied=None if row["applied"] is None else msgspec.json.decode(row["applied"], type=Applied),
                )
                for row in self._database.execute(query, (run,))
            ]

    def profiles(self, run: str, *, last: int | None = None, eigenvalues: bool = True) -> Iterator[ProfileRow]:
        """Yield snapshots; without `eigenvalues`, profiles have none and are read in a third of the time."""
        with self._reading("profiles"):
            for row in self._of_run("profiles", run, last):
                yield profile_row(row, eigenvalues=eigenvalues)

    def profile_heads(self, run: str) -> Iterator[ProfileHead]:
        """Yield all snapshots of a run without their profiles."""
        columns = ", ".join(name for name in ProfileHead.__struct_fields__ if name != "id")
        with self._reading("profiles"):
            yield from map(
                profile_head, self._dicts(f"SELECT t.id, {columns} FROM profiles AS t{_OF_RUN} ORDER BY t.id", (run,))
            )

    def profiles_at(self, ids: Iterable[int]) -> Iterator[ProfileRow]:
        """Yield the snapshots of these rows; a row that was deleted meanwhile is left out."""
        query = (
            "SELECT t.*, incarnation FROM profiles AS t JOIN incarnations ON incarnations.id = t.incarnation_id"
            " WHERE t.id IN (SELECT value FROM json_each(?)) ORDER BY t.id"
        )
        with self._reading("profiles"):
            for row in self._database.execute(query, (msgspec.json.encode(list(ids)).decode(),)):
                yield profile_row(row)

    def observations(self, run: str, *, last: int | None = None) -> Iterator[ObservationRow]:
        with self._reading("observations"):
            for row in self._of_run("observations", run, last):
                yield assessment_row(row, ObservationRow, observation=observation_of(row))

    def assessments(self, run: str, *, last: int | None = None) -> Iterator[AssessmentRow]:
        """Yield the rows of `observations` without the input of the detector, in less time."""
        with self._reading("observations"):
            for row in self._of_run("observations", run, last):
                yield assessment_row(row, AssessmentRow)

    def decisions(self, run: str, *, last: int | None = None) -> Iterator[DecisionRow]:
        with self._reading("decisions"):
            for row in self._of_run("decisions", run, last):
                yield row_of(row, DecisionRow, commands=tuple(self._commands(row["id"])))

    def heartbeats(self, run: str, *, last: int | None = None) -> Iterator[HeartbeatRow]:
        with self._reading("heartbeats"):
            for row in self._of_run("heartbeats", run, last):
                text = row["logged"] if "logged" in row.keys() else None  # noqa: SIM118 - a row has no "in"
                yield row_of(
                    row,
                    HeartbeatRow,
                    training=training_of(row),
                    step_seconds=from_scalar(row["step_seconds"]),
                    logged={} if text is None else msgspec.json.decode(text),
                )

    def _of_run(self, table: str, run: str, last: int | None = None) -> Iterator[dict[str, Any]]:
        # The subquery reads the index alone: the rows of a long run may have gigabytes.
        newest = f"SELECT t.id FROM {table} AS t{_OF_RUN} ORDER BY incarnation_id DESC, step DESC LIMIT ?"
        query = (
            f"SELECT t.*, incarnation FROM {table} AS t JOIN incarnations ON incarnations.id = t.incarnation_id"
            f" WHERE t.id IN ({newest}) ORDER BY t.id"
        )
        return self._dicts(query, (run, -1 if last is None else last))

    def _dicts(self, query: str, values: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
        """Yield rows as dicts, which find a column by name in a fraction of the time of sqlite3.Row."""
        cursor = self._database.execute(query, values)
        cursor.row_factory = None
        names = [column[0] for column in cursor.description]
        for row in cursor:
            yield dict(zip(names, row, strict=True))

    def _commands(self, decision_id: int) -> Iterator[dict[str, Any]]:
        query = (
            "SELECT commands.*, acks.step AS acked_step, acks.detail AS detail FROM commands"
            " LEFT JOIN acks ON acks.id = (SELECT max(id) FROM acks WHERE command_id = commands.id)"
            " WHERE decision_id = ? ORDER BY commands.rowid"
        )
        for row in self._database.execute(query, (decision_id,)):
            yield {**row, "command": msgspec.json.decode(row["command"], type=Command)}

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (IndexError, KeyError):  # the schema inside a damaged file may name other columns
            raise StoreError(f"store {self._path}: {what}: a column is missing") from None
        except (sqlite3.Error, zlib.error, msgspec.MsgspecError, ValueError, TypeError, OverflowError) as error:
            raise StoreError(f"store {self._path}: {what}: a row cannot be read: {one_line(error)}") from None
        except RecursionError:
            raise StoreError(f"store {self._path}: {what}: a row cannot be read: nested too deeply") from None


def _tidy(path: Path) -> None:
    """Remove the empty write-ahead log that a reader without write access to the database leaves.

    Only a connection for writing removes it, when it is the last one. A log with content belongs to a monitor that was
    killed: the next monitor recovers it.
    """
    try:
        if path.with_name(f"{path.name}-wal").stat().st_size or not path.stat().st_size or is_held(path):
            return
        with closing(sqlite3.connect(_address(path, "rw"), uri=True, timeout=0.0)) as database:
            database.execute("PRAGMA schema_version").fetchone()
    except (OSError, *SQLITE_ERRORS):
        return


def _address(path: Path, mode: str) -> str:
    return f"file:{quote(str(path.resolve()))}?mode={mode}"
