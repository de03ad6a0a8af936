"""Parallel layouts: koopmon acts in the proven ones, watches the unproven ones, and refuses the wrong ones.

`proven` follows the support matrix (docs/support.md). The tests of the matrix check this file.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from koopmon.agent.rank_identity import RankContext

PROVEN = frozenset({"single", "ddp", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2-tp"})
"""Layouts over all ranks, on the CPU, in which the matrix proves that koopmon acts correctly."""
CHECKED_DEVICES = frozenset({"cuda"})
"""Devices on which the matrix did not run. Actions that check their effect in the training itself act there."""
_MAX_FRAMES = 64
T = TypeVar("T", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """A layout.

    `proven`: commands are applied by default. `caution` is the reason against. `refused`: known to be wrong.
    """

    name: str
    proven: bool
    caution: str = ""
    refused: bool = False
    splits_tokens: bool = False
    """True if ranks that share one model hold different tokens of its data."""
    device: str = "cpu"
    """The type of the device of the parameters."""

    @property
    def has_whole_gradients(self) -> bool:
        """True if each rank is known to hold the gradients of the whole model."""
        return self.name in ("single", "split", "ddp")

    @property
    def hides_parameters(self) -> bool:
        """True if the forward uses other tensors than the parameters that the optimizer updates."""
        return self.name.startswith(("fsdp", "hsdp"))


class Role(Enum):
    """The agent's part in a training."""

    ACT = "apply commands"
    WATCH = "take snapshots and refuse commands"
    REFUSE = "do neither"


@dataclass(frozen=True, slots=True)
class RoleDecision:
    """A role and, unless the configuration asks for it, the reason."""

    role: Role
    reason: str = ""


def decide_role(layout: ParallelLayout, act: Literal["auto", "always", "never"]) -> RoleDecision:
    """Return the agent's role in a training of this layout. `act` is `[limits] act` of the configuration."""
    if layout.refused:
        return RoleDecision(Role.REFUSE, layout.caution)
    if act == "auto" and not layout.proven:
        return RoleDecision(Role.WATCH, f"{layout.caution}; [limits] act = 'always' acts all the same")
    return RoleDecision(Role.WATCH if act == "never" else Role.ACT)


@dataclass(frozen=True, slots=True)
class DataRanks:
    """This rank among those that train on different data.

    `leads`: it is the first of the ranks that share one model.
    """

    rank: int
    size: int
    leads: bool = True


def refusal(model: nn.Module) -> str:
    """Return the reason against attaching to `model`; empty if there is none."""
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        return "torch.nn.DataParallel runs copies of the model in threads; use DistributedDataParallel"
    if isinstance(model, torch.jit.ScriptModule):
        return "a model of torch.jit.script takes no hooks; train the model before it is scripted, or torch.compile it"
    return ""


def data_ranks(model: nn.Module, world: RankContext) -> DataRanks:
    """Return the data rank of this rank. Under tensor parallelism several ranks train on the same data."""
    mesh = _model_mesh(model)
    if mesh is None or mesh.size() != world.size:
        return DataRanks(world.rank, world.size)
    data = _data_mesh(model)
    if data is None and _shards_data(model):
        return DataRanks(world.rank, world.size)
    if data is None:  # tensor parallelism alone
        return DataRanks(0, 1, leads=world.rank == 0)
    ranks = data.mesh.flatten().tolist()
    return DataRanks(ranks.index(world.rank), len(ranks), leads=0 in ranks)


def inspect_layout(model: nn.Module, world: RankContext, *, search: bool = False) -> ParallelLayout | None:
    """Return the layout of a training, as this rank sees it; None while it is not known.

    A wrapper around `model` is visible only while it runs: call again from inside a forward. With `search` it is looked
    for among all live objects, which takes up to a second.
    """
    if _runs_as_stage() or (search and world.size > 1 and _is_stage(model)):
        return ParallelLayout(
            "pipeline", False, "stages of a pipeline are not watched yet: their layers would be mixed", True
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return ParallelLayout("split", False, "its parameters lie on several devices, a layout not yet proven")
    layout = _shared_layout(model, world, search)
    kind = next((device.type for device in devices), "cpu")
    if layout is None or kind in ("cpu", "meta"):
        return layout
    if kind in CHECKED_DEVICES:
        return replace(layout, device=kind)
    caution = layout.caution or f"its parameters lie on {kind}, where nothing is proven yet"
    return replace(layout, proven=False, caution=caution, device=kind)


def _shared_layout(model: nn.Module, world: RankContext, search: bool) -> ParallelLayout | None:
    """Return how the ranks share the model, regardless of its device."""
    mesh = _model_mesh(model)
    if mesh is not None:
        return _mesh_layout(model, mesh, world)
    sharded: list[Any] = [module for module in model.modules() if type(module).__name__ == "FullyShardedDataParallel"]
    if sharded:
        return _over("fsdp1", {module.process_group.size() for module in sharded}, world)
    if world.size == 1:
        return ParallelLayout("single", True)
    parts = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if parts and set(model.parameters()) == {parameter for part in parts for parameter in part.parameters()}:
        return _over("ddp", {part.process_group.size() for part in parts}, world)
    wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if wrapper is None and search:
        wrapper = next(iter(wrappers(model, DistributedDataParallel)), None)
    if wrapper is None:
        return None
    return _over("ddp", {wrapper.process_group.size()}, world)


def takes_uneven_inputs(model: nn.Module) -> bool:
    """Return True inside a forward whose ranks may end their inputs at different steps (`join()` of torch)."""
    wrapper = model if isinstance(model, DistributedDataParallel) else None
    wrapper = wrapper or DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    join = getattr(wrapper, "_join_config", None)
    return join is not None and bool(join.enable) and not join.throw_on_early_termination


def collectives_counter() -> Callable[[], int] | None:
    """Return a function that counts the collectives of the default process group; None if its backend does not.

    It is 0 after the end of that group, to which it holds no reference.
    """

    def count() -> int:
        group: Any = dist.group.WORLD
        return 0 if group is None else int(group._get_sequence_number_for_group())

    try:
        count()
    except (RuntimeError, AttributeError):
        return None
    return count


def wrappers(model: nn.Module, kind: type[T]) -> list[T]:
    """Return the live modules of a class that hold `model` itself."""
    # isinstance() reads `__class__`, which makes a lazy proxy load its object. type() does not.
    found = [each for each in gc.get_objects() if issubclass(type(each), kind) and "_modules" in vars(each)]
    return [each for each in found if any(inner is model for inner in each.modules())]


def _mesh_layout(model: nn.Module, mesh: Any, world: RankContext) -> ParallelLayout:
    data = _data_mesh(model)
    if data is None and _shards_data(model):
        return ParallelLayout("fsdp2", False, "this version of torch does not show over which ranks FSDP2 shards it")
    if data is None:
        return _over("tp", {mesh.size()}, world)
    name = "fsdp2" if data.ndim == 1 else "hsdp"
    return _over(name if mesh.size() == data.size() else f"{name}-tp", {mesh.size()}, world)


def _over(name: str, sizes: set[int], world: RankContext) -> ParallelLayout:
    """Return the layout `name`; it is proven only if it spans the world."""
    if sizes == {world.size}:
        return ParallelLayout(name, name in PROVEN, "" if name in PROVEN else f"{name} is a layout not yet proven")
    return ParallelLayout(name, False, f"its {name} spans {min(sizes)} of {world.size} ranks, a layout not yet proven")


def _model_mesh(model: nn.Module) -> Any:
    """Return the largest device mesh over which a parameter is distributed; None if there is none."""
    meshes = [mesh for each in model.parameters() if (mesh := getattr(each, "device_mesh", None)) is not None]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def _data_mesh(model: nn.Module) -> Any:
    """Return the mesh over which FSDP2 shards and replicates; None if there is none or torch does not expose it."""
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        mesh = getattr(getattr(groups[0], "mesh_info", None), "mesh", None)
        if mesh is not None:
            return mesh
    return None


def _shards_data(model: nn.Module) -> bool:
    """Return True if fully_shard was applied to a part of `model`. Compares class names, to import nothing."""
    return any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__)


def _runs_as_stage() -> bool:
    """Return True if the caller runs inside a stage of torch.distributed.pipelining."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return False
        caller = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if any(kind.__name__ == "_PipelineStageBase" for kind in type(caller).__mro__):
            return True
        frame = frame.f_back
    return False


def _is_stage(model: nn.Module) -> bool:
    """Return True if a live stage of torch.distributed.pipelining holds a part of `model`."""
    pipelining = sys.modules.get("torch.distributed.pipelining.stage")
    kind = getattr(pipelining, "_PipelineStageBase", None)
    if kind is None:
        return False
    stages = [each.submod for each in gc.get_objects() if issubclass(type(each), kind)]
    inside = {id(module) for stage in stages for module in stage.modules()}
    return any(id(module) in inside for module in model.modules())


def compiled_whole(model: nn.Module, blocks: list[nn.Module]) -> bool:
    """Return True if the blocks of `model` run inside a compiled graph, where none of their hooks fires."""
    inside = {id(module) for block in blocks for module in block.modules() if module is not block}
    return any(
        (hasattr(module, "dynamo_ctx") and not any(module is block for block in blocks))
        or module._compiled_call_impl is not None
        for module in model.modules()
        if id(module) not in inside
    )


UNKNOWN = ParallelLayout(
    "unknown", False, "several ranks train it in a way that is not known here, a layout not yet proven"
)
