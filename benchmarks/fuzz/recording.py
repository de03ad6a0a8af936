"""Target recording: a history file with changed bytes or columns, read, replayed and written; runs of a campaign.

An input is a kind (one byte) and its data. Kind 0 is a campaign's .npz file, kind 255 a packed profile before its
compression. Other kinds are edits of a small store of one of the schemas: a place (four bytes, little-endian), a
length (one byte) and the new bytes, which go into a column for an odd length.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import shutil
import sqlite3
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from benchmarks.campaign import _fields, _path, _read
from benchmarks.fuzz import check_line
from koopmon.config import Config, StoreConfig
from koopmon.errors import StoreError
from koopmon.history.plain_profile import FORMAT, QUANTITIES, PlainProfile, pack, unpack
from koopmon.history.reader import HistoryReader
from koopmon.history.schema import SCHEMA_VERSION, SQLITE_ERRORS
from koopmon.history.writer import HistoryWriter
from koopmon.offline.calibration_examples import calibration_examples
from koopmon.offline.replay import replay
from koopmon.views.spectra import Column, Spectrum
from koopmon.wire.messages import TrainingStep

KEPT = Path(__file__).parents[2] / "tests" / "history" / "stores"
COLUMNS = (
    *(("runs", "name"), ("incarnations", "hello"), ("incarnations", "applied"), ("incarnations", "memory")),
    *(("profiles", "profile"), ("profiles", "step"), ("observations", "observation"), ("observations", "components")),
    *(("observations", "loss"), ("observations", "risk"), ("observations", "time"), ("decisions", "phase")),
    *(("observations", "update_ratios"), ("observations", "spectral_radii"), ("profiles", "non_finite")),
    *(("commands", "command"), ("commands", "outcome"), ("acks", "applied"), ("heartbeats", "loss")),
)
PACKED = b"\xff"
"""Kind of a packed profile."""
QUIET = Console(file=io.StringIO())
_folder = Path(tempfile.mkdtemp(prefix="koopmon-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def _templates() -> list[bytes]:
    """Return a small store of each schema; the code of today adds a snapshot to that of today."""
    kept = (KEPT / f"schema-{version}.sqlite3.gz" for version in range(1, SCHEMA_VERSION))
    found = [gzip.decompress(each.read_bytes()) for each in kept]
    path = _folder / "template.sqlite3"
    path.write_bytes(found[-1])
    store = HistoryWriter.open(path)
    layers = {"update_ratios": (0.5, 0.25, 0.125), "spectral_radii": (1.5, 1.25, 1.0), "num_layers": 3}
    place = (1e9, "job", "aaaaaaaa")
    columns: Any = {"num_shards": 1, "masked": 0, "seconds": 0.1}
    store.record_profile(*place, 3, profile=PROFILE, observables={"a": (0.5, None)}, **columns)
    training = TrainingStep(step=3, loss=2.0, learning_rate=0.1)
    risk: Any = {"non_finite": False, "risk": 0.5, "reason": "", "components": {"prior": 0.0, "growth": 1.0}}
    store.record_observation(*place, training, observation={"informative": True, **layers}, **risk)
    store.close()
    return [*found, path.read_bytes()]


PROFILE = PlainProfile(
    columns=dict.fromkeys(QUANTITIES, (0.5, 0.25, 1.0)),
    eigenvalues=(array("f", (0.5, 0.25, 0.5, -0.25)), array("f", (0.25, 0.0)), array("f", ())),
    informative=(True, False, True),
    reasons=("", "few samples", ""),
    num_samples=8,
    svd_rank=4,
    is_informative=True,
    reason="1 of 3 layers: few samples",
)
TEMPLATES = _templates()


@dataclass(frozen=True)
class Case:
    """Build the smallest run of a campaign."""

    seed: int = 0
    name: str = "case"


def seeds() -> Iterator[bytes]:
    yield b"\x01"
    yield b"\x01" + (68).to_bytes(4, "little") + b"\x04koop"
    yield b"\x01" + (4096).to_bytes(4, "little") + b"\x08" + bytes(8)
    for index in range(len(COLUMNS)):
        yield b"\x01" + index.to_bytes(4, "little") + b"\x03[1]"
        yield b"\x03" + (index | 0x100).to_bytes(4, "little") + b"\x09" + bytes(7) + b"\xf0\x7f"
    yield PACKED + zlib.decompress((pack(PROFILE, {"a": (0.5, None)}) or b"")[1:])
    archive = io.BytesIO()
    described = f'{{"case": {{"seed": 0, "name": "{Case().name}"}}, "scalars": {{"loss": 1.0}}}}'
    assert _fields(Case()) == {"seed": 0, "name": "case"}
    np.savez_compressed(archive, about=np.array(described), losses=np.zeros(3))
    yield b"\x00" + archive.getvalue()


def run(data: bytes) -> str:
    if not data or data[0] == 0:
        path = _path(Case(), _folder)
        path.write_bytes(data[1:])
        return "campaign" if _read(Case(), _folder, QUIET) else "campaign refused"
    if data[:1] == PACKED:
        return _unpack(data[1:])
    for path in _folder.iterdir():
        path.unlink()
    path = _folder / "history.sqlite3"
    _edit(path, TEMPLATES[(data[0] - 1) % len(TEMPLATES)], data[1:])
    read = _survey(path)
    return f"{read}, {_continue(path)}"


def _unpack(data: bytes) -> str:
    """Unpack a profile and use its content."""
    try:
        profile, _ = unpack(FORMAT + zlib.compress(data, 1), non_finite=False)
    except (zlib.error, msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return "profile refused"
    assert profile is not None
    column, spectrum = Column.of(1, profile), Spectrum.of(1, profile)
    assert all(math.isfinite(modulus) for modulus in spectrum.moduli())
    assert len(column.values["near_unit_mass"]) == len(spectrum.labels)
    again, _ = unpack(pack(profile, None), non_finite=False)
    assert again is not None
    assert again.informative == profile.informative
    return "profile"


def _edit(path: Path, template: bytes, edits: bytes) -> None:
    content = bytearray(template)
    columns: list[tuple[int, bytes]] = []
    at = 0
    while at + 5 <= len(edits):
        place, length = int.from_bytes(edits[at : at + 4], "little"), edits[at + 4]
        piece = edits[at + 5 : at + 5 + length]
        at += 5 + length
        if length % 2:
            columns.append((place, piece))
        else:
            place %= len(content)
            content[place : place + len(piece)] = piece
    path.write_bytes(content)
    if not columns:
        return
    # A file that is too damaged for an edit stays as it is.
    with contextlib.suppress(*SQLITE_ERRORS), contextlib.closing(sqlite3.connect(path)) as database:
        for place, piece in columns:
            table, column = COLUMNS[place % len(COLUMNS)]
            value: Any = piece if place & 0x100 else piece.decode("utf-8", "replace")
            database.execute(f"UPDATE {table} SET {column} = ?", (value,))  # noqa: S608 - our own tables
        database.commit()


def _survey(path: Path) -> str:
    """Read everything in the file."""
    try:
        with HistoryReader.open(path) as history:
            for run_name in history.runs():
                history.incarnations(run_name)
                for table in (history.profiles, history.observations, history.decisions, history.heartbeats):
                    for _ in table(run_name):
                        pass
            list(calibration_examples(history))
            _judge_again(history)
    except StoreError as error:
        check_line(str(error))
        return "refused"
    return "read"


def _judge_again(history: HistoryReader) -> None:
    for run_name in history.runs():
        with contextlib.suppress(StoreError):
            list(replay(history, run_name, Config()))


def _continue(path: Path) -> str:
    """Open the file like a monitor, write, and check the records."""
    try:
        store = HistoryWriter.open(path, StoreConfig(max_bytes=1 << 20))
    except StoreError as error:
        check_line(str(error))
        return "not opened"
    try:
        for run_name in ("job", "other"):
            store.launches.incarnations(run_name)
            store.launches.last_applied(run_name, other_than="bbbbbbbb")
            store.launches.memory(run_name, "aaaaaaaa")
            store.record_memory(1e9, run_name, "aaaaaaaa", b"{}")
        store._upkeep_at = 0.0
        store.upkeep(["job"])
    finally:
        store.close()
    return "set aside" if list(path.parent.glob("*.damaged-*")) else "written"


def close() -> None:
    shutil.rmtree(_folder, ignore_errors=True)
