"""Tables of the proving ground, from a result that is made up."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.proving_ground.page import FAULTS, proving_ground, title
from benchmarks.proving_ground.training import FAILURES


def model(**more: Any) -> dict[str, Any]:
    usual = {"width": 64, "num_layers": 4, "family": "rms", "optimizer": "adamw", "weight_decay": 0.0, "faults": {}}
    return {**usual, **more}


def rates(**more: Any) -> dict[str, Any]:
    arms = {
        "clip": {"losses": {"0.003": [1.8, 1.9], "0.03": [2.2, 2.4]}, "sensitivity": None},
        "guarded": {"losses": {"0.003": [1.8, 1.9]}, "sensitivity": None},
    }
    summary = {
        "best_rate": 0.003,
        "healthy": {"num_runs": 2, "untouched": 1.0},
        "ruined_alone": 2,
        "ruined_within": 1,
        "acted_before_shown": 2,
        "median_lead_steps": 30.0,
        "within_0.05": 1,
        "num_above": 2,
    }
    return model(steps=400, batch=8, arms=arms, **summary, **more)


def fault(**more: Any) -> dict[str, Any]:
    losses = {"reference": [1.8], "clip": [2.2], "guarded": [1.81]}
    counts = {"alone_within": 0, "guarded_within": 1, "acted": 1, "ruined_alone": 1, "ruined_within": 1}
    return {**losses, **counts, **more}


def test_a_rate_that_an_arm_did_not_run_is_a_dash() -> None:
    lines = proving_ground({"models": [rates()]})
    assert lines[0] == "| validation loss (nats) | 0.003 | 0.03 |", "no arm has a sensitivity"
    assert "| clipping at 1.0 | 1.85 | 2.30 |" in lines
    assert "| clipping and koopmon | 1.85 | - |" in lines
    assert "2 seeds (400 steps, batch 8): the best rate is 0.003." in " ".join(lines)


def test_failures_of_all_models_are_counted_by_kind() -> None:
    faults = {"restart": fault(), "bf16": fault(ruined_alone=0, ruined_within=0, acted_before_shown=0)}
    known = model(family="pre", faults={"restart": fault(acted_before_shown=1)})
    lines = proving_ground({"models": [rates(faults=faults), known]})
    assert "| rate, RMSNorm | 2 | 2 of 2 | 1 of 2 |" in lines
    assert "| schedule restarts at 30 times its rate | 2 | 1 of 1 | 2 of 2 |" in lines, "one has no step of its damage"
    assert lines[-1] == "| all | 4 | 3 of 3 | 3 of 4 |"
    assert not any(line.startswith("| attention in bfloat16 | 0") for line in lines), "it ruined no run"
    assert "| attention in bfloat16 | 1.80 | 2.20 | 1.81 | 0 of 1 | 1 of 1 | 1 of 1 |" in lines


def test_remedies_are_beside_clipping_and_the_guard() -> None:
    losses = {arm: {"0.01": [loss], "0.1": []} for arm, loss in (("clip", 2.0), ("zclip", 2.1), ("guarded", 1.9))}
    lines = proving_ground({"models": [model(rules={"best": [1.8], "losses": losses})]})
    assert lines[:3] == ["| RMSNorm, remedy | 0.01 | 0.1 |", "|---|---|---|", "| clipping at 1.0 | 2.00 | - |"]
    assert "| clipping and ZClip | 2.10 | - |" in lines
    assert "Clipping alone ends at 1.80 at the best rate (1 seed)." in lines


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "RMSNorm, D 64, L 4"),
        ({"optimizer": "muon"}, "RMSNorm, D 64, L 4, Muon and AdamW"),
        ({"weight_decay": 0.1, "family": "kan"}, "Splines, D 64, L 4, weight decay 0.1"),
    ],
)
def test_a_title_has_the_settings_that_are_not_the_usual_ones(fields: dict[str, Any], words: str) -> None:
    assert title(model(**fields)) == words


def test_every_fault_has_words() -> None:
    assert {name.partition(" at ")[0] for name in FAULTS} == set(FAILURES)
