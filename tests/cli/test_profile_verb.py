"""`koopmon profile` and `koopmon adapters`. Another process costs an import of torch, so most tests share this one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli import main
from koopmon.cli.factory import FactoryError, load

Refused = Callable[..., None]

FACTORY = """
import torch
from torch import nn
from neighbour import WIDTH

class Block(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = scale

    def forward(self, x):
        return x + self.scale * self.inner(self.norm(x))

class Model(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(scale) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

def make(scale=1.0):
    torch.manual_seed(0)
    return Model(scale), torch.randn(8, 32, WIDTH)

def keywords():
    model, x = make()
    return model, {"x": x}

def with_loss():
    return *make(), lambda model: (model(torch.randn(8, 32, WIDTH)) - 1.0).square().mean()

def bare_with_loss():
    model, *rest = with_loss()
    for block in model.blocks:
        block.norm = nn.Identity()
    return model, *rest

def not_a_loss():
    return *make(), 0.5

def breaks():
    def loss(model):
        raise RuntimeError("no\\ndata")
    return *make(), loss

def still():
    return make(0.0)

def not_finite():
    model, x = make()
    return model, x.fill_(float("nan"))

def bare():
    model, x = make()
    return nn.Sequential(*model.blocks), x

def number():
    return 3

def broken():
    raise RuntimeError("no\\nway")

def refuses():
    model, _ = make()
    return model, torch.ones(2, 2)

def no_chain():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.ones(4, 2)
"""


EXPERTS = """

class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, h):
        return sum(share[..., None] * f(h) for share, f in zip(self.gate(h).softmax(-1).unbind(-1), self.experts))


def mixture():
    model, batch = make()
    for block in list(model.blocks)[1:]:
        block.mixture = Mixture()
        block.register_forward_hook(lambda block, args, h: h + 0.1 * block.mixture(h))
    return model, batch
"""


@pytest.fixture
def bench(koopmon: Any) -> Any:
    """Run verbs in other processes, in the directory of the factories."""
    (koopmon.directory / "factory.py").write_text(FACTORY)
    (koopmon.directory / "neighbour.py").write_text("WIDTH = 16\n")
    return koopmon


Verb = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def here(bench: Any, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Verb:
    """Run verbs in this process."""
    monkeypatch.chdir(bench.directory)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words: str) -> subprocess.CompletedProcess[bytes]:
        try:
            status = main(words)
        finally:
            for name in ("factory", "neighbour"):
                sys.modules.pop(name, None)
        out, err = capfdbinary.readouterr()
        return subprocess.CompletedProcess(words, status, out, err)

    return call


@pytest.mark.process
def test_a_table_a_verdict_and_a_picture(bench: Any, tmp_path: Path) -> None:
    done = bench("profile", "factory.py:make", "--png", "deep/spectrum.png")
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "256 of 256 tokens" in text
    rows = [line.split("│")[1].strip() for line in text.splitlines() if line.count("│") > 5]
    assert rows == ["0", "1", "2", "mean"]
    assert {line.count("│") for line in text.splitlines() if line.count("│") > 5} == {12}, "no column without a heading"
    assert "initial risk: " in text
    assert "not informative" not in text
    assert (tmp_path / "deep" / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_everything(here: Verb) -> None:
    first = json.loads(here("profile", "factory.py:make", "--json", "--num-samples", "200").stdout)
    assert first["adapter"] == "transformer"
    assert first["points"] == ["blocks.0", "blocks.1", "blocks.2"]
    layers = first["profile"]["layers"]
    assert len(layers) == 3
    assert {layer["num_samples"] for layer in layers} == {200}
    assert {len(layer["eigenvalues"]) for layer in layers} == {16}
    score = math.fsum(layer["near_unit_mass"] for layer in layers) / 3
    assert first["initial_risk"]["score"] == pytest.approx(score)
    same = json.loads(here("profile", "factory:keywords", "--json", "--num-samples", "200").stdout)
    assert same == first, "a module and a file, arguments and keywords name the same forward pass"
    small = json.loads(here("profile", "factory.py:make", "--json", "--svd-rank", "4").stdout)
    assert {len(layer["eigenvalues"]) for layer in small["profile"]["layers"]} == {4}


def test_what_the_family_measures_stands_beside_the_spectra(here: Verb, bench: Any) -> None:
    source = bench.directory / "factory.py"
    source.write_text(source.read_text() + EXPERTS)
    found = json.loads(here("profile", "factory.py:mixture", "--json").stdout)
    assert found["adapter"] == "moe"
    assert set(found["observables"]) == {"router_entropy", "load_imbalance", "top_expert_share"}
    entropies = found["observables"]["router_entropy"]
    assert [0 < value <= 1 for value in entropies[1:]] == [True, True]
    assert entropies[0] is None, "the first block is dense"
    text = here("profile", "factory.py:mixture").stdout.decode()
    assert "load_imbalance" in text
    assert "router_entropy: Mean entropy" in text


def test_a_stack_without_a_path_of_its_own_has_a_name_all_the_same(here: Verb) -> None:
    assert "stack the model itself;" in here("profile", "factory.py:bare").stdout.decode()


def test_the_highest_safe_rate_comes_from_warm_ups_of_a_copy(here: Verb) -> None:
    found = json.loads(here("profile", "factory.py:with_loss", "--max-lr", "--json").stdout)
    assert "forecast" not in found, "the calibrator has no ruined run of normalised layers"
    peak = found["peak_rate"]
    assert len(peak["alarm_rates"]) == 3
    assert peak["num_steps"] > 0
    assert 0.0 < peak["low"] < (peak["high"] or math.inf)
    text = here("profile", "factory.py:make", "--max-lr").stdout.decode()
    assert "highest safe peak learning rate: 0.031, between 0.0078 and 0.12: from the width 16 alone" in text


def test_without_a_normalisation_the_shipped_calibrator_predicts(here: Verb) -> None:
    found = json.loads(here("profile", "factory.py:bare_with_loss", "--max-lr", "--lr", "1e-4", "--json").stdout)
    assert "peak_rate" not in found
    assert 0.0 < found["forecast"]["max_learning_rate"] < found["forecast"]["even_learning_rate"]
    assert found["forecast"]["divergence_probability"] < 0.05
    text = here("profile", "factory.py:make", "--lr", "1e-4").stdout.decode()
    assert "divergence probability at learning rate 0.0001: 0.00" in text


def test_a_model_that_does_not_move_is_not_called_risky(here: Verb) -> None:
    text = here("profile", "factory.py:still").stdout.decode()
    assert "initial risk: not informative" in text
    assert "high" not in text


@pytest.mark.parametrize(
    ("factory", "said", "status"),
    [
        ("factory.py", ["module:function"], 2),
        ("factory.py:", ["module:function"], 2),
        ("missing.py:make", ["missing.py", "no such file"], 2),
        ("missing_module:make", ["missing_module", "ModuleNotFoundError"], 2),
        ("factory.py:missing", ["no function missing"], 2),
        ("factory.py:number", ["(model, batch)", "int"], 2),
        ("factory.py:broken", ["RuntimeError: no way"], 2),
        ("factory.py:not_finite", ["not finite"], 2),
        ("factory.py:refuses", ["forward pass", "RuntimeError"], 1),
        ("factory.py:no_chain", ["Sequential"], 2),
        ("factory.py:not_a_loss", ["(model, batch, loss)", "float"], 2),
    ],
)
def test_a_mistake_is_one_line(here: Verb, one_line: Refused, factory: str, said: list[str], status: int) -> None:
    one_line(here("profile", factory), *said, status=status)


def test_a_loss_that_raises_is_one_line(here: Verb, one_line: Refused) -> None:
    one_line(here("profile", "factory.py:breaks", "--max-lr"), "RuntimeError: no data", "warm-up", status=1)


def test_a_script_that_parses_its_command_line_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "parsing.py"
    script.write_text(
        "import argparse\nfrom torch import nn\n"
        "def make():\n"
        "    argparse.ArgumentParser().parse_args()\n"
        "    return nn.Linear(2, 2), None\n"
    )
    monkeypatch.setattr(sys, "argv", ["koopmon", "profile", "--json"])
    load(f"{script}:make")
    assert sys.argv == ["koopmon", "profile", "--json"]
    with pytest.raises(FactoryError):
        load(f"{script}:absent")
    assert sys.argv == ["koopmon", "profile", "--json"]


def test_an_unknown_adapter_is_one_line(here: Verb, one_line: Refused) -> None:
    one_line(here("profile", "factory.py:make", "--adapter", "mamba2"), "'mamba2'", "transformer")


def test_a_picture_without_matplotlib_is_one_line_before_any_work(
    here: Verb, one_line: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.plots.find_spec", lambda name: None)
    one_line(here("profile", "no_such_module:make", "--png", "x.png"), "x.png", "koopmon[plots]", status=1)
    assert here("profile", "factory.py:make").returncode == 0, "only the picture needs it"


@pytest.mark.process
def test_adapters_name_the_plugin_that_brought_them(koopmon: Any, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "broken-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[koopmon.adapters]\nbroken = no_such_module\n")
    found = json.loads(koopmon("adapters", "--json", PYTHONPATH=str(site)).stdout)
    brought = {row["name"]: row["distribution"].split()[0] for row in found["adapters"]}
    assert brought["transformer"] == "koopmon"
    (failure,) = found["failures"]
    assert failure["plugin"] == "broken"
    assert failure["distribution"] == "broken 1.2"
    assert "no_such_module" in failure["reason"]
    table = koopmon("adapters", PYTHONPATH=str(site)).stdout.decode()
    assert "broken 1.2" in table
    assert "not usable" in table
