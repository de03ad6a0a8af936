"""Reproduction of the paper's residual schemes within the bands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import norm_table
from benchmarks.models import NORMS, Norm
from benchmarks.norm_table import REFERENCES, Row, measure, render

torch.set_num_threads(1)


@pytest.mark.parametrize("norm", REFERENCES)
def test_rows_are_within_their_bands(norm: Norm) -> None:
    """Two seeds of weights, batch and tokens must meet the bands of the reproduction."""
    row = measure(norm, seeds=(0, 1))
    assert row.holds, render(row)
    if norm == "rezero":
        assert "until layers move" in row.reason


def test_every_scheme_has_its_row() -> None:
    assert set(REFERENCES) == set(NORMS)


def row(norm: Norm, near_unit_mass: float, num_informative: int) -> Row:
    mean = dict.fromkeys(norm_table.FIELDS, 0.5) | {"near_unit_mass": near_unit_mass}
    return Row(norm, mean, dict.fromkeys(norm_table.FIELDS, 0.01), num_informative, 3, "reason")


@pytest.mark.process
@pytest.mark.parametrize(
    ("norm", "near_unit_mass", "num_informative", "holds"),
    [
        ("pre", 0.12, 3, True),
        ("pre", 0.22, 3, False),
        ("pre", 0.12, 2, False),
        ("post", 0.59, 3, False),
        ("none", 0.97, 3, True),
        ("rezero", 1.0, 0, True),
        ("rezero", 1.0, 1, False),
    ],
)
def test_a_row_outside_its_band_is_told(
    norm: Norm,
    near_unit_mass: float,
    num_informative: int,
    holds: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(norm_table, "REFERENCES", {norm: REFERENCES[norm]})
    monkeypatch.setattr(norm_table, "measure", lambda *_: row(norm, near_unit_mass, num_informative))
    out = tmp_path / "table.json"
    assert norm_table.main(["--seeds", "3", "--out", str(out)]) == (0 if holds else 1)
    printed = capsys.readouterr().out
    assert ("every row within its band" in printed) == holds
    assert holds or f"outside the bands: {REFERENCES[norm].label}" in printed
    document = json.loads(out.read_text())
    assert document["provenance"]
    assert document["rows"][0]["holds"] == holds
    assert document["rows"][0]["reference"]["label"] == REFERENCES[norm].label
