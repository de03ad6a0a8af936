"""Tables of a run: each row has the kinds of its columns, and a forged row gives one line."""

from __future__ import annotations

import shutil
import sqlite3
import zlib
from pathlib import Path

import pytest

from koopmon.errors import StoreError
from koopmon.history.reader import HistoryReader
from koopmon.risk.band import BandReading
from koopmon.views.export_tables import TABLES
from koopmon.wire.messages import TrainingStep
from tests.report.recorder import NAN, RUN, Recorder, guarded

KINDS = {"text": str, "integer": int, "number": float, "flag": bool}
WRONG = b'{"layers": [{"eigenvalues": [], "num_samples": 8, "informative": true, "update_ratio": [1]}]}'


def rows(path: Path, table: str) -> list[dict[str, object]]:
    names = [column.name for column in TABLES[table].columns]
    with HistoryReader.open(path) as history:
        return [dict(zip(names, row, strict=True)) for row in TABLES[table].rows(history, RUN)]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recorder = Recorder(tmp_path_factory.mktemp("recorded") / "h.sqlite3")
    guarded(recorder)
    recorder.saw(200, 0.05, 2.8, profiled=True)
    recorder.saw(202, 1.0, NAN, non_finite=True)
    recorder.did(202, 1.0, "refused", lr_scale=0.25, detail="\x1b[2J")
    recorder.beat(210, logged={"kl": BandReading(208, 0.5)})
    recorder.beat(220, logged={"kl": BandReading(208, 0.5), "entropy": BandReading(219, 2.0, 1.0, 3.0)})
    recorder.beat(230, logged={"kl": BandReading(228, NAN, 0.1, 0.9)})
    recorder.close()
    return recorder.path


@pytest.fixture
def path(recorded: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copy(recorded, tmp_path))


@pytest.mark.parametrize("table", TABLES)
def test_each_value_has_the_kind_of_its_column(path: Path, table: str) -> None:
    found = rows(path, table)
    assert found
    for column in TABLES[table].columns:
        kinds = {type(row[column.name]) for row in found}
        assert kinds <= {KINDS[column.kind], type(None)}, column.name
        assert column.description


def test_a_logged_value_that_heartbeats_repeat_is_one_row(path: Path) -> None:
    found = [
        (row["step"], row["name"], row["value"], row["band_low"], row["band_high"]) for row in rows(path, "logged")
    ]
    assert found == [
        (208, "kl", 0.5, None, None),
        (219, "entropy", 2.0, 1.0, 3.0),
        (228, "kl", None, 0.1, 0.9),
    ]


def test_snapshots(path: Path) -> None:
    found = rows(path, "snapshots")
    assert len(found) == 103
    assert set(TrainingStep.__struct_fields__) <= found[0].keys()
    assert found[20] | {"step": 40, "risk": 0.85, "loss": 3.1, "lr_scale": 1.0, "launch": "0123abcd"} == found[20]
    assert found[-1]["non_finite"] is True
    assert found[-1]["loss"] != found[-1]["loss"], "NaN stays NaN"


def test_layers(path: Path) -> None:
    found = rows(path, "layers")
    assert [row["layer"] for row in found] == [0, 1, 2]
    assert all(0.0 <= float(str(row["near_unit_mass"])) <= 1.0 for row in found)
    assert 202 not in {row["step"] for row in found}, "no spectrum of states that are not finite"


def test_commands(path: Path) -> None:
    applied, refused = rows(path, "commands")
    assert (applied["step"], applied["outcome"], applied["applied_step"], applied["lr_scale"]) == (
        40,
        "applied",
        42,
        0.5,
    )
    assert (refused["outcome"], refused["applied_step"], refused["detail"]) == ("refused", None, "?[2J")


@pytest.mark.parametrize(
    ("statement", "value", "table"),
    [
        ("UPDATE observations SET observation = ?", '{"near_unit_mass": "x"}', "snapshots"),
        ("UPDATE observations SET observation = ?", "[]", "snapshots"),
        ("UPDATE profiles SET profile = ?", zlib.compress(b'{"layers": [{}]}'), "layers"),
        ("UPDATE profiles SET profile = ?", zlib.compress(b'{"layers": 3}'), "layers"),
        (
            "UPDATE profiles SET profile = ?",
            zlib.compress(b'{"layers": [{"informative": true, "update_ratio": [1]}]}'),
            "layers",
        ),
        ("UPDATE profiles SET profile = ?", b"x", "layers"),
        ("UPDATE commands SET command = ?", "{}", "commands"),
    ],
)
def test_a_forged_row_is_one_line(path: Path, statement: str, value: object, table: str) -> None:
    with sqlite3.connect(path) as database:
        database.execute(statement, (value,))
    database.close()
    with pytest.raises(StoreError) as caught:
        rows(path, table)
    assert "\n" not in str(caught.value)
