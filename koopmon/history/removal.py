"""Delete runs from a history file that no monitor has open."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from koopmon.errors import StoreError, one_line
from koopmon.history.database import COMPANIONS, claim_file, release_lock, take_lock
from koopmon.history.schema import SQLITE_ERRORS, check

BESIDE = (".log",)
"""Further files beside a history of `koopmon run`."""
_LAUNCHES = "(SELECT incarnations.id FROM incarnations JOIN runs ON runs.id = run_id WHERE name = :run)"
_DECISIONS = f"(SELECT id FROM decisions WHERE incarnation_id IN {_LAUNCHES})"
_STATEMENTS = (
    f"DELETE FROM acks WHERE command_id IN (SELECT id FROM commands WHERE decision_id IN {_DECISIONS})",
    f"DELETE FROM commands WHERE decision_id IN {_DECISIONS}",
    *(
        f"DELETE FROM {table} WHERE incarnation_id IN {_LAUNCHES}"
        for table in ("decisions", "profiles", "observations", "heartbeats")
    ),
    f"DELETE FROM incarnations WHERE id IN {_LAUNCHES}",
    "DELETE FROM runs WHERE name = :run",
)


def remove_run(path: Path, run: str | None) -> int:
    """Delete `run` from the store at `path`, and the file too if no other run is in it. Returns the freed bytes.

    With None it deletes a file without runs. Raises StoreError if a monitor has the file open, and then deletes
    nothing.
    """
    try:
        lock = take_lock(path)
    except OSError as error:
        raise StoreError(f"store {path}: {error.strerror}") from None
    stack = contextlib.ExitStack()
    try:
        before = _size(path)
        try:
            stack.callback(os.close, claim_file(path))
            with contextlib.closing(sqlite3.connect(path, timeout=2.0, isolation_level=None)) as database:
                check(database, path, empty_allowed=True)
                is_last = _delete(database, run)
        except SQLITE_ERRORS as error:
            raise StoreError(f"store {path}: {one_line(error)}") from None
        except OSError as error:
            raise StoreError(f"store {path}: {error.strerror}") from None
        if is_last:
            _unlink(path)
        return before - _size(path)
    finally:
        stack.close()
        # It comes last: a monitor that opens the same path afterwards starts a new store.
        release_lock(path, lock)


def _delete(database: sqlite3.Connection, run: str | None) -> bool:
    """Delete the rows of `run`. Returns True if no other run remains."""
    if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return True
    if not database.execute("SELECT count(*) FROM runs WHERE name IS NOT ?", (run,)).fetchone()[0]:
        return True
    database.execute("BEGIN IMMEDIATE")
    for statement in _STATEMENTS if run is not None else ():
        database.execute(statement, {"run": run})
    database.execute("COMMIT")
    database.executescript("PRAGMA incremental_vacuum")
    return False


def _unlink(path: Path) -> None:
    try:
        for suffix in (*COMPANIONS, *BESIDE, ""):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        for suffix in (".settings", ".ended"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"store {path}: {error.strerror}") from None


def _size(path: Path) -> int:
    """Return the bytes of the store and of SQLite's companion files."""
    places = [path.with_name(path.name + suffix) for suffix in ("", *COMPANIONS)]
    return sum(place.stat().st_size for place in places if place.exists())
