"""A few cycles of the flooding campaign, and its judgement of bad results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import flood_and_kill

pytestmark = pytest.mark.process


@pytest.mark.slow
def test_both_sides_live_through_a_few_cycles(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert flood_and_kill.main(["--times", "4", "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert set(told["sides"]) == {"monitor", "training"}
    for row in told["sides"].values():
        assert (row["cycles"], row["survived"], row["status"], row["why"]) == (4, 4, 0, "")
        assert row["messages"] > 100
    assert told["provenance"]["seed"] == 0


GOOD = {"cycles": 3, "survived": 3, "status": 0, "messages": 9}


@pytest.mark.parametrize("bad", [{"survived": 2}, {"status": -6}, {"messages": 0}, {"cycles": 0, "survived": 0}])
def test_what_did_not_survive_or_was_not_tried_is_not_good(bad: dict[str, Any]) -> None:
    assert flood_and_kill.good(GOOD)
    assert not flood_and_kill.good({**GOOD, **bad})


@pytest.mark.parametrize("option", [["--times", "0"], ["--seconds", "0"]])
def test_nothing_to_do_is_refused(option: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        flood_and_kill.main(option)
    assert ended.value.code == 2
