"""Decisions of the guard inside a small training: the detector and the policy of the product, without its processes.

A decision takes effect `DELAY` steps after its profile, as over the wire. "spike" is the manual baseline: halve the
rate when the loss jumps, and restore it later.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from benchmarks.ceilings import Ceilings
from koopmon.agent.control.lr_backoff import MIN_EFFECTIVE_SCALE
from koopmon.agent.control.rate_shares import Shares, factors, outgrown, shares_of
from koopmon.agent.control.rewind import INTERVAL_STEPS, SECOND_SLOT, START_COPY_STEPS
from koopmon.agent.control.state_copies import StateCopy, TrainingState
from koopmon.config import KssConfig, PolicyConfig, RiskConfig
from koopmon.policy import Action, PolicyState, ceilings_answered, decide, rewound
from koopmon.risk.online_detector import OnlineRisk, RiskState, assess, observe
from koopmon.spectral import SpectralProfile
from koopmon.wire.messages import Ack, AckOutcome, Applied, KssSettings, Rewind, TrainingStep

Control = Literal["", "auto", "lr", "kss", "kss+lr", "observe", "spike"]
DELAY = 2
SPIKE_RATIO, SPIKE_WINDOW, SPIKE_HOLD = 1.5, 20, 50


@dataclass(slots=True)
class Cap:
    """A cap on the peak of the rate, as the agent holds it (`koopmon.agent.control.lr_backoff`)."""

    max_rate: float
    first_step: int
    warmup_steps: int
    peak: float
    """Largest scheduled rate under a cap so far."""

    def scale(self, step: int, scheduled: float) -> float:
        """Compute the scale at `step`, whose scheduled rate is `scheduled`."""
        self.peak = max(self.peak, scheduled)
        warm = min(1.0, (step - self.first_step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return max(warm * min(1.0, self.max_rate / self.peak), MIN_EFFECTIVE_SCALE)


class Copies:
    """Copies of a training in its own process, taken and chosen as the agent does (`koopmon.agent.control.rewind`)."""

    def __init__(self, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer]) -> None:
        self._model = model
        self._optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self._start, self._recent, self._older = StateCopy(), StateCopy(), StateCopy()

    def take(self, step: int, rate: float, rates: tuple[float, ...] = ()) -> None:
        """Take the copies that are due after `step` updates, the last one at `rate`, and the groups at `rates`."""
        if step == 0:
            self._start.take(TrainingState(self._model, self._optimizers), 0, 0.0)
        elif step % INTERVAL_STEPS == 0 and (state := TrainingState(self._model, self._optimizers)).is_finite:
            if step % (SECOND_SLOT * INTERVAL_STEPS) == 0:
                self._recent, self._older = self._older, self._recent
            self._recent.take(state, step, rate, rates)
        if step >= START_COPY_STEPS:
            self._start.clear()

    def rates(self, step: int) -> tuple[float, ...]:
        """Return the rates of the groups when the copy of `step` was taken."""
        return next(copy.rates for copy in (self._start, self._older, self._recent) if copy.step == step)

    def restore(self, step: int, wanted: Rewind) -> int | None:
        """Go back to the newest copy that meets `wanted`, and return its step; None without one."""
        held = {each.step: each for each in (self._start, self._older, self._recent) if each.step is not None}
        latest = step - wanted.min_age_steps
        fitting = [at for at, copy in held.items() if at == 0 or (at <= latest and copy.rate <= wanted.max_rate)]
        if not fitting:
            return None
        held[max(fitting)].restore(TrainingState(self._model, self._optimizers))
        for at, copy in held.items():
            if at > max(fitting):
                copy.clear()
        return max(fitting)


class Controller:
    """Control of one training. `lr_scale` and `kss` are the settings in force.

    `width` is 0 if the rate does not give the step length; `exponent` is the update exponent at the start. `copies` are
    those of a training that can rewind. With `ceilings` KSS is that by projection, else as published.
    """

    def __init__(
        self,
        control: Control,
        *,
        width: int = 0,
        num_layers: int = 0,
        exponent: float | None = None,
        risk: RiskConfig | None = None,
        policy: PolicyConfig | None = None,
        copies: Copies | None = None,
        ceilings: Ceilings | None = None,
    ) -> None:
        self._width, self._num_layers, self._exponent = width, num_layers, exponent
        self._config = risk or RiskConfig()
        self.lr_scale = 1.0
        self.kss = KssSettings()
        self.num_actions = 0
        self.min_lr_scale = 1.0
        self.risk = OnlineRisk(value=0.0, reason="")
        self._control = control
        self._policy = policy
        if policy is None and control in ("auto", "lr", "kss", "kss+lr", "observe"):
            self._policy = PolicyConfig(name=control)
        self.first_action: int | None = None
        self.highest_risk = 0.0
        self._state, self._history = PolicyState(), RiskState()
        self._waiting: list[tuple[int, Action]] = []
        self._copies = copies
        self._ceilings = ceilings
        self._kss = KssConfig(method="published" if ceilings is None else "projection")
        self._cap: Cap | None = None
        self._rates = (0.0, 0.0)
        """Rates of both groups of parameters, before the scale and within the bounds on them."""
        self._shares: Shares = {}
        self.apart = 1.0
        """Rate of the second group over that of the first."""
        self._rate = 0.0
        self.num_rewinds = self.lost_steps = 0
        self._ramp = (0, 0, 1.0, 1.0)
        self._kss_ramp = (0, 0, 0.0, 0.0)
        self._losses: list[float] = []
        self._restore_at = 0

    def begin(self, step: int, scheduled: float = 0.0, apart: float = 1.0) -> None:
        """Apply the decisions that are due at `step`, where the schedule asks for the rate `scheduled`.

        A second group of parameters has `apart` times that rate.
        """
        asked, before = (scheduled, scheduled * apart), self._rates
        due = [action for at, action in self._waiting if at <= step]
        self._waiting = [(at, action) for at, action in self._waiting if at > step]
        for action in due:
            if action.lr_scale is not None:
                self._ramp = (step, action.ramp_steps, _ramped(self._ramp, step), action.lr_scale)
            if action.max_rate is not None:
                self._cap = Cap(action.max_rate, step, action.warmup_steps, self._cap.peak if self._cap else 0.0)
            if action.rewind is not None:
                self._rewind(step, action.rewind, self._bounded(asked))
            if action.ceilings is not None and self._ceilings is not None:
                self._set_ceilings(step, self._ceilings, action.ceilings)
            if action.kss is not None:
                self._kss_ramp = (step, action.ramp_steps, self.kss.alpha, action.kss.alpha)
                self.kss = action.kss if action.kss.alpha > 0 else replace_alpha(self.kss, self.kss.alpha)
        self._rates = self._bounded(asked)
        first, second = factors(self._shares, asked)
        self.apart = apart * second / first
        if self._policy is not None:
            self.lr_scale = _ramped(self._ramp, step)
            if self._cap is not None:
                self.lr_scale = min(self.lr_scale, self._cap.scale(step, self.scheduled))
            self.kss = replace_alpha(self.kss, _ramped(self._kss_ramp, step))
        self.min_lr_scale = min(self.min_lr_scale, self.lr_scale)
        if self._copies is not None:
            self._copies.take(step, self._rate, before)
        self._rate = self.scheduled * self.lr_scale

    @property
    def scheduled(self) -> float:
        """Rate before the scale, as the agent reports it: the largest one of both groups."""
        return max(self._rates)

    def _bounded(self, rates: tuple[float, float]) -> tuple[float, float]:
        first, second = factors(self._shares, rates)
        return rates[0] * first, rates[1] * second

    def _rewind(self, step: int, wanted: Rewind, rates: tuple[float, float]) -> None:
        copy_step = None if self._copies is None else self._copies.restore(step, wanted)
        outcome: AckOutcome = "refused" if copy_step is None else "applied"
        if copy_step is not None and self._copies is not None:
            before = self._copies.rates(copy_step)
            if found := outgrown(before, rates, wanted.max_rate, self._shares):
                self._shares = {**self._shares, **shares_of({*self._shares, *found}, before)}
                self._cap = None if self._cap is None else replace(self._cap, peak=0.0, warmup_steps=0)
            self.num_rewinds, self.lost_steps = self.num_rewinds + 1, self.lost_steps + step - copy_step
            self._history = RiskState()
        self._state = rewound(self._state, _ack(outcome, step, Applied()))

    def _set_ceilings(self, step: int, ceilings: Ceilings, factors: Mapping[int, float]) -> None:
        ceilings.set(factors)
        # The agent answers once two updates have shown that they hold.
        ack = _ack("applied", step + 1, Applied(held_layers=tuple(factors)))
        self._state = ceilings_answered(self._state, ack)

    @property
    def held_steps(self) -> int:
        """Number of steps with ceilings."""
        return 0 if self._ceilings is None else self._ceilings.num_held

    def after_update(self) -> None:
        """Hold the ceilings, after an update of the optimizer."""
        if self._ceilings is not None:
            self._ceilings.hold()

    def see(
        self,
        step: int,
        profile: SpectralProfile | None,
        loss: float,
        lr: float,
        attention_logits: Sequence[float | None] = (),
    ) -> None:
        """Assess one profile (None for states that are not finite), with the loss and the scheduled rate."""
        if self._control == "spike":
            self._spike(step, loss)
        if self._policy is None:
            return
        seen = observe(
            profile,
            TrainingStep(step=step, learning_rate=lr, loss=loss, lr_scale=self.lr_scale, kss_alpha=self.kss.alpha),
            width=self._width or None,
            num_layers=self._num_layers,
            update_exponent=self._exponent,
            rewinds=self._copies is not None,
            non_finite=profile is None,
            attention_logits=attention_logits,
        )
        self._history, self.risk = assess(self._history, seen, self._config)
        self.highest_risk = max(self.highest_risk, self.risk.value)
        decision = decide(float(step), self._state, seen, self.risk, self._policy, self._kss)
        self._state = decision.state
        for action in decision.commands:
            if action.changes_training:
                self.num_actions += 1
                self.first_action = step if self.first_action is None else self.first_action
            if action.kind != "set_cadence":
                self._waiting.append((step + DELAY, action))

    @property
    def dense_until(self) -> int:
        """Step until which the policy requests a snapshot at each step."""
        return self._state.dense_until

    def _spike(self, step: int, loss: float) -> None:
        before = self._losses[-SPIKE_WINDOW:]
        if len(before) >= 5 and loss > SPIKE_RATIO * statistics.fmean(before) and step >= self._restore_at:
            self.lr_scale = max(0.05, self.lr_scale / 2)
            self.num_actions += 1
            self._restore_at = step + SPIKE_HOLD
        elif self.lr_scale < 1.0 and step >= self._restore_at:
            self.lr_scale = min(1.0, self.lr_scale * 2)
            self._restore_at = step + SPIKE_HOLD
        self._losses.append(loss)


def _ack(outcome: AckOutcome, step: int, applied: Applied) -> Ack:
    return Ack(run="run", incarnation="0" * 8, command_id="0" * 8, outcome=outcome, step=step, applied=applied)


def replace_alpha(settings: KssSettings, alpha: float) -> KssSettings:
    return KssSettings(**{name: getattr(settings, name) for name in settings.__struct_fields__} | {"alpha": alpha})


def _ramped(ramp: tuple[int, int, float, float], step: int) -> float:
    start, length, old, new = ramp
    return new if length <= 0 else old + (new - old) * min(1.0, (step - start + 1) / length)
