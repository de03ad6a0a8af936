"""Small models of the other families: structure and training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("scipy")

import torch
from rich.console import Console
from scipy.interpolate import BSpline

import koopmon
from benchmarks import architectures, family_alarms
from benchmarks.families import FAMILIES, SPLINE_ORDER, Experts, Family, basis_functions, language_model
from benchmarks.tasks import TASKS, Task, draw, loss_of, share_right
from benchmarks.training import Recipe, train

torch.set_num_threads(1)
ADAPTERS = {"transformer": "transformer", "mamba": "mamba", "kan": "kan"}
SIZES = {"width": 16, "num_layers": 2, "vocabulary": 64, "num_tokens": 16, "seed": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_seeded_causal_and_known_by_its_adapter(family: Family) -> None:
    model = language_model(family, **SIZES)
    tokens = torch.randint(64, (3, 16))
    logits = model(tokens)
    assert torch.equal(language_model(family, **SIZES)(tokens), logits)
    changed = tokens.clone()
    changed[:, 10:] = 63 - changed[:, 10:]
    assert torch.allclose(model(changed)[:, :10], logits[:, :10], atol=1e-5)
    found = koopmon.discover(model, tokens)
    assert found.adapter.name == ADAPTERS.get(family, "moe")
    assert len(found.points) == 2


def test_splines_are_those_of_scipy() -> None:
    knots = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64)
    x = torch.linspace(-0.9, 0.9, 101, dtype=torch.float64)  # within the grid: beyond it scipy extrapolates
    ours = basis_functions(x[:, None], knots[None])[:, 0]
    num = len(knots) - SPLINE_ORDER - 1
    for index in range(num):
        one = BSpline(knots.numpy(), torch.eye(num, dtype=torch.float64)[index].numpy(), SPLINE_ORDER)
        assert torch.allclose(ours[:, index], torch.from_numpy(one(x.numpy())), atol=1e-12)
    assert torch.allclose(ours.sum(-1), torch.ones_like(x))
    assert not basis_functions(torch.tensor([[-2.5], [2.5]]), knots[None]).any()


@pytest.mark.parametrize("renormalised", [False, True])
def test_a_mixture_is_the_weighted_sum_of_the_experts_it_chose(renormalised: bool) -> None:
    experts = Experts(8, 4, 2, renormalised=renormalised)
    x = torch.randn(5, 3, 8)
    weights, chosen = experts.gate(x).softmax(-1).topk(2)
    if renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    every = torch.stack([expert(x) for expert in experts.experts], -2)
    expected = (every.gather(-2, chosen[..., None].expand(-1, -1, -1, 8)) * weights[..., None]).sum(-2)
    assert torch.allclose(experts(x), expected, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_score_a_model_that_knows_the_answer(task: Task) -> None:
    tokens, labels = draw(task, 4, seed=0)
    vocabulary = TASKS[task]["vocabulary"]
    answers = tokens.roll(-1, 1)
    if labels.dim() == 1:
        answers[:, -1] = labels
    logits = 50.0 * torch.nn.functional.one_hot(answers, vocabulary).float()
    assert loss_of(task, logits, labels) < 1e-6
    assert share_right(task, logits, labels) == 1.0


@pytest.mark.parametrize("family", ["moe-2", "mamba", "kan"])
def test_a_family_trains_and_is_profiled(family: Family) -> None:
    recipe = Recipe(
        task="text", family=family, norm="pre", width=16, num_layers=2, lr=0.003, seed=0, steps=3, shaping="published"
    )
    scalars, series = train(recipe)
    assert scalars["died_at"] is None
    assert series["near_unit_mass"].shape == (3, 2)


@pytest.mark.slow
@pytest.mark.process
def test_both_tables_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "WIDTH", 16)
    monkeypatch.setattr(architectures, "NUM_LAYERS", 2)
    monkeypatch.setattr(architectures, "TRAINED", ("transformer", "moe-2"))
    monkeypatch.setattr(architectures, "RATES", (0.003,))
    monkeypatch.setattr(architectures, "BASE", Recipe(task="text", width=16, num_layers=2, lr=0.0, seed=0, steps=2))
    monkeypatch.setattr(architectures.campaign, "console", lambda: Console(file=io.StringIO()))
    out = tmp_path / "told.json"
    assert architectures.main(["--seeds", "1", "--workers", "1", "--out", str(out), "--work", str(tmp_path)]) == 0
    told = json.loads(out.read_text())
    assert [row["label"] for row in told["spectra"]] == [variant.label for variant in architectures.VARIANTS]
    assert {(row["family"], row["num_runs"]) for row in told["trained"]} == {("transformer", 1), ("moe-2", 1)}


@pytest.mark.slow
@pytest.mark.process
def test_the_alarms_of_a_family_are_counted_by_what_became_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Recipe(task="text", width=16, num_layers=2, lr=0.0, seed=0, steps=25, warmup=1)
    monkeypatch.setattr(family_alarms, "BASE", base)
    monkeypatch.setattr(family_alarms, "ADAPTERS", {"transformer": "transformer", "kan": "kan"})
    monkeypatch.setattr(family_alarms, "RATES", (0.001, 3.0))
    out = tmp_path / "alarms.json"
    assert family_alarms.main(["--out", str(out), "--seeds", "1", "--workers", "1"]) == 0
    rows = {(row["family"], row["norm"]): row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {(family, norm) for family in ("transformer", "kan") for norm in ("pre", "none")}
    bare = rows["transformer", "none"]
    assert bare["num_diverged"] == 1
    assert bare["healthy_steps"] == 25
    assert bare["alarms_by_rate"] == {"0.001": 0, "3": 0}
    assert all(row["num_runs"] == 2 for row in rows.values())


def test_a_family_has_the_schemes_that_it_has() -> None:
    with pytest.raises(ValueError, match="norm = 'post': kan allows pre, none"):
        Recipe(family="kan", norm="post", lr=0.1, seed=0).model()
