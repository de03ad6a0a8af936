"""A slice of the campaign of benchmarks.guarded in real processes, and its tables."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from rich.console import Console

from benchmarks.guarded import again, analyse
from benchmarks.guarded_runs import BASE, BY_HAND, Plan, train_all
from koopmon.config import PolicyConfig


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_one_monitor_and_one_launcher_serve_many_runs(tmp_path: Path) -> None:
    base = replace(BASE, steps=80)
    plan = Plan(base=base, rates=(0.012,), fixed=(0.001,), seeds=1, healthy=1, policies=(PolicyConfig().name,))
    console = Console(file=io.StringIO(), width=160)
    runs = train_all(plan, tmp_path, console)
    assert len(runs) == len(BY_HAND) + 1 + 4 + 1 + 4
    assert train_all(plan, tmp_path, console) == runs, "finished runs are read, not made again"
    found = {"plan": plan.told(), **analyse(plan, runs, "abc", console)}
    controls = {row["control"]: row for row in found["rows"]}
    assert controls["nothing"]["diverged"] == 1.0
    assert controls["nothing"]["actions"] == 0.0
    assert controls[PolicyConfig().name]["actions"] > 0.0
    assert found["replicas_equal"]
    assert found["healthy"]["num_runs"] == 4
    assert found["healthy"]["acted_on"] == 0
    assert found["healthy"]["identical"] == 4
    before = json.loads(json.dumps(found))
    anew = again(plan, before, runs, "def", console)
    assert {row["control"]: row["commit"] for row in anew["rows"]} == {
        **dict.fromkeys(BY_HAND, "abc"),
        PolicyConfig().name: "def",
    }
    assert anew["healthy"] == before["healthy"]
    with pytest.raises(ValueError, match="seeds = 2: the file of results has 1"):
        again(replace(plan, seeds=2), before, runs, "def", console)
