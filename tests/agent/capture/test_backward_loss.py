"""The backward passes that show a loss, and those that must not; test_step_scalars.py has whole loops."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koopmon.agent.capture.backward_loss import NUM_PARAMETERS, BackwardLoss, backward_roots
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.stats import AgentStats
from tests.agent.models import batch, build, checkpointed_reentrant, loss_of


class Bench:
    """A listener to one model."""

    def __init__(self, model: nn.Module | None = None, *, sharded: bool = False) -> None:
        self.model = build() if model is None else model
        self.breaker = CircuitBreaker("the measurement of the loss")
        self.loss = BackwardLoss(self.breaker, AgentStats())
        self.sharded = sharded

    def begin(self) -> None:
        self.loss.begin(self.model.parameters(), self.model if self.sharded else None)

    def end(self) -> float | None:
        found = self.loss.end()
        assert self.breaker.num_errors == 0
        return None if found is None else float(found)


def hooked_roots(call: Callable[[Tensor], None]) -> list[Any]:
    """Return what a hook of the graph sees during `call(loss)`."""
    parameter, seen = nn.Parameter(torch.ones(())), []
    parameter.register_hook(
        lambda _: seen.append([(float(root.detach()), weight) for root, weight in backward_roots()])
    )
    call(3.0 * parameter)
    return seen


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda loss: loss.backward(), [[(3.0, None)]]),
        (lambda loss: torch.autograd.backward(loss), [[(3.0, None)]]),
        (lambda loss: torch.autograd.backward((loss, 2.0 * loss)), [[(3.0, None), (6.0, None)]]),
        (lambda loss: torch.autograd.backward([loss], [None]), [[(3.0, None)]]),
        (lambda loss: loss.backward(torch.tensor(0.5)), [[(3.0, torch.tensor(0.5))]]),
        (lambda loss: torch.autograd.grad(loss, loss.grad_fn.next_functions[0][0].variable), [[]]),
        (lambda loss: torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss), torch.ones(())), [[]]),
    ],
)
def test_the_roots_of_each_kind_of_call(call: Callable[[Tensor], None], seen: list[Any]) -> None:
    assert hooked_roots(call) == seen


def test_outside_of_a_backward_pass_there_is_no_root() -> None:
    assert backward_roots() == []


def test_a_hook_in_the_thread_of_a_device_finds_the_call_that_waits_for_it() -> None:
    """CUDA runs hooks in such a thread. Here the hook itself waits for one, as the call does there."""
    found: list[Any] = []

    def elsewhere(_: Tensor) -> None:
        thread = threading.Thread(target=lambda: found.append([float(each.detach()) for each, _ in backward_roots()]))
        thread.start()
        thread.join()

    parameter = nn.Parameter(torch.ones(()))
    parameter.register_hook(elsewhere)
    (5.0 * parameter).backward()
    assert found == [[5.0]]


def test_with_two_calls_in_two_other_threads_there_is_no_root() -> None:
    inside, leave, found = threading.Barrier(3, timeout=60.0), threading.Event(), []

    def hold(_: Tensor) -> None:
        inside.wait()
        leave.wait(60.0)

    def work() -> None:
        parameter = nn.Parameter(torch.ones(()))
        parameter.register_hook(hold)
        (5.0 * parameter).backward()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for each in threads:
        each.start()
    inside.wait()
    found = backward_roots()
    leave.set()
    for each in threads:
        each.join()
    assert found == []


def test_a_training_in_another_thread_than_the_main_one() -> None:
    bench, found = Bench(), []

    def work() -> None:
        bench.begin()
        loss = loss_of(bench.model, batch(0))
        loss.backward()
        found.extend([bench.end(), float(loss.detach())])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] == pytest.approx(found[1], rel=1e-7)


def test_only_between_begin_and_end() -> None:
    bench = Bench()
    loss_of(bench.model, batch(0)).backward()
    assert bench.end() is None
    bench.begin()
    assert bench.end() is None
    loss_of(bench.model, batch(0)).backward()
    assert bench.end() is None
    bench.begin()
    loss_of(bench.model, batch(0)).backward()
    bench.begin()
    loss = loss_of(bench.model, batch(1))
    loss.backward()
    assert bench.end() == pytest.approx(float(loss.detach()), rel=1e-7), "the step before counts no more"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend: str) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    bench = Bench()
    compiled = torch.compile(bench.model, backend=backend)
    graphs = set()
    for step in range(3):
        bench.begin()
        loss = loss_of(compiled, batch(step))  # type: ignore[arg-type]
        loss.backward()
        assert bench.end() == pytest.approx(float(loss.detach()), rel=1e-6)
        graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(graphs) == 1, "no hook causes another compilation"


def test_a_compiled_backward_pass_is_left_alone() -> None:
    torch.compiler.reset()
    bench = Bench(nn.Linear(4, 4))
    with torch._dynamo.config.patch(compiled_autograd=True):
        bench.begin()
        bench.model(torch.ones(2, 4)).sum().backward()
        assert bench.end() is None
    bench.begin()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        bench.model(torch.ones(2, 4)).sum().backward()
    assert bench.end() is None
    assert bench.model.weight.grad is not None


class Sharded(nn.Module):
    """Uses copies of its parameters in the forward, as the wrappers of FSDP do."""

    def __init__(self, make: Callable[[Tensor], Any] = lambda out: out) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.make = make

    def forward(self, x: Tensor) -> Any:
        self.copy = self.weight.detach().clone().requires_grad_()
        return self.make(x @ self.copy)


@pytest.mark.parametrize(
    ("make", "take"),
    [
        (lambda out: out, lambda out: out),
        (lambda out: (None, [out]), lambda out: out[1][0]),
        (lambda out: {"loss": out.sum(), "logits": out, "other": 3}, lambda out: out["loss"]),
        (lambda out: {"loss": out.sum(), "logits": out, "other": out.detach()}, lambda out: out["logits"]),
    ],
)
def test_a_wrapper_that_hides_its_parameters(make: Callable[[Tensor], Any], take: Callable[[Any], Tensor]) -> None:
    bench = Bench(Sharded(make), sharded=True)
    for _ in range(2):
        bench.begin()
        losses = [take(bench.model(torch.ones(2, 4))).sum() / 2 for _ in range(2)]
        for loss in losses:
            loss.backward()
        assert bench.end() == pytest.approx(sum(float(each.detach()) for each in losses))
    take(bench.model(torch.ones(2, 4))).sum().backward()
    assert bench.end() is None
    bench.loss.close()
    assert not bench.model._forward_hooks


def test_the_loss_of_each_scale() -> None:
    bench = Bench()
    bench.begin()
    (8.0 * loss_of(bench.model, batch(0))).backward()
    assert bench.loss.maybe_scaled
    bench.loss.unscale(torch.tensor([8.0]))
    loss_of(bench.model, batch(1)).backward()
    bench.loss.unscale(None)
    expected = sum(float(loss_of(bench.model, batch(step)).detach()) for step in (0, 1))
    assert bench.end() == pytest.approx(expected, rel=1e-6)
    bench.begin()
    assert not bench.loss.maybe_scaled


@pytest.mark.parametrize("loss", [torch.ones(3), torch.ones(()).to(torch.complex64)])
def test_roots_that_are_no_losses(loss: Tensor) -> None:
    bench = Bench(nn.Linear(1, 1, bias=False))
    bench.begin()
    root = bench.model(torch.ones(1)).sum() * loss
    root.backward(torch.ones_like(root))
    assert bench.end() is None


def test_one_element_in_any_shape() -> None:
    bench = Bench(nn.Linear(1, 1, bias=False))
    bench.begin()
    root = bench.model(torch.ones(1, 1, 1))
    root.backward()
    assert bench.end() == pytest.approx(float(root.detach()))


def test_a_framework_that_takes_the_gradients_away_does_not_clear_them() -> None:
    """Megatron and others add the gradients to buffers of their own in hooks of the graph."""
    bench, kept = Bench(), []
    for each in bench.model.parameters():

        def take(parameter: Tensor) -> None:
            kept.append(parameter.grad)
            parameter.grad = None

        each.register_post_accumulate_grad_hook(take)
    bench.begin()
    losses = [loss_of(bench.model, batch(step)) / 2 for step in range(2)]
    for loss in losses:
        loss.backward()
    assert bench.end() == pytest.approx(sum(float(each.detach()) for each in losses), rel=1e-6)


def test_parameters_without_gradients_and_a_model_without_any() -> None:
    bench = Bench()
    for each in bench.model.blocks.parameters():  # type: ignore[union-attr]
        each.requires_grad_(False)
    bench.begin()
    assert len(bench.loss._nodes) <= NUM_PARAMETERS
    loss = loss_of(bench.model, batch(0))
    loss.backward()
    assert bench.end() == pytest.approx(float(loss.detach()), rel=1e-7)
    bench.loss.begin([])
    assert bench.end() is None


@pytest.mark.parametrize("count", [1, NUM_PARAMETERS, NUM_PARAMETERS + 1, 1000])
def test_few_parameters_have_a_hook(count: int) -> None:
    bench = Bench(nn.ParameterList(nn.Parameter(torch.ones(1 + number % 3)) for number in range(count)))
    bench.begin()
    assert 1 <= len(bench.loss._nodes) <= min(count, NUM_PARAMETERS)
    bench.loss.close()
    assert bench.loss._nodes == []


def test_a_dropped_model_is_freed_while_its_step_is_measured() -> None:
    bench = Bench(build(run=checkpointed_reentrant))
    bench.begin()
    loss_of(bench.model, batch(0)).backward()
    parameter = weakref.ref(next(bench.model.parameters()))
    del bench
    gc.collect()
    assert parameter() is None


def test_parameters_are_copied_and_pickled_without_a_hook() -> None:
    bench = Bench(nn.Linear(2, 2))
    plain = pickle.dumps(bench.model)
    bench.begin()
    assert pickle.dumps(bench.model) == plain
    twin = copy.deepcopy(bench.model)
    twin(torch.ones(2)).sum().backward()
    assert bench.end() is None
    assert all(each._backward_hooks is None for each in bench.model.parameters())


def test_a_hook_that_fails_ends_the_measurement_and_not_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.begin()

    def broken() -> list[Any]:
        raise RuntimeError("broken")

    monkeypatch.setattr("koopmon.agent.capture.backward_loss.backward_roots", broken)
    loss_of(bench.model, batch(0)).backward()
    assert bench.breaker.num_errors == 1
    assert all(each.grad is not None for each in bench.model.parameters())
