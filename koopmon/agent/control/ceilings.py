"""Ceilings on the norms of the weights with which layers write into the residual stream: KSS by projection.

A layer maps x to x + F(x), and F is linear in its writing weights. A factor c on them turns an eigenvalue 1 + mu of one
residual branch into 1 + c mu. A command names layers, and a factor for each. The ceiling of a writing weight is its
norm when the command comes in force, times the factor. After every update, a weight above its ceiling is scaled down.

Nothing runs before the first command. That command starts the search for the writing weights, in the training forwards
that follow. It is acknowledged once all ranks have proven the weights and held the ceilings for two updates.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from koopmon.agent.control.action import (
    ACTS,
    NEVER,
    Capability,
    Completion,
    ControlAction,
    Injection,
    NextForwards,
    RequestRefusedError,
    Target,
    Update,
)
from koopmon.agent.control.optimizer_set import OptimizerSet, parameter_ids
from koopmon.agent.control.state import ControlState
from koopmon.agent.control.writing_weights import WritingWeightsSearch, why_not_to_scale
from koopmon.agent.parallelism import ParallelLayout
from koopmon.config import LimitsConfig
from koopmon.plugins import Selection
from koopmon.wire.messages import Applied, Command

LAYOUTS = ("single", "ddp")
"""Layouts in which each rank holds whole weights, equal on all ranks."""
MAX_SEARCH_STEPS = 16
"""Steps in which the forwards must use every writing weight. An expert may get no token in some of them."""
LAST_VOTE_STEPS = 24
"""Steps after which a search ends without a vote, because the ranks no longer exchange."""
TOLERANCE = 1e-3
"""Relative excess of a norm over its ceiling that counts as held, beside the rounding of the weight's type.

A norm in single precision is a sum of up to millions of squares.
"""
PREFIX = "layer."
"""The parameter of a layer's factor has this and the number of the layer as its name."""


class HeldWeight(NamedTuple):
    """A writing weight under a ceiling, or without one. The training alone keeps it alive."""

    name: str
    tensor: weakref.ref[Tensor]
    ceiling: float = math.inf


class Ceilings(ControlAction):
    """Holds the norms of writing weights. Its parameters are the step of the last command and the factor of each layer.

    Its strength is 1 from a command until the release.
    """

    kind = "set_ceilings"
    neutral = 0.0
    lasting = True
    completes_at_edge = True

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._optimizers = OptimizerSet()
        self._obstacle = ""
        self._refusal = ""
        """The reason why this training can never have ceilings, which a search has found."""
        self._search: WritingWeightsSearch | None = None
        self._weights: dict[int, list[HeldWeight]] = {}
        """The writing weights of each layer. Empty before they are proven."""
        self._answered = -1
        """Step of the last command that was answered. A command is known by the step at which it came in force."""
        self._taken = -1, 0
        """The command whose ceilings are held, and the number of the first update after which they held."""
        self._moved: str | None = None
        """The reason why a ceiling did not hold until the next update; None before that check."""
        self._held: dict[int, list[HeldWeight]] = {}
        """The weights under ceilings of each layer."""
        self._parts: weakref.WeakKeyDictionary[Optimizer, list[HeldWeight]] = weakref.WeakKeyDictionary()
        """The weights under ceilings that each optimizer updates."""
        self._updating: Optimizer | None = None

    # The decision, on rank 0.

    def target(self, request: Command | Applied, state: ControlState, step: int) -> Target:
        factors = request.ceilings if isinstance(request, Command) else None
        if not factors:
            return self.released(state)
        if self._command(state) > self._answered:
            raise RequestRefusedError("no ceilings: the command before is not complete")
        if unknown := self._unknown(factors):
            raise RequestRefusedError(unknown)
        least = self._limits.min_ceiling_factor
        capped = sum(factor < least for factor in factors.values())
        parameters = {f"{PREFIX}{layer}": max(least, factor) for layer, factor in sorted(factors.items())}
        detail = f"{capped} factors capped at {least:g}" if capped else ""
        return Target(1.0, {"at_step": step, **parameters}, detail, corrects=bool(self._held))

    def _unknown(self, factors: Mapping[int, float]) -> str:
        """Return the reason against layers that the model does not have; empty if it has all."""
        if not self._weights or max(factors) < len(self._weights):
            return ""
        return f"no ceilings: layer {max(factors)} is none of the {len(self._weights)} layers"

    def released(self, state: ControlState) -> Target:
        return Target(self.neutral, acts=False)

    def capability(self, layout: ParallelLayout) -> Capability:
        if layout.name not in LAYOUTS:
            why = f"each rank must hold whole weights, and the layout is {layout.name}"
        elif layout.device != "cpu" and self._limits.act != "always":
            why = f"it is not proven on {layout.device}"
        else:
            why = self._obstacle or self._refusal
        return Capability(False, f"{_REFUSED}: {why}") if why else ACTS

    def set_obstacle(self, reason: str) -> None:
        self._obstacle = reason

    # Facts.

    def applied(self, state: ControlState, step: int) -> Mapping[str, Any]:
        return {"held_layers": tuple(self._held)}

    def training(self, state: ControlState, step: int) -> Mapping[str, float]:
        return {"kss_held_layers": float(len(self._held))}

    def facts(self) -> Mapping[str, Any]:
        return {"held_layers": list(self._held)}

    def inspect(self, model: nn.Module, optimizers: OptimizerSet, selection: Selection) -> None:
        self._model, self._optimizers = weakref.ref(model), optimizers
        self._weights, self._search = {}, None  # those of other blocks, if the adapter has changed
        self._release()

    # The state in force, on every rank.

    def _command(self, state: ControlState) -> int:
        """Return the step at which the command in force came in force; -1 without one. A rewind ends it."""
        at = int(self.parameters(state).get("at_step", -1))
        return -1 if _rewound(state) >= at else at

    def next_work(self, state: ControlState, step: int) -> int:
        return step + 1 if self._held or self._command(state) >= 0 else NEVER

    def before_forwards(self, state: ControlState, step: int, forwards: NextForwards) -> Injection | None:
        self._obstacle = forwards.obstacle
        if self._command(state) <= self._answered or self._weights:
            self._search = None
        elif self._search is None and forwards.stack is not None:
            self._search = WritingWeightsSearch(forwards.stack)
        return self._search

    def apply(self, state: ControlState, step: int, update: Update) -> None:
        if self.kind not in state.actions:
            return
        at = self._command(state)
        if at < 0:
            self._release()
        elif at > self._answered:
            if self._taken[0] == at:
                if step > self._taken[1] and self._moved is None:
                    self._moved = self._above()
            elif self._weights:
                self._take(state, at, step)
        self._updating = update.optimizer if self._held else None

    def revert(self) -> None:
        """Scale down what exceeds its ceiling, after the update."""
        optimizer, self._updating = self._updating, None
        if optimizer is None:
            return
        weights = self._parts.get(optimizer)
        if weights is None:
            updated = parameter_ids(optimizer)
            weights = [each for layer in self._held.values() for each in layer if id(each.tensor()) in updated]
            self._parts[optimizer] = weights
        hold(weights)

    def at_edge(self, state: ControlState, step: int, agree: Callable[[bool], bool]) -> Completion | None:
        if self.kind not in state.actions:
            return None
        at = self._command(state)
        if at < 0:
            self._release()
            rewound = "at_step" in self.parameters(state)
            return Completion("failed", "a rewind has released it") if rewound else Completion("applied", "")
        if at <= self._answered:
            return None
        done = None
        if self._taken[0] == at:
            if self._moved is None:
                hold([each for layer in self._held.values() for each in layer])  # also of optimizers that have not run
            else:
                done = self._confirm(agree)
        elif not self._weights:
            done = self._end_search(state, step - at, agree)
        if done is not None:
            self._answered = at
            if done.outcome != "applied":
                self._release()
        return done

    # The search.

    def _end_search(self, state: ControlState, steps: int, agree: Callable[[bool], bool]) -> Completion | None:
        """Evaluate the search, `steps` after the command, until all ranks have ended theirs.

        Returns the outcome of the command if the search has failed.
        """
        refusal, missing, found = self._result()
        if not agree(bool(refusal or not missing or steps >= MAX_SEARCH_STEPS)):
            return None if steps < LAST_VOTE_STEPS else Completion("failed", "the ranks do not exchange")
        self._search = None
        named = repr([[each.name for each in layer] for layer in found.values()])
        if agree(bool(found)) and _equal_on_all(zlib.crc32(named.encode()), agree):
            self._weights = found
            unknown = self._unknown(self._factors(state))
            return Completion("refused", unknown) if unknown else None
        self._refusal = refusal or missing or "another rank did not find these writing weights"
        return Completion("refused", f"{_REFUSED}: {self._refusal}", permanent=True)

    def _result(self) -> tuple[str, str, dict[int, list[HeldWeight]]]:
        """Return a reason against the writing weights, what the search still misses, or what it has found."""
        search, model = self._search, self._model()
        if self._obstacle or search is None or model is None:
            return self._obstacle, "no training forward was seen", {}
        if search.refusal or search.missing:
            return search.refusal, search.missing, {}
        layers = {layer: list(search.weights[layer].values()) for layer in sorted(search.weights)}
        if why := why_not_to_scale(layers.values(), model, self._optimizers):
            return why, "", {}
        names = {id(each): name for name, each in model.named_parameters()}
        return (
            "",
            "",
            {
                layer: [HeldWeight(names[id(each)], weakref.ref(each)) for each in found]
                for layer, found in layers.items()
            },
        )

    # The ceilings.

    def _factors(self, state: ControlState) -> dict[int, float]:
        parameters = self.parameters(state).items()
        return {int(name.removeprefix(PREFIX)): value for name, value in parameters if name.startswith(PREFIX)}

    def _take(self, state: ControlState, at: int, step: int) -> None:
        """Set the ceilings of the command `at` from the norms before update `step`. A weight of norm 0 gets none."""
        self._release()
        self._taken = at, step
        for layer, factor in self._factors(state).items():
            known = self._weights.get(layer, [])
            held = [
                each._replace(ceiling=factor * norm)
                for each, norm in zip(known, _norms([each.tensor() for each in known]), strict=True)
                if 0.0 < norm < math.inf
            ]
            if held:
                self._held[layer] = held

    def _release(self) -> None:
        self._held, self._taken, self._moved = {}, (-1, 0), None
        self._parts = weakref.WeakKeyDictionary()

    def _confirm(self, agree: Callable[[bool], bool]) -> Completion:
        wrong = self._moved or self._above() or ("" if self._held else "the writing weights are 0 or not finite")
        if agree(not wrong):
            return Completion("applied", "")
        return Completion("failed", wrong or "a ceiling does not hold on another rank")

    def _above(self) -> str:
        """Return the reason why a ceiling does not hold; empty if all do."""
        for each in (one for layer in self._held.values() for one in layer):
            weight = each.tensor()
            (norm,) = _norms([weight])
            tolerance = TOLERANCE + (0.0 if weight is None else 4.0 * torch.finfo(weight.dtype).eps)
            if not norm <= each.ceiling * (1.0 + tolerance):
                return f"{each.name} has the norm {norm:.3g}, and its ceiling is {each.ceiling:.3g}"
        return ""

    def end(self) -> None:
        self._search = None


_REFUSED = "KSS by projection is refused"


@torch.no_grad()
def hold(weights: Sequence[HeldWeight]) -> None:
    """Scale each weight whose norm exceeds its ceiling to the ceiling. It waits for no device."""
    tensors, ceilings = [], []
    for each in weights:
        if (tensor := each.tensor()) is not None:
            tensors.append(tensor)
            ceilings.append(each.ceiling)
    if not tensors:
        return
    norms = torch.stack(torch._foreach_norm(tensors, 2, _norm_type(tensors)))
    if norms.device.type == "cpu":
        pairs = list(zip(tensors, ceilings, norms.tolist(), strict=True))
        above = [(tensor, ceiling / norm) for tensor, ceiling, norm in pairs if ceiling < norm < math.inf]
        if above:
            torch._foreach_mul_([tensor for tensor, _ in above], [factor for _, factor in above])
        return
    limits = torch.tensor(ceilings, dtype=norms.dtype, device="cpu").to(norms.device, non_blocking=True)
    factors = (limits / norms).clamp_(max=1.0).nan_to_num_(nan=1.0)
    torch._foreach_mul_(tensors, list(factors.unbind()))


def _norm_type(weights: Sequence[Tensor]) -> torch.dtype:
    """Return the type in which norms are summed.

    Replicas may sum in another order, as with another number of threads. In double precision they still get the same
    factor in the type of the weight. That takes twice the time, which a process alone does not need.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return torch.float64 if several or any(each.dtype == torch.float64 for each in weights) else torch.float32


def _norms(weights: Sequence[Tensor | None]) -> list[float]:
    """Return the norms in double precision, NaN for a weight that is gone."""
    with torch.no_grad():
        return [
            math.nan if each is None else float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in weights
        ]


def _rewound(state: ControlState) -> int:
    """Return the step of the last rewind; -1 without one."""
    rewind = state.actions.get("rewind")
    return -1 if rewind is None else int(rewind.parameters.get("at_step", -1))


def _equal_on_all(value: int, agree: Callable[[bool], bool]) -> bool:
    """Return True if `value`, of 32 bits, is equal on all ranks: in each bit all have 1, or all have 0."""
    bits = (bool(value >> place & 1) for place in range(32))
    return all(agree(bit) or agree(not bit) for bit in bits)
