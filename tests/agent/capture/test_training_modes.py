"""Loops that train in eval mode, through reentrant checkpoints or beside the root; one true sentence for the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.agent.models import VOCABULARY, Block, D, batch, paced
from tests.agent.scripted_monitor import ScriptedMonitor

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in validations
Attach = Callable[..., Any]
EVERY_STEP = {"cadence": {"dense_every": 1, "warmup_steps": 1000}}
L, STEPS = 4, 6


class OwnCheckpoint(torch.autograd.Function):
    """A library's own reentrant checkpoint, as DeepSpeed and Megatron have them."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        (x,) = ctx.saved_tensors
        again = x.detach().requires_grad_(True)
        with torch.enable_grad():
            out = ctx.block(again)
        torch.autograd.backward(out, gradient)
        return None, again.grad


def plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def not_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def own(block: nn.Module, x: Tensor) -> Tensor:
    return OwnCheckpoint.apply(block, x)


class Model(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor] = plain) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.blocks = nn.ModuleList(Block(D) for _ in range(L))
        self.head = nn.Linear(D, VOCABULARY)
        self.call = call

    def loss(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for block in self.blocks:
            h = self.call(block, h)
        return self.head(h).square().mean()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.loss(tokens)


class InSegments(Model):
    def loss(self, tokens: Tensor) -> Tensor:
        h = checkpoint_sequential(self.blocks, 2, self.embedding(tokens), use_reentrant=True)
        return self.head(h).square().mean()


def through_the_root(model: Model, step: int) -> Tensor:
    return model(batch(step))


def beside_the_root(model: Model, step: int) -> Tensor:
    return model.loss(batch(step))


def and_validates(model: Model, step: int) -> Tensor:
    """Validates through the root, trains beside it."""
    with torch.no_grad():
        model(batch(100 + step))
    return model.loss(batch(step))


def in_two_parts(model: Model, step: int) -> Tensor:
    return model.loss(batch(step)) + model.loss(batch(50 + step))


MODELS = {
    "plain": Model,
    "reentrant": lambda: Model(reentrant),
    "not reentrant": lambda: Model(not_reentrant),
    "own": lambda: Model(own),
    "in segments": InSegments,
}


def trained(
    monitor: ScriptedMonitor,
    agents: Attach,
    model: Any,
    loss_of: Callable[[Any, int], Tensor],
    steps: int = STEPS,
    before: Callable[[Any, int], Any] = lambda model, step: None,
) -> Any:
    """Train beside a copy that is not watched: the losses are equal."""
    bare = copy.deepcopy(model)
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, bare))
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived = paced(agent, monitor)
    for step in range(steps):
        losses = []
        for each, stepping in ((model, optimizer), (bare, bare_optimizer)):
            before(each, step)
            stepping.zero_grad()
            loss = loss_of(each, step)
            loss.backward()
            stepping.step()
            losses.append(float(loss.detach()))
        assert losses[0] == losses[1]
        arrived()
    assert agent.status()["errors"] == 0
    return agent


def steps_of(monitor: ScriptedMonitor) -> list[int]:
    return [header.step for header, _ in monitor.shards]


@pytest.mark.parametrize("loss_of", [through_the_root, beside_the_root, and_validates, in_two_parts])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_every_way_to_train_is_watched(
    kind: str,
    training: bool,
    loss_of: Callable[[Any, int], Tensor],
    monitor: ScriptedMonitor,
    agents: Attach,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = MODELS[kind]().train(training)
    agent = trained(monitor, agents, model, loss_of)
    first = 1 if training else 2  # in eval mode, the first update shows that it trains
    assert steps_of(monitor) == list(range(first, STEPS))
    assert agent.status()["taps_missing"] == 0
    assert {header.num_points for header, _ in monitor.shards} == {L + 1}
    assert not any("missed" in line for line in caplog.messages)


def test_a_loop_may_change_the_mode(monitor: ScriptedMonitor, agents: Attach) -> None:
    def change(model: Model, step: int) -> None:
        model.train(step % 8 < 4)

    trained(monitor, agents, Model(), through_the_root, 24, change)
    found = steps_of(monitor)
    assert len(found) >= 18
    assert {step % 8 for step in found} == set(range(8)) - {4}, "the first step in eval mode may be a validation"


@pytest.mark.parametrize("loss_of", [through_the_root, beside_the_root])
def test_a_validation_with_gradients_is_no_training(
    loss_of: Callable[[Any, int], Tensor], monitor: ScriptedMonitor, agents: Attach
) -> None:
    def validate(model: Model, step: int) -> None:
        model.eval()
        loss_of(model, 100 + step)
        model.train()

    agent = trained(monitor, agents, Model(), loss_of, before=validate)
    assert steps_of(monitor) == list(range(1, STEPS))
    runtime = agent._runtime
    assert not runtime.taps.forwards.trains_in_eval
    for _, states in monitor.shards:
        assert torch.isfinite(states).all()


def test_parts_in_eval_mode_do_not_matter(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = Model()
    model.blocks.eval()
    trained(monitor, agents, model, through_the_root)
    assert steps_of(monitor) == list(range(1, STEPS))


# One sentence for each cause of blindness.


def told(caplog: pytest.LogCaptureFixture) -> str:
    lines = [line for line in caplog.messages if "missed" in line or "no snapshots" in line]
    (line,) = lines
    return line


def by_transforms(model: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    gradients = grad(lambda p: functional_call(model, p, (batch(step),)))(parameters)
    for name, each in model.named_parameters():
        each.grad = gradients[name]
    optimizer.step()


def without_gradients(model: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
    with torch.no_grad():
        model(batch(step))
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()


def by_a_copy(model: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
    twin = copy.deepcopy(model)
    twin(batch(step)).backward()
    for each, other in zip(model.parameters(), twin.parameters(), strict=True):
        each.grad = other.grad
    optimizer.step()


def by_new_blocks(model: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
    model.blocks = copy.deepcopy(model.blocks)
    model(batch(step)).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("train", "cause"),
    [
        (by_transforms, "its forwards run under torch.func"),
        (without_gradients, "its forwards run without gradients"),
        (by_a_copy, "attach to the module that the loop calls"),
        (by_new_blocks, "attach to the module that the loop calls"),
    ],
)
def test_blindness_is_said_once_with_its_cause(
    train: Callable[[Any, Any, int], None],
    cause: str,
    monitor: ScriptedMonitor,
    agents: Attach,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    for step in range(20):
        train(model, optimizer, step)
    assert cause in told(caplog)
    assert monitor.shards == []
    assert agent.status()["errors"] == 0
    assert agent.enabled


def test_one_rank_speaks_for_all(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monkeypatch.setenv("RANK", "1")
    for step in range(6):
        without_gradients(model, optimizer, step)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_loop_that_recovers_is_watched_again(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(6):
        without_gradients(model, optimizer, step)
    arrived = paced(agent, monitor)
    for step in range(6):
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
        arrived()
    assert len(monitor.shards) == 5


def test_nested_tensors_are_no_states_and_disable_nothing(monitor: ScriptedMonitor, agents: Attach) -> None:
    class Ragged(Model):
        ragged = False

        def loss(self, tokens: Tensor) -> Tensor:
            if not self.ragged:
                return super().loss(tokens)
            rows = list(self.embedding(tokens))
            h = torch.nested.as_nested_tensor([rows[0], rows[1][:3]], layout=torch.jagged)
            for block in self.blocks:
                h = block(h)
            return h.values().square().mean()

    def change(model: Ragged, step: int) -> None:
        model.ragged = step % 2 == 0

    model = Ragged()
    model.blocks = nn.ModuleList(Wide() for _ in range(L))
    agent = trained(monitor, agents, model, through_the_root, before=change)
    assert steps_of(monitor) == [3, 5]
    assert agent.status()["reason"] == ""


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = self.key = nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))
