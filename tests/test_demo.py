"""Demonstration: its script, its conclusion, and a small slice of the whole."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from koopmon.demo import train
from koopmon.demo.training import DemoError, DemoRecord, DemoResult, LoggedStep, Setting, run_training
from koopmon.demo.view import summary_table, verdict
from koopmon.plots import Curve, PlotError, Watched, demo, require
from koopmon.views.run_summary import RecordedRun, summary_of

SMALL = Setting(lr=0.003, steps=6, warmup=2, batch=4, context=32, width=48, layers=3)


def steps(losses: list[float], *, diverged: bool = False) -> list[LoggedStep]:
    last = len(losses) - 1
    return [
        LoggedStep(step=index, loss=loss, grad_norm=1.0, diverged=diverged and index == last)
        for index, loss in enumerate(losses)
    ]


def ended(loss: float, policy: str | None = None, *, diverged: bool = False) -> DemoResult:
    losses = [5.5, 5.0, 4.0, *[loss] * (1 if diverged else 30)]
    return DemoResult(setting=SMALL, policy=policy, record=DemoRecord(steps(losses, diverged=diverged)), seconds=1.0)


GOOD, RUINED, DEAD, SAVED = ended(2.0), ended(2.5), ended(99.0, diverged=True), ended(2.05, "auto")


def test_the_corpus_is_the_standard_librarys_source_and_the_same_each_time() -> None:
    data = train.corpus()
    assert torch.equal(data, train.corpus())
    assert data.dtype == torch.uint8
    assert len(data) > 5_000_000
    text = data.numpy().tobytes()
    assert b"class Fraction(numbers.Rational)" in text
    assert b"class TestFraction" not in text


def test_the_script_is_ordinary() -> None:
    source = Path(train.__file__).read_text()
    assert not re.search(r"^\s*(import|from)\s+koopmon", source, re.MULTILINE)
    model = train.ByteTransformer(width=64, layers=2, heads=4, context=8)
    assert sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules()) == 5
    plain = train.ByteTransformer(width=64, layers=2, heads=4, context=8, norm="none")
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in plain.modules())
    assert float(model.blocks[0].up.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.blocks[0].up.bias.detach().abs().max()) == 0.0
    tokens = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    tokens[:, -1] += 1
    assert torch.equal(model(tokens)[:, :-1], before[:, :-1]), "no byte may see what follows"


def test_inputs_and_targets_are_one_byte_apart() -> None:
    data = torch.arange(200, dtype=torch.uint8)
    inputs, targets = train.draw(data, 4, 16, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(targets, inputs + 1)


def test_an_outcome() -> None:
    assert DEAD.diverged
    assert (DEAD.last_step, DEAD.final_loss) == (3, math.inf)
    assert (SAVED.last_step, SAVED.final_loss) == (32, pytest.approx(2.05))
    assert SAVED.is_as_good_as(GOOD)
    assert not RUINED.is_as_good_as(GOOD)
    assert not DEAD.is_as_good_as(GOOD)
    assert not ended(math.nan).is_as_good_as(GOOD)


def test_the_verdict_names_what_failed() -> None:
    assert "With koopmon it ends at 2.05" in verdict(GOOD, RUINED, SAVED)
    assert "With koopmon it ends at 2.05" in verdict(GOOD, DEAD, SAVED)
    assert "nothing to save" in verdict(GOOD, SAVED, SAVED)
    assert "Policy lr did not save it" in verdict(GOOD, RUINED, replace(RUINED, policy="lr"))


def test_the_table_has_the_actions_in_words() -> None:
    history = RecordedRun(name="demo", launches=[], points=[], beats=[], decisions=[])
    told = asdict(summary_of(history, Path("h.sqlite3"))) | {"num_rewinds": 1, "max_rate": 0.004, "exit_status": 0}
    table = summary_table([GOOD, DEAD, replace(SAVED, summary=told)])
    cells = [list(column.cells) for column in table.columns]
    assert cells[1] == ["2.000", "diverged at step 3", "2.050"]
    assert cells[2] == ["-", "-", "learning rate capped at 0.004; went back to earlier weights once"]


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    require("picture")
    curve = Curve(label="a", steps=[0, 1, 2], losses=[5.0, 60.0, math.inf], diverged=True, colour="red")
    watched = Watched(
        steps=[0, 2], risks=[0.1, 0.9], lr_scales=[1.0, 0.5], kss_alphas=[0.0, 0.15], commands=[(2, "set_kss")]
    )
    demo([curve], watched, tmp_path / "deep" / "demo.png", title="t")
    assert (tmp_path / "deep" / "demo.png").read_bytes().startswith(b"\x89PNG")
    nothing = Watched(steps=[], risks=[], lr_scales=[], kss_alphas=[])
    demo([], nothing, tmp_path / "empty.png", title="t")
    (tmp_path / "file").write_text("")
    with pytest.raises(PlotError, match="cannot be written"):
        demo([], nothing, tmp_path / "file" / "demo.png", title="t")


@pytest.mark.distributed
def test_a_training_alone_and_guarded_is_the_same_training(tmp_path: Path) -> None:
    heard: list[DemoRecord] = []
    alone = run_training("alone", SMALL, None, tmp_path, heard.append)
    assert [step.step for step in alone.record.steps] == list(range(6))
    assert not alone.diverged
    assert heard[-1].steps == alone.record.steps
    guarded = run_training("watched", SMALL, "observe", tmp_path)
    assert [(step.loss, step.grad_norm) for step in guarded.record.steps] == [
        (step.loss, step.grad_norm) for step in alone.record.steps
    ], "watching must not change the training"
    assert guarded.summary["adapter"] == "transformer"
    assert guarded.record.observations
    assert guarded.record.observations[0].observation["spectral_radius"] > 0.0


@pytest.mark.distributed
def test_divergence_ends_a_training_and_another_failure_is_an_error(tmp_path: Path) -> None:
    dead = run_training("dead", replace(SMALL, lr=1e4, warmup=1, norm="none", clip=0.0), None, tmp_path)
    assert dead.diverged
    assert dead.last_step < 5
    with pytest.raises(DemoError, match="the broken training ended with status 1"):
        run_training("broken", replace(SMALL, width=49), None, tmp_path)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_verb_says_when_there_was_nothing_to_save(tmp_path: Path) -> None:
    words = ["demo", "--policy", "observe", "--steps", "3", "--lr", "0.001", "--json", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "koopmon", *words],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"TERM": "dumb"},
    )
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["shown"] is False
    assert [training["policy"] for training in told["trainings"]] == [None, None, None, "observe"]
    assert "nothing to save" in told["verdict"]
    assert Path(told["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "guarded: lr 0.001, clipping, koopmon" in done.stderr
