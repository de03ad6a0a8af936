"""The callback for Hugging Face's Trainer, with the real library on two gloo ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from koopmon.agent.stats import AgentStats
from koopmon.cli.embedded import EmbeddedMonitor
from tests.integrations.conftest import asked, history, trained
from tests.integrations.programs.trainings import DEADLY_RATE, LAST

CALM = {"lr": 0.001, "steps": 14, "accumulate": 2, "eval": 5, "workers": 1}
DEADLY = {"lr": DEADLY_RATE, "steps": 100, "seed": 1}


def test_the_numbers_of_a_trainers_log_get_names_that_the_agent_accepts() -> None:
    """The names are those of TRL's GRPO, PPO and DPO trainers."""
    scalars = pytest.importorskip("koopmon.integrations.huggingface").scalars
    logs = {
        "loss": 0.1,
        "grad_norm": 1.0,
        "learning_rate": 1e-6,
        "epoch": 0.5,
        "num_tokens": 4096.0,
        "kl": 0.02,
        "entropy": 1,
        "rewards/accuracy_reward/mean": 0.25,
        "objective/kl": 0.5,
        "completions/" + "x" * 80: 3.0,
        "eval_loss": 2.0,
        "clip_ratio/region_mean": math.nan,
        "step_time": "12 s",
        "///": 1.0,
        "train_runtime": 9.0,
    }
    found = scalars(logs)
    assert list(found) == [
        *("kl", "entropy", "rewards_accuracy_reward_mean", "objective_kl"),
        *("completions_" + "x" * 28, "eval_loss", "clip_ratio_region_mean"),
    ]
    assert (found["entropy"], found["objective_kl"]) == (1.0, 0.5)
    stats = AgentStats()
    for name, value in found.items():
        stats.log(name, value)
    assert set(stats.logged_scalars()) == set(found)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_are_bit_identical_when_watched_and_saved_when_they_would_diverge(
    monitors: Callable[[str], EmbeddedMonitor], tmp_path: Path
) -> None:
    watching, guarding = monitors("observe"), monitors("lr")
    folder = str(tmp_path / "checkpoints")
    phases = [
        CALM,
        {**CALM, "endpoint": watching.endpoint, "run": "watched", "folder": folder, "save": 7},
        {**CALM, "endpoint": watching.endpoint, "run": "resumed", "resume": f"{folder}/checkpoint-7"},
        DEADLY,
        {**DEADLY, "endpoint": guarding.endpoint, "run": "guarded"},
    ]
    plain, watched, resumed, dead, guarded = trained("train_huggingface.py", tmp_path / "out", phases)
    watching.close()
    guarding.close()

    for rank in range(2):
        assert len(plain[rank]["losses"]) == CALM["steps"]
        assert watched[rank]["losses"] == plain[rank]["losses"]
        assert resumed[rank]["losses"] == plain[rank]["losses"][7:]
        assert watched[rank]["digest"] == resumed[rank]["digest"] == plain[0]["digest"]
        for each in (watched, resumed, guarded):
            assert each[rank]["status"]["enabled"], each
            assert each[rank]["status"]["acts"]
            assert (each[rank]["status"]["layout"], each[rank]["status"]["errors"]) == ("ddp", 0)
            assert each[rank]["closed"] == "closed"
    for run in ("watched", "resumed"):
        profiles, commands = history(watching, run)
        assert profiles >= 3
        assert not any("applied" in command for command in commands)

    assert len(dead[0]["losses"]) < DEADLY["steps"]
    assert not dead[0]["losses"][-1] < 50.0
    losses = guarded[0]["losses"]
    assert len(losses) == DEADLY["steps"]
    assert sum(losses[-LAST:]) / LAST < 0.6 * losses[0]
    assert guarded[0]["digest"] == guarded[1]["digest"]
    assert "set_lr_scale applied" in history(guarding, "guarded")[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_trainer_saves_and_stops_at_the_monitors_request(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    results, (*saved, stop) = asked(
        "train_huggingface.py", tmp_path, {"lr": 0.001, "accumulate": 2, "folder": str(folder)}
    )
    assert sorted(each.name for each in folder.iterdir()) == sorted(f"checkpoint-{step}" for step in saved)
    assert [len(each["losses"]) for each in results] == [stop] * 2
    assert len({each["digest"] for each in results}) == 1
    assert [each["closed"] for each in results] == ["closed"] * 2
