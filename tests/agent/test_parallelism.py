"""Proven, untested and refused layouts within one process; the support matrix has the ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from benchmarks.matrix.__main__ import RESULT
from koopmon.agent.parallelism import (
    PROVEN,
    UNKNOWN,
    DataRanks,
    ParallelLayout,
    Role,
    data_ranks,
    decide_role,
    inspect_layout,
    refusal,
    takes_uneven_inputs,
)
from koopmon.agent.rank_identity import RankContext
from koopmon.wire.messages import KssSettings
from tests.agent.models import build, train_step
from tests.agent.scripted_monitor import ScriptedMonitor


class On(nn.Module):
    """Parameters with given properties for `inspect_layout`."""

    def __init__(self, *parameters: Any) -> None:
        super().__init__()
        self.claimed = parameters

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield from self.claimed


class Mesh:
    """A device mesh over ranks 0 ... n - 1 of one dimension."""

    ndim = 1

    def __init__(self, *ranks: int) -> None:
        self.mesh = torch.tensor(ranks)

    def size(self) -> int:
        return self.mesh.numel()


def parameter(device: str = "cpu", mesh: Mesh | None = None) -> Any:
    fields: dict[str, Any] = {"device": torch.device(device)} | ({} if mesh is None else {"device_mesh": mesh})
    return SimpleNamespace(**fields)


def fully_sharded(model: nn.Module, mesh: Mesh) -> nn.Module:
    group = SimpleNamespace(mesh_info=SimpleNamespace(mesh=mesh))
    model._get_fsdp_state = lambda: SimpleNamespace(_fsdp_param_groups=[group])  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("model", "world", "name", "proven", "says"),
    [
        (On(parameter()), RankContext(), "single", True, ""),
        (On(parameter("cuda")), RankContext(), "single", True, ""),
        (On(parameter("mps")), RankContext(), "single", False, "on mps, where nothing is proven yet"),
        (On(parameter(), parameter("cuda")), RankContext(), "split", False, "several devices"),
        (On(parameter(mesh=Mesh(0, 1))), RankContext(0, 2), "tp", True, ""),
        (On(parameter(mesh=Mesh(0, 1))), RankContext(0, 4), "tp", False, "its tp spans 2 of 4 ranks"),
        (fully_sharded(On(parameter(mesh=Mesh(0, 1))), Mesh(0, 1)), RankContext(0, 2), "fsdp2", True, ""),
        (fully_sharded(On(parameter(mesh=Mesh(0, 1, 2, 3))), Mesh(0, 2)), RankContext(0, 4), "fsdp2-tp", True, ""),
        (fully_sharded(On(parameter("cuda", Mesh(0, 1))), Mesh(0, 1)), RankContext(0, 2), "fsdp2", True, ""),
    ],
)
def test_one_look(model: nn.Module, world: RankContext, name: str, proven: bool, says: str) -> None:
    layout = inspect_layout(model, world)
    assert layout is not None
    assert (layout.name, layout.proven, layout.refused) == (name, proven, False)
    assert says in layout.caution
    assert bool(layout.caution) != layout.proven
    assert layout.device == ("cpu" if name == "split" else next(model.parameters()).device.type)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0, DataRanks(0, 2, True)), (1, DataRanks(0, 2, False)), (2, DataRanks(1, 2, True)), (3, DataRanks(1, 2, False))],
)
def test_ranks_that_share_a_model_train_on_the_same_data_and_one_of_them_leads(rank: int, expected: DataRanks) -> None:
    mine = Mesh(rank % 2, rank % 2 + 2)
    model = fully_sharded(On(parameter(mesh=Mesh(0, 1, 2, 3))), mine)
    assert data_ranks(model, RankContext(rank, 4)) == expected
    assert data_ranks(On(parameter()), RankContext(rank, 4)) == DataRanks(rank, 4)
    assert data_ranks(On(parameter(mesh=Mesh(0, 1, 2, 3))), RankContext(rank, 4)) == DataRanks(0, 1, rank == 0)


class FSDPModule(On):
    """Build a model after fully_shard, for a torch without the ranks of its mesh."""


def test_sharding_whose_ranks_cannot_be_told_is_not_taken_for_tensor_parallelism() -> None:
    model = FSDPModule(parameter(mesh=Mesh(0, 1)))
    layout = inspect_layout(model, RankContext(1, 2))
    assert layout is not None
    assert (layout.name, layout.proven) == ("fsdp2", False)
    assert data_ranks(model, RankContext(1, 2)) == DataRanks(1, 2)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # in the compiler
def test_a_compiled_wrapper_is_the_wrapper_of_its_layout(process_group: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    for model in (wrapped, torch.compile(wrapped)):
        layout = inspect_layout(cast(nn.Module, model), RankContext(0, 2))
        assert layout is not None
        assert layout.name == "ddp"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_stage_of_a_pipeline_is_found_from_outside_of_its_forward(process_group: None) -> None:
    part = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiled = cast(nn.Module, torch.compile(part))
    stage = PipelineStage(compiled, 0, 1, torch.device("cpu"))
    for model in (part, compiled, nn.ModuleDict({"part": part})):
        layout = inspect_layout(model, RankContext(0, 2), search=True)
        assert layout is not None
        assert (layout.name, layout.refused) == ("pipeline", True)
    assert inspect_layout(nn.Linear(2, 2), RankContext(0, 2), search=True) is None
    assert stage.submod is compiled


DDP = ParallelLayout("ddp", True)
PIPELINE = ParallelLayout("pipeline", False, "stages are not watched", refused=True)


@pytest.mark.parametrize(
    ("layout", "act", "role", "says"),
    [
        (DDP, "auto", Role.ACT, ""),
        (DDP, "always", Role.ACT, ""),
        (DDP, "never", Role.WATCH, ""),
        (UNKNOWN, "auto", Role.WATCH, f"{UNKNOWN.caution}; [limits] act = 'always' acts all the same"),
        (UNKNOWN, "always", Role.ACT, ""),
        (UNKNOWN, "never", Role.WATCH, ""),
        (PIPELINE, "auto", Role.REFUSE, "stages are not watched"),
        (PIPELINE, "always", Role.REFUSE, "stages are not watched"),
        (PIPELINE, "never", Role.REFUSE, "stages are not watched"),
    ],
)
def test_the_role_follows_from_the_layout_and_the_configuration(
    layout: ParallelLayout, act: Any, role: Role, says: str
) -> None:
    decision = decide_role(layout, act)
    assert (decision.role, decision.reason) == (role, says)


def test_replicas_in_threads_are_refused() -> None:
    assert "DataParallel" in refusal(nn.DataParallel(build()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_stage_of_a_pipeline_is_refused_in_its_first_forward(
    monitor: ScriptedMonitor, agents: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    class _PipelineStageBase:
        def forward_one_chunk(self, step: int) -> float:
            return train_step(model, optimizer, step)

    model, plain = build(), build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    stage = _PipelineStageBase()
    for step in range(4):
        assert stage.forward_one_chunk(step) == train_step(plain, plain_optimizer, step)
    status = agent.status()
    assert (status["enabled"], status["acts"], status["layout"], status["sent"]) == (False, False, "pipeline", 0)
    assert sum("stages of a pipeline are not watched yet" in line for line in caplog.messages) == 1
    assert not model.blocks[0]._forward_hooks


def test_on_a_gpu_only_the_learning_rate_is_acted_on(
    monitor: ScriptedMonitor, agents: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout alone is that of a GPU: none is here."""
    monkeypatch.setattr(
        "koopmon.agent.roles.inspect_layout", lambda *_, **__: ParallelLayout("single", True, device="cuda")
    )
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    scale = monitor.command("set_lr_scale", lr_scale=0.5)
    kss = monitor.command("set_kss", kss=KssSettings(alpha=0.5, svd_rank=4, num_samples=16))
    monitor.wait(lambda: train_step(model, optimizer, 1) and monitor.acked(scale) and monitor.acked(kss))
    assert agent.status()["acts"]
    assert monitor.ack(scale).outcome == "applied"
    assert (monitor.ack(kss).outcome, monitor.ack(kss).detail) == (
        "refused",
        "KSS is refused: it is not proven on cuda",
    )


@pytest.mark.skipif(not RESULT.exists(), reason="the matrix was not run yet")
def test_what_is_proven_is_what_the_matrix_proves() -> None:
    cells = json.loads(RESULT.read_text())["cells"]
    assert {cell["layout"] for cell in cells if cell["state"] == "proven"} == PROVEN
    assert not [cell["name"] for cell in cells if cell["state"] == "wrong"]


@pytest.mark.parametrize(
    ("enable", "together", "uneven"),
    [(True, False, True), (True, True, False), (False, False, False)],
    ids=["join", "join that ends together", "no join"],
)
def test_ranks_may_step_alone_inside_join_unless_they_all_end_together(
    monkeypatch: pytest.MonkeyPatch, enable: bool, together: bool, uneven: bool
) -> None:
    config = SimpleNamespace(enable=enable, throw_on_early_termination=together)
    wrapper = SimpleNamespace(_join_config=config)
    monkeypatch.setattr(DistributedDataParallel, "_get_active_ddp_module", lambda: wrapper)
    assert takes_uneven_inputs(build()) is uneven
    monkeypatch.setattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)
    assert not takes_uneven_inputs(build())
