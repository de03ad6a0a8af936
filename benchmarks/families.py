"""Small language models of the other families, for `benchmarks.architectures` and `benchmarks.family_alarms`.

Shapes: N tokens, D width, E experts, K experts per token, G basis functions. Each is a `Decoder` with other blocks. The
published table names families without details, so these are their simplest members.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import Block, Decoder, FeedForward, Residual, initialise

Family = Literal["transformer", "moe-1", "moe-2", "moe-4", "mamba", "kan"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Scheme = Literal["pre", "none"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
"""Residual schemes of the families other than the transformer."""
NUM_EXPERTS, NUM_HEADS = 8, 4
GRID_INTERVALS, SPLINE_ORDER, GRID_RANGE = 5, 3, 1.0
"""Default grid of KAN layers. Inputs beyond the grid have no spline."""


class Experts(nn.Module):
    """Mixture of experts, (..., D) to (..., D): each token goes to the K of E experts with the highest router scores.

    The softmax over all E experts weighs their outputs (Switch), or with `renormalised` the softmax over the K chosen
    experts (Mixtral). With one expert, the latter weight is always 1 and would give the router no gradient.
    """

    def __init__(self, width: int, num_experts: int, top_k: int, *, renormalised: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.renormalised = renormalised and top_k > 1
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, sub=False) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top_k)
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            tokens, places = (chosen == index).nonzero(as_tuple=True)
            mixed = mixed.index_add(0, tokens, expert(flat[tokens]) * weights[tokens, places, None])
        return mixed.view_as(x)


class Splines(nn.Module):
    """Kolmogorov-Arnold layer, (..., D) to (..., D): silu and a cubic B-spline on every connection."""

    grid: Tensor

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        step = 2 * GRID_RANGE / GRID_INTERVALS
        knots = torch.arange(-SPLINE_ORDER, GRID_INTERVALS + SPLINE_ORDER + 1) * step - GRID_RANGE
        self.register_buffer("grid", knots.repeat(width, 1))
        self.base = nn.Parameter(torch.randn(width, width, generator=generator) / width**0.5)
        num_basis = GRID_INTERVALS + SPLINE_ORDER
        noise = 0.1 / GRID_INTERVALS
        self.coefficients = nn.Parameter(noise * torch.randn(width, width, num_basis, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = functional.silu(x) @ self.base.T
        return y + basis_functions(x, self.grid).flatten(-2) @ self.coefficients.flatten(1).T


def basis_functions(x: Tensor, grid: Tensor) -> Tensor:
    """Compute the B-splines (..., D, G) over the knots `grid` (D, knots) at x (..., D), by the Cox-de Boor rule."""
    x = x[..., None]
    values = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
    for order in range(1, SPLINE_ORDER + 1):
        rise = (x - grid[:, : -order - 1]) / (grid[:, order:-1] - grid[:, : -order - 1])
        fall = (grid[:, order + 1 :] - x) / (grid[:, order + 1 :] - grid[:, 1:-order])
        values = rise * values[..., :-1] + fall * values[..., 1:]
    return values


class StateSpace(nn.Module):
    """mambapy's selective state space as a residual block, h + f(norm(h)); without `residual`, f(norm(h)) alone."""

    def __init__(self, width: int, num_layers: int, *, residual: bool, scheme: Scheme) -> None:
        super().__init__()
        from mambapy.mamba import MambaBlock, MambaConfig

        self.mixer: nn.Module = MambaBlock(MambaConfig(d_model=width, n_layers=num_layers))
        self.norm: nn.Module = nn.RMSNorm(width) if scheme == "pre" else nn.Identity()
        self.residual = residual

    def forward(self, h: Tensor) -> Tensor:
        update: Tensor = self.mixer(self.norm(h))
        return h + update if self.residual else update


def language_model(
    family: Family,
    *,
    width: int,
    num_layers: int,
    vocabulary: int,
    num_tokens: int,
    seed: int,
    scheme: Scheme = "pre",
    renormalised: bool = True,
    residual: bool = True,
) -> Decoder:
    """Build a decoder with blocks of `family`. `renormalised` applies to experts, `residual` to state spaces."""
    generator = torch.Generator().manual_seed(seed)

    def attended(feed_forward: nn.Module) -> Block:
        block = Block(scheme, width, NUM_HEADS, num_layers)
        block.feed_forward = Residual(feed_forward, scheme, width, num_layers)
        return block

    def make() -> nn.Module:
        if family == "mamba":
            return StateSpace(width, num_layers, residual=residual, scheme=scheme)
        if family == "kan":
            return attended(Splines(width, generator))
        experts = Experts(width, NUM_EXPERTS, int(family.removeprefix("moe-")), renormalised=renormalised)
        block = attended(experts)
        initialise(block, generator)
        return block

    make_block: Callable[[], nn.Module] | None = None if family == "transformer" else make
    return Decoder(
        scheme,
        width=width,
        num_layers=num_layers,
        num_heads=NUM_HEADS,
        max_tokens=num_tokens,
        vocabulary=vocabulary,
        seed=seed,
        make_block=make_block,
    )
