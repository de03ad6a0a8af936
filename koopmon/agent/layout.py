"""How the ranks share the training: which layouts koopmon is proven to act in, and which it only watches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from koopmon.agent.world import World
from koopmon.observables import shielded
from koopmon.plugins import Selection


@dataclass(frozen=True, slots=True)
class Layout:
    """`proven`: commands may be applied by default; `caution` says why not."""

    name: str
    proven: bool
    caution: str = ""


def refusal(model: nn.Module) -> str:
    """Why koopmon cannot be attached to `model` at all; empty when it can."""
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        return "torch.nn.DataParallel runs copies of the model in threads; use DistributedDataParallel"
    return ""


def kss_refusal(model: nn.Module, selection: Selection) -> str:
    """Why KSS must not act on `model`: its families shield some of its modules. Empty when it may."""
    modules = shielded(selection.families, selection.candidates)
    if not modules:
        return ""
    name = next((name for name, module in model.named_modules() if module is modules[0]), "a module of the model")
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    allow = "set [kss] through_shielded = true to allow it"
    return f"KSS would reach what the model's family shields from it, {name[:200]}{more}: {allow}"


def inspect_layout(model: nn.Module, world: World) -> Layout | None:
    """The layout of a training, seen from one rank; None while that cannot be told.

    A wrapper around `model` shows itself only while it runs: ask again from inside a forward.
    """
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    ):
        return Layout("sharded", False, "its parameters are sharded over ranks, a layout not yet proven")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return Layout("split", False, "its parameters lie on several devices, a layout not yet proven")
    if world.size == 1:
        return Layout("single", True)
    wrapper = model if isinstance(model, DistributedDataParallel) else None
    if wrapper is None:
        wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if wrapper is None:
        return None
    if wrapper.process_group.size() != world.size:
        return Layout("ddp", False, f"its replicas are {wrapper.process_group.size()} of {world.size} ranks")
    return Layout("ddp", True)


UNKNOWN = Layout("unknown", False, "several ranks train it without DistributedDataParallel, a layout not yet proven")
