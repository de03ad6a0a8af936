"""A small run of the benchmark of histories, and its judgement of bad results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import history_size
from benchmarks.history_size import GOALS, missed


@pytest.mark.process
@pytest.mark.slow
def test_a_small_run_measures_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_size, "NUM_SIZED", 40)
    monkeypatch.setattr(history_size, "NUM_BLOCKS", 2)
    out = tmp_path / "out.json"
    status = history_size.main(["--snapshots", "50", "--out", str(out)])
    told = json.loads(out.read_text())
    assert status == bool(missed(told["measured"]))
    assert told["measured"].keys() == GOALS.keys()
    for sizes in told["sizes"].values():
        assert 0 < sizes["now"] < sizes["before"]
    for took in told["milliseconds"].values():
        assert 0 < took["now"] < took["before"]
    assert all(seconds > 0 for seconds in told["seconds"].values())


@pytest.mark.parametrize("name", GOALS)
def test_a_figure_above_its_goal_misses_it(name: str) -> None:
    assert missed(GOALS) == []
    assert missed({**GOALS, name: 1.01 * GOALS[name]}) == [name]
    assert missed({**GOALS, name: float("nan")}) == [name]


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(SystemExit) as ended:
        history_size.main(["--snapshots", "0"])
    assert ended.value.code == 2
