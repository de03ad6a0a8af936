"""The KSS action: its limits, the models that it is refused on, and when it injects a gradient."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from torch import nn

from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.action import ACTS, Capability, ControlAction, Injection, NextForwards, Target, Update
from koopmon.agent.control.kss.injection import KssInjection
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.state import ActionState, ControlState, Ramp
from koopmon.agent.parallelism import ParallelLayout
from koopmon.agent.stats import AgentStats
from koopmon.api import ArchitectureAdapter
from koopmon.config import Config, KssConfig
from koopmon.logs import log_for_job
from koopmon.observables import shielded
from koopmon.plugins import Selection, source
from koopmon.wire.messages import Applied, Command, KssSettings

logger = logging.getLogger("koopmon.agent")


class KssAction(ControlAction):
    """Adds the gradient of alpha x KSS to the training. Its strength is alpha; the other settings switch at once."""

    kind = "set_kss"
    neutral = 0.0

    def __init__(self, config: Config, stats: AgentStats, breaker: CircuitBreaker) -> None:
        self._limits = config.limits
        self._through_shielded = config.kss.through_shielded
        self._injection = KssInjection(config.sampling.seed, stats, breaker)
        self._refusal = ""
        self._obstacle = ""

    def target(self, request: Command | Applied, state: ControlState, step: int) -> Target:
        limits, value = self._limits, request.kss
        assert value is not None
        capped = {
            "alpha": min(value.alpha, limits.max_kss_alpha),
            "svd_rank": min(value.svd_rank, limits.max_kss_svd_rank),
            "num_samples": min(value.num_samples, limits.max_kss_samples),
        }
        details = [f"{name} capped at {cap}" for name, cap in capped.items() if cap != getattr(value, name)]
        parameters = {**msgspec.structs.asdict(value), **capped}
        alpha = parameters.pop("alpha")
        return Target(alpha, parameters, ", ".join(details), acts=alpha != self.neutral)

    def _settings(self, state: ControlState, step: int) -> KssSettings:
        # The state comes from rank 0: convert() holds its numbers to the bounds of the protocol.
        return msgspec.convert({**self.parameters(state), "alpha": self.strength(state, step)}, KssSettings)

    def applied(self, state: ControlState, step: int) -> Mapping[str, Any]:
        return {"kss": self._settings(state, step)}

    def training(self, state: ControlState, step: int) -> Mapping[str, float]:
        return {"kss_alpha": self.strength(state, step)}

    def capability(self, layout: ParallelLayout) -> Capability:
        if layout.splits_tokens:
            return Capability(False, "KSS is refused: ranks that share one model hold different tokens of its data")
        if layout.device != "cpu" and self._limits.act != "always":
            return Capability(False, f"KSS is refused: it is not proven on {layout.device}")
        if self._obstacle:
            return Capability(False, f"KSS is refused: {self._obstacle}")
        return Capability(False, self._refusal) if self._refusal else ACTS

    def inspect(self, model: nn.Module, optimizers: OptimizerSet, selection: Selection) -> None:
        self._refusal = "" if self._through_shielded else kss_refusal(model, selection)

    def hello(self, adapter: ArchitectureAdapter) -> Mapping[str, Any]:
        overrides = adapter.kss_settings()
        if not overrides:
            return {"kss": None}
        known = {**msgspec.structs.asdict(KssConfig()), **overrides}
        fields = {name: known[name] for name in KssSettings.__struct_fields__ if name in known}
        try:
            return {"kss": msgspec.convert(fields, KssSettings)}
        except msgspec.ValidationError as error:
            logger.warning("koopmon: the KSS settings of %s are left out: %s", source(adapter), error)
            return {"kss": None}

    def set_obstacle(self, reason: str) -> None:
        self._obstacle = reason

    def facts(self) -> Mapping[str, Any]:
        return {"kss_skipped": self._injection.skipped.get() or 0.0}

    def tuned(self, state: ControlState) -> ControlState:
        """Return `state` without KSS once nothing can change the stream, as after a later compilation."""
        part = state.actions.get(self.kind)
        if not self._obstacle or part is None or part.ramp.target <= 0.0:
            return state
        log_for_job(logger, f"KSS is no longer in force: {self._obstacle}")
        off = ActionState(ramp=Ramp(), parameters=part.parameters)
        return state.changed(actions={**state.actions, self.kind: off})

    def before_forwards(self, state: ControlState, step: int, forwards: NextForwards) -> Injection | None:
        self._obstacle = forwards.obstacle
        if self.kind not in state.actions or self.strength(state, step) <= 0.0:
            return None
        self._injection.latch(step, self._settings(state, step), forwards)
        return self._injection if self._injection.active else None

    def apply(self, state: ControlState, step: int, update: Update) -> None:
        # The scale of the loss must be known before the next step's forward, which may be the first with KSS.
        if self.kind in state.actions and self.strength(state, step + 1) > 0.0:
            self._injection.find_scaler(update.optimizer)

    def revert(self) -> None:
        self._injection.end()


def kss_refusal(model: nn.Module, selection: Selection) -> str:
    """Return the reason against KSS on `model`: its families shield some of its modules. Empty if there is none."""
    modules = shielded(selection.families, selection.candidates)
    if not modules:
        return ""
    name = next((name for name, module in model.named_modules() if module is modules[0]), "a module of the model")
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    allow = "set [kss] through_shielded = true to allow it"
    return f"KSS would reach what the model's family shields from it, {name[:200]}{more}: {allow}"
