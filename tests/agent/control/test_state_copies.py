"""A restored training repeats its losses bit for bit; an unsuitable state is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from koopmon.agent.control.state_copies import CannotCopyError, StateCopy, TrainingState
from tests.agent.models import VOCABULARY, D, batch, build, loss_of, train_step


class Tied(nn.Module):
    """Tied embeddings, and batch normalisation with its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.norm = nn.BatchNorm1d(D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        h = h + self.mix(self.norm(h.flatten(0, 1))).view_as(h)
        logits: Tensor = self.head(h)
        return logits


def matrices(model: nn.Module) -> list[Tensor]:
    return [each for each in model.parameters() if each.ndim == 2]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.05),
    "momentum": lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda model: AdamW(model.parameters(), lr=0.01),
    "amsgrad": lambda model: AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "foreach": lambda model: AdamW(model.parameters(), lr=0.01, foreach=True),
    "fused": lambda model: AdamW(model.parameters(), lr=0.01, fused=True),
    "tensor-lr": lambda model: Adam(model.parameters(), lr=torch.tensor(0.01)),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda model: torch.optim.Muon(matrices(model), lr=0.01)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    return [train_step(model, optimizer, step) for step in steps]


def values(model: nn.Module) -> list[Tensor]:
    return [each.detach().clone() for each in (*model.parameters(), *model.buffers())]


def identical(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("taken_at", [0, 4])
@pytest.mark.parametrize("make_model", [build, Tied])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_batches_after_a_restore_give_the_same_losses(
    name: str, make_model: Callable[[], nn.Module], taken_at: int
) -> None:
    torch.manual_seed(0)
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(taken_at))
    copy = StateCopy()
    copy.take(TrainingState(model, optimizer), 7, 0.5)
    assert (copy.step, copy.rate) == (7, 0.5)
    before, tensors = values(model), [each.data_ptr() for each in model.parameters()]
    expected = train(model, optimizer, range(10, 16))
    after = values(model)
    assert not identical(before, after)
    state = TrainingState(model, optimizer)
    assert copy.fits(state)
    copy.restore(state)
    assert identical(values(model), before)
    assert [each.data_ptr() for each in model.parameters()] == tensors, "in place"
    assert train(model, optimizer, range(10, 16)) == expected
    assert identical(values(model), after)
    copy.restore(TrainingState(model, optimizer))
    assert train(model, optimizer, range(10, 16)) == expected, "a copy can be used more than once"


def test_the_memory_of_a_copy_is_used_again() -> None:
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(1))
    copy = StateCopy()
    copy.take(TrainingState(model, optimizer), 1, 0.0)
    first = {key: each.data_ptr() for key, each in copy._tensors.items()}
    train(model, optimizer, range(1))
    state = TrainingState(model, optimizer)
    copy.take(state, 2, 0.0)
    assert {key: each.data_ptr() for key, each in copy._tensors.items()} == first
    assert copy.nbytes == state.nbytes
    weights = sum(each.nbytes for each in model.parameters())
    assert 3 * weights < state.nbytes < 3.01 * weights + 1024, "two moments, and the step of each parameter"


def test_rates_of_the_schedule_and_gradients_are_left_alone() -> None:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.param_groups[0]["calls"] = 1
    copy = StateCopy()
    copy.take(TrainingState(model, optimizer), 0, 0.0)
    train(model, optimizer, range(2))
    gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    optimizer.param_groups[0].update(lr=0.125, initial_lr=0.5, calls=3)
    copy.restore(TrainingState(model, optimizer))
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    assert optimizer.param_groups[0]["calls"] == 1, "as Prodigy and schedule-free optimizers keep their own numbers"
    assert len(optimizer.state) == 0
    assert identical([each.grad for each in model.parameters() if each.grad is not None], gradients)


def test_a_copy_does_not_fit_an_optimizer_without_its_state() -> None:
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    copy = StateCopy()
    copy.take(TrainingState(model, optimizer), 3, 0.0)
    assert copy.fits(TrainingState(model, optimizer))
    # A tensor in place of a missing one might have to be a DTensor.
    del optimizer.state[model.head.bias]["exp_avg"]
    assert not copy.fits(TrainingState(model, optimizer))


def test_plain_numbers_in_the_optimizers_state_are_restored() -> None:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, range(1))
    entries = optimizer.state[model.head.bias]
    entries["step"] = 1
    copy = StateCopy()
    copy.take(TrainingState(model, optimizer), 1, 0.0)
    entries.update(step=2, late=True)
    copy.restore(TrainingState(model, optimizer))
    assert {name: value for name, value in entries.items() if name != "momentum_buffer"} == {"step": 1}


def test_frozen_parameters_and_caches_are_not_copied() -> None:
    model = Tied()
    model.mix.requires_grad_(False)
    state = TrainingState(model, SGD([each for each in model.parameters() if each.requires_grad], lr=0.1))
    assert [key for key in state.tensors if key[0] == "weight"] == [("weight", 0), ("weight", 1), ("weight", 2)]
    assert {key[1] for key in state.tensors if key[0] == "buffer"} == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_a_copy_fits_only_the_parameters_it_was_taken_from() -> None:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    copy = StateCopy()
    assert not copy.fits(TrainingState(model, optimizer)), "nothing was taken"
    copy.take(TrainingState(model, optimizer), 0, 0.0)
    assert copy.fits(TrainingState(model, optimizer))
    model.register_buffer("late", torch.zeros(3))
    assert copy.fits(TrainingState(model, optimizer))
    model.head.bias.data = torch.zeros(1)
    assert not copy.fits(TrainingState(model, optimizer)), "another shape"
    other = build()
    assert not copy.fits(TrainingState(other, SGD(other.parameters(), lr=0.1)))
    copy.clear()
    assert copy.step is None


class Wrapper(SGD):
    """Like ZeroRedundancyOptimizer: the optimizer that steps is in `optim`."""

    def __init__(self, params: Any, inner: Optimizer) -> None:
        super().__init__(params, lr=0.1)
        self.optim = inner


def test_the_state_of_an_optimizer_that_wraps_another_is_that_of_the_inner_one() -> None:
    model = build()
    inner = AdamW(model.parameters(), lr=0.01)
    train(model, inner, range(2))
    state = TrainingState(model, Wrapper(model.parameters(), inner))
    assert state.optimizers == [inner]
    assert state.nbytes == TrainingState(model, inner).nbytes


def test_of_a_sharded_tensor_this_ranks_part_is_copied() -> None:
    """A tensor with `to_local()`, as a DTensor has."""
    model, part = build(), torch.ones(2)
    whole: Any = torch.zeros(4)
    whole.to_local = lambda: part
    model.register_buffer("sharded", whole)
    state = TrainingState(model, SGD(model.parameters(), lr=0.1))
    assert state.tensors["buffer", ".sharded"] is part


def test_a_stride_of_0_in_a_dimension_of_one_element_shares_no_memory() -> None:
    model = build()
    model.register_buffer("row", torch.zeros(4).as_strided((1, 4), (0, 1)))
    assert ("buffer", ".row") in TrainingState(model, SGD(model.parameters(), lr=0.1)).tensors


def test_a_copy_that_was_not_finished_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    state = TrainingState(model, SGD(model.parameters(), lr=0.1))
    copy = StateCopy()
    assert (copy.step, copy.nbytes) == (None, 0)
    copy.take(state, 3, 0.1)

    def no_memory(*_: Any) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(torch, "_foreach_copy_", no_memory)
    with pytest.raises(RuntimeError, match="not enough memory"):
        copy.take(state, 5, 0.1)
    assert copy.step is None
    assert not copy.fits(state)


def lists_of_tensors(model: nn.Module) -> Optimizer:
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return optimizer


def state_of_its_own(model: nn.Module) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=0.1)
    state: Any = optimizer.state
    state["global"] = {"step": 1}
    return optimizer


def capturable(model: nn.Module) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["capturable"] = True
    return optimizer


def expanded(model: nn.Module) -> Optimizer:
    model.register_buffer("row", torch.zeros(1).expand(5))
    return SGD(model.parameters(), lr=0.1)


def expanded_in_part(model: nn.Module) -> Optimizer:
    model.register_buffer("rows", torch.zeros(3, 1).expand(3, 2))
    return SGD(model.parameters(), lr=0.1)


def sparse(model: nn.Module) -> Optimizer:
    model.register_buffer("mask", torch.eye(3).to_sparse())
    return SGD(model.parameters(), lr=0.1)


def elsewhere(model: nn.Module) -> Optimizer:
    model.to("meta")
    return SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lists_of_tensors, "the optimizer's .* is a list"),
        (state_of_its_own, "belongs to no parameter"),
        (capturable, "capturable"),
        (expanded, "share memory"),
        (expanded_in_part, "share memory"),
        (sparse, "sparse"),
        (elsewhere, "on meta"),
    ],
)
def test_a_state_that_a_copy_would_not_hold_is_refused(make: Callable[[nn.Module], Optimizer], reason: str) -> None:
    model = build()
    optimizer = make(model)
    with pytest.raises(CannotCopyError, match=reason):
        TrainingState(model, optimizer)


def test_weights_that_no_optimizer_updates_are_put_back_as_well() -> None:
    """As those that a loop updates itself."""
    model = build()
    state = TrainingState(model, SGD(model.blocks.parameters(), lr=0.05))
    copy, before = StateCopy(), values(model)
    copy.take(state, 3, 0.05)
    with torch.no_grad():
        for each in model.parameters():
            each += 1.0
    copy.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_one_weight_that_is_not_finite_is_found_in_any_type(dtype: torch.dtype) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2, 2, dtype=dtype))])
    optimizer = SGD(model.parameters(), lr=0.1)
    assert TrainingState(model, optimizer).is_finite
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model[1][1, 0] = value
        assert not TrainingState(model, optimizer).is_finite


def test_whether_weights_are_finite_does_not_depend_on_buffers_whole_numbers_or_empty_ones() -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    model.weight = nn.Parameter(torch.ones(2))
    model.table = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    model.empty = nn.Parameter(torch.empty(0))
    large = nn.Parameter(torch.full((4,), 6e4, dtype=torch.float16))  # a sum of squares would overflow
    model.large = large
    state = TrainingState(model, SGD(model.parameters(), lr=0.1))
    assert state.is_finite
