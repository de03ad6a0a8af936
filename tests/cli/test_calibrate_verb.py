"""From recorded runs to a calibrator, and from a calibrator to `koopmon profile`."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from koopmon.cli import main
from koopmon.cli.profile import Forecast
from koopmon.history.plain_profile import PlainProfile
from koopmon.history.writer import HistoryWriter
from koopmon.risk.calibration import Example, fit, load, save
from koopmon.spectral import profile_states
from tests.factories import hello, observation, record_observation

NUM_RUNS = 60
MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        return x + 0.5 * self.inner(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

def make():
    torch.manual_seed(0)
    return Model(), torch.randn(8, 32, 16)
"""


class Recorder:
    """Write one short run after another into a history."""

    def __init__(self, path: Path) -> None:
        self.store = HistoryWriter.open(path)
        self.count = 0

    def run(
        self,
        rate: float | None,
        *,
        diverges: bool,
        scale: float = 0.3,
        width: int = 8,
        lr_scale: float = 1.0,
        first_step: int = 0,
        sized: bool = True,
    ) -> None:
        self.count += 1
        name, incarnation = f"run-{self.count}", f"{self.count:08x}"
        said = hello(name, incarnation, num_layers=2, width=width, rate_sized_steps=sized, update_exponent=0.4)
        self.store.record_hello(0.0, said)
        generator = torch.Generator().manual_seed(self.count)
        x = torch.randn((64, width), generator=generator)
        states = [x, x + scale * torch.randn((64, width), generator=generator) @ torch.randn((width, width))]
        profile = profile_states([*states, states[1] * 1.1 + 0.1 * x], svd_rank=4, kreiss="never")
        self.store.record_profile(
            0.0,
            name,
            incarnation,
            first_step,
            num_shards=1,
            masked=False,
            seconds=0.0,
            profile=PlainProfile.of(profile),
        )
        for step in range(3):
            record_observation(
                self.store,
                float(step),
                step,
                name,
                incarnation,
                learning_rate=rate,
                loss=60.0 if diverges and step == 2 else 2.0,
                lr_scale=lr_scale,
                observation=observation(step),
            )


@pytest.fixture
def histories(tmp_path: Path) -> list[str]:
    """Two stores: runs diverge at high rates, with some noise; some runs are unusable."""
    draw = random.Random(0)
    paths = [tmp_path / name for name in ("a.sqlite3", "b.sqlite3")]
    recorders = [Recorder(path) for path in paths]
    for index in range(NUM_RUNS):
        log_rate = draw.uniform(-4, -1)
        dies = draw.random() < 1 / (1 + math.exp(-6 * (log_rate + 2.5)))
        recorders[index % 2].run(10**log_rate, diverges=dies, width=(8, 12)[index // 2 % 2])
    recorders[0].run(0.01, diverges=False, lr_scale=0.5)
    recorders[0].run(None, diverges=False)
    recorders[1].run(0.01, diverges=False, first_step=500)
    for recorder in recorders:
        recorder.store.close()
    return list(map(str, paths))


def test_recorded_runs_make_a_calibrator_that_knows_its_error(
    histories: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "calibrator.json", tmp_path / "reliability.png"
    assert main(["calibrate", *histories, "--out", str(out), "--png", str(png)]) == 0
    told = capsys.readouterr()
    assert "transformer: fitted on 60 runs" in told.out
    for why in ("koopmon acted on it", "learning rate is unknown", "no profile of its first 10 steps"):
        assert f"1 of 63 runs left out: {why}" in told.err or why in told.err
    calibrator = load(out)
    assert (calibrator.adapter, calibrator.num_runs) == ("transformer", 60)
    assert calibrator.weights[0] > 0
    assert calibrator.held_out_error is not None
    assert calibrator.held_out_error < 0.25
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("keep", "arguments", "says"),
    [
        (0, [], "no such file"),
        (1, ["--adapter", "mamba"], "--adapter 'mamba': no run can serve; architectures seen: transformer"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    histories: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keep: int,
    arguments: list[str],
    says: str,
) -> None:
    stores = histories if keep else [str(tmp_path / "nowhere.sqlite3")]
    out = tmp_path / "calibrator.json"
    assert main(["calibrate", *stores, "--out", str(out), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_too_few_runs_are_refused_with_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(tmp_path / "few.sqlite3")
    for index in range(5):
        recorder.run(0.01, diverges=index == 0)
    recorder.store.close()
    out = tmp_path / "calibrator.json"
    assert main(["calibrate", str(tmp_path / "few.sqlite3"), "--out", str(out)]) == 2
    assert "5 runs, 1 of them diverged: at least 20 are needed" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def calibrated(tmp_path: Path) -> list[str]:
    """Arguments of `koopmon profile` with a calibrator for transformers, beside one for experts."""
    (tmp_path / "model.py").write_text(MODEL)
    examples = [
        Example(update_exponent=0.5, learning_rate=10 ** (-5 + i / 15), width=16, num_layers=3, diverged=i % 60 > 30)
        for i in range(60)
    ]
    save(fit(examples, held_out_error=0.04), tmp_path / "calibrator.json")
    save(fit(examples, adapter="moe"), tmp_path / "experts.json")
    factory = f"{tmp_path / 'model.py'}:make"
    return ["profile", factory, "--num-samples", "256", "--calibrator", str(tmp_path / "calibrator.json")]


def test_profile_tells_the_probability_and_the_highest_rate(
    calibrated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*calibrated, "--lr", "0.001", "--max-lr", "--json"]) == 0
    forecast = json.loads(capsys.readouterr().out)["forecast"]
    assert 0.2 < forecast["divergence_probability"] < 0.8, "the runs died from 0.001 on"
    assert forecast["max_learning_rate"] < forecast["even_learning_rate"] == pytest.approx(1.07e-3, rel=0.2)
    assert main([*calibrated, "--max-lr"]) == 0
    said = capsys.readouterr().out
    assert "highest learning rate survived with probability 95%" in said
    assert "(expected calibration error 0.040)" in said


def test_a_rate_at_the_end_of_the_runs_is_a_lower_bound() -> None:
    """A tame model has no unsafe rate among the rates of the calibrator."""
    known = {"learning_rate": None, "divergence_probability": None, "held_out_error": None}
    (line,) = Forecast(
        max_learning_rate=0.05, even_learning_rate=0.067, highest_known_learning_rate=0.067, **known
    ).lines()
    end = "0.067 or more, the highest that the calibrator has seen for this size"
    assert line == f"highest learning rate survived with probability 95%: 0.05; with 50%: {end}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--calibrator FILE needs --lr RATE or --max-lr"),
        (["--max-lr", "--calibrator", "experts.json"], "is for moe; this model's adapter is transformer"),
        (["--max-lr", "--calibrator", "nowhere.json"], "nowhere.json: No such file"),
    ],
)
def test_a_calibrator_that_does_not_fit_is_refused(
    calibrated: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*calibrated, *arguments]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
