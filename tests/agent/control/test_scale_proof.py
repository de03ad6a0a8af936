"""An accepted optimizer moves the weights as the scale says, and keeps its own rates; any other is refused."""

from __future__ import annotations

import copy
import math
import random
import re
import signal
import threading
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from koopmon.agent.control import scale_proof
from koopmon.agent.control.scale_proof import (
    CLEAR,
    MAX_GROUPS,
    SCALE,
    ScaleProof,
    _clear,
    _gradient,
    _Isolation,
    _NotProvenError,
    _sample,
    prove,
    prove_groups,
)
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


class SquaresLastRate(SGD):
    """Squares the rate of its last group in each step, after its use."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.param_groups[-1]["lr"] **= 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_change_of_the_rate_that_cannot_be_undone_is_refused_in_any_group(count: int) -> None:
    optimizer = SquaresLastRate([{"params": [each]} for each in parameters()[:count]], lr=0.9)
    wanted = "SquaresLastRate changes its learning rate in each step in a way that cannot be restored"
    assert prove(optimizer) == ScaleProof(wanted)


def test_a_group_without_a_rate_leaves_the_others_scaled() -> None:
    class Partial(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for each in group["params"] if group["lr"] is not None else ():
                        each -= group["lr"] * each.grad

    first, second, *_ = parameters()
    optimizer = Partial([{"params": [first]}, {"params": [second]}], lr=0.1)
    optimizer.param_groups[1]["lr"] = None
    assert prove(optimizer) == ScaleProof()


class Lagging(SGD):
    """Uses the rate of `lag` steps ago."""

    lag = 2

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            rates = self.state[group["params"][0]].setdefault("rates", [])
            rates.append(group["lr"])
            with torch.no_grad():
                for each in group["params"]:
                    each -= rates[max(len(rates) - 1 - self.lag, 0)] * each.grad


def test_one_that_uses_the_rate_of_two_steps_ago_follows_and_of_three_does_not() -> None:
    proof, ratios, same = examined(lambda weights: Lagging(weights, lr=0.01))
    assert proof == ScaleProof()
    assert same
    assert ratios == pytest.approx([1.0, 1.0] + [SCALE] * (STEPS - 2), rel=1e-3)
    late = Lagging(parameters(), lr=0.01)
    late.lag = 3
    assert "moves the weights 1 times as far" in prove(late).refusal


def test_a_step_that_decays_its_rate_in_place_follows() -> None:
    class DecayingInPlace(SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            for group in self.param_groups:
                group["lr"].mul_(0.9)

    assert prove(DecayingInPlace(parameters(), lr=torch.tensor(0.01))) == ScaleProof()


def test_all_copies_draw_the_same_random_numbers() -> None:
    """The parameter has one element: other draws would differ by more than the tolerance."""

    class Dice(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for each in group["params"]:
                        each -= group["lr"] * torch.randn(()) ** 3

    for seed in range(3):
        torch.manual_seed(seed)
        assert prove(Dice([nn.Parameter(torch.zeros(1))], lr=0.1)) == ScaleProof()


@pytest.mark.parametrize("far", [0.0, math.inf, math.nan])
def test_one_that_does_not_move_the_weights_by_a_finite_distance_is_refused(far: float) -> None:
    class Moving(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for each in group["params"]:
                        each += far

    assert "does not move the weights by a finite distance" in prove(Moving(parameters(), lr=0.1)).refusal


def test_marks_of_a_parameter_are_those_of_its_copy() -> None:
    class Marked(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for each in group["params"]:
                        each -= (1.0 if each.ignores else group["lr"]) * each.grad

    weights: list[Any] = parameters()
    for each in weights:
        each.ignores = False
    assert prove(Marked(weights, lr=0.1)) == ScaleProof()
    weights[-1].ignores = True
    assert "does not follow" in prove(Marked(weights, lr=0.1)).refusal


@pytest.mark.parametrize("count", [1, 3, 8, 9, 20])
def test_the_check_takes_evenly_spaced_groups(count: int) -> None:
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(count)]
    taken = _sample(SGD([{"params": [each]} for each in weights], lr=0.1).param_groups)
    every = math.ceil(count / MAX_GROUPS)
    assert list(map(id, taken)) == list(map(id, weights[::every]))


def test_the_check_takes_the_smallest_parameter_and_the_smallest_matrix_of_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen, empty, bias, wide, square, cube = (
        nn.Parameter(torch.zeros(shape)) for shape in ((1,), (0,), (3,), (2, 8), (3, 3), (2, 2, 2))
    )
    frozen.requires_grad_(False)

    def taken(*weights: nn.Parameter) -> list[int]:
        return list(map(id, _sample(SGD(weights, lr=0.1).param_groups)))

    assert taken(wide, square, bias, frozen, empty) == [id(bias), id(square)]
    assert taken(wide, cube, square) == [id(cube)], "one is both"
    assert taken(frozen) == [id(frozen)], "a loop may freeze an optimizer for a while"
    other = nn.Parameter(torch.zeros(1), requires_grad=False)
    partly = SGD([{"params": [frozen, bias]}, {"params": [other]}], lr=0.1)
    assert list(map(id, _sample(partly.param_groups))) == [id(bias)], "a frozen group has no part in the training"
    assert taken(empty) == []
    assert len(taken(nn.Parameter(torch.zeros(())))) == 1
    square.grad = torch.zeros(3, 3)
    wide.grad = torch.zeros(2, 8)
    assert taken(wide, square, bias, cube) == [id(square)], "one with a gradient takes part in the training"
    monkeypatch.setattr(scale_proof, "MAX_ELEMENTS", 9)
    assert taken(wide, square, bias) == [id(square)]
    monkeypatch.setattr(scale_proof, "MAX_ELEMENTS", 8)
    assert taken(wide, square, bias) == []


def test_the_check_takes_a_group_of_every_kind() -> None:
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(20)]
    groups = [{"params": [each], "use_muon": at % 3 == 1, "decay": 0.1 * at} for at, each in enumerate(weights)]
    groups[13]["name"] = "head"
    taken = _sample(SGD(groups, lr=0.1).param_groups)
    assert list(map(id, taken)) == [id(weights[at]) for at in (0, 3, 6, 9, 12, 15, 18, 1, 13)]


def test_an_exception_of_a_signal_handler_ends_the_check() -> None:
    class Alarmed(SGD):
        def step(self, closure: Any = None) -> Any:
            signal.raise_signal(signal.SIGUSR1)

    class EndedError(Exception):
        pass

    def end(*_: object) -> None:
        raise EndedError

    before = signal.signal(signal.SIGUSR1, end)
    try:
        with pytest.raises(EndedError):
            prove(Alarmed(parameters(), lr=0.1))
    finally:
        signal.signal(signal.SIGUSR1, before)


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
    class Locked(SGD):
        def step(self, closure: Any = None) -> Any:
            with self.lock:
                return super().step(closure)

    optimizer: Any = Locked(parameters(), lr=0.1)
    optimizer.lock = threading.Lock()
    return optimizer  # type: ignore[no-any-return]


def diverged() -> Optimizer:
    return SGD([nn.Parameter(torch.empty(0))], lr=0.1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (needing_a_closure, "needs a closure"),
        (communicating, "communicates between the ranks"),
        (uncopyable, "its step needs its lock, which cannot be copied"),
        (diverged, "no small parameter"),
    ],
)
def test_a_check_without_a_result_is_a_refusal(make: Callable[[], Optimizer], reason: str) -> None:
    proof = prove(make())
    assert reason in proof.refusal
    assert not proof.conclusive


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


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda each: each.add_(1.0),
    "out": lambda each: torch.add(each, 1.0, out=each),
    "foreach": lambda each: torch._foreach_add_([each], 1.0),
    "copy": lambda each: each.copy_(torch.ones_like(each)),
    "view": lambda each: each.view(-1)[1:].zero_(),
}


@pytest.mark.parametrize("held", ["weights", "gradient", "state"])
@pytest.mark.parametrize("write", WRITES)
def test_the_check_writes_to_no_tensor_of_the_training(write: str, held: str) -> None:
    outside: list[Tensor] = []

    class Outside(SGD):
        def step(self, closure: Any = None) -> Any:
            for each in outside:
                WRITES[write](each)
            return super().step(closure)

    weights = parameters()
    optimizer = Outside(weights, lr=0.1, momentum=0.9)
    movements(weights, optimizer, range(2))
    found = {"weights": weights[-1].data, "gradient": weights[0].grad, "state": optimizer.state[weights[0]]}[held]
    outside.append(found["momentum_buffer"] if isinstance(found, dict) else found)
    kept = outside[0].clone()
    assert "writes to tensors that it holds outside of its groups" in prove(optimizer).refusal
    assert torch.equal(outside[0], kept)


@pytest.mark.parametrize("namespace", ["c10d", "_c10d_functional", "c10d_functional"])
def test_an_operation_between_the_ranks_ends_the_check(namespace: str) -> None:
    isolation: Any = _Isolation([])
    with pytest.raises(_NotProvenError, match="communicates between the ranks"):
        isolation.__torch_dispatch__(SimpleNamespace(namespace=namespace), ())


ROUNDING = CLEAR * torch.finfo(torch.float32).eps * 2.0 / SCALE
"""Least movement of a parameter of norm 2 that is clear of its rounding."""


@pytest.mark.parametrize(
    ("moved", "from_zero", "clear"),
    [
        ([[1.0, 1.0]], False, True),
        ([[0.0, 1.0]], False, True),
        ([[0.0, 0.0], [0.0, 1.0]], False, True),
        ([[0.0, 0.0]], False, False),
        ([[1.0, math.inf]], False, False),
        ([[math.nan, 1.0]], False, False),
        ([[1.0], [math.inf]], False, False),
        ([[1.01 * ROUNDING, 1.0]], False, True),
        ([[0.99 * ROUNDING, 1.0]], False, False),
        ([[1.0], [0.99 * ROUNDING]], False, False),
        ([[1e-30, 1e-30]], True, True),
        ([[0.0, 0.0]], True, False),
        ([[1.0, math.inf]], True, False),
    ],
)
def test_movements_are_compared_only_if_they_are_clear_of_rounding(
    moved: list[list[float]], from_zero: bool, clear: bool
) -> None:
    assert _clear(moved, [torch.ones(4)] * len(moved), from_zero) is clear


@pytest.mark.parametrize("value", [None, 0.0, math.nan, math.inf])
def test_a_gradient_that_says_nothing_is_replaced(value: float | None) -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = None if value is None else torch.ones(3, 4)
    if weight.grad is not None:
        weight.grad[0, 0], weight.grad[1:] = value, 0.0
        weight.grad[0, 1:] = 0.0
    other = _gradient(weight)
    assert other.shape == (3, 4)
    assert float(other.abs().min()) > 0.0
    assert float(other.abs().max()) <= 0.01
    assert len(other.unique()) == 12
    weight.grad = torch.tensor([[1.0, -1.0, 0.0, 0.0]] * 3)
    for size in (1.0, 1e-6):
        weight.grad *= size
        own = _gradient(weight)
        assert torch.equal(own, weight.grad)
        assert own is not weight.grad
    twice = torch.tensor([[1, 1], [0, 0]])
    for values, layout in (((1.0, -1.0), torch.strided), ((1.0, 1.0), torch.sparse_coo)):
        weight.grad = torch.sparse_coo_tensor(twice, torch.tensor(values), (3, 4), check_invariants=True)
        assert _gradient(weight).layout is layout, "entries of one place add up"


def test_the_copy_has_only_the_sampled_parameters() -> None:
    places: list[str] = []

    class Holding(SGD):
        def step(self, closure: Any = None) -> Any:
            places.extend(each.device.type for each in self.everything)
            return super().step(closure)

    weights = parameters()
    optimizer: Any = Holding(weights, lr=0.1)
    optimizer.everything = list(weights)
    assert prove(optimizer) == ScaleProof()
    assert {tuple(places[at : at + 4]) for at in range(0, len(places), 4)} == {("cpu", "meta", "meta", "cpu")}
    assert all(each.device.type == "cpu" for each in optimizer.everything)


class FromState(SGD):
    """Uses a rate in the state of a parameter, or in a state of its own, before that of the group."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    own = self.state[each].get("rate") or self.state["all"].get("rate")
                    each -= (own or group["lr"]) * each.grad


@pytest.mark.parametrize("key", ["parameters", "all"])
def test_the_copy_has_the_state_of_the_optimizer(key: str) -> None:
    weights = parameters()
    optimizer = FromState(weights, lr=0.1)
    assert prove(optimizer) == ScaleProof()
    for each in weights if key == "parameters" else ("all",):
        optimizer.state[each]["rate"] = 0.1
    assert "moves the weights 1 times as far" in prove(optimizer).refusal


class Part(Tensor):
    """Stands for a sharded tensor."""

    def to_local(self) -> Tensor:
        return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: Any) -> Part:
        return self.to_local().clone().as_subclass(Part)


def test_the_copy_has_this_ranks_part_of_sharded_states() -> None:
    found: list[type] = []

    class Watched(SGD):
        def step(self, closure: Any = None) -> Any:
            found.extend(type(each["buffer"]) for each in self.state.values() if isinstance(each, dict))
            return super().step(closure)

    weights = parameters()
    optimizer: Any = Watched(weights, lr=0.1)
    for each in weights:
        optimizer.state[each]["buffer"] = torch.zeros(3).as_subclass(Part)
        optimizer.state[each]["number"] = 3
    optimizer.state["other"] = [1.0]
    assert prove(optimizer) == ScaleProof()
    assert set(found) == {Tensor}
    assert type(optimizer.state[weights[0]]["buffer"]) is Part


def test_the_copies_have_the_rate_of_the_group_and_its_scaled_one() -> None:
    seen: set[float] = set()

    class Watched(SGD):
        def step(self, closure: Any = None) -> Any:
            seen.update(group["lr"] for group in self.param_groups)
            return super().step(closure)

    assert prove(Watched(parameters(), lr=0.1)) == ScaleProof()
    assert seen == {0.1, SCALE * 0.1}


def test_an_optimizer_with_a_scheduler_is_checked_and_the_scheduler_is_left_alone() -> None:
    optimizer = AdamW(parameters(), lr=0.01)
    schedule = ExponentialLR(optimizer, 0.5)
    step: Any = optimizer.step
    assert prove(optimizer) == ScaleProof()
    assert schedule.last_epoch == 0
    assert optimizer.step == step


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_rate_of_zero_is_checked_with_another_and_stays(rate: Any) -> None:
    optimizer = Adam(parameters(), lr=rate)
    assert prove(optimizer) == ScaleProof()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.0
    ignores = IgnoresItsGroup(parameters(), lr=0.1)
    ignores.param_groups[0]["lr"] = rate
    assert "does not follow" in prove(ignores).refusal


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


def test_a_replicated_gradient_of_a_sharded_parameter_is_not_used() -> None:
    """As under sequence parallelism: the part of the parameter is smaller than that of its gradient."""
    parameter: Any = SimpleNamespace(detach=lambda: torch.zeros(4, 2), grad=torch.ones(8, 2))
    assert _gradient(parameter).shape == (4, 2)
    parameter.grad = torch.ones(4, 2)
    assert torch.equal(_gradient(parameter), torch.ones(4, 2))


class FirstRateOnly(SGD):
    """Updates all groups at the rate of the first one."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each -= self.param_groups[0]["lr"] * each.grad


@pytest.mark.parametrize(
    ("make", "groups", "refusal"),
    [
        (SGD, {1}, ""),
        (AdamW, {0, 2}, ""),
        (AdamW, {0, 1, 2}, ""),
        (FirstRateOnly, {1}, "does not follow: at 0.125 of its learning rate in 1 of its groups"),
        (FirstRateOnly, {0}, "does not follow: at 0.125 of its learning rate in 1 of its groups"),
        (FirstRateOnly, {0, 1, 2}, ""),
        (IgnoresItsGroup, {0, 1}, "does not follow: at 0.125 of its learning rate in 2 of its groups"),
    ],
)
def test_a_scale_of_single_groups_moves_their_weights_alone(make: Any, groups: set[int], refusal: str) -> None:
    weights = parameters()
    optimizer = make([{"params": part} for part in (weights[:1], weights[1:2], weights[2:])], lr=0.1)
    set_gradients(weights, 0)
    before = [each.detach().clone() for each in weights]
    told = prove_groups(optimizer, groups)
    assert told == "" if not refusal else refusal in told
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_single_groups_without_weights_are_refused() -> None:
    optimizer = SGD([{"params": parameters()}, {"params": []}], lr=0.1)
    assert "no small parameter" in prove_groups(optimizer, {1})
    assert prove(optimizer) == ScaleProof()


def test_the_hooks_of_all_optimizers_are_not_called_for_a_copy() -> None:
    class Nested(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    optimizer, calls = Nested(SGD(parameters(), lr=0.1).param_groups[0]["params"], lr=0.1), []
    handles = [
        register(lambda *_: calls.append(1))
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    assert prove(optimizer) == ScaleProof()
    assert calls == []
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert len(calls) == 4, "two steps, one inside the other"
    for each in handles:
        each.remove()
