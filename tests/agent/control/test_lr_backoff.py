"""Effective rate = schedule x scale in all bits, for any optimizer and scheduler. The user never sees the scale."""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from koopmon.agent.control.action import RequestRefusedError, Target, Update, towards
from koopmon.agent.control.lr_backoff import LrBackoff
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rate_shares import BOUNDED_AT, as_parameters
from koopmon.agent.control.state import ActionState, ControlState, Ramp
from koopmon.config import LimitsConfig
from koopmon.plugins import select
from koopmon.wire.messages import Applied, Command, Heartbeat
from tests.agent.models import batch, build, loss_of
from tests.agent.scripted_monitor import ScriptedMonitor

SCALES = [1.0, 1.0, 1.0, 0.3, 0.3, 0.55, 0.07, 1.0, 1.0, 0.9, 0.5]
LONG = 60
SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 7)),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.03, total_steps=LONG + 1),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, T_max=5, eta_min=1e-5),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.5),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda groups: SGD(groups, lr=0.02, momentum=0.9),
    "AdamW": lambda groups: AdamW(groups, lr=0.01),
}


def rates(optimizer: Optimizer) -> list[Any]:
    return [group["lr"] for group in optimizer.param_groups]


def step_recording(optimizer: Optimizer, seen: list[list[float]]) -> None:
    """One step that records the rates in use."""
    handle = optimizer.register_step_pre_hook(lambda _, args, __: seen.append(rates(args[0])))
    optimizer.step()
    handle.remove()


def guarded(optimizer: Optimizer, scale: Callable[[], float]) -> LrBackoff:
    """Scale the updates of `optimizer` as the agent does."""
    backoff = LrBackoff(LimitsConfig())

    def before(each: Optimizer, args: Any, kwargs: Any) -> Any:
        update = Update(each, args, kwargs)
        ramp = Ramp(start=scale(), target=scale())
        backoff.apply(ControlState(actions={"set_lr_scale": ActionState(ramp=ramp)}), 0, update)
        return update.args, update.kwargs

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: backoff.revert())
    return backoff


def train(optimizer_name: str, schedule_name: str, *, by_hand: bool) -> tuple[list[list[float]], list[Tensor]]:
    """Return the rates inside each step and the final parameters, scaled by the hooks or by hand."""
    model = build()
    inner = list(model.blocks.parameters())
    outer = [p for name, p in model.named_parameters() if not name.startswith("blocks")]
    optimizer = OPTIMIZERS[optimizer_name]([{"params": inner}, {"params": outer, "lr": 0.005}])
    schedule, current = SCHEDULES[schedule_name](optimizer), [1.0]
    if not by_hand:
        guarded(optimizer, lambda: current[0])
    seen: list[list[float]] = []
    for step, scale in enumerate(SCALES):
        loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        own, current[0] = rates(optimizer), scale
        if by_hand:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * scale
        step_recording(optimizer, seen)
        if by_hand:
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate
        assert rates(optimizer) == own
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(loss.detach())
        else:
            schedule.step()
    return seen, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_effective_rate_is_schedule_times_scale(optimizer: str, schedule: str) -> None:
    expected, by_hand = train(optimizer, schedule, by_hand=True)
    found, hooked = train(optimizer, schedule, by_hand=False)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(by_hand, hooked, strict=True))


@pytest.mark.parametrize("schedule", ["LambdaLR", "OneCycleLR", "CosineAnnealingLR"])
def test_a_command_scales_a_schedule_exactly(
    schedule: str, monitor: ScriptedMonitor, agents: Callable[..., Any]
) -> None:
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.01)
    twin = SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    ours, theirs = SCHEDULES[schedule](optimizer), SCHEDULES[schedule](twin)
    agents(model, optimizer, endpoint=monitor.endpoint)
    monitor.wait(lambda: monitor.heard)
    scheduled: list[float] = []
    seen: list[list[float]] = []
    command_id = ""
    for step in range(LONG):
        if step == 5:
            command_id = monitor.command("set_lr_scale", lr_scale=0.25, ramp_steps=3)
        time.sleep(0.005)
        scheduled.append(twin.param_groups[0]["lr"])
        loss_of(model, batch(step)).backward()
        step_recording(optimizer, seen)
        twin.step()
        ours.step()
        theirs.step()
    start = monitor.ack(command_id).step
    assert 5 <= start < LONG - 3
    scales = [1.0] * start + [0.25 ** (1 / 3), 0.25 ** (2 / 3)] + [0.25] * (LONG - start - 2)
    assert [each[0] for each in seen] == [rate * scale for rate, scale in zip(scheduled, scales, strict=True)]


def test_what_is_saved_holds_the_users_rates() -> None:
    optimizer = AdamW(build().parameters(), lr=0.1)
    guarded(optimizer, lambda: 0.5)
    optimizer.step()
    plain = AdamW(build().parameters(), lr=0.1)
    plain.step()
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == 0.1


def test_a_step_whose_closure_runs_the_forward_is_scaled_all_the_same(
    monitor: ScriptedMonitor, agents: Callable[..., Any]
) -> None:
    """Like Lightning: the training step is inside `step()`, and a forward there must not undo the scale."""
    model = build()
    optimizer = SGD(model.parameters(), lr=0.02)
    agent = agents(model, optimizer, endpoint=monitor.endpoint)
    by_keyword = [False]

    def change() -> float:
        """Return the change of the head's bias in one step, in units of its gradient."""

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(0))
            loss.backward()
            return loss

        before = model.head.bias.detach().clone()
        optimizer.step(closure=closure) if by_keyword[0] else optimizer.step(closure)
        moved = (before - model.head.bias.detach()) / model.head.bias.grad
        assert optimizer.param_groups[0]["lr"] == 0.02
        return float(moved.median())

    assert change() == pytest.approx(0.02, rel=1e-3)
    monitor.wait(lambda: agent.status()["connected"])
    command = monitor.command("set_lr_scale", lr_scale=0.25)
    monitor.wait(lambda: change() < 0.019)
    assert change() == pytest.approx(0.005, rel=1e-3)
    by_keyword[0] = True
    assert change() == pytest.approx(0.005, rel=1e-3)
    assert monitor.ack(command).outcome == "applied"

    def broken() -> Tensor:
        raise ArithmeticError

    steps = agent.status()["step"]
    with pytest.raises(ArithmeticError):
        optimizer.step(broken)
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert change() == pytest.approx(0.005, rel=1e-3)
    assert agent.status()["step"] == steps + 1, "a step that raised is none"
    assert agent.status()["errors"] == 0


def test_no_scale_is_recorded_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    optimizer = OPTIMIZERS["SGD"]([nn.Parameter(torch.ones(2))])
    guarded(optimizer, lambda: 0.5)
    step_recording(optimizer, seen)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    step_recording(optimizer, seen)
    assert seen == [[0.01], [0.02]]


def test_a_scale_below_the_limit_is_raised_to_it_and_said() -> None:
    backoff = LrBackoff(LimitsConfig(min_lr_scale=0.25))
    for asked, scale, detail in ((0.1, 0.25, "lr_scale capped at 0.25"), (0.25, 0.25, ""), (0.5, 0.5, "")):
        target = backoff.target(Applied(lr_scale=asked), ControlState(), 0)
        assert target == Target(scale, detail=detail)


def test_the_scale_in_force_is_that_of_the_ramp_at_the_step() -> None:
    backoff = LrBackoff(LimitsConfig())
    assert backoff.strength(ControlState(), 3) == 1.0
    ramp = Ramp(first_step=2, start=1.0, target=0.25, num_steps=2)
    state = ControlState(actions={"set_lr_scale": ActionState(ramp=ramp)})
    assert [backoff.strength(state, step) for step in (1, 2, 3)] == [1.0, pytest.approx(0.5), 0.25]
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    update = Update(optimizer, (optimizer,), {})
    backoff.apply(state, 3, update)
    assert rates(update.args[0]) == [pytest.approx(0.025)]
    assert rates(optimizer) == [0.1]


def test_without_a_scale_the_arguments_are_left_alone() -> None:
    backoff = LrBackoff(LimitsConfig())
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    closure = object()
    update = Update(optimizer, (optimizer, closure), {})
    backoff.apply(ControlState(), 0, update)
    assert update.args == (optimizer, closure)


class Capped:
    """A schedule, one group, and a back-off in the control state; `rates` are those inside each update."""

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self.optimizer = optimizer or SGD(build().parameters(), lr=0.1)
        self.backoff = LrBackoff(LimitsConfig())
        model = build()
        self.backoff.inspect(model, OptimizerSet(self.optimizer), select(model))
        self.state = ControlState()
        self.step = 0
        self.detail = ""

    def command(self, lr_scale: float = 1.0, ramp_steps: int = 0, **fields: Any) -> Target:
        name = {"run": "r", "incarnation": "c0f0c0f0", "id": "c0f0c0f0", "reason": "", "expires_step": 9}
        asked = Command(**name, kind="set_lr_scale", lr_scale=lr_scale, **fields)
        target = self.backoff.target(asked, self.state, self.step)
        self.state = towards(self.state, self.backoff, target, self.step, ramp_steps)
        return target

    def rates(self, schedule: list[float]) -> list[float]:
        seen = []
        for rate in schedule:
            self.optimizer.param_groups[0]["lr"] = rate
            update = Update(self.optimizer, (self.optimizer,), {})
            self.backoff.apply(self.state, self.step, update)
            seen.append(update.args[0].param_groups[0]["lr"])
            self.backoff.revert()
            assert self.optimizer.param_groups[0]["lr"] is rate
            self.step += 1
        return seen

    @property
    def applied(self) -> Applied:
        return Applied(**self.backoff.applied(self.state, self.step))


def test_a_cap_keeps_the_shape_of_the_schedule_below_a_lower_peak() -> None:
    capped = Capped()
    assert capped.rates([0.1, 0.2]) == [0.1, 0.2]
    assert capped.command(max_rate=0.02).acts
    assert capped.applied == Applied(max_rate=0.02)
    rising = capped.rates([0.01, 0.03, 0.2, 0.4])
    assert rising == pytest.approx([0.01, 0.02, 0.02, 0.02]), "the peak counts from the cap on"
    assert capped.rates([0.2, 0.04]) == pytest.approx([0.01, 0.002]), "a twentieth of what is scheduled"


def test_a_cap_above_the_schedule_changes_nothing() -> None:
    capped = Capped()
    capped.command(max_rate=0.5)
    assert capped.rates([0.1, 0.3, 0.5, 0.2]) == [0.1, 0.3, 0.5, 0.2]


def test_a_warm_up_under_the_cap_is_linear_and_ends_exactly() -> None:
    capped = Capped()
    capped.command(max_rate=0.1, warmup_steps=4)
    assert capped.rates([0.2] * 6) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert capped.backoff.effective(capped.state, capped.step) == 0.5
    capped.step = 3
    assert capped.applied == Applied(max_rate=0.1, peak_rate=0.2, warmup_done=3, warmup_steps=4)
    capped.step = 4
    assert capped.applied == Applied(max_rate=0.1, peak_rate=0.2), "an update later it has ended"


def test_the_scale_in_force_is_the_smaller_of_ramp_and_cap() -> None:
    capped = Capped()
    capped.command(max_rate=0.1)
    capped.rates([0.2])
    capped.command(lr_scale=0.1, ramp_steps=2)
    in_force = Applied(lr_scale=pytest.approx(0.1**0.5), max_rate=0.1, peak_rate=0.2)
    assert capped.applied == in_force, "a scale alone keeps the cap"
    assert capped.rates([0.2] * 3) == pytest.approx([0.2 * 0.1**0.5, 0.02, 0.02])
    assert capped.backoff.training(capped.state, capped.step) == {"lr_scale": 0.1}
    back = capped.command(lr_scale=1.0)
    assert not back.acts, "the way back from the scale is always open"
    assert capped.rates([0.2]) == pytest.approx([0.1]), "and the cap stays"
    assert capped.backoff.training(capped.state, capped.step) == {"lr_scale": 0.5}
    assert capped.applied.lr_scale == 1.0


def test_a_cap_is_only_lowered_and_keeps_its_peak() -> None:
    capped = Capped()
    capped.command(max_rate=0.1)
    assert capped.rates([0.4, 0.2]) == pytest.approx([0.1, 0.05])
    assert capped.command(max_rate=0.3).detail == "max_rate stays at 0.1, since a cap is only lowered"
    assert capped.rates([0.2]) == pytest.approx([0.05])
    assert capped.command(max_rate=0.08).detail == ""
    assert capped.rates([0.2]) == pytest.approx([0.04])
    capped.command(max_rate=0.08, warmup_steps=2)
    assert capped.rates([0.2] * 3) == pytest.approx([0.02, 0.04, 0.04]), "the warm-up starts again"


def test_the_scale_under_a_cap_has_a_floor_of_its_own() -> None:
    capped = Capped()
    capped.command(max_rate=1e-9)
    assert capped.rates([0.1, math.nan, 0.1]) == [0.1 * 0.001, pytest.approx(math.nan, nan_ok=True), 0.1 * 0.001]


def test_a_cap_needs_a_rate_that_can_be_read() -> None:
    capped = Capped()
    capped.optimizer.param_groups[0]["lr"] = None
    with pytest.raises(RequestRefusedError, match="has no learning rate"):
        capped.command(max_rate=0.1)
    capped.optimizer.param_groups[0]["lr"] = torch.ones((), device="meta")
    with pytest.raises(RequestRefusedError, match="on a device"):
        capped.command(max_rate=0.1)
    capped = Capped(Adam(build().parameters(), lr=torch.tensor(0.1), foreach=False))
    capped.command(max_rate=0.05)
    rate = capped.optimizer.param_groups[0]["lr"]
    update = Update(capped.optimizer, (capped.optimizer,), {})
    capped.backoff.apply(capped.state, 0, update)
    assert rates(update.args[0]) == [pytest.approx(0.05)]
    capped.backoff.revert()
    assert torch.equal(rate, torch.tensor(0.1))


def test_a_restored_run_has_its_cap_from_the_first_step_on_and_a_closed_one_has_none(
    agents: Callable[..., Any], tmp_path: Path
) -> None:
    before = Applied(lr_scale=0.5, max_rate=0.01)
    with ScriptedMonitor(tmp_path / "m", restore=before) as monitor:
        model = build()
        optimizer = SGD(model.parameters(), lr=0.1)
        agent = agents(model, optimizer, endpoint=monitor.endpoint)
        monitor.wait(lambda: agent.status()["connected"])
        seen: list[list[float]] = []
        for step in range(4):
            loss_of(model, batch(step)).backward()
            step_recording(optimizer, seen)
        assert [each[0] for each in seen] == pytest.approx([0.01] * 4)
        assert agent.status()["applied"]["max_rate"] == 0.01
        monitor.wait(lambda: any(beat.training.lr_scale < 0.2 for beat in monitor.of(Heartbeat)))
        assert monitor.of(Heartbeat)[-1].training.lr_scale == pytest.approx(0.1), "the scale in force"
        assert monitor.of(Heartbeat)[-1].applied == Applied(lr_scale=0.5, max_rate=0.01, peak_rate=0.1)
        agent.close()
        step_recording(optimizer, seen)
        assert seen[-1] == [0.1]


def test_a_lost_monitor_ramps_the_cap_away_where_it_ramps_back(
    monitor: ScriptedMonitor, agents: Callable[..., Any]
) -> None:
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    config = {"control": {"on_monitor_lost": "ramp", "ramp_back_steps": 4}}
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=config)
    monitor.wait(lambda: agent.status()["connected"])
    seen: list[list[float]] = []

    def stepped() -> float:
        loss_of(model, batch(0)).backward()
        step_recording(optimizer, seen)
        return seen[-1][0]

    monitor.command("set_lr_scale", lr_scale=1.0, max_rate=0.01)
    monitor.wait(lambda: stepped() < 0.1)
    agent._runtime.lifecycle.monitor_lost()
    assert [stepped() for _ in range(5)] == pytest.approx([0.1 * 0.1 ** (n / 4) for n in (3, 2, 1, 0, 0)])
    assert agent.status()["applied"]["max_rate"] is None


def test_a_cap_before_the_optimizer_is_known_is_refused() -> None:
    asked = Command(
        run="r",
        incarnation="c0f0c0f0",
        id="c0f0c0f0",
        kind="set_lr_scale",
        reason="",
        expires_step=9,
        lr_scale=1.0,
        max_rate=0.1,
    )
    with pytest.raises(RequestRefusedError, match="has no learning rate"):
        LrBackoff(LimitsConfig()).target(asked, ControlState(), 0)


def test_the_way_back_to_the_users_rates_is_always_open() -> None:
    capped = Capped()
    capped.command(lr_scale=0.5, max_rate=0.1)
    assert capped.backoff.released(capped.state) == Target(1.0, {}, acts=False)


def test_a_new_cap_does_not_count_the_peak_of_an_earlier_one() -> None:
    """Before the next update its scale is reported, too."""
    capped = Capped()
    capped.command(max_rate=0.1)
    assert capped.rates([0.4]) == pytest.approx([0.1])
    capped.state = towards(capped.state, capped.backoff, capped.backoff.released(capped.state), capped.step, 0)
    assert capped.rates([0.4]) == [0.4]
    capped.command(max_rate=0.1)
    assert capped.backoff.training(capped.state, capped.step) == {"lr_scale": 1.0}
    assert capped.rates([0.05, 0.2]) == pytest.approx([0.05, 0.1])


def test_a_restored_cap_keeps_its_peak_and_goes_on_with_its_warm_up() -> None:
    killed = Capped()
    killed.command(max_rate=0.1, warmup_steps=8)
    before = killed.rates([0.2, 0.4, 0.2])
    killed.step -= 1  # the last update of the launch
    restarted = Capped()
    target = restarted.backoff.target(killed.applied, restarted.state, restarted.step)
    restarted.state = towards(restarted.state, restarted.backoff, target, restarted.step, 0)
    assert restarted.applied == killed.applied
    after = restarted.rates([0.2] * 7)
    assert after[0] == before[-1]
    assert after == pytest.approx([0.2 * 0.25 * warm / 8 for warm in (3, 4, 5, 6, 7, 8, 8)])
    restarted.command(max_rate=0.05)
    assert restarted.applied == Applied(max_rate=0.05, peak_rate=0.4), "a lower cap keeps the peak of the launch before"


def test_an_optimizer_that_does_not_follow_refuses_a_scale_and_no_way_back() -> None:
    capped = Capped(torch.optim.Rprop(build().parameters(), lr=0.1))
    for asked in ({"lr_scale": 0.5}, {"max_rate": 0.5}):
        with pytest.raises(RequestRefusedError, match="the learning rate is not lowered: Rprop does not follow"):
            capped.command(**asked)
    assert capped.command(lr_scale=1.0) == Target(1.0, acts=False)


def test_one_that_joins_under_a_scale_and_does_not_follow_is_left_alone_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    capped = Capped()
    capped.command(lr_scale=0.5)
    late = torch.optim.Rprop(build().parameters(), lr=0.1)
    for _ in range(2):
        update = Update(late, (late,), {})
        capped.backoff.apply(capped.state, capped.step, update)
        assert update.args == (late,)
        assert len(caplog.records) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "koopmon: the learning-rate scale 0.5 is not in force: Rprop does not follow: at 0.125 of its learning rate it"
        " moves the weights 1 times as far"
    ]
    assert capped.rates([0.1]) == [0.05], "one that follows is scaled without a line"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("raises", [False, True])
def test_a_rate_that_the_step_changes_in_place_is_the_users_at_the_latest_before_the_next_update(raises: bool) -> None:
    rate = torch.tensor(0.1)
    capped = Capped(Adam(build().parameters(), lr=rate, foreach=False))
    capped.command(lr_scale=0.5)
    for _ in range(2):
        update = Update(capped.optimizer, (capped.optimizer,), {})
        capped.backoff.apply(capped.state, capped.step, update)
        expected = 0.5 * float(rate)
        update.args[0].param_groups[0]["lr"].mul_(0.5)
        if not raises:  # a step that raises has no post-hook
            capped.backoff.revert()
            assert float(rate) == pytest.approx(expected)
    if raises:
        assert float(rate) == pytest.approx(0.05), "the change of the first update"


class Bounded:
    """Two groups, a cap on the rate, and a bound on the second group; `rates` are those inside an update."""

    def __init__(self, shares: dict[int, float], max_rate: float = 1.0) -> None:
        weights = list(build().parameters())
        self.optimizer = SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.1)
        self.backoff = LrBackoff(LimitsConfig())
        self.members = OptimizerSet(self.optimizer)
        model = build()
        self.backoff.inspect(model, self.members, select(model))
        cap = {"max_rate": max_rate, "capped_from": 0, "peak_rate": 0.0, "warmup_from": 0, "warmup_steps": 0}
        self.cap = ActionState(ramp=Ramp(start=1.0, target=1.0), parameters=cap)
        self.rewind = ActionState(
            ramp=Ramp(start=1.0, target=1.0), parameters={"interval": 16, **as_parameters(shares)}
        )
        self.step = 0

    @property
    def state(self) -> ControlState:
        return ControlState(actions={"set_lr_scale": self.cap, "rewind": self.rewind})

    def rates(self, first: float, second: float) -> list[float]:
        for group, rate in zip(self.optimizer.param_groups, (first, second), strict=True):
            group["lr"] = rate
        update = Update(self.optimizer, (self.optimizer,), {})
        self.backoff.apply(self.state, self.step, update)
        seen = rates(update.args[0])
        self.backoff.revert()
        assert rates(self.optimizer) == [first, second], "the user's own"
        self.step += 1
        return seen


def test_a_bounded_group_follows_the_schedule_of_the_others() -> None:
    bounded = Bounded({1: 0.5})
    for rate in (0.1, 0.2, 0.01):
        assert bounded.rates(rate, 30.0) == pytest.approx([rate, 0.5 * rate])
    assert bounded.rates(0.1, 0.04) == [0.1, 0.04], "within the bound the user's own"


def test_the_peak_under_a_cap_is_that_of_the_bounded_rates() -> None:
    bounded = Bounded({}, max_rate=0.1)
    assert bounded.rates(0.05, 1.5) == pytest.approx([0.05 / 15, 0.1])
    bounded.rewind = ActionState(ramp=Ramp(start=1.0, target=1.0), parameters=dict(as_parameters({1: 1.0})))
    assert bounded.rates(0.05, 1.5) == pytest.approx([0.05, 0.05]), "the peak of the groups at fault is forgotten"
    assert bounded.rates(0.2, 6.0) == pytest.approx([0.1, 0.1])
    assert bounded.rates(0.1, 3.0) == pytest.approx([0.05, 0.05]), "the cap keeps the shape of the schedule"
    assert bounded.backoff.applied(bounded.state, 4)["peak_rate"] == 0.2


def test_a_bound_is_released_over_the_steps_of_the_cap() -> None:
    bounded = Bounded({1: 1.0})
    assert bounded.rates(0.1, 1.6) == pytest.approx([0.1, 0.1])
    ramp = Ramp(first_step=1, start=1.0, target=0.0, num_steps=4)
    bounded.rewind = ActionState(ramp=ramp, parameters=bounded.rewind.parameters)
    bounded.cap = ActionState(ramp=Ramp(first_step=1, start=1.0, target=1.0, num_steps=4))
    assert [bounded.rates(0.1, 1.6)[1] for _ in range(5)] == pytest.approx([0.2, 0.4, 0.8, 1.6, 1.6])


def test_the_reason_against_bounds_is_that_of_the_optimizer_with_these_groups() -> None:
    class FirstRateOnly(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for each in group["params"]:
                        each -= self.param_groups[0]["lr"] * each.grad

    weights = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    first = FirstRateOnly([{"params": weights[:1]}, {"params": weights[1:2]}], lr=0.1)
    second = SGD([{"params": weights[2:3]}, {"params": weights[3:]}], lr=0.1)
    backoff, model = LrBackoff(LimitsConfig()), build()
    backoff.inspect(model, OptimizerSet([first, second]), select(model))
    refused = {each: bool(backoff.refusal_of_bounds([each])) for each in range(5)}
    assert refused == {0: True, 1: True, 2: False, 3: False, 4: False}
    assert backoff.refusal_of_bounds([0, 1]) == "", "all groups of one optimizer"
    assert backoff.refusal_of_bounds([]) == ""


def test_a_rewind_that_adds_bounds_ends_the_warm_up_of_its_cap() -> None:
    bounded = Bounded({1: 1.0}, max_rate=0.1)
    shares = bounded.rewind.parameters

    def warm(warmup_from: int) -> list[float]:
        cap = {**bounded.cap.parameters, "warmup_from": warmup_from, "warmup_steps": 4}
        bounded.cap = ActionState(ramp=Ramp(start=1.0, target=1.0), parameters=cap)
        bounded.step = warmup_from
        return bounded.rates(0.1, 3.0)

    assert warm(7) == pytest.approx([0.025, 0.025]), "a rewind without new bounds"
    bounded.rewind = ActionState(ramp=Ramp(start=1.0, target=1.0), parameters={**shares, BOUNDED_AT: 7})
    assert warm(7) == warm(6) == pytest.approx([0.1, 0.1])
    assert "warmup_steps" not in bounded.backoff.applied(bounded.state, 7)
    assert warm(8) == pytest.approx([0.025, 0.025]), "a later cap"
    assert bounded.backoff.applied(bounded.state, 8)["warmup_steps"] == 4
