"""An accepted optimizer moves the weights as the scale says, and keeps its own rates; any other is refused."""

from __future__ import annotations

import copy
import random
import re
import threading
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from koopmon.agent.control.scale_proof import SCALE, ScaleProof, _gradient, prove
from koopmon.agent.control.scaled_view import close_view, scaled_view

Make = Callable[[Any], Optimizer]
WARM, STEPS = 6, 6


def parameters(*, matrices_only: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6)] + ([] if matrices_only else [(6,), (4,)])
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def set_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for each in weights:
        each.grad = torch.randn(each.shape, generator=generator).to(each.dtype)


def movements(weights: list[nn.Parameter], optimizer: Optimizer, steps: range, **view: Any) -> list[float]:
    """Train on fixed gradients and return the distance of each step. With `scale`, on views as the agent does."""
    distances = []
    for step in steps:
        set_gradients(weights, step)
        before = [each.detach().clone() for each in weights]
        if view:
            seen = scaled_view(optimizer, **view)
            type(optimizer).step.__wrapped__(seen)
            close_view(seen, optimizer)
        else:
            optimizer.step()
        distances.append(sum(float((a - b.detach()).norm()) ** 2 for a, b in zip(before, weights, strict=True)) ** 0.5)
    return distances


def examined(make: Make, *, rel: float = 1e-5, **options: Any) -> tuple[ScaleProof, list[float], bool]:
    """Return the proof, the ratio of scaled to unscaled movement in each step, and if the rates stay the user's."""
    runs = []
    for scaled in (False, True):
        weights = parameters(**options)
        torch.manual_seed(1)
        optimizer = make(weights)
        movements(weights, optimizer, range(WARM))
        proof = prove(optimizer)
        view = {"scale": SCALE, "sets_rate": proof.sets_rate} if scaled else {}
        torch.manual_seed(2)
        moved = movements(weights, optimizer, range(WARM, WARM + STEPS), **view)
        runs.append((moved, [group.get("lr") for group in optimizer.param_groups]))
    (own, own_rates), (less, rates) = runs
    same = all(a == b or float(a) == pytest.approx(float(b), rel=rel) for a, b in zip(own_rates, rates, strict=True))
    return proof, [b / a if a else SCALE for a, b in zip(own, less, strict=True)], same


FOLLOW: dict[str, Make] = {
    "SGD": lambda weights: SGD(weights, lr=0.01),
    "nesterov": lambda weights: SGD(weights, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "tensor": lambda weights: Adam(weights, lr=torch.tensor(0.01)),
    "fused": lambda weights: AdamW(weights, lr=0.01, fused=True),
    "amsgrad": lambda weights: AdamW(weights, lr=0.01, amsgrad=True, foreach=True),
    "groups": lambda weights: AdamW([{"params": [each], "lr": 0.01 * (1 + i)} for i, each in enumerate(weights)]),
    "tiny": lambda weights: AdamW(weights, lr=1e-9),
    "zero": lambda weights: AdamW(weights, lr=0.0),
    "frozen": lambda weights: AdamW([weights[0].requires_grad_(False), *weights[1:]], lr=0.01),
    **{
        name: lambda weights, name=name: getattr(torch.optim, name)(weights, lr=0.01)
        for name in ("Adam", "AdamW", "Adamax", "Adadelta", "Adagrad", "ASGD", "NAdam", "RAdam", "RMSprop")
    },
}


@pytest.mark.parametrize("name", FOLLOW)
def test_optimizers_that_follow_their_rate(name: str) -> None:
    proof, ratios, same = examined(FOLLOW[name])
    assert proof == ScaleProof()
    assert same
    if name not in ("zero", "tiny"):
        assert ratios[1:] == pytest.approx([SCALE] * (STEPS - 1), rel=0.1)


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_newer_optimizers_of_torch_follow_their_rate(name: str) -> None:
    kind = getattr(torch.optim, name, None) or pytest.skip(f"this torch has no {name}")
    proof, ratios, same = examined(lambda weights: kind(weights, lr=1e-3), matrices_only=True)
    assert proof == ScaleProof()
    assert same
    assert median(ratios) == pytest.approx(SCALE, rel=0.2)


class IgnoresItsGroup(SGD):
    """Keeps the rate of its construction."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for each in group["params"]:
                with torch.no_grad():
                    each -= self.defaults["lr"] * each.grad


class Late(SGD):
    """Uses the rate of ten steps ago."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            rates = self.state[group["params"][0]].setdefault("rates", [])
            rates.append(group["lr"])
            with torch.no_grad():
                for each in group["params"]:
                    each -= rates[max(len(rates) - 10, 0)] * each.grad


class Partly(SGD):
    """Decays the weights without the rate."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each *= 0.99


class Squared(SGD):
    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each -= group["lr"] ** 2 * each.grad


class Jumps(SGD):
    """Derives the weights from sums and the rate, as FTRL does: a lower rate moves them far, once."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    state = self.state[each]
                    state["sum"] = state.get("sum", torch.full_like(each, 5.0)) + each.grad
                    each.copy_(-group["lr"] * state["sum"])


class SetsAndIgnores(SGD):
    """Computes its rate, uses it, and writes it into the group for others to read."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                rate = 0.01
                for each in group["params"]:
                    each -= rate * each.grad
                group["lr"] = rate


class Bound(SGD):
    """Calls a method that was bound to the optimizer when it was made."""

    def __init__(self, weights: Any, lr: float) -> None:
        super().__init__(weights, lr=lr)
        self.inner = super().step

    def step(self, closure: Any = None) -> Any:
        return self.inner(closure)


class Noisy(SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        random.random()
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each += group["lr"] ** 0.5 * torch.randn_like(each)


class Aliased(SGD):
    """Updates the parameters through a list of its own, in which only small parts are its groups'."""

    def __init__(self, weights: Any, lr: float) -> None:
        super().__init__(weights, lr=lr)
        self.flat = [each.data for each in weights]

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for part, each in zip(self.flat, group["params"], strict=False):
                    part -= group["lr"] * each.grad


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda weights: torch.optim.Rprop(weights, lr=0.01), "moves the weights 1 times as far"),
        (lambda weights: IgnoresItsGroup(weights, lr=0.01), "moves the weights 1 times as far"),
        (lambda weights: Late(weights, lr=0.01), "moves the weights 1 times as far"),
        (lambda weights: Partly(weights, lr=0.001), "does not follow"),
        (lambda weights: Squared(weights, lr=0.01), "0.0156 times as far"),
        (lambda weights: Jumps(weights, lr=0.1), "does not follow"),
        (lambda weights: SetsAndIgnores(weights, lr=0.01), "does not follow|cannot be restored"),
        (lambda weights: Bound(weights, lr=0.01), "moves the weights 1 times as far"),
        (lambda weights: Noisy(weights, lr=0.01), "does not follow"),
        (lambda weights: SGD(weights, lr=None), "has no learning rate"),  # type: ignore[arg-type]
    ],
    ids=["Rprop", "ignores", "late", "partly", "squared", "jumps", "sets", "bound", "noisy", "none"],
)
def test_optimizers_that_do_not_follow_are_refused_with_the_reason(
    make: Make, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SGD, "__init__", lenient)
    assert_refused(make, reason)


_SGD_INIT = SGD.__init__


def lenient(self: SGD, weights: Any, lr: Any) -> None:
    _SGD_INIT(self, weights, lr=0.1)
    self.defaults["lr"] = lr
    for group in self.param_groups:
        group["lr"] = lr


def assert_refused(make: Make, reason: str) -> None:
    weights = parameters()
    optimizer = make(weights)
    for step in range(WARM):
        set_gradients(weights, step)
        if optimizer.param_groups[0]["lr"] is not None:
            optimizer.step()
    proof = prove(optimizer)
    assert type(optimizer).__name__ in proof.refusal
    assert re.search(reason, proof.refusal), proof.refusal


def test_a_step_that_sets_its_rate_and_reads_it_follows() -> None:
    class Setting(SGD):
        def step(self, closure: Any = None) -> Any:
            self.count = getattr(self, "count", 0) + 1
            for group in self.param_groups:
                group["lr"] = 0.1 / self.count**0.5
            return super().step(closure)

    proof, ratios, same = examined(lambda weights: Setting(weights, lr=1.0))
    assert proof == ScaleProof(sets_rate=True)
    assert same
    assert ratios == pytest.approx([SCALE] * STEPS, rel=1e-3)


def test_a_step_that_decays_its_rate_follows() -> None:
    class Decaying(AdamW):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for group in self.param_groups:
                group["lr"] *= 0.9

    proof, ratios, same = examined(lambda weights: Decaying(weights, lr=0.01))
    assert proof == ScaleProof()
    assert same
    assert ratios == pytest.approx([SCALE] * STEPS, rel=0.05)


def needing_a_closure() -> Optimizer:
    return torch.optim.LBFGS(parameters(), lr=0.1)


def communicating() -> Optimizer:
    class Communicating(SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for each in group["params"]:
                    torch.ops._c10d_functional.all_reduce(each.grad, "sum", "0")

    return Communicating(parameters(), lr=0.1)


def uncopyable() -> Optimizer:
    optimizer = SGD(parameters(), lr=0.1)
    optimizer.lock = threading.Lock()  # type: ignore[attr-defined]
    return optimizer


def diverged() -> Optimizer:
    return SGD([nn.Parameter(torch.empty(0))], lr=0.1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (needing_a_closure, "needs a closure"),
        (communicating, "communicates between the ranks"),
        (uncopyable, "cannot pickle"),
        (diverged, "no small parameter"),
    ],
)
def test_a_check_without_a_result_is_a_refusal(make: Callable[[], Optimizer], reason: str) -> None:
    assert reason in prove(make()).refusal


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from koopmon.agent.control.scale_proof import ScaleProof, prove
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
makers = [torch.optim.AdamW, torch.optim.SGD]
if hasattr(torch.optim, "Muon"):
    makers.append(lambda weights, lr: torch.optim.Muon([each for each in weights if each.dim() == 2], lr=lr))
for make in makers:
    optimizer = make(model.parameters(), lr=0.01)
    model.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert prove(optimizer) == ScaleProof(), prove(optimizer)
dist.destroy_process_group()
"""


@pytest.mark.process
def test_sharded_parameters_are_checked_without_communication(python: Callable[..., Any]) -> None:
    python("import warnings; warnings.simplefilter('ignore')\n" + SHARDED)


def test_the_check_writes_to_no_tensor_of_the_training() -> None:
    weights = parameters()
    outside = weights[0].data

    class Outside(SGD):
        def step(self, closure: Any = None) -> Any:
            outside.add_(1.0)

    optimizer = Outside(weights, lr=0.1)
    kept = outside.clone()
    assert "writes to tensors" in prove(optimizer).refusal
    assert torch.equal(outside, kept)


@pytest.mark.parametrize("make", [FOLLOW["amsgrad"], lambda weights: Aliased(weights, lr=0.1)])
def test_the_training_is_the_same_after_a_check(make: Make) -> None:
    weights = parameters()
    optimizer = make(weights)
    movements(weights, optimizer, range(3))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("a hook of the user's"))
    kept = copy.deepcopy((weights, [each.grad for each in weights], optimizer.state_dict()))
    states = torch.get_rng_state(), random.getstate()
    prove(optimizer)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    for old, new in zip(kept[0], weights, strict=True):
        assert torch.equal(old, new)
    assert str(optimizer.state_dict()) == str(kept[2])
    assert all(torch.equal(old, new.grad) for old, new in zip(kept[1], weights, strict=True))


@pytest.mark.parametrize("name", list(FOLLOW)[:4])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_whose_parameters_are_frozen_for_a_while_is_checked(name: str, steps: int) -> None:
    """Lightning freezes the parameters of all other optimizers while one of them takes its turn."""
    weights = parameters()
    optimizer = FOLLOW[name](weights)
    for _ in range(steps):
        for each in weights:
            each.grad = torch.ones_like(each)
        optimizer.step()
    for each in weights:
        each.requires_grad_(False)
    assert prove(optimizer) == ScaleProof()
    assert not any(each.requires_grad for each in weights)


@pytest.mark.parametrize("fault", ["weights", "state", "gradients", "no gradients", "zero gradients"])
def test_a_training_that_has_diverged_is_checked_all_the_same(fault: str) -> None:
    weights = parameters()
    optimizer = AdamW(weights, lr=0.01)
    movements(weights, optimizer, range(3))
    for each in weights:
        gradient: Any = each.grad
        match fault:
            case "weights":
                each.data.fill_(float("nan"))
            case "state":
                optimizer.state[each]["exp_avg"].fill_(float("inf"))
            case "gradients":
                gradient.fill_(float("nan"))
            case "no gradients":
                each.grad = None
            case "zero gradients":
                gradient.zero_()
    assert prove(optimizer) == ScaleProof()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precision_are_checked(dtype: torch.dtype) -> None:
    weights = parameters(dtype=dtype)
    optimizer = AdamW(weights, lr=1e-4)
    movements(weights, optimizer, range(3))
    assert prove(optimizer) == ScaleProof()


def test_sparse_gradients_are_checked() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(list(embedding.parameters()), lr=0.01)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert prove(optimizer) == ScaleProof()


def by_shape(make: Make) -> Make:
    """Muon and its variants are told which parameters are matrices."""
    return lambda weights: make(
        [
            {"params": [each for each in weights if each.dim() == 2], "use_muon": True},
            {"params": [each for each in weights if each.dim() < 2], "use_muon": False},
        ]
    )


def accepted_ones_follow(make: Make) -> str:
    """Return the refusal; check an accepted optimizer on fixed gradients."""
    errors: list[Exception] = []
    attempts: list[tuple[Make, dict[str, Any]]] = [(make, {}), (make, {"matrices_only": True}), (by_shape(make), {})]
    for attempt, options in attempts:
        try:
            # Some derive their rate from the weights, which differ.
            proof, ratios, same = examined(attempt, rel=0.2, **options)
            break
        except Exception as error:  # it needs a closure, a model or a process group: it cannot train here
            errors.append(error)
    else:
        pytest.skip(f"{type(errors[0]).__name__}: {errors[0]}")
    if not proof.refusal:
        assert same
        assert median(ratios[1:]) <= 0.3, ratios
        assert max(ratios) <= 1.5, ratios
    return proof.refusal


def names(module: str) -> list[str]:
    try:
        return sorted(pytest.importorskip(module).get_supported_optimizers())
    except pytest.skip.Exception:
        return ["not installed"]


@pytest.mark.parametrize("name", names("pytorch_optimizer"))
def test_published_optimizers_follow_or_are_refused(name: str) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    accepted_ones_follow(lambda weights: library.load_optimizer(name)(weights, lr=1e-3))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_optimizers_follow_or_are_refused(name: str) -> None:
    library = pytest.importorskip("schedulefree")

    def make(weights: Any) -> Optimizer:
        optimizer: Any = getattr(library, name)(weights, lr=1e-3)
        optimizer.train()
        return optimizer  # type: ignore[no-any-return]

    accepted_ones_follow(make)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({}, "has no learning rate"),
        ({"lr": 1e-3, "relative_step": False, "scale_parameter": False}, ""),
        ({"lr": 1e-3, "relative_step": False}, ""),
    ],
)
def test_adafactor_of_transformers_is_scaled_unless_it_chooses_its_rate(options: dict[str, Any], refusal: str) -> None:
    adafactor = pytest.importorskip("transformers").Adafactor
    found = accepted_ones_follow(lambda weights: adafactor(weights, **options))
    assert refusal in found
    assert bool(refusal) == bool(found)


def test_a_replicated_gradient_of_a_sharded_parameter_is_not_used() -> None:
    """As under sequence parallelism: the part of the parameter is smaller than that of its gradient."""
    parameter: Any = SimpleNamespace(detach=lambda: torch.zeros(4, 2), grad=torch.ones(8, 2))
    assert _gradient(parameter).shape == (4, 2)
    parameter.grad = torch.ones(4, 2)
    assert torch.equal(_gradient(parameter), torch.ones(4, 2))
