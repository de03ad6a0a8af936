"""Discovery: a forward pass without side effects, and its errors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import koopmon
from koopmon.api import Point, call_arguments
from koopmon.block_finder import block_lists, canonical_name
from koopmon.discovery import probe
from tests.stacks import B, Block, D, Listed, Pair, Stacked, T, in_turn, parallel

torch.set_num_threads(1)


class Noisy(nn.Module):
    """Model that draws from every generator, trains some parts, and records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(D, 2, D, batch_first=True) for _ in range(2))
        self.blocks[1].eval()
        self.drop = nn.Dropout(0.5)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, h: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        h = self.drop(h) + torch.rand(()) + random.random()
        return in_turn(self.blocks, h)


def test_discovery_leaves_no_trace() -> None:
    model = Noisy()
    modes = [module.training for module in model.modules()]
    parameters = [parameter.clone() for parameter in model.parameters()]
    states = torch.get_rng_state(), random.getstate()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    assert koopmon.discover(model, torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))).verified
    assert model.calls == [(False, False)]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.is_grad_enabled()
    assert all(torch.equal(*pair) for pair in zip(parameters, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_discovery_leaves_no_trace_when_the_model_raises() -> None:
    model = Noisy()
    modes = [module.training for module in model.modules()]
    with pytest.raises(AssertionError, match="embedding dimension"):
        koopmon.discover(model, torch.randn(B, T, D + 1))
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def one_process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_data_parallel_model_is_probed_without_collectives() -> None:
    model = nn.parallel.DistributedDataParallel(Noisy())
    found = koopmon.discover(model, torch.randn(B, T, D))
    assert found.verified
    assert found.stack.name == "module.blocks"
    assert koopmon.discover(model, torch.randn(B, T, D), stack="blocks").stack.name == "module.blocks"
    with probe(model) as call:
        assert call is model.module


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_model_in_mixed_precision_is_one_chain() -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = Noisy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    found = koopmon.discover(model, torch.randn(B, T, D))
    assert found.verified
    assert found.stack.name == "blocks"
    assert found.adapter.specificity(model) == 10


def test_no_batch_is_not_verified() -> None:
    found = koopmon.discover(Noisy())
    assert not found.verified
    assert found.stack.name == "blocks"
    assert [point.name for point in found.points] == ["blocks.0", "blocks.1"]


def test_no_chain_lists_each_candidate_and_the_way_out() -> None:
    model = Pair(2, 3)
    model.first.run = model.second.run = parallel
    with pytest.raises(koopmon.DiscoveryError) as caught:
        koopmon.discover(model, torch.randn(B, T, D), adapter=Listed("first.blocks", "second.blocks"))
    assert str(caught.value) == (
        "adapter 'listed' finds no residual chain in Pair: "
        "first.blocks: the output of first.blocks.0 is not the input of first.blocks.1; "
        "second.blocks: the output of second.blocks.0 is not the input of second.blocks.1; "
        "pass stack= to name the list of blocks that is one"
    )


def test_canonical_names_are_without_wrappers() -> None:
    assert canonical_name("module._orig_mod.h.0._checkpoint_wrapped_module.attn") == "h.0.attn"
    assert canonical_name("") == ""


def test_call_arguments_by_name() -> None:
    class Model(nn.Module):
        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> None: ...

    a, b, c = (torch.zeros(1) for _ in range(3))
    assert call_arguments(Model(), (a, b), {"labels": c}) == {"tokens": a, "attention_mask": b, "labels": c}
    assert call_arguments(Model(), ({"tokens": a},), {"labels": c}) == {"tokens": a, "labels": c}
    assert call_arguments(Model(), (a, b, c), {"labels": c}) == {"labels": c}, "a wrong call is the model's to refuse"


def test_a_repeated_block_stands_once_in_a_list_and_at_each_depth_in_the_stack() -> None:
    block = Block()
    lists = block_lists(Stacked(in_turn, [block, block, block]))
    assert [(blocks.name, len(blocks.blocks)) for blocks in lists] == [("blocks", 1)]
    found = koopmon.discover(Stacked(in_turn, [block, block, block]), torch.randn(B, T, D), adapter=Listed("blocks"))
    assert [(point.layer, point.module) for point in found.points] == [(layer, block) for layer in range(3)]


def test_points_are_entered_through_themselves_unless_told() -> None:
    block, door = Block(), Block()
    assert Point("b", block, 0).entry is block
    assert Point("b", block, 0, door).entry is door


class LayerScaleNorm(nn.Module):
    """A model's own normalisation, recognisable only by its name."""

    def forward(self, h: Tensor) -> Tensor:
        return h / h.norm(dim=-1, keepdim=True)


def _with(**children: nn.Module) -> nn.Module:
    block = Block()
    for name, child in children.items():
        block.add_module(name, child)
    return block


@pytest.mark.parametrize(
    ("make", "normalises"),
    [
        (lambda: _with(), False),
        (lambda: _with(ln_1=nn.LayerNorm(D)), True),
        (lambda: _with(inner=nn.Sequential(nn.Linear(D, D), LayerScaleNorm())), True),
        (lambda: _with(q_norm=nn.RMSNorm(D), k_layernorm=nn.RMSNorm(D), norm_query=nn.LayerNorm(D)), False),
        (lambda: _with(q_norm=nn.RMSNorm(D), post_attention_layernorm=nn.RMSNorm(D)), True),
        (lambda: _with(dense=nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))), False),
    ],
)
def test_normalisations_are_known_by_name(make: Any, normalises: bool) -> None:
    points = tuple(Point(str(layer), make(), layer) for layer in range(2))
    stack = koopmon.Stack("blocks", points)
    assert koopmon.normalised(stack) is normalises
    assert not koopmon.normalised(koopmon.Stack("blocks", (*points, Point("2", Block(), 2)))), "every block must"
    entered = tuple(Point(point.name, Block(), point.layer, entry_module=point.module) for point in points)
    assert koopmon.normalised(koopmon.Stack("blocks", entered)) is normalises


@pytest.mark.parametrize("where", ["model", "block", "forward"])
@pytest.mark.parametrize("look", [koopmon.discover, koopmon.profile])
def test_no_graph_is_compiled_with_hooks_of_koopmon(where: str, look: Any) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    blocks = [Block() for _ in range(3)]
    model: Any = nn.Sequential(*blocks)
    match where:
        case "model":
            model = torch.compile(model, backend=backend)
        case "block":
            for block in blocks:
                block.compile(backend=backend)
        case _:
            model.forward = torch.compile(model.forward, backend=backend)
    batch = torch.randn(B, T, D)
    look(model, batch)
    assert not graphs
    with torch.no_grad():
        model(batch)
    assert graphs
    assert torch._dynamo.eval_frame._stance.stance == "default"
