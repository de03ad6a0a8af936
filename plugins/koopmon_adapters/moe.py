"""Mixtures of experts: blocks in which a router sends each token to a few of many experts.

They are recognised by structure: a collection of experts, and beside it a router with one row of weights for each
expert. The experts are equal modules in one list, or matrices stacked in parameters of three dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from koopmon import ArchitectureAdapter, ExampleModel, Observable, Stack, hookimpl, lists_holding, normalised, parts_of

CHOICES = ("top_k", "num_experts_per_tok", "topk", "k")
"""Attributes in which routers and mixtures hold the number of experts per token."""
CAPACITIES = ("expert_capacity", "capacity_factor")
"""Attributes for a capacity beyond which choices are dropped."""
_OTHER_FAMILIES = {"A_log", "grid"}
"""Tensors of state spaces and of splines."""


class MoEAdapter(ArchitectureAdapter):
    """Blocks with routed experts, in all of the depth or in part of it.

    Flags: "dense-layers" if some blocks of the stack hold no experts. Beside state spaces or splines the experts are
    the smaller part of a hybrid, and the claim is 15. Routers are shielded from KSS. Thresholds and KSS settings are
    the general ones; `benchmarks.family_alarms` evaluates the thresholds.

    Routers weight tokens regardless of their norm, and states are weak evidence of normalisation (`benchmarks.brake`).
    Blocks that do not normalise therefore count as unnormalised.

    The observables include all tokens that a router received, padding too.
    """

    name = "moe"
    measures: ClassVar[Mapping[str, str]] = {
        "router_entropy": "Mean entropy of a token's routing distribution over that of the uniform one, 0 to 1.",
        "load_imbalance": "Choices of the most chosen expert over those of the mean expert, from 1.",
        "top_expert_share": "Share of the tokens that choose the most chosen expert, if a token chooses at most half.",
        "dropped_token_ratio": "Share of the choices that found their expert full; absent without a capacity.",
    }

    def specificity(self, model: nn.Module) -> int:
        stacks = self.stacks(model)
        if not stacks:
            return 0
        return 15 if any(_OTHER_FAMILIES & {*each._parameters, *each._buffers} for each in model.modules()) else 20

    def stacks(self, model: nn.Module) -> list[Stack]:
        return [blocks.stack(residual=True) for blocks in lists_holding(model, _is_mixture)]

    def flags(self, model: nn.Module) -> frozenset[str]:
        dense = any(not parts_of(point.module, _is_mixture) for stack in self.stacks(model) for point in stack.points)
        return frozenset({"dense-layers"} if dense else ())

    def observables(self, stack: Stack) -> Sequence[Observable]:
        found = []
        for layer, routing in _routings(stack):
            found.append(Observable("router_entropy", layer, routing.router, routing.entropy))
            found.append(Observable("load_imbalance", layer, routing.router, routing.imbalance))
            found.append(Observable("top_expert_share", layer, routing.router, routing.top_share))
            if routing.drops:
                found.append(Observable("dropped_token_ratio", layer, routing.router, routing.dropped))
        return found

    def update_exponent(self, stack: Stack) -> float | None:
        return None if normalised(stack) else 1.0

    def shielded(self, stack: Stack) -> Sequence[nn.Module]:
        return [routing.router for _, routing in _routings(stack)]


@dataclass(frozen=True, slots=True)
class Routing:
    """One router and the readings of its outputs. N tokens, E experts, each token chooses K of them.

    An output holds logits (..., E), or probabilities, and often the choices. Choices are integers: either indices (...,
    K) or a mask (..., E) of the accepted ones.
    """

    router: nn.Module
    num_experts: int
    num_choices: int
    drops: bool

    def entropy(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        scores = self._scores(output)
        if scores is None:
            return None
        entropies: Tensor = torch.special.entr(self._probabilities(scores)).sum(-1)
        return entropies.mean() / math.log(self.num_experts)

    def imbalance(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        load = self._load(output)
        return None if load is None else load.max() / load.float().mean()

    def top_share(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        load = self._load(output) if 2 * self.num_choices <= self.num_experts else None
        return None if load is None else load.max() * self.num_choices / load.sum()

    def _load(self, output: Any) -> Tensor | None:
        """Count the choices of each expert, (E,)."""
        scores, chosen = self._scores(output), self._choices(output, self.num_choices)
        if chosen is None:
            if scores is None:
                return None
            chosen = scores.topk(min(self.num_choices, self.num_experts)).indices
        experts = torch.arange(self.num_experts, device=chosen.device)
        return (chosen.reshape(-1, 1) == experts).sum(0)  # bincount would synchronise; no atomic additions

    def dropped(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        kept = self._choices(output, self.num_experts)
        if kept is None:
            return None
        return 1.0 - kept.sum() / (kept.shape[:-1].numel() * self.num_choices)

    def _scores(self, output: Any) -> Tensor | None:
        for value in _tensors(output):
            if value.is_floating_point() and value.shape[-1:] == (self.num_experts,):
                return value.float()
        return None

    def _choices(self, output: Any, width: int) -> Tensor | None:
        for value in _tensors(output):
            if not value.is_floating_point() and value.dim() > 1 and value.shape[-1] == width:
                return value
        return None

    def _probabilities(self, scores: Tensor) -> Tensor:
        if any("correction" in name for name in (*self.router._parameters, *self.router._buffers)):
            scores = scores.sigmoid()  # routers with a correction use independent sigmoid scores, not a softmax
            return scores / scores.sum(-1, keepdim=True)
        given = (scores >= 0).all() & ((scores.sum(-1) - 1).abs() < 1e-2).all()
        return torch.where(given, scores, scores.softmax(-1))


@hookimpl
def koopmon_architecture_adapters() -> list[ArchitectureAdapter]:
    return [MoEAdapter()]


@hookimpl
def koopmon_example_models() -> list[ExampleModel]:
    if find_spec("transformers") is None:
        return []
    return [ExampleModel(name, MoEAdapter.name, build) for name, build in (("mixtral", _mixtral), ("olmoe", _olmoe))]


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "use_cache": False,
}
"""Sizes of the example models."""


def _mixtral(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Mixtral with padding, and a loss that balances the experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokens = torch.randint(50, (4, 12))
    mask = torch.arange(12) < torch.tensor([[12], [12], [12], [8]])
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True))
    return model, {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}


def _olmoe(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    tokens = torch.randint(50, (4, 12))
    config = OlmoeConfig(**SIZES, num_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return OlmoeForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def _routings(stack: Stack) -> Iterator[tuple[int, Routing]]:
    """Yield (layer, routing) of every mixture in `stack`."""
    for point in stack.points:
        for mixture in parts_of(point.module, _is_mixture):
            router, num_experts = _router(mixture) or (mixture, 0)
            num_choices = _setting(CHOICES, router, mixture)
            drops = _setting(CAPACITIES, router, mixture) is not None
            yield point.layer, Routing(router, num_experts, int(num_choices or 1), drops)


def _setting(names: Sequence[str], *modules: nn.Module) -> float | None:
    values = (getattr(module, name, None) for module in modules for name in names)
    return next((value for value in values if isinstance(value, (int, float))), None)


def _tensors(output: Any) -> list[Tensor]:
    """Return the plain tensors of a module's output. Sharded ones are excluded, because they would need a gather."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return [part for part in parts if isinstance(part, Tensor) and not hasattr(part, "to_local")]


def _is_mixture(module: nn.Module) -> bool:
    return _router(module) is not None


def _router(module: nn.Module) -> tuple[nn.Module, int] | None:
    """Return the child of `module` that routes to its experts, and their number; None if it is no mixture."""
    for collection in (*module.children(), module):
        num_experts = _num_experts(collection)
        if num_experts < 2:
            continue
        routers = [child for child in module.children() if child is not collection and _routes(child, num_experts)]
        if routers:
            # Several modules may have one row per expert: the smallest is the router.
            return min(routers, key=lambda router: sum(weight.numel() for weight in router.parameters())), num_experts
    return None


def _num_experts(collection: nn.Module) -> int:
    """Return the number of experts in `collection`; 0 if it is no such collection."""
    stacked = [weight for weight in collection._parameters.values() if weight is not None and weight.dim() == 3]
    if len(stacked) > 1 and len({weight.shape[0] for weight in stacked}) == 1:
        return int(stacked[0].shape[0])
    experts = list(collection.children())
    if not isinstance(collection, (nn.ModuleList, nn.ModuleDict)) or len({_make(expert) for expert in experts}) != 1:
        return 0
    return len(experts) if _could_be_expert(experts[0]) else 0


def _make(module: nn.Module) -> tuple[object, ...]:
    """Return a key that is equal for modules of one class whose parameters have the same shapes."""
    return type(module), *(tuple(weight.shape) for weight in module.parameters())


def _could_be_expert(module: nn.Module) -> bool:
    """Return True if `module` has weights and no attention.

    Blocks of a transformer also form lists of equal modules.
    """
    names = (name for name, _ in module.named_modules())
    has_matrix = any(weight.dim() > 1 for weight in module.parameters())
    return has_matrix and not any("att" in name.lower() for name in names)


def _routes(module: nn.Module, num_experts: int) -> bool:
    return any(weight.dim() == 2 and weight.shape[0] == num_experts for weight in module.parameters())
