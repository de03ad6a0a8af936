"""All optimizers of a model have one scale, one cap, one count of steps, and one rewind."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

import koopmon
from koopmon.agent.control import rewind as rewind_module
from koopmon.agent.control.command_judge import CommandResult
from koopmon.wire.messages import Applied, Rewind
from tests.agent.bench import attached, outcomes, submit
from tests.agent.models import Model, batch, build, loss_of
from tests.agent.scripted_monitor import ScriptedMonitor


class Training:
    """A training in this process; its loop depends on where the optimizers step."""

    def __init__(self, make: Callable[[Model], list[Optimizer]], *, in_backward: bool = False) -> None:
        self.model = build()
        self.optimizers = make(self.model)
        self.in_backward = in_backward
        self.step = 0
        self.moved: list[float] = []
        """The distance that the head's bias moves in each step, in units of its gradient."""
        if in_backward:
            for optimizer in self.optimizers:
                for each in optimizer.param_groups[0]["params"]:
                    each.register_post_accumulate_grad_hook(self._update(optimizer))

    def _update(self, optimizer: Optimizer) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        return update

    def train(self, steps: int) -> list[float]:
        losses = []
        bias = self.model.head.bias
        for _ in range(steps):
            seen: list[Tensor] = []
            handle = bias.register_hook(lambda gradient, seen=seen: seen.append(gradient.clone()))
            before = bias.detach().clone()
            loss = loss_of(self.model, batch(self.step))
            loss.backward()
            handle.remove()
            if not self.in_backward:
                for optimizer in self.optimizers:
                    optimizer.step()
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
            self.moved.append(float(((before - bias.detach()) / seen[0]).median()))
            losses.append(float(loss.detach()))
            self.step += 1
        return losses

    def values(self) -> list[Tensor]:
        return [each.detach().clone() for each in self.model.parameters()]


class Guarded(Training):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.runtime = attached(self.model, self.optimizers, cadence={"dense_every": 1})

    def command(self, kind: Any, **fields: Any) -> CommandResult:
        """Submit a command and train until its outcome; two steps at most."""
        asked = submit(self.runtime, kind, **fields)
        for _ in range(2):
            self.train(1)
            if (found := outcomes(self.runtime)) and found[-1].command_id == asked:
                break
        outcome = outcomes(self.runtime)[-1]
        assert outcome.command_id == asked
        return outcome


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Guarded]]:
    monkeypatch.setattr(rewind_module, "MAX_COST", 1e9)
    made: list[Guarded] = []

    def make(*args: Any, **options: Any) -> Guarded:
        made.append(Guarded(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.runtime.close("")
        assert each.runtime.breaker.num_errors == 0


def two(model: Model) -> list[Optimizer]:
    """Like Muon for the matrices of the blocks and another one for the rest."""
    matrices = [each for each in model.blocks.parameters() if each.dim() == 2]
    rest = [each for each in model.parameters() if all(each is not other for other in matrices)]
    kind: Any = getattr(torch.optim, "Muon", SGD)
    return [kind(matrices, lr=0.02), SGD(rest, lr=0.01, momentum=0.0)]


def one_per_parameter(model: Model) -> list[Optimizer]:
    return [SGD([each], lr=0.01) for each in model.parameters()]


def one_per_layer(model: Model) -> list[Optimizer]:
    return [SGD(part.parameters(), lr=0.01) for part in (model.embedding, *model.blocks, model.head)]


KINDS: dict[str, tuple[Callable[[Model], list[Optimizer]], bool]] = {
    "muon and another": (two, False),
    "one per layer": (one_per_layer, False),
    "one per parameter": (one_per_parameter, False),
    "in the backward pass": (one_per_parameter, True),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    make, in_backward = KINDS[request.param]
    return {"make": make, "in_backward": in_backward}


def test_without_a_command_no_bit_changes(kind: dict[str, Any], guarded: Callable[..., Guarded]) -> None:
    plain, ours = Training(**kind), guarded(**kind)
    assert ours.train(40) == plain.train(40)
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), ours.values(), strict=True))


def test_all_optimizers_share_the_clock_and_the_scale(kind: dict[str, Any], guarded: Callable[..., Guarded]) -> None:
    training = guarded(**kind)
    training.train(6)
    assert training.runtime.stats.step in (5, 6), "the last step may end at the next forward"
    assert training.runtime.stats.measured["learning_rate"].get() == training.optimizers[0].param_groups[0]["lr"]
    step = training.runtime.stats.step
    assert training.moved == pytest.approx([0.01] * 6, rel=1e-3)
    assert training.command("set_lr_scale", lr_scale=0.25).outcome == "applied"
    training.train(3)
    assert training.moved[-3:] == pytest.approx([0.0025] * 3, rel=1e-3)
    assert training.runtime.stats.step - step == training.step - 6
    rates = {group["lr"] for each in training.optimizers for group in each.param_groups}
    assert rates <= {0.01, 0.02}
    assert training.command("set_lr_scale", lr_scale=1.0).outcome == "applied"
    training.train(1)
    assert training.moved[-1] == pytest.approx(0.01, rel=1e-3)


def test_every_parameter_moves_less(kind: dict[str, Any], guarded: Callable[..., Guarded]) -> None:
    plain, ours = Training(**kind), guarded(**kind)
    for each in (plain, ours):
        each.train(3)
    plain.train(1)
    submit(ours.runtime, "set_lr_scale", lr_scale=0.125)
    before = ours.values()
    ours.train(1)
    for old, own, less in zip(before, plain.values(), ours.values(), strict=True):
        moved = float((own - old).norm())
        assert moved == 0.0 or float((less - old).norm()) == pytest.approx(0.125 * moved, rel=0.02)


def test_a_cap_counts_from_the_largest_rate_of_all(guarded: Callable[..., Guarded]) -> None:
    training = guarded(two)
    training.train(3)
    assert training.command("set_lr_scale", lr_scale=1.0, max_rate=0.01).outcome == "applied"
    peak = max(each.param_groups[0]["lr"] for each in training.optimizers)
    training.train(2)
    assert training.moved[-1] == pytest.approx(0.01 * 0.01 / peak, rel=1e-3)


def test_a_rewind_returns_all_parameters_and_states(kind: dict[str, Any], guarded: Callable[..., Guarded]) -> None:
    training = guarded(**kind)
    training.train(16)
    held = training.values()
    first = training.train(3)
    assert training.runtime.stats.step in (18, 19)
    outcome = training.command("rewind", rewind=Rewind(max_rate=1.0, min_age_steps=0))
    assert (outcome.outcome, outcome.detail) == ("applied", "returned to step 16")
    if not kind["in_backward"]:
        assert all(torch.equal(a, b) for a, b in zip(held, training.values(), strict=True))
        training.step = 16
        assert training.train(3) == first


def test_an_optimizer_that_joins_is_scaled_and_one_that_dies_is_let_go(guarded: Callable[..., Guarded]) -> None:
    def head_alone(model: Model) -> list[Optimizer]:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return [SGD(model.head.parameters(), lr=0.01)]

    training = guarded(head_alone)
    training.train(20)
    assert training.command("set_lr_scale", lr_scale=0.5).outcome == "applied"
    step = training.runtime.stats.step
    training.model.requires_grad_(True)
    training.optimizers = [AdamW(training.model.parameters(), lr=0.01, weight_decay=0.0)]
    gc.collect()
    training.runtime.steps.add_optimizer(training.optimizers[0])
    assert list(training.runtime.optimizers) == training.optimizers
    before = training.values()
    training.train(1)
    assert training.runtime.stats.step == step + 1
    # The first step of AdamW moves each weight by the rate.
    moved = max(float((a - b).abs().max()) for a, b in zip(before, training.values(), strict=True))
    assert moved == pytest.approx(0.005, rel=0.01)
    assert training.command("rewind", rewind=Rewind(max_rate=1.0, min_age_steps=0)).outcome in ("failed", "refused")
    training.train(33)
    outcome = training.command("rewind", rewind=Rewind(max_rate=1.0, min_age_steps=0))
    assert (outcome.outcome, outcome.detail) == ("applied", "returned to step 48")


def test_one_that_does_not_follow_its_rate_refuses_for_all(
    guarded: Callable[..., Guarded], caplog: pytest.LogCaptureFixture
) -> None:
    def make(model: Model) -> list[Optimizer]:
        return [SGD(model.head.parameters(), lr=0.01), torch.optim.Rprop(model.blocks.parameters(), lr=0.01)]

    training = guarded(make)
    training.train(3)
    outcome = training.command("set_lr_scale", lr_scale=0.25)
    assert (outcome.outcome, "Rprop does not follow" in outcome.detail) == ("refused", True)
    training.train(1)
    assert training.moved[-1] == pytest.approx(0.01, rel=1e-3)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_one_that_joins_later_and_does_not_follow_is_named(
    guarded: Callable[..., Guarded], caplog: pytest.LogCaptureFixture
) -> None:
    training = guarded(lambda model: [SGD(model.head.parameters(), lr=0.01)])
    training.train(3)
    assert training.command("set_lr_scale", lr_scale=0.25).outcome == "applied"
    late = torch.optim.Rprop(training.model.blocks.parameters(), lr=0.01)
    training.optimizers.append(late)
    training.runtime.steps.add_optimizer(late)
    training.train(4)
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    share, record = warnings
    assert "the optimizer trains 0 of 3 blocks" in share.getMessage(), "at the first forward"
    assert "0.25 is not in force" in record.getMessage()
    assert "Rprop" in record.getMessage()


def test_schedulers_of_each_optimizer_see_their_own_rates(guarded: Callable[..., Guarded]) -> None:
    training = guarded(two)
    schedules = [ExponentialLR(each, 0.5) for each in training.optimizers]
    training.train(2)
    assert training.command("set_lr_scale", lr_scale=0.25).outcome == "applied"
    for _ in range(3):
        training.train(1)
        for each in schedules:
            each.step()
    assert [each.param_groups[0]["lr"] for each in training.optimizers] == pytest.approx([0.02 / 8, 0.01 / 8])


def test_attach_takes_a_list_and_a_second_call_adds_to_it(monitor: ScriptedMonitor) -> None:
    training = Training(one_per_layer)
    first, *others = training.optimizers
    agent = koopmon.attach(training.model, [first, others[0]], endpoint=monitor.endpoint)
    try:
        again = koopmon.attach(training.model, others[1:], endpoint=monitor.endpoint)
        by_optimizer = koopmon.attach(nn.Linear(2, 2), others[-1], endpoint=monitor.endpoint)
        assert again.joined
        assert by_optimizer.joined
        runtime: Any = agent._runtime
        assert list(runtime.optimizers) == training.optimizers
        training.train(3)
        assert agent.status()["step"] == 3
    finally:
        agent.close()
    for wrong in ([], [training.model], training.model):
        with pytest.raises(TypeError, match="optimizer is"):
            koopmon.attach(build(), wrong, endpoint=monitor.endpoint)  # type: ignore[arg-type]


def test_what_was_in_force_is_said_when_it_is_back(
    monitor: ScriptedMonitor, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedMonitor(tmp_path / "again", restore=Applied(lr_scale=0.25, max_rate=0.005)) as again:
        training = Training(one_per_layer)
        agent = koopmon.attach(training.model, training.optimizers, endpoint=again.endpoint)
        try:
            again.wait(lambda: agent.status()["connected"])
            again.wait(lambda: training.train(1) and training.moved[-1] < 0.009)
        finally:
            agent.close()
    (record,) = [each for each in caplog.records if "in force again" in each.getMessage()]
    assert "learning rate x 0.25, peak rate at most 0.005" in record.getMessage()


def test_weights_that_change_without_a_step_are_one_line(
    monitor: ScriptedMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.01)
    agent = koopmon.attach(model, optimizer, endpoint=monitor.endpoint)
    step: Any = SGD.step.__wrapped__  # type: ignore[attr-defined]  # without hooks, as in torch.compile
    try:
        for number in range(40):
            loss_of(model, batch(number)).backward()
            step(optimizer)
    finally:
        agent.close()
    found = [each.getMessage() for each in caplog.records if "no snapshots and no commands" in each.getMessage()]
    assert len(found) == 1


class Sharpness(SGD):
    """Like sharpness-aware minimisation: its constructor makes the optimizer that steps."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.base_optimizer = SGD(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)


class Copying(SGD):
    """Like ZeroRedundancyOptimizer: copies its rate to the optimizer that steps."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.optim = SGD(self.param_groups[0]["params"], lr=lr)

    def step(self, closure: Any = None) -> Any:
        for own, inner in zip(self.param_groups, self.optim.param_groups, strict=True):
            inner["lr"] = own["lr"]
        return self.optim.step(closure)


@pytest.mark.parametrize("wrapper", [Sharpness, Copying])
@pytest.mark.parametrize("early", [False, True])
def test_a_wrapper_is_scaled_once_also_if_it_is_attached_in_its_constructor(
    wrapper: Any, early: bool, guarded: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = guarded(lambda model: [wrapper(model.parameters(), lr=0.01)] if not early else [SGD(model.parameters())])
    if early:  # as `koopmon run` does, which is called at the end of Optimizer.__init__

        def init(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            training.runtime.steps.add_optimizer(self)

        original = Optimizer.__init__
        monkeypatch.setattr(Optimizer, "__init__", init)
        training.optimizers = [wrapper(training.model.parameters(), lr=0.01)]
        gc.collect()
    training.train(3)
    assert training.command("set_lr_scale", lr_scale=0.25).outcome == "applied"
    training.train(2)
    assert training.moved[-5:] == pytest.approx([0.01] * 2 + [0.0025] * 3, rel=1e-3)
    assert training.runtime.stats.step == training.step
    (outer,) = training.optimizers
    assert outer.param_groups[0]["lr"] == 0.01
