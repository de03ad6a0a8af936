"""The callback for Lightning's Trainer, with the real library on two gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from koopmon.cli.embedded import EmbeddedMonitor
from tests.integrations.conftest import asked, history, trained
from tests.integrations.programs.trainings import DEADLY_RATE, LAST

CALM = {"lr": 0.001, "steps": 14, "accumulate": 2, "eval": 5, "workers": 1}
DEADLY = {"lr": DEADLY_RATE, "steps": 100, "seed": 1}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_are_bit_identical_when_watched_and_saved_when_they_would_diverge(
    monitors: Callable[[str], EmbeddedMonitor], tmp_path: Path
) -> None:
    watching, guarding = monitors("observe"), monitors("lr")
    folder = str(tmp_path / "checkpoints")
    resuming = {**CALM, "resume": f"{folder}/step=7.ckpt"}
    phases = [
        CALM,
        {**CALM, "endpoint": watching.endpoint, "run": "watched", "folder": folder, "save": 7},
        resuming,
        {**resuming, "endpoint": watching.endpoint, "run": "resumed"},
        DEADLY,
        {**DEADLY, "endpoint": guarding.endpoint, "run": "guarded"},
    ]
    plain, watched, alone, resumed, dead, guarded = trained("train_lightning.py", tmp_path / "out", phases)
    watching.close()
    guarding.close()

    for rank in range(2):
        assert len(plain[rank]["losses"]) == 2 * CALM["steps"], "one for each batch"
        assert watched[rank]["losses"] == plain[rank]["losses"]
        assert watched[rank]["digest"] == plain[0]["digest"]
        assert len(alone[rank]["losses"]) == CALM["steps"], "half of the way was gone before"
        assert resumed[rank]["losses"] == alone[rank]["losses"]
        assert resumed[rank]["digest"] == alone[0]["digest"]
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
    phase = {"lr": 0.001, "accumulate": 2, "folder": str(folder), "save": 100_000}
    results, (*saved, stop) = asked("train_lightning.py", tmp_path, phase)
    assert sorted(each.name for each in folder.iterdir()) == sorted(f"koopmon-step={step}.ckpt" for step in saved)
    assert [len(each["losses"]) for each in results] == [2 * stop] * 2, "one for each batch"
    assert len({each["digest"] for each in results}) == 1
    assert [each["closed"] for each in results] == ["closed"] * 2


@pytest.mark.slow
@pytest.mark.distributed
def test_without_a_directory_for_it_no_checkpoint_is_saved(tmp_path: Path) -> None:
    results, (*_, stop) = asked("train_lightning.py", tmp_path, {"lr": 0.001})
    assert [len(each["losses"]) for each in results] == [stop] * 2
