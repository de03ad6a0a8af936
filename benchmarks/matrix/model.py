"""Tiny model of the support matrix in all layouts: B batch, T tokens, D width, L blocks.

`plain` is the reference in a single process. `Trained` is the same model with the same initial weights, wrapped for the
layout of a cell.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.matrix.cells import Cell

B, T, D, L = 4, 8, 16, 4
HEAD_WIDTH = 4
VOCABULARY = 11


class Attention(nn.Module):
    """Attention with the number of heads in the query's projection; under tensor parallelism, those of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast(Tensor, self.wo(mixed.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(functional.gelu(self.up(x))))


class Block(nn.Module):
    """Pre-LN block; `inside` applies checkpointing to the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(D), Attention()
        self.norm2, self.mlp = nn.LayerNorm(D), Mlp()
        self.inside: bool | None = None
        """True for reentrant checkpointing, False for the other kind, None for none."""

    def forward(self, h: Tensor) -> Tensor:
        if self.inside is None:
            return self.change(h)
        return cast(Tensor, checkpoint(self.change, h, use_reentrant=self.inside))

    def change(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.norm1(h))
        return cast(Tensor, h + self.mlp(self.norm2(h)))


class Decoder(nn.Module):
    """Tokens (B, T) to logits; `first` and `last` are False on pipeline stages without an embedding or a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding: nn.Module | None = nn.Embedding(VOCABULARY, D)
        self.position: nn.Module | None = nn.Embedding(T, D)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.norm: nn.Module | None = nn.LayerNorm(D)
        self.head: nn.Module | None = nn.Linear(D, VOCABULARY)
        self.outside: bool | None = None
        """Checkpointing of whole blocks, as `Block.inside`."""

    def embed(self, tokens: Tensor) -> Tensor:
        assert self.embedding is not None
        assert self.position is not None
        return cast(Tensor, self.embedding(tokens) + self.position(torch.arange(T).expand(tokens.shape)))

    def forward(self, h: Tensor) -> Tensor:
        if self.embedding is not None:
            h = self.embed(h)
        for block in self.blocks:
            h = block(h) if self.outside is None else checkpoint(block, h, use_reentrant=self.outside)
        if self.head is not None and self.norm is not None:
            h = self.head(self.norm(h))
        return h


def plain() -> Decoder:
    """Build the model with its initial weights, equal in every process."""
    torch.manual_seed(3)
    model = Decoder()
    with torch.no_grad():  # updates large enough for an informative spectrum
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.mul_(1.5)
    return model


def states_of(model: Decoder, tokens: Tensor) -> list[Tensor]:
    """Compute h_0 ... h_L, each (B, T, D), of an unwrapped model."""
    states = [model.embed(tokens)]
    for block in model.blocks:
        states.append(block(states[-1]))
    return states


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute the next-token cross-entropy of logits (B, T, V)."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def tokens_at(step: int, micro: int, data_rank: int) -> Tensor:
    """Draw the tokens (B, T) of one microbatch."""
    generator = torch.Generator().manual_seed(100_000 * data_rank + 10 * step + micro)
    return torch.randint(VOCABULARY, (B, T), generator=generator)


def autocast(cell: Cell) -> AbstractContextManager[Any]:
    """Return the context of the forward pass."""
    dtypes = {"bf16": torch.bfloat16, "scaler": torch.float16}
    return torch.autocast("cpu", dtypes[cell.precision]) if cell.precision in dtypes else nullcontext()


def wrapped(cell: Cell) -> nn.Module:
    """Wrap the model for `cell`. Raises torch's exceptions for combinations that torch does not support."""
    model: nn.Module = checkpointed(plain(), cell)
    mesh = _mesh(cell)
    if cell.parallel in ("tp", "tp-sequence", "fsdp2-tp"):
        assert mesh is not None
        _parallelize(cast(Decoder, model), mesh["tp"], sequence=cell.parallel == "tp-sequence")
    compiled(cast(Decoder, model), cell)
    if cell.compile == "inner":
        model = cast(nn.Module, torch.compile(model))
    model = _distribute(model, cell, mesh)
    if cell.compile in ("whole", "fullgraph"):
        model = cast(nn.Module, torch.compile(model, fullgraph=cell.compile == "fullgraph"))
    return model


def checkpointed(model: Decoder, cell: Cell) -> Decoder:
    if cell.checkpoint != "none":
        reentrant = cell.checkpoint.startswith("reentrant")
        if cell.checkpoint.endswith("outside"):
            model.outside = reentrant
        else:
            for block in model.blocks:
                block.inside = reentrant  # type: ignore[assignment]
    return model


def compiled(model: Decoder, cell: Cell) -> None:
    if cell.compile == "block":
        for name, block in list(model.blocks.named_children()):
            model.blocks.register_module(name, cast(nn.Module, torch.compile(block, fullgraph=True)))


def _mesh(cell: Cell) -> DeviceMesh | None:
    if cell.parallel in ("single", "ddp", "ddp-static"):
        return None
    shapes = {"hsdp": ((2, 2), ("replicate", "shard")), "fsdp2-tp": ((2, 2), ("dp", "tp"))}
    name = "tp" if cell.parallel.startswith("tp") else "dp"
    shape, names = shapes.get(cell.parallel, ((dist.get_world_size(),), (name,)))
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _parallelize(model: Decoder, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Apply Megatron's plan; `sequence` shards the states between blocks over the tokens."""
    columns, rows = ColwiseParallel, RowwiseParallel
    plan: dict[str, Any] = {f"attention.{name}": columns() for name in ("wq", "wk", "wv")}
    plan |= {"attention.wo": rows(), "mlp.up": columns(), "mlp.down": rows()}
    if sequence:
        gather = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
        plan |= {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
        plan |= {"attention": PrepareModuleInput(**gather), "mlp": PrepareModuleInput(**gather)}  # type: ignore[arg-type]
        plan |= {"attention.wo": rows(output_layouts=Shard(1)), "mlp.down": rows(output_layouts=Shard(1))}
        outer: dict[str, Any] = {
            "embedding": rows(input_layouts=Replicate(), output_layouts=Shard(1)),
            "position": rows(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": columns(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, outer)
    for block in model.blocks:
        parallelize_module(block, mesh, plan)


def _distribute(model: nn.Module, cell: Cell, mesh: DeviceMesh | None) -> nn.Module:
    blocks = list(cast(Decoder, model).blocks)
    if cell.parallel in ("ddp", "ddp-static"):
        return DistributedDataParallel(model, static_graph=cell.parallel == "ddp-static")
    if cell.parallel == "fsdp1":
        for name, block in list(cast(Decoder, model).blocks.named_children()):
            sharded = FullyShardedDataParallel(block, use_orig_params=True, device_id=torch.device("cpu"))
            cast(Decoder, model).blocks.register_module(name, sharded)
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if cell.parallel in ("fsdp2", "fsdp2-mixed", "hsdp", "fsdp2-tp"):
        options: dict[str, Any] = {"mesh": mesh["dp"] if cell.parallel == "fsdp2-tp" and mesh is not None else mesh}
        if cell.parallel == "fsdp2-mixed":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model


def synchronising(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return the context of a microbatch's backward pass: only the `last` one synchronises gradients."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "set_requires_gradient_sync"):
        inner.set_requires_gradient_sync(last)
        return nullcontext()
    no_sync: Callable[[], AbstractContextManager[Any]] | None = getattr(inner, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()


def data_rank(cell: Cell, rank: int) -> int:
    """Return the data-parallel rank whose microbatches a rank trains on."""
    if cell.parallel == "fsdp2-tp":
        return rank // 2
    return 0 if cell.parallel.startswith(("tp", "pp")) else rank
