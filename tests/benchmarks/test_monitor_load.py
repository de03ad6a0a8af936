"""The benchmark of the monitor's load with few ranks and runs, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

from benchmarks import monitor_load

pytestmark = pytest.mark.process

TOLD: dict[str, Any] = {
    "nobody": {"share": 0.01, "heartbeats_per_second": 0.0},
    "ranks": {"share": 0.04, "heartbeats_per_second": 100.0},
    "runs": {"share": 0.04, "heartbeats_per_second": 100.0},
    "metrics": {"cpu_seconds": [0.1, 0.1, 0.9], "series": 9, "bytes": 900, "sent_bytes": 300},
}


@pytest.mark.slow
def test_few_ranks_and_runs_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_RANKS": 3, "NUM_RUNS": 2, "SETTLE_SECONDS": 0.5, "SCRAPES": 2}.items():
        monkeypatch.setattr(monitor_load, name, value)
    out = tmp_path / "out.json"
    monitor_load.main(["--seconds", "2", "--out", str(out)])
    told = json.loads(out.read_text())
    assert told["nobody"]["heartbeats_per_second"] == 0
    assert 2 <= told["ranks"]["heartbeats_per_second"] <= 4
    assert told["metrics"]["series"] > 2 * 10 * monitor_load.NUM_LAYERS
    assert told["metrics"]["sent_bytes"] < told["metrics"]["bytes"]


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("ranks", {}),
        ("ranks", {"share": 0.06}),
        ("runs", {"share": 0.06}),
        ("metrics", {"sent_bytes": 500_000}),
        ("metrics", {"cpu_seconds": [0.2, 0.2, 0.1]}),
    ],
)
def test_a_missed_goal_is_an_exit_status(
    part: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {**TOLD, part: {**TOLD[part], **values}}
    monkeypatch.setattr(monitor_load, "measure", lambda folder, seconds: told)
    out = tmp_path / "out.json"
    assert monitor_load.main(["--out", str(out)]) == int(bool(values))
    assert sum(not goal["met"] for goal in json.loads(out.read_text())["goals"]) == int(bool(values))
