"""Highest safe peak of the learning rate of a normalised model, from short warm-ups of a copy before training.

A peak that is too high makes the update ratios of normalised layers unsteady in the warm-up. The probe trains copies of
the model while the rate rises linearly over STEPS steps, up to HIGHEST times the critical rate of the width. Each copy
trains until the first alarm of the online detector, at the threshold of the policy. The estimate is the median of the
rates at these alarms. The optimizer is AdamW with betas (0.9, 0.95), without weight decay, with gradient clipping at 1.

docs/evidence.md compares estimates with trainings (`python -m benchmarks.max_rate`).
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from koopmon.api import Discovery
from koopmon.config import MonitorConfig, PolicyConfig, RiskConfig, SamplingConfig, merged
from koopmon.discovery import eager, random_state_kept
from koopmon.errors import KoopmonError
from koopmon.profiling import CapturedStates, capture_states, walking
from koopmon.risk.online_detector import RiskState, assess, observe
from koopmon.spectral import SpectralProfile, has_equal_lengths, profile_states
from koopmon.token_sampling import align_mask, choose_rows, take_rows
from koopmon.wire.messages import TrainingStep

Loss = Callable[[nn.Module], Tensor]
"""Draws the next batch of the training data and returns the loss of the given model, 0-d."""

STEPS = 100
"""Steps over which the rate rises."""
HIGHEST = 4.0
"""Last rate over the critical one. Published recipes use up to 3.2 times the critical rate."""
REPEATS = 3
"""Copies that train, each on other batches."""
LOW, HIGH = 0.5, 2.0
"""Bounds of the interval over the estimate (`benchmarks.max_rate`)."""
PRIOR_LOW, PRIOR_HIGH = 0.25, 4.0
"""The same without a probe, over the critical rate. Published recipes lie within them."""
BETAS, CLIP = (0.9, 0.95), 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakRate:
    """Highest safe peak of the learning rate. `rate`, `low` and `high` are None where they are unknown."""

    rate: float | None
    low: float | None
    high: float | None
    reason: str
    alarm_rates: tuple[float | None, ...] = ()
    """Rate at the first alarm of each copy; None for a copy without an alarm."""
    num_steps: int = 0
    """Steps of all copies together."""
    seconds: float = 0.0

    def line(self) -> str:
        """Return the result for users."""
        if self.low is None:
            return f"highest safe peak learning rate: unknown: {self.reason}"
        if self.rate is None or self.high is None:
            return f"highest safe peak learning rate: above {self.low:.2g}: {self.reason}"
        return (
            f"highest safe peak learning rate: {self.rate:.2g}, between {self.low:.2g} and {self.high:.2g}: "
            f"{self.reason}"
        )


def peak_rate(
    model: nn.Module,
    loss: Loss | None,
    captured: CapturedStates,
    update_exponent: float,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> PeakRate:
    """Estimate the highest safe peak of the learning rate of a normalised model.

    The model, its gradients and the random states stay unchanged: copies train. `loss` must use its argument.

    Args:
        model: the model before training.
        loss: the loss on the next batch; None gives the estimate from the width alone.
        captured: the states of `model` on one batch.
        update_exponent: its update exponent.
        args: the arguments of one forward pass of the model.
        kwargs: its keyword arguments.

    Raises:
        KoopmonError: `loss` returns no finite scalar at the first step, or does not train its argument.
    """
    risk = _risk_config(captured.discovery)
    width = int(captured.states[0].shape[-1])
    critical = risk.normalized_critical_rate / width
    if has_equal_lengths(captured.states):
        why = "all states have equal lengths: a Post-LN model that normalises its embeddings fails without an alarm"
        return PeakRate(rate=None, low=None, high=None, reason=why)
    if loss is None:
        why = f"from the width {width} alone; a factory that returns (model, batch, loss) adds a probe"
        return PeakRate(rate=critical, low=critical * PRIOR_LOW, high=critical * PRIOR_HIGH, reason=why)
    began, alarms, num_steps = time.perf_counter(), [], 0
    known: dict[str, Any] = {"adapter": captured.discovery.adapter, "stack": captured.discovery.stack.name}
    with eager(), random_state_kept(), torch.enable_grad():
        for _ in range(REPEATS):
            copied = copy.deepcopy(model)
            discovery = capture_states(
                copied, *args, num_samples=SamplingConfig().num_samples, **known, **kwargs
            ).discovery
            warmup = _Warmup(copied, discovery, loss, risk, update_exponent)
            found, steps = _alarm_rate(warmup, critical * HIGHEST)
            alarms.append(found)
            num_steps += steps
    rate = statistics.median(math.inf if found is None else found for found in alarms)
    heard = ", ".join("none" if found is None else f"{found:.2g}" for found in alarms)
    seconds = time.perf_counter() - began
    reason = (
        f"AdamW, clipping at {CLIP:g}; {REPEATS} warm-ups of a copy, {num_steps} steps, {seconds:.1f} s, "
        f"up to {critical * HIGHEST:.2g}; first alarms at {heard}"
    )
    raised = math.isfinite(rate)
    return PeakRate(
        rate=rate if raised else None,
        low=LOW * (rate if raised else critical * HIGHEST),
        high=HIGH * rate if raised else None,
        reason=reason,
        alarm_rates=tuple(alarms),
        num_steps=num_steps,
        seconds=seconds,
    )


class _Warmup:
    """Training of a copy of the model, with a profile at each step."""

    def __init__(
        self, model: nn.Module, discovery: Discovery, loss: Loss, risk: RiskConfig, update_exponent: float
    ) -> None:
        self._model = model.train()
        self._loss, self.risk, self.update_exponent = loss, risk, update_exponent
        self._discovery = discovery
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise KoopmonError("the model has no parameters that train")
        self._optimizer = torch.optim.AdamW(self._parameters, lr=0.0, betas=BETAS, weight_decay=0.0)

    @property
    def num_layers(self) -> int:
        return self._discovery.stack.num_layers

    def look(self, step: int) -> tuple[SpectralProfile | None, float, int]:
        """Compute the gradients of `step`; return its profile, None for states that are not finite, and loss and width.

        Raises KoopmonError if the loss is no scalar of this model.
        """
        adapter, stack = self._discovery.adapter, self._discovery.stack
        states: list[Tensor] = []
        rows: Tensor | None = None
        mask: Tensor | None = None

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal mask
            mask = adapter.token_mask(module, args, kwargs, stack)

        def take(state: Tensor) -> None:
            nonlocal rows
            if rows is None:
                kept = align_mask(mask, state.shape[:-1])
                rows = choose_rows(state.shape[:-1].numel(), SamplingConfig().num_samples, seed=step, mask=kept)
            states.append(take_rows(state.detach(), rows.to(state.device)))

        hook = self._model.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with walking(adapter, stack, take):
                value: Any = self._loss(self._model)
        finally:
            hook.remove()
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
            raise KoopmonError("loss: expected loss(model) to return a 0-d tensor with gradients")
        # These gradients go to the copy alone, also if the loss calls another model too.
        gradients = torch.autograd.grad(value, self._parameters, allow_unused=True)
        if not states or all(gradient is None for gradient in gradients):
            raise KoopmonError(
                "loss: loss(model) does not call its argument; it must not use another copy of the model"
            )
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        finite = all(bool(state.isfinite().all()) for state in states) and bool(value.isfinite())
        rank = MonitorConfig().svd_rank
        paired = stack.form == "pairs"
        profile = profile_states(states, svd_rank=rank, paired=paired, kreiss="never") if finite else None
        return profile, float(value.detach()), int(states[0].shape[-1])

    def update(self, rate: float) -> None:
        nn.utils.clip_grad_norm_(self._parameters, CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()


def _alarm_rate(warmup: _Warmup, highest: float) -> tuple[float | None, int]:
    """Return the rate at the first alarm, and the number of steps. Raises KoopmonError as `_Warmup.look`."""
    state = RiskState()
    for step in range(STEPS):
        rate = highest * (step + 1) / STEPS
        profile, loss, width = warmup.look(step)
        if profile is None and step == 0:
            raise KoopmonError(f"loss: {loss} at the first step, or states that are not finite: the model is broken")
        seen = observe(
            profile,
            TrainingStep(step=step, learning_rate=rate, loss=loss),
            width=width,
            num_layers=warmup.num_layers,
            update_exponent=warmup.update_exponent,
            non_finite=profile is None,
        )
        state, risk = assess(state, seen, warmup.risk)
        if risk.value >= PolicyConfig().act_risk:
            return rate, step + 1
        warmup.update(rate)
    return None, STEPS


def _risk_config(discovery: Discovery) -> RiskConfig:
    """Return the detector's settings with the thresholds of the model's adapter."""
    return merged(RiskConfig(), discovery.adapter.thresholds(), "thresholds")
