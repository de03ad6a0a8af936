"""Loss and gradient norm without a call in the loop: the traps of real loops, against the loop's own numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW, Optimizer

from koopmon.agent.capture.step_scalars import StepScalars
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.parallelism import ParallelLayout
from koopmon.agent.stats import AgentStats
from koopmon.wire.messages import TrainingStep
from tests.agent.models import batch, build, checkpointed, checkpointed_reentrant, loss_of, paced
from tests.agent.scripted_monitor import ScriptedMonitor

Attach = Callable[..., Any]
STEPS = 6


@dataclass
class Record:
    """The loop's own loss and gradient norm of each step; None for a value that no report may contain."""

    attach: Callable[..., Callable[[], None]]
    losses: list[float | None] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    pace: Callable[[], None] = lambda: None

    def watch(self, model: nn.Module, *optimizers: Optimizer) -> None:
        self.pace = self.attach(model, optimizers)

    def step(self, loss: float | Tensor | None, norm: float | None) -> None:
        self.losses.append(float(loss.detach()) if isinstance(loss, Tensor) else loss)
        self.norms.append(norm)
        self.pace()


Loop = Callable[[Record], nn.Module]
LOOPS: dict[str, Loop] = {}


def trap(loop: Loop) -> Loop:
    LOOPS[loop.__name__] = loop
    return loop


def norm_of(*models: nn.Module) -> float:
    gradients = [each.grad for model in models for each in model.parameters() if each.grad is not None]
    return math.sqrt(sum(float(each.double().pow(2).sum()) for each in gradients))


@pytest.fixture
def watched(monitor: ScriptedMonitor, agents: Attach) -> Callable[..., Callable[[], None]]:
    def attach(model: nn.Module, optimizers: Any) -> Callable[[], None]:
        agent = agents(model, optimizers, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
        monitor.wait(lambda: agent.status()["connected"])
        return paced(agent, monitor)

    return attach


def reports(monitor: ScriptedMonitor) -> dict[int, TrainingStep]:
    return {shard.step: shard.training for shard, _ in monitor.shards}


def same(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found == pytest.approx(expected, rel=1e-6, nan_ok=True)


@trap
def plain(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


@trap
def gradients_cleared_in_place_after_the_update(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        torch.autograd.backward(loss)
        optimizer.step()
        norm = norm_of(model)
        optimizer.zero_grad(set_to_none=False)
        record.step(loss, norm)
    return model


@trap
def clipped(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        record.step(loss, norm_of(model))
        assert record.norms[-1] == pytest.approx(0.05, rel=1e-3)
    return model


@trap
def micro_batches_of_a_divided_loss(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [loss_of(model, batch(3 * step + part)) / 3 for part in range(3)]
        for loss in losses:
            loss.backward()
        optimizer.step()
        record.step(sum(float(each.detach()) for each in losses), norm_of(model))
    return model


@trap
def micro_batches_in_turn_with_clearing_after_the_update(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        total = 0.0
        for part in range(4):
            loss = loss_of(model, batch(4 * step + part)) / 4
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        norm = norm_of(model)
        optimizer.zero_grad()
        record.step(total, norm)
    return model


@trap
def micro_batches_that_are_not_divided(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.01)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [loss_of(model, batch(3 * step + part)) for part in range(3)]
        torch.autograd.backward(losses)
        optimizer.step()
        record.step(sum(float(each.detach()) for each in losses), norm_of(model))
    return model


def scaled(record: Record, optimizer_of: Callable[..., Optimizer], *, unscales: bool, divided: bool) -> nn.Module:
    model = build()
    optimizer, scaler = optimizer_of(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=1024.0)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for part in range(2):
            loss = loss_of(model, batch(2 * step + part))
            total += float(loss.detach()) / 2
            (scaler.scale(loss) / 2 if divided else scaler.scale(loss / 2)).backward()
        if unscales:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scale = 1.0 if unscales else scaler.get_scale()
        norm = norm_of(model) / scale
        scaler.step(optimizer)
        scaler.update(256.0)  # another scale in the next step
        record.step(total, norm)
    return model


@trap
def a_grad_scaler(record: Record) -> nn.Module:
    return scaled(record, SGD, unscales=False, divided=False)


@trap
def a_grad_scaler_with_clipping(record: Record) -> nn.Module:
    return scaled(record, AdamW, unscales=True, divided=True)


@trap
def a_grad_scaler_with_an_optimizer_that_unscales(record: Record) -> nn.Module:
    def fused(parameters: Any, lr: float) -> Optimizer:
        return AdamW(parameters, lr=lr, fused=True)

    return scaled(record, fused, unscales=False, divided=False)


@trap
def a_grad_scaler_that_skips_updates(record: Record) -> nn.Module:
    model = build()
    optimizer, scaler = SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
    record.watch(model, optimizer)
    for step in range(2 * STEPS):
        loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step % 2:
            parameter = next(model.parameters())
            assert parameter.grad is not None
            parameter.grad[0] = math.inf
        else:
            norm = norm_of(model) / scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if not step % 2:
            record.step(loss, norm)
    return model


@trap
def several_losses_of_one_forward(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = model(batch(step))
        one, two = logits.logsumexp(-1).mean(), logits.pow(2).mean()
        one.backward(retain_graph=True)
        two.backward()
        optimizer.step()
        record.step(one.detach() + two.detach(), norm_of(model))
    return model


@trap
def one_loss_twice(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


@trap
def a_weighted_loss(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        loss.backward(torch.tensor(0.25))
        optimizer.step()
        record.step(0.25 * loss.detach(), norm_of(model))
    return model


@trap
def a_loss_that_is_changed_after_its_backward(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        kept = float(loss.detach())
        loss.backward()
        loss.detach_().mul_(1000.0)
        optimizer.step()
        record.step(kept, norm_of(model))
    return model


@trap
def a_vector_alone(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = model(batch(step))
        logits.backward(torch.ones_like(logits))
        optimizer.step()
        record.step(None, norm_of(model))
    return model


@trap
def a_vector_beside_the_loss(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = model(batch(step))
        logits.backward(1e-3 * torch.ones_like(logits), retain_graph=True)
        loss = logits.logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


def checkpoints(record: Record, run: Any) -> nn.Module:
    model = build(run=run)
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [loss_of(model, batch(2 * step + part)) / 2 for part in range(2)]
        for loss in losses:
            loss.backward()
        optimizer.step()
        record.step(sum(float(each.detach()) for each in losses), norm_of(model))
    return model


@trap
def activation_checkpoints(record: Record) -> nn.Module:
    return checkpoints(record, checkpointed)


@trap
def reentrant_checkpoints(record: Record) -> nn.Module:
    return checkpoints(record, checkpointed_reentrant)


@trap
def a_gradient_penalty(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            loss = loss_of(model, batch(step))
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        whole = loss + 1e-3 * torch.stack([each.pow(2).sum() for each in gradients]).sum()
        whole.backward()
        optimizer.step()
        record.step(whole, norm_of(model))
    return model


@trap
def gradients_from_autograd_grad(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        record.step(None, norm_of(model))
    return model


class Inner(torch.autograd.Function):
    """Runs a backward pass of its own inside that of the loss, as implicit layers do."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, model: nn.Module, tokens: Tensor) -> Tensor:
        ctx.model, ctx.tokens = model, tokens
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            (1e-3 * ctx.model(ctx.tokens).pow(2).mean()).backward()
        return gradient, None, None


@trap
def a_backward_inside_a_node(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = Inner.apply(loss_of(model, batch(step)), model, batch(step + 100))
        loss.backward()
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


@trap
def another_model_beside_it(record: Record) -> nn.Module:
    model, other = build(), build(seed=1)
    optimizer, others = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        others.zero_grad()
        (100.0 * loss_of(other, batch(step))).backward()
        loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        (1000.0 * loss_of(other, batch(step))).backward()
        others.step()
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


@trap
def two_passes_of_which_the_second_counts(record: Record) -> nn.Module:
    """Sharpness-aware minimisation: the first gradient moves the weights, the second one updates them."""
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        loss_of(model, batch(step)).backward()
        moved = [(each, 0.05 * each.grad) for each in model.parameters() if each.grad is not None]
        with torch.no_grad():
            for parameter, change in moved:
                parameter.add_(change)
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        loss.backward()
        with torch.no_grad():
            for parameter, change in moved:
                parameter.sub_(change)
        optimizer.step()
        norm = norm_of(model)
        optimizer.zero_grad()
        record.step(loss, norm)
    return model


@trap
def the_discriminator_of_a_gan(record: Record) -> nn.Module:
    model, generator = build(), nn.Linear(3, 16)
    model.embedding = nn.Identity()  # type: ignore[assignment]
    optimizer, others = SGD(model.parameters(), lr=0.01), SGD(generator.parameters(), lr=0.01)
    record.watch(model, optimizer)
    for step in range(STEPS):
        model.zero_grad()
        real = model(0.1 * batch(step).unsqueeze(-1) * torch.ones(16)).pow(2).mean()
        real.backward()
        noise = torch.ones(4, 8, 3)
        fake = model(generator(noise).detach()).pow(2).mean()
        fake.backward()
        optimizer.step()
        record.step(real.detach() + fake.detach(), norm_of(model))
        generator.zero_grad()
        (-model(generator(noise)).pow(2).mean()).backward()  # reaches the discriminator too
        others.step()
    return model


@trap
def the_generator_of_a_gan(record: Record) -> nn.Module:
    model, judge = build(), nn.Linear(11, 1)
    optimizer, others = SGD(model.parameters(), lr=0.1), SGD(judge.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        others.zero_grad()
        judge(model(batch(step)).detach()).pow(2).mean().backward()
        others.step()
        optimizer.zero_grad()
        loss = (1 - judge(model(batch(step)))).pow(2).mean()
        loss.backward()
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


@trap
def several_optimizers(record: Record) -> nn.Module:
    model = build()
    blocks = SGD(model.blocks.parameters(), lr=0.1)
    rest = AdamW([*model.embedding.parameters(), *model.head.parameters()], lr=0.01)
    record.watch(model, blocks, rest)
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        loss.backward()
        norm = norm_of(model)
        for optimizer in (rest, blocks):
            optimizer.step()
            optimizer.zero_grad()
        record.step(loss, norm)
    return model


@trap
def an_optimizer_in_the_backward_pass(record: Record) -> nn.Module:
    model = build()
    optimizers = {each: SGD([each], lr=0.1) for each in model.parameters()}
    squares: list[float] = []

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        squares.append(float(parameter.grad.double().pow(2).sum()))
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for each in model.parameters():
        each.register_post_accumulate_grad_hook(update)
    record.watch(model, *optimizers.values())
    for step in range(STEPS):
        squares.clear()
        loss = loss_of(model, batch(step))
        loss.backward()
        record.losses.append(float(loss.detach()))
        record.norms.append(math.sqrt(sum(squares)))
    return model


@trap
def a_closure(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(step))
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # type: ignore[arg-type]
        record.step(loss, norm_of(model))
    return model


@trap
def a_closure_that_is_called_again(record: Record) -> nn.Module:
    model = build()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    record.watch(model, optimizer)
    for step in range(STEPS):
        losses: list[float] = []

        def closure(step: int = step, losses: list[float] = losses) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(step))
            loss.backward()
            losses.append(float(loss.detach()))
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        record.step(losses[-1], norm_of(model))
    return model


@trap
def autocast(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


@trap
def weights_in_half_precision(record: Record) -> nn.Module:
    model = build(dtype=torch.bfloat16)
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step)).mean()
        loss.backward()
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


@trap
def a_sparse_gradient(record: Record) -> nn.Module:
    model = build()
    model.embedding.sparse = True
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        sparse = [each.grad.to_dense() for each in model.parameters() if each.grad is not None]
        record.step(loss, math.sqrt(sum(float(each.double().pow(2).sum()) for each in sparse)))
    return model


@trap
def a_loss_that_is_not_finite(record: Record) -> nn.Module:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.0)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step)) * (math.inf if step % 2 else math.nan)
        loss.backward()
        for each in model.parameters():
            each.grad = torch.full_like(each, 0.5)  # the states stay finite
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


@trap
def part_of_the_model_at_a_time(record: Record) -> nn.Module:
    model = build(layers=10)
    optimizer = SGD(model.parameters(), lr=0.1)
    record.watch(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = model(batch(step))
        part = model.head(torch.ones(16)) if step % 2 else logits
        loss = part.pow(2).mean()
        loss.backward()
        optimizer.step()
        record.step(loss, norm_of(model))
    return model


@pytest.mark.parametrize("name", LOOPS)
def test_the_report_has_the_loops_own_loss_and_gradient_norm(
    name: str, monitor: ScriptedMonitor, watched: Callable[..., Callable[[], None]]
) -> None:
    loop = LOOPS[name]
    alone = Record(lambda model, optimizers: lambda: None)
    model = loop(alone)
    record = Record(watched)
    guarded = loop(record)
    assert [repr(each) for each in record.losses] == [repr(each) for each in alone.losses], "the losses are bit-equal"
    for one, two in zip(model.parameters(), guarded.parameters(), strict=True):
        assert torch.equal(one, two)
    found = reports(monitor)
    assert len(found) >= 3
    for step, training in found.items():
        expected = (record.losses[step], record.norms[step])
        assert same(training.loss, expected[0]), (step, training.loss, expected)
        assert same(training.grad_norm, expected[1]), (step, training.grad_norm, expected)


def test_what_the_loop_logs_replaces_the_measurement_for_good(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    pace, own, norms = paced(agent, monitor), [], []
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        if step == 3:
            agent.log(loss=7.0)
        optimizer.step()
        own.append(float(loss.detach()) if step < 3 else 7.0)
        norms.append(norm_of(model))
        pace()
    found = reports(monitor)
    assert {3, 4, 5}.union({1, 2}) <= set(found)
    for step, training in found.items():
        assert (training.loss, training.grad_norm) == pytest.approx((own[step], norms[step]), rel=1e-6)
        assert training.learning_rate == 0.1
    assert not agent._runtime.steps.scalars._loss._nodes, "the loss is not listened for any more"


def test_other_steps_and_a_closed_agent_have_no_hook(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    config = {"cadence": {"dense_every": 4, "warmup_steps": 100}}
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=config)
    monitor.wait(lambda: agent.status()["connected"])
    listened = []
    for step in range(9):
        listened.append(bool(agent._runtime.steps.scalars._loss._nodes))
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [step for step, each in enumerate(listened) if each] == [1, 5]
    assert agent._runtime.steps.scalars._loss._nodes, "the next step has a snapshot"
    agent.close()
    assert not agent._runtime.steps.scalars._loss._nodes
    assert agent.status()["loss"] is not None


def test_a_snapshot_of_a_step_that_does_not_end_is_sent_at_the_close(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    loss_of(model, batch(0)).backward()
    optimizer.step()
    loss = loss_of(model, batch(1))
    loss.backward()
    assert monitor.shards == []
    agent.close()
    monitor.wait(lambda: monitor.shards)
    ((shard, _),) = monitor.shards
    assert (shard.step, shard.training.grad_norm) == (1, None)
    assert shard.training.loss == pytest.approx(float(loss.detach()), rel=1e-6)


def test_a_measurement_that_fails_leaves_snapshots_and_training_alone(
    monitor: ScriptedMonitor, agents: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    pace = paced(agent, monitor)

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    for step in range(STEPS):
        if step == 3:
            monkeypatch.setattr(torch, "_foreach_norm", broken)
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        pace()
    found = reports(monitor)
    assert set(found) == set(range(1, STEPS))
    assert [found[step].loss is None for step in range(1, STEPS)] == [False, False, True, True, True]
    assert agent.enabled


@pytest.mark.distributed
@pytest.mark.slow
def test_each_rank_reports_its_own_loss_and_the_norm_only_where_it_holds_whole_gradients(
    ranks: Callable[..., Any], monitor: ScriptedMonitor, tmp_path: Path
) -> None:
    layouts = ["ddp", "ddp-late", "zero", "fsdp1", "fsdp2", "fsdp2-late"]
    ranks("measured.py", tmp_path / "out", monitor.endpoint, *layouts).wait()
    for rank in range(2):
        own = json.loads(Path(f"{tmp_path / 'out'}.{rank}").read_text())
        for layout in layouts:
            shards = [shard for shard, _ in monitor.shards if (shard.run, shard.process_rank) == (layout, rank)]
            assert len(shards) >= 3, (layout, rank)
            for shard in shards:
                assert shard.training.loss == pytest.approx(own[layout]["losses"][shard.step], rel=1e-6), layout
                assert shard.training.log_partition is not None, layout
                assert shard.training.update_rms is not None or shard.step == 0, layout
                if layout.startswith("fsdp"):
                    assert shard.training.grad_norm is None, "the norm of a shard is none of the model"
                else:
                    assert shard.training.grad_norm == pytest.approx(own[layout]["norms"][shard.step], rel=1e-5), layout


def _loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(tokens)
    return logits, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _update_rms(model: nn.Module, optimizer: Optimizer, step: int) -> float:
    """The loop's own figure, before the update that makes `step + 1`."""
    squares = []
    for each in model.parameters():
        moment = optimizer.state[each]["exp_avg_sq"].double() / (1 - 0.95**step)
        assert each.grad is not None
        squares.append(float(each.grad.double().square().sum() / moment.sum()))
    return math.sqrt(sum(squares) / len(squares))


@pytest.mark.parametrize("block", [None, checkpointed, checkpointed_reentrant])
def test_update_rms_log_partition_and_attention_logits_are_measured_beside(
    block: Any, monitor: ScriptedMonitor, agents: Attach
) -> None:
    losses: dict[bool, list[str]] = {}
    rms: dict[int, float] = {}
    partitions: dict[int, float] = {}
    for watches in (False, True):
        model = build(run=block)
        optimizer = AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95))
        pace = lambda: None  # noqa: E731
        if watches:
            agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
            monitor.wait(lambda agent=agent: agent.status()["connected"])
            pace = paced(agent, monitor)
        for step in range(STEPS):
            logits, loss = _loss(model, batch(step))
            optimizer.zero_grad()
            loss.backward()
            partitions[step] = float(logits.detach().logsumexp(-1).mean())
            if step:
                rms[step] = _update_rms(model, optimizer, step)
            if block is not checkpointed_reentrant:  # which warns without gradients
                with torch.no_grad():
                    model.eval()(batch(0))  # an evaluation between the two has an output of its own
                    model.train()
            optimizer.step()
            losses.setdefault(watches, []).append(repr(loss))
            pace()
    assert losses[True] == losses[False]
    found = reports(monitor)
    assert len(found) >= 3
    for step, training in found.items():
        assert training.update_rms == pytest.approx(rms[step], rel=1e-5)
        assert training.log_partition == pytest.approx(partitions[step], rel=1e-5)
    for shard, _ in monitor.shards:
        measured = shard.observables.get("max_attention_logit")
        if block is None:
            assert measured is not None
            assert all(value is not None and math.log(8) - 1 < value < 10 for value in measured)
        else:
            assert measured is None, "what a checkpoint has packed is not computed again"


def test_no_gradient_accumulators_are_made_while_forwards_run_in_several_threads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scalars = StepScalars(OptimizerSet([optimizer]), AgentStats())

    def measured() -> float | None:
        scalars._stats.measured["loss"].put(None)
        scalars.begin(model, ParallelLayout("single", True))
        loss_of(model, batch(0)).backward()
        scalars.end()
        return scalars._stats.measured["loss"].get()

    assert measured() is not None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(scalars.note_output, None).result()
    scalars.note_output(None)
    assert measured() is None
    assert caplog.text.count("the loss may stay unmeasured; Agent.log(loss=...) sends it") == 1
    assert measured() is not None, "the forwards since are of this thread"
    scalars.close()
