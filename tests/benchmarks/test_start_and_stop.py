"""The benchmark of start and stop with one short job, and its goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import start_and_stop


@pytest.mark.process
@pytest.mark.slow
def test_one_round_measures_every_part(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    start_and_stop.main(["--rounds", "1", "--help-rounds", "1", "--job-seconds", "0.1", "--out", str(out)])
    told = json.loads(out.read_text())
    assert told["measured"].keys() == start_and_stop.GOALS.keys()
    assert told["measured"]["help_ratio"] > 1
    assert [len(told["jobs"][name]) for name in ("alone", "guarded")] == [1, 1]


@pytest.mark.parametrize("name", start_and_stop.GOALS)
def test_a_figure_above_its_goal_misses_it(name: str) -> None:
    measured = dict(start_and_stop.GOALS)
    assert start_and_stop.missed(measured) == []
    assert start_and_stop.missed({**measured, name: 1.01 * measured[name]}) == [name]


@pytest.mark.parametrize("option", ["--rounds", "--help-rounds"])
def test_nothing_to_do_is_refused(option: str) -> None:
    with pytest.raises(SystemExit):
        start_and_stop.main([option, "0"])
