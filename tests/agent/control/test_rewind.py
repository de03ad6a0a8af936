"""Rewind: when copies are taken, which one a command returns to, and that the training then repeats bit for bit."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from koopmon.agent.control import rewind as rewind_module
from koopmon.agent.control.action import Completion, RequestRefusedError, Target, Update, towards
from koopmon.agent.control.lr_backoff import LrBackoff
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rewind import RewindAction
from koopmon.agent.control.state import ActionState, ControlState, Ramp
from koopmon.agent.stats import AgentStats
from koopmon.config import from_mapping
from koopmon.plugins import select
from koopmon.wire.messages import Applied, Command, Heartbeat, Hello, Rewind
from tests.agent.bench import Bench, benches
from tests.agent.models import Model, build, train_step
from tests.agent.scripted_monitor import ScriptedMonitor


class Normed(Model):
    """Batch normalisation before the head: its buffers change in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(self.head.in_features)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embedding(tokens) * 1.0
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(self.norm(h.flatten(0, 1)).view_as(h))
        return logits


def normed() -> Normed:
    torch.manual_seed(0)
    return Normed()


class Rewindable(Bench):
    """A training whose agent returns to copies."""

    @property
    def facts(self) -> dict[str, Any]:
        return dict(self.action.facts())

    @property
    def action(self) -> RewindAction:
        return next(each for each in self.runtime.actions if isinstance(each, RewindAction))

    def rewind(self, max_rate: float = 1.0, min_age_steps: int = 0, **more: bool) -> tuple[str, str]:
        result = self.command("rewind", rewind=Rewind(max_rate=max_rate, min_age_steps=min_age_steps, **more))
        assert self.runtime.breaker.num_errors == 0
        return result.outcome, result.detail


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rewindable]]:
    """Makes trainings whose copies are never too expensive: these steps take a millisecond."""
    monkeypatch.setattr(rewind_module, "MAX_COST", 1e9)
    with benches(Rewindable) as make:
        yield make


def test_copies_are_taken_at_fixed_steps_and_the_start_is_freed(
    bench: Callable[..., Rewindable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewind_module, "START_COPY_STEPS", 100)
    training = bench()
    found = {}
    for step in range(1, 145):
        training.train(1)
        found[step] = training.facts["rewind_steps"]
    assert [found[step] for step in (1, 15, 16, 32, 63, 64)] == [[0], [0], [0, 16], [0, 32], [0, 48], [0, 48, 64]]
    assert [found[step] for step in (80, 99, 100, 112, 128, 144)] == [
        [0, 48, 80],
        [0, 48, 96],
        [48, 96],
        [48, 112],
        [112, 128],
        [112, 144],
    ]


@pytest.mark.parametrize("make", [build, normed])
def test_after_a_rewind_the_training_goes_on_as_from_the_copy(
    make: Callable[[], nn.Module], bench: Callable[..., Rewindable]
) -> None:
    training, twin = bench(make()), make()
    optimizer = AdamW(twin.parameters(), lr=0.01)
    plain = [train_step(twin, optimizer, step) for step in range(48)]
    assert training.train(99)[:48] == plain, "copies change nothing"
    assert training.rewind(min_age_steps=20) == ("applied", "returned to step 48")
    assert training.runtime.stats.step == 100, "the steps go on"
    assert training.facts["rewind_steps"] == [0, 48], "copies of the time after step 48 are gone"
    assert training.train(30) == [train_step(twin, optimizer, step) for step in range(100, 130)]
    fresh = make()
    assert training.rewind(min_age_steps=100) == ("applied", "returned to step 0")
    assert training.facts["rewinds"] == 2
    assert training.facts["rewind_steps"] == [0]
    optimizer = AdamW(fresh.parameters(), lr=0.01)
    assert training.train(20) == [train_step(fresh, optimizer, step) for step in range(131, 151)]
    for one, other in zip(training.model.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(one, other), "the start is the state before the first forward"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_copied(value: float, bench: Callable[..., Rewindable]) -> None:
    training = bench()
    training.train(70)
    assert training.facts["rewind_steps"] == [0, 48, 64]
    before = [each.detach().clone() for each in training.action._recent._tensors.values()]
    with torch.no_grad():
        next(iter(training.model.parameters())).view(-1)[-1] = value
    training.train(70)
    assert training.facts["rewind_steps"] == [0, 48, 64], "the last copies from before the fault stay"
    assert training.rewind(min_age_steps=8, unless_finite=True) == ("applied", "returned to step 64")
    weights = [each for key, each in training.action._training().tensors.items()]
    assert all(torch.equal(old, new) for old, new in zip(before, weights, strict=True))
    training.train(10)
    assert training.facts["rewind_steps"][-1] == 144, "the training is copied again"


def test_a_rewind_for_nan_is_refused_while_the_weights_are_finite(bench: Callable[..., Rewindable]) -> None:
    """A loop that drops the batches with a loss of NaN keeps its weights."""
    training = bench()
    training.train(40)
    assert training.rewind(unless_finite=True) == ("refused", "no rewind: the weights are finite")
    assert training.facts["rewinds"] == 0
    assert training.rewind()[0] == "applied"


def test_a_copy_on_which_the_ranks_disagree_is_not_offered_again(
    bench: Callable[..., Rewindable], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = bench()
    training.train(70)
    monkeypatch.setattr("koopmon.agent.control.state_copies.StateCopy.fits", lambda self, state: self.step != 64)
    assert training.rewind()[0] == "failed"
    assert training.facts["rewind_steps"] == [0, 48]
    assert training.rewind() == ("applied", "returned to step 48")


def test_a_copy_must_be_old_enough_and_from_a_low_rate(bench: Callable[..., Rewindable]) -> None:
    training = bench(optimizer=lambda parameters: SGD(parameters, lr=0.001))
    for step in range(120):
        training.optimizer.param_groups[0]["lr"] = 0.001 * (step + 1)
        training.train(1)
    # Copies: the start, step 48 at rate 0.048, step 112 at rate 0.112.
    assert training.facts["rewind_steps"] == [0, 48, 112]
    assert training.rewind(max_rate=0.1) == ("applied", "returned to step 48")
    assert training.rewind(max_rate=0.04) == ("applied", "returned to step 0")


def test_the_copy_of_the_start_is_always_old_enough(bench: Callable[..., Rewindable]) -> None:
    training = bench()
    training.train(3)
    assert training.rewind(min_age_steps=200) == ("applied", "returned to step 0")


def test_without_a_fitting_copy_a_rewind_is_refused(
    bench: Callable[..., Rewindable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.agent.control.rewind.START_COPY_STEPS", 100)
    training = bench(optimizer=lambda parameters: SGD(parameters, lr=0.001))
    training.train(120)
    for asked in ({"min_age_steps": 200}, {"max_rate": 0.0001}):
        outcome, detail = training.rewind(**asked)
        assert outcome == "refused"
        assert "no copy is at least" in detail
        assert "step 48 at rate 0.001" in detail


def test_the_rate_of_a_copy_includes_the_scale(bench: Callable[..., Rewindable]) -> None:
    training = bench()
    training.train(5)
    training.command("set_lr_scale", lr_scale=1.0, max_rate=0.002)
    training.train(20)
    assert training.facts["rewind_steps"] == [0, 16]
    assert training.rewind(max_rate=0.002) == ("applied", "returned to step 16")
    assert training.rewind(max_rate=0.0019) == ("applied", "returned to step 0")


def test_rewinds_are_limited_in_number_and_per_hour(bench: Callable[..., Rewindable]) -> None:
    training = bench(max_rewinds=2)
    training.train(17)
    assert [training.rewind()[0] for _ in range(3)] == ["applied", "applied", "refused"]
    assert "2 rewinds" in training.rewind()[1]
    training = bench(max_actions_per_hour=1)
    training.train(17)
    assert [training.rewind()[0] for _ in range(2)] == ["applied", "refused"]


def test_a_second_rewind_of_one_step_is_refused(bench: Callable[..., Rewindable]) -> None:
    training = bench()
    training.train(17)
    for _ in range(2):
        training.submit("rewind", rewind=Rewind(max_rate=1.0, min_age_steps=0))
    training.train(1)
    assert [each.outcome for each in training.outcomes] == ["refused", "applied"]
    assert training.facts["rewinds"] == 1


def split(parameters: Any) -> Optimizer:
    return SGD(list(parameters)[:-1], lr=0.01)


class Listing(SGD):
    """Keeps a list in its state, as LBFGS does."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = [1.0]
        return super().step(closure)


NBYTES = sum(each.nbytes for each in build().parameters())
"""Size of the weights. The state of AdamW is twice as large, plus one number of 4 bytes for each parameter."""


@pytest.mark.parametrize(
    ("optimizer", "limits", "reason"),
    [
        (AdamW, {"max_rewinds": 0}, "limits allow no rewind"),
        (AdamW, {"rewind_max_bytes": 0}, "limits allow no rewind"),
        (AdamW, {"rewind_max_bytes": NBYTES - 1}, "rewind_max_bytes"),
        (AdamW, {"rewind_max_bytes": 7 * NBYTES}, "rewind_max_bytes"),
        (split, {}, "does not update all parameters"),
        (Listing, {}, "history is a list"),
    ],
)
def test_a_training_that_cannot_rewind_says_why(
    optimizer: Any, limits: dict[str, Any], reason: str, bench: Callable[..., Rewindable]
) -> None:
    training = bench(None, optimizer, **limits)
    training.train(33)
    outcome, detail = training.rewind()
    assert outcome == "refused"
    assert reason in detail
    assert training.facts["rewind_steps"] == []
    assert reason in training.facts["rewind_refusal"]


def test_copies_that_just_fit_are_kept(bench: Callable[..., Rewindable]) -> None:
    training = bench(rewind_max_bytes=7 * NBYTES + 8 * len(list(build().parameters())))
    training.train(17)
    assert training.rewind() == ("applied", "returned to step 16")


def test_ranks_that_do_not_agree_change_nothing(
    bench: Callable[..., Rewindable], monkeypatch: pytest.MonkeyPatch
) -> None:
    training, twin = bench(), build()
    optimizer = AdamW(twin.parameters(), lr=0.01)
    training.train(20)
    monkeypatch.setattr(training.runtime.lifecycle.state._actuator, "_agree", lambda value: False)
    outcome, detail = training.rewind()
    assert outcome == "failed"
    assert "no longer fits" in detail
    plain = [train_step(twin, optimizer, step) for step in range(41)]
    assert training.train(20) == plain[21:]


def test_a_copy_that_no_longer_fits_is_not_restored(bench: Callable[..., Rewindable]) -> None:
    training = bench()
    training.train(20)
    training.model.head.bias = nn.Parameter(torch.zeros_like(training.model.head.bias))
    training.optimizer.param_groups[0]["params"][-1] = training.model.head.bias
    training.optimizer.state.popitem()
    assert training.rewind()[0] == "failed"
    assert training.facts["rewinds"] == 0


def test_the_interval_doubles_while_copies_cost_too_much(
    bench: Callable[..., Rewindable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewind_module, "INTERVAL_STEPS", 1)
    training = bench()
    training.train(40)
    assert training.facts["rewind_steps"][-1] == 40
    monkeypatch.setattr(rewind_module, "MAX_COST", 0.3)
    training.action._credit_seconds = 0.0
    seconds = training.runtime.stats.step_seconds or 0.0
    training.action._seconds.extend([1e6, seconds, seconds, seconds, 0.0])
    training.train(1)
    state = training.runtime.lifecycle.state.control
    assert training.action.parameters(state) == {"interval": 4}, "the median copy takes as long as a step"
    assert state.version == 0, "an earlier launch's values may still be restored"
    training.train(8)
    assert training.facts["rewind_steps"] == [0, 44, 48]


def test_a_copy_that_fails_ends_rewinds_and_not_the_agent(
    bench: Callable[..., Rewindable], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = bench()
    training.train(17)

    def no_memory(*_: Any) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(torch, "_foreach_copy_", no_memory)
    training.train(16)
    assert training.facts["rewind_steps"] == []
    assert "not enough memory" in training.facts["rewind_refusal"]
    assert training.runtime.breaker.num_errors == 0


def test_the_end_of_the_agent_frees_the_copies(bench: Callable[..., Rewindable]) -> None:
    training = bench()
    training.train(17)
    assert training.facts["rewind_steps"] == [0, 16]
    training.runtime.stand_down("a test")
    assert training.facts["rewind_steps"] == []


@pytest.mark.parametrize("limits", [{"act": "never"}, {"max_rewinds": 0}, {"rewind_max_bytes": 0}])
def test_an_agent_that_may_not_rewind_keeps_no_copy(limits: dict[str, Any]) -> None:
    alone = Alone(**limits)
    assert alone.action.facts()["rewind_refusal"] == "the agent's limits allow no rewind"
    for number in range(17):
        alone.step(number)
    assert alone.held == []
    assert alone.action.facts()["rewind_refusal"] == "the agent's limits allow no rewind"


class Alone:
    """The action of one rank without an agent: the test calls it, as the runtime does in each step."""

    def __init__(self, make: Callable[[], nn.Module] = build, **limits: Any) -> None:
        self.model = make()
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.limits = from_mapping({"limits": limits}).limits
        self.stats = AgentStats()
        self.backoff = LrBackoff(self.limits)
        self.action = RewindAction(self.limits, self.stats, self.backoff)
        self.action.inspect(self.model, OptimizerSet(self.optimizer), select(self.model))
        self.state = ControlState()
        self.votes: list[bool] = []

    def step(self, number: int, rate: float | None = 0.1) -> Completion | None:
        """Optimizer step `number`, counted from 0, with the edge after it."""
        self.stats.step = number
        self.stats.measured["learning_rate"].put(rate)
        self.action.on_forward()
        self.action.apply(self.state, number, Update(self.optimizer, (), {}))
        self.stats.step = number + 1
        return self.action.at_edge(self.state, number + 1, self.agree)

    def agree(self, value: bool) -> bool:
        self.votes.append(value)
        return value

    def ask(self, step: int, max_rate: float = 1.0, min_age_steps: int = 0) -> Target:
        name = {"run": "job", "incarnation": "c0f0c0f0", "id": "c0f0c0f0", "reason": "", "expires_step": 1 << 40}
        asked = Command(**name, kind="rewind", rewind=Rewind(max_rate=max_rate, min_age_steps=min_age_steps))
        target = self.action.target(asked, self.state, step)
        self.state = towards(self.state, self.action, target, step, 0)
        return target

    @property
    def held(self) -> list[int]:
        return list(self.action.facts()["rewind_steps"])


ADAPTER: Any = None
"""The fields of hello do not depend on the adapter."""


def test_before_the_first_step_nothing_can_be_returned_to() -> None:
    alone = Alone()
    facts = {"rewinds": 0, "rewind_steps": [], "rewind_refusal": "no step has run yet"}
    assert alone.action.facts() == facts
    assert alone.action.hello(ADAPTER) == {"rewinds": False}
    with pytest.raises(RequestRefusedError, match=r"^no rewind: no step has run yet$"):
        alone.ask(0)
    assert alone.action.at_edge(alone.state, 3, alone.agree) is None
    alone.step(0)
    assert alone.action.facts() == {"rewinds": 0, "rewind_steps": [0], "rewind_refusal": ""}
    assert alone.action.hello(ADAPTER) == {"rewinds": True}


def test_a_command_names_its_step_and_that_of_the_copy() -> None:
    alone = Alone()
    for number in range(33):
        alone.step(number)
    alone.state = ControlState(actions={"rewind": ActionState(ramp=Ramp(), parameters={"interval": 16})})
    assert alone.ask(33) == Target(1.0, {"interval": 16, "at_step": 33, "copy_step": 32})
    assert alone.action.target(Applied(), alone.state, 40) == Target(
        0.0, {"interval": 16, "at_step": 33, "copy_step": 32}, acts=False
    ), "an earlier launch's rewinds are not repeated"


def test_the_newest_copy_of_the_age_and_the_rate_is_taken() -> None:
    alone = Alone()
    for number in range(64):
        alone.step(number, rate=0.1 if number < 63 else 0.2)
    assert alone.held == [0, 48, 64]
    for age, copy in ((0, 64), (2, 64), (3, 48), (18, 48), (19, 0), (500, 0)):
        assert alone.ask(66, min_age_steps=age).parameters["copy_step"] == copy
        alone.state = ControlState()
    for rate, copy in ((0.2, 64), (0.2 * (1 - 1e-10), 64), (0.19, 48), (0.1, 48), (0.09, 0)):
        assert alone.ask(66, max_rate=rate).parameters["copy_step"] == copy
        alone.state = ControlState()


def test_a_copy_of_an_unknown_rate_is_of_any_rate() -> None:
    alone = Alone()
    for number in range(16):
        alone.step(number, rate=None)
    assert alone.held == [0, 16]
    assert alone.ask(16, max_rate=1e6).parameters["copy_step"] == 0


def test_the_rate_of_a_copy_is_that_of_its_last_update() -> None:
    """Within a ramp. Update 15 of 0, 1, ... is the last one before step 16."""
    alone = Alone()
    ramp = Ramp(first_step=14, start=1.0, target=0.25, num_steps=4)
    alone.state = ControlState(actions={"set_lr_scale": ActionState(ramp=ramp)})
    for number in range(16):
        alone.step(number)
    for rate, copy in ((0.0501, 16), (0.0499, 0)):
        state = alone.state
        assert alone.ask(16, max_rate=rate).parameters["copy_step"] == copy
        alone.state = state


def test_the_copies_of_the_first_buffers_are_freed() -> None:
    alone = Alone(normed)
    alone.stats.step = 0
    alone.action.on_forward()
    assert alone.action._first_buffers
    alone.step(0)
    assert not alone.action._first_buffers
    alone = Alone(normed)
    alone.action.on_forward()
    alone.action.end()
    assert not alone.action._first_buffers


def test_of_two_commands_for_one_step_the_second_is_refused_and_at_another_step_it_is_not() -> None:
    alone = Alone()
    alone.step(0)
    alone.ask(1)
    with pytest.raises(RequestRefusedError, match="another one comes in force at this step"):
        alone.ask(1)
    alone.ask(2)


def test_the_start_is_kept_for_2000_steps() -> None:
    alone = Alone()
    alone.step(0)
    alone.action.at_edge(alone.state, 1999, alone.agree)
    assert alone.held == [0]
    alone.action.at_edge(alone.state, 2000, alone.agree)
    assert alone.held == [2000]


def test_the_first_copies_have_a_credit() -> None:
    alone = Alone()
    alone.action = RewindAction(alone.limits, alone.stats, alone.backoff, credit_seconds=1.0)
    alone.action.inspect(alone.model, OptimizerSet(alone.optimizer), select(alone.model))
    alone.stats.step_seconds = 1e-9

    def interval(steps: range) -> float:
        for step in steps:
            alone.action.at_edge(alone.state, step, alone.agree)
            alone.state = alone.action.tuned(alone.state)
        return alone.action.parameters(alone.state).get("interval", 16)

    assert interval(range(1, 200)) == 16
    assert 0.0 < alone.action._credit_seconds < 1.0
    alone.action._credit_seconds = 1e-12
    assert interval(range(200, 209)) == 65536


def test_copies_cost_a_thousandth_of_the_step_time_at_most() -> None:
    """The median duration of five copies decides. Copies of 6.4 seconds may come every 64 steps of 100 seconds."""
    alone = Alone()
    alone.step(0)
    alone.stats.step_seconds = 100.0

    def interval(*seconds: float, before: int | None = None) -> int:
        alone.action._seconds.clear()
        alone.action._seconds.extend(seconds)
        if before is not None:
            part = ActionState(ramp=Ramp(), parameters={"interval": before, "at_step": 3})
            alone.state = ControlState(version=7, actions={"rewind": part})
        alone.state = alone.action.tuned(alone.state)
        return int(alone.action.parameters(alone.state).get("interval", 16))

    assert interval(1.6, 1.6, 1.6, 99.0, 99.0) == 16
    assert interval(1.7, 1.7, 1.7, 1.7) == 16, "four copies are not enough"
    assert interval(1.7, 1.7, 1.7, 0.0, 0.0) == 32
    assert alone.state.version == 0, "no command changed it"
    assert len(alone.action._seconds) == 0, "the next five decide again"
    assert interval(6.4, 6.4, 6.4, 6.4, 6.4, before=16) == 64
    assert alone.action.parameters(alone.state) == {"interval": 64, "at_step": 3}
    assert alone.state.version == 7
    assert interval(*[1e9] * 5, before=16) == 65536
    assert interval(*[1e9] * 5, before=65536) == 65536
    alone.stats.step_seconds = None
    assert interval(*[1e9] * 5, before=16) == 16, "no step is timed yet"


def test_the_first_four_copies_are_not_timed() -> None:
    """They allocate memory. The copy of the start is none of them."""
    alone = Alone()
    timed = []
    for number in range(7 * 16):
        alone.step(number)
        if (number + 1) % 16 == 0:
            timed.append(len(alone.action._seconds))
    assert timed == [0, 0, 0, 0, 1, 2, 3]
    assert all(0.0 < seconds < 60.0 for seconds in alone.action._seconds)


def test_an_interval_of_rank_0_holds_on_every_rank() -> None:
    alone = Alone()
    alone.state = ControlState(actions={"rewind": ActionState(ramp=Ramp(), parameters={"interval": 5})})
    found = {}
    for number in range(30):
        alone.step(number)
        found[number + 1] = alone.held
    assert [found[step] for step in (1, 4, 5, 10, 15, 20, 25)] == [
        [0],
        [0],
        [0, 5],
        [0, 10],
        [0, 15],
        [0, 15, 20],
        [0, 15, 25],
    ]


def test_a_rewind_is_carried_out_at_the_edge_after_its_step() -> None:
    alone = Alone()
    alone.step(0)
    alone.ask(1)
    before = [each.detach().clone() for each in alone.model.parameters()]
    for each in alone.model.parameters():
        each.data.add_(1.0)
    alone.stats.step = 1
    alone.action.apply(alone.state, 1, Update(alone.optimizer, (), {}))
    assert alone.action.at_edge(alone.state, 2, alone.agree) == Completion("applied", "returned to step 0")
    assert alone.votes == [True]
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), before, strict=True))
    assert alone.action.at_edge(alone.state, 3, alone.agree) is None, "once"
    assert alone.action.facts()["rewinds"] == 1


def test_a_rewind_without_a_cap_is_logged_with_its_reason(
    bench: Callable[..., Rewindable], caplog: pytest.LogCaptureFixture
) -> None:
    training = bench()
    training.train(20)
    assert training.rewind() == ("applied", "returned to step 16")
    (line,) = [each.getMessage() for each in caplog.records if "returned" in each.getMessage()]
    assert line == (
        "koopmon: job: weights and optimizer state returned from step 21 to step 16, 5 steps are lost, "
        "the learning rate is not capped; a test"
    )


def test_a_rank_that_does_not_decide_returns_too_and_logs_it_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    alone = Alone()
    alone.step(0)
    parameters: dict[str, int | float] = {"at_step": 6, "copy_step": 0}
    alone.state = ControlState(actions={"rewind": ActionState(ramp=Ramp(), parameters=parameters)})
    with caplog.at_level(logging.DEBUG, "koopmon.agent"):
        assert alone.action.at_edge(alone.state, 7, alone.agree) == Completion("applied", "returned to step 0")
    (record,) = [each for each in caplog.records if "returned" in each.message]
    assert record.levelno == logging.DEBUG
    assert record.message == (
        "koopmon: this rank: weights and optimizer state returned from step 7 to step 0, 7 steps are lost, "
        "the learning rate is not capped"
    )


def test_without_any_copy_a_refusal_says_so() -> None:
    alone = Alone()
    alone.step(0)
    alone.action.at_edge(alone.state, 2001, alone.agree)
    assert alone.held == []
    wanted = r"no copy is at least 7 steps old at a rate of at most 0\.5; copies: none$"
    with pytest.raises(RequestRefusedError, match=wanted):
        alone.ask(2001, max_rate=0.5, min_age_steps=7)


def test_a_rank_without_the_copy_votes_against_it() -> None:
    alone = Alone()
    alone.step(0)
    parameters: dict[str, int | float] = {"at_step": 1, "copy_step": 5}
    alone.state = ControlState(actions={"rewind": ActionState(ramp=Ramp(), parameters=parameters)})
    done = alone.action.at_edge(alone.state, 2, alone.agree)
    assert done == Completion("failed", "the copy of step 5 no longer fits the training on every rank")
    assert alone.votes == [False]


def test_a_rank_that_no_longer_holds_copies_votes_all_the_same() -> None:
    """All ranks join the vote or none does: the others would wait for it."""
    alone = Alone()
    alone.step(0)
    alone.ask(1)
    alone.action.end()
    done = alone.action.at_edge(alone.state, 2, alone.agree)
    assert done is not None
    assert done.outcome == "failed"
    assert alone.votes == [False]


def test_a_model_that_is_gone_ends_rewinds() -> None:
    alone = Alone()
    alone.step(0)
    alone.ask(1)
    alone.model = nn.Linear(1, 1)
    gc.collect()
    done = alone.action.at_edge(alone.state, 2, alone.agree)
    assert done is not None
    assert done.outcome == "failed"
    assert alone.action.facts()["rewind_refusal"] == "the model or the optimizer is gone"
    with pytest.raises(RequestRefusedError, match="is gone"):
        alone.ask(3)


def test_an_action_without_a_model_copies_nothing() -> None:
    alone = Alone()
    alone.action = RewindAction(alone.limits, alone.stats, alone.backoff)
    alone.action.on_forward()
    assert alone.action.at_edge(alone.state, 1, alone.agree) is None
    assert alone.action.facts()["rewind_refusal"] == "the model or the optimizer is gone"


def test_parameters_that_begin_to_train_outside_of_the_optimizer_end_rewinds() -> None:
    alone = Alone()
    frozen = alone.model.head
    frozen.requires_grad_(False)
    alone.optimizer.param_groups[0]["params"] = [each for each in alone.model.parameters() if each.requires_grad]
    for number in range(16):
        alone.step(number)
    assert alone.held == [0, 16]
    frozen.requires_grad_(True)
    for number in range(16, 31):
        alone.step(number)
    assert alone.held == [0, 16], "without gradients they do not train"
    alone = Alone()
    alone.optimizer.param_groups[0]["params"] = list(alone.model.parameters())[:-1]
    for number in range(16):
        alone.step(number)
    (last,) = list(alone.model.parameters())[-1:]
    last.grad = torch.zeros_like(last)
    for number in range(16, 31):
        alone.step(number)
    assert alone.held == [0, 16], "one look in each interval is enough"
    alone.step(31)
    assert alone.held == []
    assert "does not update all parameters" in alone.action.facts()["rewind_refusal"]


def test_the_first_update_is_looked_at_before_it_is_made() -> None:
    alone = Alone()
    alone.optimizer.param_groups[0]["params"] = list(alone.model.parameters())[:-1]
    for each in alone.model.parameters():
        each.grad = torch.zeros_like(each)
    alone.action.apply(alone.state, 0, Update(alone.optimizer, (), {}))
    assert "does not update all parameters" in alone.action.facts()["rewind_refusal"]


def test_a_copy_of_the_start_that_fails_ends_rewinds_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no memory")

    alone = Alone()
    monkeypatch.setattr(rewind_module, "TrainingState", fail)
    alone.action.apply(alone.state, 0, Update(alone.optimizer, (), {}))
    assert alone.action.facts()["rewind_refusal"] == "no memory"


def test_a_change_of_the_refusal_is_told_to_the_monitor() -> None:
    alone = Alone()
    assert not alone.action.hello_changed
    alone.step(0)
    assert alone.action.hello_changed, "rewinds are possible"
    alone.action.hello_changed = False
    for number in range(1, 17):
        alone.step(number)
    assert not alone.action.hello_changed, "nothing new"
    alone.action.end()
    assert alone.action.hello_changed
    assert alone.action.facts()["rewind_refusal"] == "the agent applies no commands"
    alone.action.hello_changed = False
    alone.action.end()
    assert not alone.action.hello_changed


def test_a_long_error_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("x" * 300)

    for name in ("copied_buffers", "TrainingState"):
        alone = Alone(normed)
        with monkeypatch.context() as patched:
            patched.setattr(rewind_module, name, fail)
            alone.step(0)
        assert alone.action.facts()["rewind_refusal"] == "x" * 200
        alone.step(1)
        assert alone.held == [], "it is final"
    copying, returning = Alone(), Alone()
    for number in range(15):
        copying.step(number)
        returning.step(number)
    returning.ask(15)
    monkeypatch.setattr(rewind_module, "TrainingState", fail)
    copying.step(15)
    assert copying.action.facts()["rewind_refusal"] == "x" * 200
    assert returning.action.at_edge(returning.state, 16, returning.agree) is not None
    assert returning.action.facts()["rewind_refusal"] == "x" * 200


@pytest.mark.parametrize(
    ("limit", "needed"), [(NBYTES - 1, NBYTES), (NBYTES, 3 * NBYTES), (3 * NBYTES - 1, 3 * NBYTES)]
)
def test_the_limit_on_memory_is_for_the_start_and_two_more_copies(limit: int, needed: int) -> None:
    """The need of all three is known after the first step. Without gradients SGD has no state."""
    alone = Alone(rewind_max_bytes=limit)
    alone.step(0)
    assert alone.held == []
    assert f"take {needed} bytes, [limits] rewind_max_bytes is {limit}" in alone.action.facts()["rewind_refusal"]


def test_three_copies_fit_exactly() -> None:
    alone = Alone(rewind_max_bytes=3 * NBYTES)
    for number in range(16):
        alone.step(number)
    assert alone.held == [0, 16]


def test_over_the_wire(monitor: ScriptedMonitor, agents: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="job")
    monitor.wait(lambda: agent.status()["connected"])
    assert not any(hello.rewinds for hello in monitor.of(Hello)), "nothing is known before the first step"

    def trained() -> bool:
        time.sleep(0.002)
        return bool(train_step(model, optimizer, 0))

    monitor.wait(lambda: trained() and any(hello.rewinds for hello in monitor.of(Hello)))
    cap = monitor.command("set_lr_scale", lr_scale=1.0, max_rate=0.001, warmup_steps=5)
    asked = monitor.command("rewind", rewind=Rewind(max_rate=1e-9, min_age_steps=0))
    with caplog.at_level(logging.WARNING, "koopmon.agent"):
        monitor.wait(lambda: trained() and monitor.acked(asked))
    ack = monitor.ack(asked)
    assert (ack.outcome, ack.detail) == ("applied", "returned to step 0")
    assert (ack.applied.lr_scale, ack.applied.max_rate) == (1.0, 0.001)
    assert monitor.ack(cap).outcome == "applied"
    text = f"koopmon: job: weights and optimizer state returned from step {ack.step + 1} to step 0"
    assert [line for line in caplog.messages if "returned" in line] == [
        f"{text}, {ack.step + 1} steps are lost, the learning rate is capped at 0.001"
    ]
    assert agent.status()["rewinds"] == 1
    assert agent.status()["rewind_refusal"] == ""
    assert agent.status()["errors"] == 0


@pytest.mark.distributed
def test_both_ranks_return_to_the_same_copy_or_neither_does(
    ranks: Callable[..., Any], monitor: ScriptedMonitor, tmp_path: Path
) -> None:
    layouts = ["ddp", "zero", "fsdp2", "fsdp1", "fsdp1-flat", "ddp-groups", "fsdp2-groups", "alone"]
    job = ranks("rewinds.py", tmp_path / "out", monitor.endpoint, *layouts)
    acks: dict[str, list[tuple[str, str]]] = {layout: [] for layout in layouts}
    for layout in layouts:

        def ready(run: str = layout) -> bool:
            if any(process.poll() for process in job.processes):
                job.wait()
            if run.endswith("-groups"):  # the fault
                return any(beat.run == run and beat.training.learning_rate == 0.25 for beat in monitor.of(Heartbeat))
            return any(hello.run == run and hello.rewinds for hello in monitor.of(Hello))

        monitor.wait(ready, 90.0)
        groups = layout.endswith("-groups")
        if groups:
            monitor.command("set_lr_scale", layout, lr_scale=1.0, max_rate=0.01)
        # Before the ranks have met it fails, and before step 20 no copy is old enough.
        while not acks[layout] or acks[layout][-1][0] != "applied":
            asked = monitor.command("rewind", layout, rewind=Rewind(max_rate=0.01 if groups else 1.0, min_age_steps=20))
            ack = monitor.ack(asked)
            acks[layout].append((ack.outcome, ack.detail))
            if "no longer fits" in ack.detail and layout == "alone":
                monitor.command("stop", layout)
                break
            time.sleep(0.1)
    job.wait()
    first, second = (json.loads(Path(f"{tmp_path / 'out'}.{rank}").read_text()) for rank in range(2))
    for layout in layouts[:-1]:
        bound = "; parameter groups with a bound on their rate: 1" if layout.endswith("-groups") else ""
        assert acks[layout][-1] == ("applied", f"returned to step {first[layout]['copied']}{bound}")
        assert [first[layout][name] for name in ("rewound", "copied")] == [
            second[layout][name] for name in ("rewound", "copied")
        ]
    assert acks["alone"][-1][0] == "failed"
    assert [each["alone"]["rewound"] for each in (first, second)] == [-1, -1]
    for each in (*first.values(), *second.values()):
        assert each["losses"] == each["expected"]
        assert each["same"] in (True, None)
        assert each["status"]["errors"] == 0


class Grouped(Alone):
    """Three groups of parameters, with a cap on the rate."""

    def __init__(self, max_rate: float | None = 0.2) -> None:
        super().__init__()
        self.divide(0.1, 0.1, 0.05)
        self.cap(max_rate)

    def divide(self, *given: float) -> None:
        weights = list(self.model.parameters())
        parts = [weights[: -len(given) + 1], *([each] for each in weights[-len(given) + 1 :])]
        self.optimizer = SGD([{"params": part, "lr": rate} for part, rate in zip(parts, given, strict=True)])
        members = OptimizerSet(self.optimizer)
        self.action.inspect(self.model, members, select(self.model))
        self.backoff.inspect(self.model, members, select(self.model))

    def cap(self, max_rate: float | None) -> None:
        if max_rate is not None:
            applied = Applied(max_rate=max_rate)
            self.state = towards(self.state, self.backoff, self.backoff.target(applied, self.state, 0), 0, 0)

    def train(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.step(number, rate=self.action._optimizers.largest_rate())  # type: ignore[arg-type]

    def rates(self, *given: float) -> list[float]:
        for group, rate in zip(self.optimizer.param_groups, given, strict=False):
            group["lr"] = rate
        return [group["lr"] for group in self.optimizer.param_groups]

    def in_force(self, step: int) -> list[float]:
        update = Update(self.optimizer, (self.optimizer,), {})
        self.backoff.apply(self.state, step, update)
        found = [group["lr"] for group in update.args[0].param_groups]
        self.backoff.revert()
        return found

    @property
    def shares(self) -> dict[int, float]:
        return dict(self.action.applied(self.state, 0)["rate_shares"])


def test_a_rewind_bounds_the_groups_that_outgrew_the_others() -> None:
    grouped = Grouped()
    grouped.train(0, 20)
    grouped.rates(0.09, 2.7, 0.045)
    grouped.train(20, 22)
    target = grouped.ask(22, max_rate=0.2)
    assert target == Target(1.0, {"at_step": 22, "copy_step": 16, "share.1": 1.0, "bounded_at": 22})
    assert grouped.shares == {1: 1.0}
    assert grouped.in_force(22) == pytest.approx([0.09, 0.09, 0.045])
    done = grouped.step(22)
    assert done == Completion("applied", "returned to step 16; parameter groups with a bound on their rate: 1")
    grouped.rates(0.02, 0.6, 0.01)
    assert grouped.in_force(400) == pytest.approx([0.02, 0.02, 0.01]), "the schedule moves on"


def test_a_second_rewind_keeps_the_bounds_and_adds_others() -> None:
    grouped = Grouped()
    grouped.train(0, 20)
    grouped.rates(0.1, 3.0, 0.05)
    grouped.ask(22, max_rate=0.2)
    grouped.step(22)
    grouped.train(23, 60)
    parameters = grouped.ask(61, max_rate=0.2).parameters
    assert (parameters["share.1"], parameters["bounded_at"]) == (1.0, 22), "no group more"
    grouped.step(61)
    grouped.train(62, 100)
    grouped.rates(0.08, 2.4, 1.6)
    parameters = grouped.ask(100, max_rate=0.2).parameters
    assert (parameters["copy_step"], parameters["bounded_at"]) == (96, 100)
    assert grouped.shares == {1: pytest.approx(1.0), 2: pytest.approx(0.5)}
    assert grouped.in_force(100) == pytest.approx([0.08, 0.08, 0.04])


@pytest.mark.parametrize(
    ("now", "max_rate"),
    [
        ((0.1, 0.1, 0.05), 0.2),  # another fault
        ((3.0, 3.0, 1.5), 0.2),  # the whole schedule
        ((0.1, 0.19, 0.05), 0.2),  # below the cap
        ((0.1, 3.0, 0.05), None),  # without a cap
    ],
)
def test_without_a_group_at_fault_there_is_no_bound(now: tuple[float, ...], max_rate: float | None) -> None:
    grouped = Grouped(max_rate)
    grouped.train(0, 20)
    grouped.rates(*now)
    assert grouped.ask(20, max_rate=0.2) == Target(1.0, {"at_step": 20, "copy_step": 16})
    assert grouped.shares == {}
    assert grouped.step(20) == Completion("applied", "returned to step 16")


def test_the_start_is_no_measure_for_the_groups() -> None:
    """They may warm up at different speeds."""
    grouped = Grouped()
    grouped.train(0, 10)
    grouped.rates(0.1, 3.0, 0.05)
    assert grouped.ask(10, max_rate=0.2) == Target(1.0, {"at_step": 10, "copy_step": 0})


def test_bounds_that_cannot_be_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = Grouped()
    grouped.train(0, 20)
    grouped.rates(0.1, 3.0, 0.05)
    monkeypatch.setattr(grouped.backoff, "refusal_of_bounds", lambda groups: f"not {sorted(groups)}")
    assert "share.1" not in grouped.ask(20, max_rate=0.2).parameters
    assert grouped.step(20) == Completion("applied", "returned to step 16; no further bound: not [1]")
    monkeypatch.undo()
    monkeypatch.setattr(rewind_module, "MAX_SHARES", 0)
    grouped.ask(21, max_rate=0.2)
    done = grouped.step(21)
    assert done is not None
    assert done.detail.endswith("no further bound: at most 0 groups can be bounded, not 1")
    monkeypatch.undo()
    monkeypatch.setattr(rewind_module, "MAX_SHARES", 1)
    grouped.ask(22, max_rate=0.2)
    assert grouped.shares == {1: 1.0}


def test_a_released_bound_is_gone_from_what_is_in_force_and_from_the_next_rewind() -> None:
    grouped = Grouped()
    grouped.train(0, 20)
    grouped.rates(0.1, 3.0, 0.05)
    grouped.ask(20, max_rate=0.2)
    grouped.step(20)
    for action in (grouped.backoff, grouped.action):
        released = action.released(grouped.state)
        assert not released.acts
        grouped.state = towards(grouped.state, action, released, 21, 4)
    assert grouped.shares == {}
    assert grouped.in_force(24) == [0.1, 3.0, 0.05]
    grouped.rates(0.1, 0.1, 0.05)
    grouped.cap(0.2)
    assert grouped.ask(30, max_rate=0.2) == Target(1.0, {"at_step": 30, "copy_step": 16, "bounded_at": 20})


def test_a_restarted_launch_has_the_bounds_from_its_first_step_on() -> None:
    killed = Grouped()
    killed.train(0, 20)
    killed.rates(0.1, 3.0, 0.05)
    killed.ask(20, max_rate=0.2)
    killed.step(20)
    before = killed.in_force(20)
    kept = Applied(**{**killed.backoff.applied(killed.state, 20), **killed.action.applied(killed.state, 20)})
    assert (kept.max_rate, kept.rate_shares) == (0.2, {1: 1.0})
    restarted = Grouped(None)
    restarted.rates(0.1, 3.0, 0.05)
    for action in (restarted.backoff, restarted.action):
        target = action.target(kept, restarted.state, 0)
        assert target.strength == 1.0
        restarted.state = towards(restarted.state, action, target, 0, 0)
    assert restarted.shares == {1: 1.0}
    restarted.step(0)
    assert restarted.action._optimizers.largest_rate() == 0.1, "what the monitor reads of the first step"
    assert restarted.in_force(0) == before


def test_a_restarted_launch_with_other_groups_refuses_the_bounds() -> None:
    grouped = Grouped()
    with pytest.raises(RequestRefusedError, match=r"^no bound on parameter group 3: the optimizer has 3 groups"):
        grouped.action.target(Applied(max_rate=0.2, rate_shares={0: 1.0, 3: 1.0}), grouped.state, 0)
    grouped.rates(0.1, torch.ones((), device="meta"))  # type: ignore[arg-type]
    with pytest.raises(RequestRefusedError, match=r"the optimizer has 0 groups with a rate that can be read$"):
        grouped.action.target(Applied(max_rate=0.2, rate_shares={1: 1.0}), grouped.state, 0)
    grouped.rates(0.1, 0.1)
    grouped.action._backoff.refusal_of_bounds = lambda groups: "why"  # type: ignore[method-assign]
    with pytest.raises(RequestRefusedError, match=r"^no bound on a parameter group: why$"):
        grouped.action.target(Applied(max_rate=0.2, rate_shares={1: 1.0}), grouped.state, 0)


def test_a_rank_with_other_groups_votes_against_a_rewind_with_bounds() -> None:
    grouped = Grouped()
    grouped.train(0, 20)
    grouped.rates(0.1, 0.1, 3.0)
    grouped.ask(20, max_rate=0.2)
    last = grouped.optimizer.param_groups.pop()
    grouped.optimizer.param_groups[1]["params"] += last["params"]
    done = grouped.step(20)
    assert done is not None
    assert done.outcome == "failed"
    assert grouped.votes == [False]


def test_bounds_over_the_wire(monitor: ScriptedMonitor, agents: Callable[..., Any]) -> None:
    model = build()
    weights = list(model.parameters())
    optimizer = AdamW([{"params": weights[:-1]}, {"params": weights[-1:]}], lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="job")
    monitor.wait(lambda: agent.status()["connected"])

    def trained() -> bool:
        time.sleep(0.01)
        return bool(train_step(model, optimizer, 0))

    monitor.wait(lambda: trained() and len(agent.status()["rewind_steps"]) == 3)
    optimizer.param_groups[1]["lr"] = 0.3
    trained()
    monitor.command("set_lr_scale", lr_scale=1.0, max_rate=0.02)
    asked = monitor.command("rewind", rewind=Rewind(max_rate=0.02, min_age_steps=0))
    monitor.wait(lambda: trained() and monitor.acked(asked))
    ack = monitor.ack(asked)
    assert ack.outcome == "applied"
    assert ack.detail.endswith("; parameter groups with a bound on their rate: 1")
    assert (ack.applied.max_rate, ack.applied.rate_shares) == (0.02, {1: 1.0})
    monitor.wait(lambda: trained() and monitor.of(Heartbeat)[-1].training.learning_rate == 0.01)
    assert monitor.of(Heartbeat)[-1].training.lr_scale == 1.0
    assert agent.status()["applied"]["rate_shares"] == {1: 1.0}
    assert agent.status()["errors"] == 0
