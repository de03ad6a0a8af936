"""The injected gradient equals that of an explicit (loss + alpha * kss).backward(), in every way of training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.action import NextForwards
from koopmon.agent.control.kss.injection import KssInjection, kss_gradient_op
from koopmon.agent.stats import AgentStats
from koopmon.spectral import kss_basis, kss_loss
from koopmon.token_sampling import order_rows, take_rows
from koopmon.wire.messages import KssSettings
from tests.agent.models import VOCABULARY, B, L, Model, T, batch, build, checkpointed, checkpointed_reentrant, loss_of
from tests.agent.scripted_monitor import ScriptedMonitor

SEED, STEP, ALPHA = 5, 17, 0.7
SETTINGS = KssSettings(alpha=ALPHA, tau_u=0.9, beta=0.8, svd_rank=6, num_samples=24)
Tie = Callable[[KssInjection, Model], None]


def latch(
    injection: KssInjection,
    step: int = STEP,
    alpha: float = ALPHA,
    settings: KssSettings = SETTINGS,
    num_forwards: int = 1,
) -> None:
    injection.latch(step, replace(settings, alpha=alpha), NextForwards(L, num_forwards, 0))


def tie(injection: KssInjection, model: Model) -> None:
    """Hooks like those of the taps."""
    for layer, block in enumerate(model.blocks):

        def enter(module: nn.Module, args: Any, layer: int = layer) -> None:
            if injection.active:
                injection.enter(layer, args[0], None)

        def leave(module: nn.Module, args: Any, output: Tensor, layer: int = layer) -> Any:
            return injection.leave(layer, output) if injection.active else None

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)


def injected(
    model: Model, *, num_forwards: int = 1, settings: KssSettings = SETTINGS, alpha: float = ALPHA
) -> AgentStats:
    stats = AgentStats()
    injection = KssInjection(SEED, stats, CircuitBreaker("KSS"))
    latch(injection, STEP, alpha, settings, num_forwards)
    tie(injection, model)
    model.injection = injection  # type: ignore[assignment]
    return stats


def penalty(
    model: Model, tokens: Tensor, layers: list[int], settings: KssSettings = SETTINGS, step: int = STEP
) -> Tensor:
    """Compute the mean over `layers` of L_KSS for autograd, with a constant basis."""
    rows, _ = order_rows(B * T, settings.num_samples, seed=SEED, step=step, data_rank=0)
    states = [model.embedding(tokens) * 1.0]
    for block in model.blocks:
        states.append(block(states[-1].clone()))
    total = torch.zeros((), dtype=states[0].dtype)
    for layer in layers:
        x, y = take_rows(states[layer], rows), take_rows(states[layer + 1], rows)
        total = total + kss_loss(
            x,
            y,
            basis=kss_basis(x.detach(), settings.svd_rank, SEED),
            temperature=settings.temperature,
            tau_u=settings.tau_u,
            tau_l=settings.tau_l,
            gamma=settings.gamma,
            beta=settings.beta,
        )
    return total / len(layers)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(found: nn.Module, expected: nn.Module, bound: float = 1e-12) -> None:
    a, b = gradients(found), gradients(expected)
    assert float((a - b).norm() / b.norm()) < bound


def explicit(
    tokens: list[Tensor], *, in_place: bool = False, layers: list[int] | None = None, scale: float = 1.0
) -> Model:
    """Return the model after the backward passes of (loss + alpha * kss) / microbatches."""
    model = build(dtype=torch.float64, in_place=in_place)
    for each in tokens:
        loss = loss_of(model, each) + ALPHA * penalty(model, each, layers or list(range(L)))
        (scale * loss / len(tokens)).backward()
    return model


@pytest.mark.parametrize("run", [None, checkpointed, checkpointed_reentrant])
def test_equals_the_written_loss(run: Any) -> None:
    model = build(dtype=torch.float64, run=run)
    stats = injected(model)
    loss_of(model, batch(0)).backward()
    close(model, explicit([batch(0)]))
    plain = build(dtype=torch.float64)
    loss_of(plain, batch(0)).backward()
    assert float((gradients(model) - gradients(plain)).norm() / gradients(plain).norm()) > 1e-3, "KSS does something"
    assert stats.action_seconds > 0.0


def test_with_blocks_that_write_into_their_input() -> None:
    model = build(dtype=torch.float64, in_place=True)
    injected(model)
    loss_of(model, batch(0)).backward()
    close(model, explicit([batch(0)], in_place=True))


@pytest.mark.parametrize("run", [None, checkpointed])
def test_with_gradient_accumulation(run: Any) -> None:
    tokens = [batch(0), batch(1), batch(2)]
    model = build(dtype=torch.float64, run=run)
    injected(model, num_forwards=3)
    for each in tokens:
        (loss_of(model, each) / 3).backward()
    close(model, explicit(tokens))


def test_with_a_part_of_the_layers() -> None:
    settings = replace(SETTINGS, layer_fraction=0.4)
    model = build(dtype=torch.float64)
    injected(model, settings=settings)
    loss_of(model, batch(0)).backward()
    found = []
    for layer in range(L):
        expected = explicit([batch(0)], layers=[layer])
        found.append(float((gradients(model) - gradients(expected)).norm() / gradients(expected).norm()) < 1e-12)
    assert sum(found) == 1, "one layer of three, as 0.4 says"


def test_with_a_grad_scaler() -> None:
    model = build(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    injected(model, alpha=0.0)
    injection: KssInjection = model.injection  # type: ignore[assignment]
    optimizer.register_step_pre_hook(lambda each, *_: injection.find_scaler(each))
    scaler.scale(loss_of(model, batch(1))).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    latch(injection)
    scaler.scale(loss_of(model, batch(0))).backward()
    close(model, explicit([batch(0)], scale=1024.0))
    assert (injection.skipped.get() or 0) == 0


def test_with_a_grad_scaler_whose_user_unscales_and_steps_by_hand() -> None:
    model = build(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler, bystander = torch.amp.GradScaler("cpu", init_scale=64.0), torch.amp.GradScaler("cpu", init_scale=3.0)
    injected(model, alpha=0.0)
    injection: KssInjection = model.injection  # type: ignore[assignment]
    bystander.scale(torch.ones(()))
    scaler.scale(loss_of(model, batch(1))).backward()
    scaler.unscale_(optimizer)
    injection.find_scaler(optimizer)
    optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    latch(injection)
    scaler.scale(loss_of(model, batch(0))).backward()
    close(model, explicit([batch(0)], scale=64.0))


def test_no_scaler_is_taken_for_one_that_is_not_there() -> None:
    model = build(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    injected(model)
    model.injection.find_scaler(optimizer)  # type: ignore[union-attr, operator]
    loss_of(model, batch(0)).backward()
    close(model, explicit([batch(0)]))


def test_without_alpha_nothing_is_added_to_the_graph() -> None:
    def nodes(loss: Tensor) -> list[str]:
        found, queue, seen = [], [loss.grad_fn], set()
        while queue:
            node = queue.pop()
            if node is not None and node not in seen:
                seen.add(node)
                found.append(node.name())
                queue += [following for following, _ in node.next_functions]
        return sorted(found)

    model, plain = build(), build()
    injected(model, alpha=0.0)
    loss, expected = loss_of(model, batch(0)), loss_of(plain, batch(0))
    assert nodes(loss) == nodes(expected)
    assert torch.equal(loss, expected)
    injection: KssInjection = model.injection  # type: ignore[assignment]
    latch(injection)
    loss = loss_of(model, batch(0))
    assert nodes(loss) != nodes(expected)
    assert torch.equal(loss, expected), "the value is never changed"


def test_before_the_first_step_nothing_is_injected() -> None:
    injection = KssInjection(SEED, AgentStats(), CircuitBreaker("KSS"))
    assert not injection.active
    state = torch.ones(B, T, 4, requires_grad=True)
    injection.enter(0, state, None)
    assert injection.leave(0, state * 2.0) is None


@pytest.mark.parametrize(("fraction", "number"), [(0.01, 1), (0.1, 1), (0.5, 2), (0.9, 3), (1.0, 3)])
def test_at_least_one_layer_is_sampled(fraction: float, number: int) -> None:
    injection = KssInjection(SEED, AgentStats(), CircuitBreaker("KSS"))
    latch(injection, settings=replace(SETTINGS, layer_fraction=fraction))
    for layer in range(L):
        injection.enter(layer, torch.ones(B, T, 4, requires_grad=True), None)
    assert len(injection._entered) == number


def test_a_chain_of_one_layer_is_sampled_and_an_unknown_number_of_microbatches_is_one() -> None:
    injection = KssInjection(SEED, AgentStats(), CircuitBreaker("KSS"))
    weights = []
    for num_microbatches in (0, 1, 2):
        injection.latch(STEP, SETTINGS, NextForwards(1, num_microbatches, 0))
        assert injection.active
        weights.append(injection._weight)
    assert weights == [ALPHA, ALPHA, ALPHA / 2]


def test_the_end_of_a_step_frees_the_states_of_its_forwards() -> None:
    injection = KssInjection(SEED, AgentStats(), CircuitBreaker("KSS"))
    latch(injection)
    state = torch.ones(B, T, 4, requires_grad=True)
    injection.enter(0, state, None)
    assert len(injection._entered) == 1
    injection.end()
    assert not injection._entered
    assert not injection.active
    assert injection.leave(0, state * 2.0) is None


def test_the_time_of_an_injection_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, ticks = AgentStats(), iter(range(100, 200))
    injection = KssInjection(SEED, stats, CircuitBreaker("KSS"))
    latch(injection)
    monkeypatch.setattr("koopmon.agent.control.kss.injection.time.perf_counter", lambda: float(next(ticks)))
    stats.action_seconds = 7.0
    state = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    injection.enter(0, state, None)
    assert stats.action_seconds == 8.0
    assert injection.leave(0, state * 2.0) is not None
    assert stats.action_seconds == 9.0


def test_every_so_many_steps() -> None:
    settings = KssSettings(alpha=1.0, every=5)
    injection = KssInjection(SEED, AgentStats(), CircuitBreaker("KSS"))
    active = []
    for step in range(12):
        latch(injection, step, 1.0, settings)
        active.append(injection.active)
    assert [step for step, each in enumerate(active) if each] == [0, 5, 10]


def test_a_gradient_that_cannot_be_trusted_adds_exactly_nothing_and_is_counted() -> None:
    model, plain = build(dtype=torch.float64), build(dtype=torch.float64)
    for each in (model, plain):
        with torch.no_grad():
            each.embedding.weight[3] = torch.nan
    injected(model)
    tokens = batch(0)
    tokens[0, 0] = 3
    weights = torch.linspace(-1, 1, B * T * VOCABULARY, dtype=torch.float64).view(B, T, VOCABULARY)
    for each in (model, plain):
        (each(tokens) * weights)[1:].sum().backward()
    found, expected = gradients(model), gradients(plain)
    assert torch.allclose(found, expected, rtol=0.0, atol=0.0, equal_nan=True)
    assert torch.isfinite(found).any()
    injection: KssInjection = model.injection  # type: ignore[assignment]
    latch(injection, STEP + 1)
    assert injection.skipped.get() == L


def test_a_second_backward_through_the_same_graph_adds_nothing_more() -> None:
    model, once, twice = build(dtype=torch.float64), build(dtype=torch.float64), build(dtype=torch.float64)
    injected(model)
    loss = loss_of(model, batch(0))
    loss.backward(retain_graph=True)
    loss.backward()
    (loss_of(twice, batch(0)) + ALPHA * penalty(twice, batch(0), list(range(L)))).backward()
    loss_of(once, batch(0)).backward()
    expected = gradients(twice) + gradients(once)
    assert float((gradients(model) - expected).norm() / expected.norm()) < 1e-12


def test_a_gradient_of_a_gradient_is_the_users_own() -> None:
    def penalised(model: Model) -> Tensor:
        weight = model.embedding.weight
        (slope,) = torch.autograd.grad(loss_of(model, batch(0)), weight, create_graph=True)
        return slope.square().sum()

    model, plain = build(dtype=torch.float64), build(dtype=torch.float64)
    injected(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found, expected = penalised(model), penalised(plain)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0.0)


def test_a_failure_in_the_backward_pass_leaves_the_users_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = build(dtype=torch.float64), build(dtype=torch.float64)
    injected(model)
    loss = loss_of(model, batch(0))

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.Tensor, "index_add", broken)
    loss.backward()
    loss_of(plain, batch(0)).backward()
    assert torch.equal(gradients(model), gradients(plain))
    breaker = model.injection._breaker  # type: ignore[union-attr]
    assert (breaker.tripped, breaker.num_errors) == (True, 1)
    assert "out of memory" in breaker.reason


def test_a_failure_at_the_input_of_a_block_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dtype=torch.float64)
    injected(model)
    loss = loss_of(model, batch(0))

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.Tensor, "index_add_", broken)
    loss.backward()
    assert torch.isfinite(gradients(model)).all()
    breaker = model.injection._breaker  # type: ignore[union-attr]
    assert breaker.tripped
    assert "out of memory" in breaker.reason


def test_a_compiler_knows_the_shapes_of_the_gradient() -> None:
    with FakeTensorMode():
        x, y = torch.empty(5, 4), torch.empty(5, 4, dtype=torch.float64)
        grad_x, grad_y, trusted = kss_gradient_op(x, y, 3, 0, [20.0, 1.05, 0.9, 0.4, 1.0])
    assert (grad_x.shape, grad_x.dtype) == ((5, 4), torch.float32)
    assert (grad_y.shape, grad_y.dtype) == ((5, 4), torch.float64)
    assert (trusted.shape, trusted.dtype) == ((), torch.bool)


def test_padding_is_left_out() -> None:
    injection = KssInjection(SEED, AgentStats(), CircuitBreaker("KSS"))
    latch(injection)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[1, 2:6] = mask[3, :3] = True
    state = torch.arange(B * T * 2, dtype=torch.float64).view(B, T, 2).requires_grad_()
    injection.enter(0, state, mask)
    rows = injection._entered[0].detach()[:, 0] / 2
    assert rows.shape == (SETTINGS.num_samples,), "the shape does not depend on the mask's values"
    assert set(rows.long().tolist()) == set(mask.flatten().nonzero().flatten().tolist())


def test_a_forward_of_another_shape_or_mask_has_rows_of_its_own() -> None:
    injection = KssInjection(SEED, AgentStats(), CircuitBreaker("KSS"))
    latch(injection)

    def rows(batch_size: int, *counted: tuple[int, int]) -> set[int]:
        mask = torch.zeros(batch_size, T, dtype=torch.bool)
        for place in counted:
            mask[place] = True
        state = torch.arange(batch_size * T * 2, dtype=torch.float64).view(batch_size, T, 2).requires_grad_()
        injection.enter(0, state, mask if counted else None)
        return set((injection._entered[0].detach()[:, 0] / 2).long().tolist())

    assert rows(B, (1, 2), (1, 4)) == {T + 2, T + 4}
    assert rows(B, (0, 3)) == {3}
    assert max(rows(B)) >= T
    assert max(rows(1)) < T


def test_a_batch_of_padding_alone_raises_nothing() -> None:
    injection = KssInjection(SEED, AgentStats(), CircuitBreaker("KSS"))
    latch(injection)
    injection.enter(0, torch.ones(B, T, 2, requires_grad=True), torch.zeros(B, T, dtype=torch.bool))
    assert injection._entered[0].shape == (SETTINGS.num_samples, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_get_a_gradient_computed_in_float32(dtype: torch.dtype) -> None:
    injection = KssInjection(SEED, AgentStats(), CircuitBreaker("KSS"))
    latch(injection)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(8, 8, generator=generator).to(dtype)
    injection.enter(0, x, None)
    y = injection.leave(0, x + x @ weight)
    assert y is not None
    assert y.dtype == dtype
    y.backward(torch.zeros_like(y))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert float(x.grad.abs().max()) > 0.0


def test_through_an_attached_agent_with_accumulation_checkpointing_and_a_grad_scaler(
    monitor: ScriptedMonitor, agents: Callable[..., Any]
) -> None:
    model = build(dtype=torch.float64, run=checkpointed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"sampling": {"seed": SEED}})
    monitor.wait(lambda: agent.status()["connected"])
    checked = 0
    for step in range(500):
        if step == 2:
            monitor.command("set_kss", kss=SETTINGS)
        time.sleep(0.005)
        alpha, scale = agent.status()["applied"]["kss"]["alpha"], scaler.get_scale()
        tokens = [batch(2 * step), batch(2 * step + 1)]
        optimizer.zero_grad()
        for each in tokens:
            scaler.scale(loss_of(model, each) / 2).backward()
        expected = build(dtype=torch.float64)
        for each in tokens:
            loss = loss_of(expected, each) + alpha * penalty(expected, each, list(range(L)), step=step)
            (scale * loss / 2).backward()
        if not agent.status()["kss_skipped"]:
            close(model, expected)
            checked += alpha > 0.0
        scaler.step(optimizer)
        scaler.update()
        if checked == 4:
            break
    assert checked == 4
    assert scaler.get_scale() > 256.0, "the scale moved, and the weight with it"
