"""Decisions of the guard inside a small training: the detector and the policy of the product, without its processes.

A decision takes effect `DELAY` steps after its profile, as over the wire. "spike" is the manual baseline: halve the
rate when the loss jumps, and restore it later.
"""

from __future__ import annotations

import statistics
from typing import Literal

from koopmon.config import KssConfig, PolicyConfig, RiskConfig
from koopmon.policy import Action, PolicyState, decide
from koopmon.risk.online_detector import OnlineRisk, RiskState, assess, observe
from koopmon.spectral import SpectralProfile
from koopmon.wire.messages import KssSettings, TrainingStep

Control = Literal["", "lr", "kss", "kss+lr", "spike"]
DELAY = 2
SPIKE_RATIO, SPIKE_WINDOW, SPIKE_HOLD = 1.5, 20, 50


class Controller:
    """Control of one training. `lr_scale` and `kss` are the settings in force.

    `width` is 0 if the rate does not give the step length; `exponent` is the update exponent at the start.
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
    ) -> None:
        self._width, self._num_layers, self._exponent = width, num_layers, exponent
        self._config = risk or RiskConfig()
        self.lr_scale = 1.0
        self.kss = KssSettings()
        self.num_actions = 0
        self.min_lr_scale = 1.0
        self.risk = OnlineRisk(value=0.0, reason="")
        self._control = control
        named = policy or (PolicyConfig(name=control) if control in ("lr", "kss", "kss+lr") else None)
        self._policy = named
        self.first_action: int | None = None
        self.highest_risk = 0.0
        self._state, self._history = PolicyState(), RiskState()
        self._waiting: list[tuple[int, Action]] = []
        self._ramp = (0, 0, 1.0, 1.0)
        self._kss_ramp = (0, 0, 0.0, 0.0)
        self._losses: list[float] = []
        self._restore_at = 0

    def begin(self, step: int) -> None:
        """Apply the decisions that are due at `step`."""
        due = [action for at, action in self._waiting if at <= step]
        self._waiting = [(at, action) for at, action in self._waiting if at > step]
        for action in due:
            if action.lr_scale is not None:
                self._ramp = (step, action.ramp_steps, self.lr_scale, action.lr_scale)
            if action.kss is not None:
                self._kss_ramp = (step, action.ramp_steps, self.kss.alpha, action.kss.alpha)
                self.kss = action.kss if action.kss.alpha > 0 else replace_alpha(self.kss, self.kss.alpha)
        if self._policy is not None:
            self.lr_scale = _ramped(self._ramp, step)
            self.kss = replace_alpha(self.kss, _ramped(self._kss_ramp, step))
        self.min_lr_scale = min(self.min_lr_scale, self.lr_scale)

    def see(self, step: int, profile: SpectralProfile | None, loss: float, lr: float) -> None:
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
            non_finite=profile is None,
        )
        self._history, self.risk = assess(self._history, seen, self._config)
        self.highest_risk = max(self.highest_risk, self.risk.value)
        decision = decide(float(step), self._state, seen, self.risk, self._policy, KssConfig())
        self._state = decision.state
        for action in decision.commands:
            if action.changes_training:
                self.num_actions += 1
                self.first_action = step if self.first_action is None else self.first_action
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


def replace_alpha(settings: KssSettings, alpha: float) -> KssSettings:
    return KssSettings(**{name: getattr(settings, name) for name in settings.__struct_fields__} | {"alpha": alpha})


def _ramped(ramp: tuple[int, int, float, float], step: int) -> float:
    start, length, old, new = ramp
    return new if length <= 0 else old + (new - old) * min(1.0, (step - start + 1) / length)
