"""Learning-rate back-off: each update runs on a view of its optimizer with scaled rates.

The user's own parameter groups keep the user's rates at all times, so that any scheduler composes: effective rate =
schedule x scale, exactly. A scale is refused where a check at run time does not show that the updates follow it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from koopmon.agent.control.action import ControlAction, RequestRefusedError, Target, Update
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rate_shares import BOUNDED_AT, from_parameters
from koopmon.agent.control.scale_proof import ScaleProof, prove, prove_around, prove_groups
from koopmon.agent.control.scaled_view import close_view, scaled_view
from koopmon.agent.control.state import ControlState
from koopmon.agent.control.step_clock import running_wrapper
from koopmon.config import LimitsConfig
from koopmon.plugins import Selection
from koopmon.wire.messages import MAX_RATE, Applied, Command

logger = logging.getLogger("koopmon.agent")

MIN_EFFECTIVE_SCALE = 0.001
"""Lower bound on the scale under a cap on the peak rate. `[limits] min_lr_scale` bounds the commanded scale only."""


class _Known(NamedTuple):
    """The result of a check of an optimizer that had `num_groups` groups."""

    proof: ScaleProof
    num_groups: int


class LrBackoff(ControlAction):
    """Scales the rates of all optimizers during each update. Its strength is the scale; 1 changes nothing.

    A cap on the peak rate is in the parameters: `max_rate`, the step `capped_from` at which the first cap was set, the
    peak `peak_rate` that an earlier launch followed (0 without one), and the warm-up of `warmup_steps` from step
    `warmup_from` on. The bounds on single groups (`rate_shares`) are parameters of the rewind that found them.
    """

    kind = "set_lr_scale"
    neutral = 1.0
    lasting = True

    def __init__(self, limits: LimitsConfig) -> None:
        self._min_scale = limits.min_lr_scale
        self._optimizers = OptimizerSet()
        self._proofs: weakref.WeakKeyDictionary[Optimizer, _Known] = weakref.WeakKeyDictionary()
        self._views: list[tuple[Optimizer, Optimizer]] = []
        """Views whose update has not ended, each with its optimizer."""
        self._peak = (-1, 0.0)
        """First step under the cap and the largest scheduled rate since. One tuple: the I/O thread reads it."""

    def inspect(self, model: nn.Module, optimizers: OptimizerSet, selection: Selection) -> None:
        self._optimizers = optimizers

    def target(self, request: Command | Applied, state: ControlState, step: int) -> Target:
        assert request.lr_scale is not None
        scale, parameters, details = max(request.lr_scale, self._min_scale), dict(self.parameters(state)), []
        if scale > request.lr_scale:
            details.append(f"lr_scale capped at {scale}")
        if request.max_rate is not None:
            self._check_rates()
            cap = min(request.max_rate, parameters.get("max_rate", request.max_rate))
            if cap < request.max_rate:
                details.append(f"max_rate stays at {cap:g}, since a cap is only lowered")
            restored = request if isinstance(request, Applied) else Applied()
            parameters = {
                "max_rate": cap,
                "capped_from": parameters.get("capped_from", step),
                "peak_rate": max(parameters.get("peak_rate", 0.0), restored.peak_rate or 0.0),
                "warmup_from": step - restored.warmup_done,
                "warmup_steps": request.warmup_steps,
            }
        acts = scale != self.neutral or request.max_rate is not None
        for optimizer in self._optimizers if acts else ():
            if refusal := self._proof(optimizer, again=True).refusal:
                raise RequestRefusedError(f"the learning rate is not lowered: {refusal}")
        return Target(scale, parameters, ", ".join(details), acts)

    def _check_rates(self) -> None:
        """Raise RequestRefusedError if the peak of the rates cannot be followed."""
        rate = self._optimizers.largest_rate()
        if not isinstance(rate, float):
            where = "has no learning rate" if rate is None else "has its learning rate on a device"
            raise RequestRefusedError(f"max_rate is refused: the optimizer {where}")

    def refusal_of_bounds(self, groups: Collection[int]) -> str:
        """Return the reason why the rates of these groups cannot be bounded apart from the others; empty if they can.

        Groups are numbered over all optimizers.
        """
        first = 0
        for optimizer in self._optimizers:
            own = {each - first for each in groups if 0 <= each - first < len(optimizer.param_groups)}
            first += len(optimizer.param_groups)
            if own and (refusal := prove_groups(optimizer, own)):
                return refusal
        return ""

    def _proof(self, optimizer: Optimizer, *, again: bool = False) -> ScaleProof:
        """Return the result of the check, which a new group repeats, and `again` if there was none."""
        num_groups = len(optimizer.param_groups)
        known = self._proofs.get(optimizer)
        if known is None or known.num_groups < num_groups or (again and not known.proof.conclusive):
            proof = prove(optimizer)
            wrapper = self._optimizers.wrapper_of(optimizer) or running_wrapper(optimizer)
            if not proof.refusal and wrapper is not None and (around := prove_around(wrapper)).refusal:
                proof = around
            known = self._proofs[optimizer] = _Known(proof, num_groups)
        return known.proof

    def released(self, state: ControlState) -> Target:
        return Target(self.neutral, acts=False)

    def applied(self, state: ControlState, step: int) -> Mapping[str, Any]:
        cap, scale = self.parameters(state), {"lr_scale": self.strength(state, step)}
        if not cap:
            return scale
        done, peak = int(step - cap["warmup_from"]), min(self._peak_rate(cap), MAX_RATE)
        warms = done < self._warmup_steps(state)
        warmup = {"warmup_done": done, "warmup_steps": int(cap["warmup_steps"])} if warms else {}
        return {**scale, "max_rate": cap["max_rate"], "peak_rate": peak or None, **warmup}

    def training(self, state: ControlState, step: int) -> Mapping[str, float]:
        return {"lr_scale": self.effective(state, step)}

    def strength(self, state: ControlState, step: int) -> float:
        part = state.actions.get(self.kind)
        return self.neutral if part is None else part.ramp.geometric(step)

    def effective(self, state: ControlState, step: int) -> float:
        scale, cap = self.strength(state, step), self.parameters(state)
        if not cap:
            return scale
        peak, warm = self._peak_rate(cap), 1.0
        if (warmup_steps := self._warmup_steps(state)) > 0:
            warm = min(1.0, (step - cap["warmup_from"] + 1) / warmup_steps)
        if peak > cap["max_rate"]:
            warm *= cap["max_rate"] / peak
        return max(min(scale, warm), MIN_EFFECTIVE_SCALE)

    def _warmup_steps(self, state: ControlState) -> int | float:
        """Return the steps of the warm-up under the cap; 0 after a rewind that bounded the groups at fault.

        The others have learned at their rate, and a warm-up would cost steps.
        """
        cap, rewind = self.parameters(state), state.actions.get("rewind")
        bounded_at = None if rewind is None else rewind.parameters.get(BOUNDED_AT)
        return 0 if bounded_at is not None and bounded_at >= cap["warmup_from"] else cap["warmup_steps"]

    def _peak_rate(self, cap: Mapping[str, int | float]) -> float:
        first, peak = self._peak
        return max(peak if first == cap["capped_from"] else 0.0, cap["peak_rate"])

    def apply(self, state: ControlState, step: int, update: Update) -> None:
        if self._views:
            self.revert()  # a step() raised: its post-hook never ran
        if self.kind not in state.actions:
            return
        self.bound_groups(state, step)
        if cap := self.parameters(state):
            self._follow_peak(int(cap["capped_from"]))
        scale, factors = self.effective(state, step), self._optimizers.factors(update.optimizer)
        if scale != self.neutral or any(each < 1.0 for each in factors):
            self._scale(update, scale, factors)

    def bound_groups(self, state: ControlState, step: int) -> None:
        """Put the bounds on single groups in force. They are in the state of the rewind."""
        rewind = state.actions.get("rewind")
        if rewind is not None and self._optimizers.bound(from_parameters(rewind.parameters), rewind.ramp.linear(step)):
            self._peak = -1, 0.0  # that of the groups at fault

    def _scale(self, update: Update, scale: float, factors: Sequence[float]) -> None:
        """Run `update` on a view of its optimizer: `scale` multiplies its rates, each of `factors` that of a group."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            return  # a graph would keep the scale for ever; its replays run no step and are only watched
        optimizer = update.optimizer
        known = self._proofs.get(optimizer)
        proof = self._proof(optimizer)
        if not proof.refusal:
            view = scaled_view(optimizer, scale, sets_rate=proof.sets_rate, factors=factors)
            self._views.append((view, optimizer))
            update.args = (view, *update.args[1:])
        elif known is None or known.proof != proof:
            logger.warning("koopmon: the learning-rate scale %g is not in force: %s", scale, proof.refusal)

    def _follow_peak(self, capped_from: int) -> None:
        first, peak = self._peak
        known = peak if first == capped_from else 0.0
        rate = self._optimizers.largest_rate()
        if rate is not None and float(rate) > known:
            known = float(rate)
        self._peak = capped_from, known

    def revert(self) -> None:
        """End the views. The user's own groups hold the user's rates already."""
        while self._views:
            close_view(*self._views.pop())
