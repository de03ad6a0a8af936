"""The ages of judged snapshots under overload, and the exit status of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

from benchmarks import judged_age
from benchmarks.judged_age import ages

pytestmark = pytest.mark.process


def test_an_age_is_counted_in_intervals_of_the_sender_after_the_first_snapshots() -> None:
    sent = {step: 100.0 + 0.5 * step for step in range(1, 11)}
    taken = [(1, 109.0), (2, 109.5), (5, 103.0), (8, 105.0), (10, 105.0)]
    found = ages(sent, taken, 0.5)
    assert (found["sent"], found["judged"]) == (10, 5)
    assert (found["median"], found["largest"]) == (1.0, 2.0)


@pytest.mark.slow
def test_a_short_measurement_under_overload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged_age, "LOADS", (2.0,))
    out = tmp_path / "out.json"
    judged_age.main(["--seconds", "4", "--out", str(out)])
    told = json.loads(out.read_text())
    assert told["bearable_interval_seconds"] > 0.0
    found = told["loads"]["2"]
    assert 0 < found["judged"] < found["sent"], "the engine cannot judge them all"
    assert 0.0 <= found["median"] <= found["p95"] <= found["largest"]


@pytest.mark.parametrize("median", [1.0, 1.01])
def test_a_missed_goal_is_an_exit_status(median: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"sent": 9, "judged": 5, "median": median, "p95": 2.0, "largest": 3.0}
    told = {"bearable_interval_seconds": 0.1, "loads": {"2": found}}
    monkeypatch.setattr(judged_age, "measure", lambda folder, seconds: told)
    out = tmp_path / "out.json"
    assert judged_age.main(["--out", str(out)]) == int(median > 1.0)
    assert json.loads(out.read_text())["goal"]["met"] == (median <= 1.0)
