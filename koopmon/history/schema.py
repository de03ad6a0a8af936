"""Schema of the history store and encoding of its values."""

from __future__ import annotations

import logging
import math
import sqlite3
from array import array
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec

from koopmon.errors import StoreError
from koopmon.wire.messages import MAX_LAYERS, TrainingStep

logger = logging.getLogger(__name__)

SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""Exceptions that SQLite raises.

Its messages quote the file, and Python raises UnicodeDecodeError if the quoted bytes are not text.
"""
SCHEMA_VERSION = 4
APPLICATION_ID = 0x6B6F6F70
"""The file's application ID: "koop" in ASCII."""
PAGE_BYTES = 8192
"""Page size of a new file: a page holds three profiles of 48 layers, and the smaller SQLite default only one."""
PACKED = ("update_ratios", "spectral_radii")
"""Columns of an observation with one float32 for each layer."""
SINGLE = b"f"
"""First byte of such a column, before the numbers. Earlier versions wrote doubles without a first byte."""
MAX_LOG_BYTES = 64 << 20
"""Size in bytes to which SQLite truncates the write-ahead log after a checkpoint."""

SCHEMA = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    first_seen REAL NOT NULL,
    last_seen REAL NOT NULL,
    state INTEGER NOT NULL
);
CREATE TABLE incarnations (
    id INTEGER PRIMARY KEY,
    run_id INTEGER NOT NULL REFERENCES runs (id),
    incarnation TEXT NOT NULL,
    started REAL NOT NULL,
    ended REAL,
    end_reason TEXT,
    hello TEXT,
    applied TEXT,
    applied_step INTEGER,
    memory BLOB,
    UNIQUE (run_id, incarnation)
);
CREATE TABLE profiles (
    id INTEGER PRIMARY KEY,
    incarnation_id INTEGER NOT NULL REFERENCES incarnations (id),
    step INTEGER NOT NULL,
    time REAL NOT NULL,
    num_shards INTEGER NOT NULL,
    masked INTEGER NOT NULL,
    non_finite INTEGER NOT NULL,
    seconds REAL NOT NULL,
    profile BLOB
);
CREATE INDEX profiles_by_step ON profiles (incarnation_id, step);
CREATE TABLE observations (
    id INTEGER PRIMARY KEY,
    incarnation_id INTEGER NOT NULL REFERENCES incarnations (id),
    step INTEGER NOT NULL,
    time REAL NOT NULL,
    learning_rate REAL,
    loss REAL,
    grad_norm REAL,
    lr_scale REAL NOT NULL,
    kss_alpha REAL NOT NULL,
    non_finite INTEGER NOT NULL,
    observation TEXT NOT NULL,
    risk REAL NOT NULL,
    reason TEXT NOT NULL,
    components TEXT NOT NULL,
    update_ratios BLOB,
    spectral_radii BLOB
);
CREATE INDEX observations_by_step ON observations (incarnation_id, step);
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY,
    incarnation_id INTEGER NOT NULL REFERENCES incarnations (id),
    step INTEGER NOT NULL,
    time REAL NOT NULL,
    phase TEXT NOT NULL,
    reason TEXT NOT NULL,
    risk REAL NOT NULL
);
CREATE TABLE commands (
    id TEXT PRIMARY KEY,
    decision_id INTEGER NOT NULL REFERENCES decisions (id),
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    command TEXT NOT NULL,
    outcome TEXT NOT NULL
);
CREATE TABLE acks (
    id INTEGER PRIMARY KEY,
    command_id TEXT NOT NULL,
    time REAL NOT NULL,
    outcome TEXT NOT NULL,
    step INTEGER NOT NULL,
    detail TEXT NOT NULL,
    applied TEXT NOT NULL
);
CREATE INDEX acks_by_command ON acks (command_id);
CREATE TABLE heartbeats (
    id INTEGER PRIMARY KEY,
    incarnation_id INTEGER NOT NULL REFERENCES incarnations (id),
    process_rank INTEGER NOT NULL,
    time REAL NOT NULL,
    step INTEGER NOT NULL,
    learning_rate REAL,
    loss REAL,
    grad_norm REAL,
    step_seconds REAL,
    overhead_ratio REAL NOT NULL,
    lr_scale REAL NOT NULL,
    kss_alpha REAL NOT NULL,
    logged TEXT
);
CREATE INDEX heartbeats_by_step ON heartbeats (incarnation_id, step);
CREATE INDEX decisions_by_step ON decisions (incarnation_id, step);
CREATE INDEX commands_by_decision ON commands (decision_id);
"""
_FOREIGN = "type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%'"
"""Parts of a schema that no store has. A view could have rows without end, and a trigger could change other rows."""
MIGRATIONS = {
    1: """
CREATE INDEX decisions_by_step ON decisions (incarnation_id, step);
CREATE INDEX commands_by_decision ON commands (decision_id);
""",
    # Profiles in the packed form of plain_profile.py stand beside those in JSON.
    2: "ALTER TABLE observations ADD COLUMN update_ratios BLOB;",
    # Columns of float32 stand beside those of doubles.
    3: "",
}
"""SQL that migrates a store from each version to the next; each step is one transaction."""


class RunState(IntEnum):
    """Values of the metric run_state."""

    ENDED = 0
    RUNNING = 1
    VANISHED = 2


def prepare(database: sqlite3.Connection, path: Path) -> None:
    """Create the tables in an empty file, else check the application ID and migrate. Add a column per new scalar.

    Raises StoreError naming `path`, or sqlite3.Error.
    """
    check(database, path, empty_allowed=True)
    # Both before the first page; with auto_vacuum, pruning can shrink the file.
    database.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    database.execute("PRAGMA auto_vacuum = INCREMENTAL")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute(f"PRAGMA journal_size_limit = {MAX_LOG_BYTES}")
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute("PRAGMA foreign_keys = ON")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == 0:
        marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
        database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {marks} COMMIT;")
    for older in range(version or SCHEMA_VERSION, SCHEMA_VERSION):
        database.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[older]} PRAGMA user_version = {older + 1}; COMMIT;")
        logger.info("store %s: brought from schema %d to %d", path, older, older + 1)
    for table in ("observations", "heartbeats"):
        columns = {column[1] for column in database.execute(f"PRAGMA table_info({table})")}
        for name in TrainingStep.__struct_fields__:
            if name not in columns:
                database.execute(f"ALTER TABLE {table} ADD COLUMN {name} REAL")
        name, kind = ("logged", "TEXT") if table == "heartbeats" else ("spectral_radii", "BLOB")
        if name not in columns:
            database.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")


def check(database: sqlite3.Connection, path: Path, *, empty_allowed: bool = False) -> None:
    """Raise StoreError unless the file is a store of this version or older.

    With `empty_allowed`, an empty file also passes.
    """
    (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and empty_allowed:
        return
    (foreign,) = database.execute(f"SELECT count(*) FROM sqlite_master WHERE {_FOREIGN}").fetchone()
    if foreign or database.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
        raise StoreError(f"store {path}: not a koopmon store: choose another file")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if not 1 <= version <= SCHEMA_VERSION:
        raise StoreError(
            f"store {path}: schema {version}, this version of koopmon supports 1 to {SCHEMA_VERSION}:"
            " upgrade koopmon or choose another file"
        )


def to_json(value: Any) -> str:
    """Compact JSON of plain values, structs and dataclasses; a number that is not finite becomes null."""
    return msgspec.json.encode(value).decode()


def scalar(value: float | None) -> float | str | None:
    """Encode a float for a column. SQLite stores NaN as NULL, and NULL means unknown here."""
    return "nan" if value is not None and math.isnan(value) else value


def from_scalar(value: float | str | None) -> float | None:
    """Decode a float from its column."""
    return None if value is None else float(value)


def packed_layers(values: Sequence[float]) -> bytes | None:
    """Encode one number for each layer, which float32 has (`koopmon.numbers.to_single`); None without any."""
    return SINGLE + array("f", values).tobytes() if values else None


def unpacked_layers(name: str, packed: bytes) -> list[float]:
    """Decode the numbers of `packed_layers`, and the doubles of earlier versions. Raises ValueError, TypeError."""
    # The size of doubles is a multiple of 8; with the first byte the size is odd.
    values = array("f", packed[1:]) if packed[:1] == SINGLE and len(packed) % 2 else array("d", packed)
    if len(values) > MAX_LAYERS or not all(map(math.isfinite, values)):
        raise ValueError(f"{name}: allowed are finite numbers, one for each layer")
    return values.tolist()
