"""Kolmogorov-Arnold networks: layers whose connections are splines with trained coefficients over a grid of knots.

They are recognised by structure: a grid of knots for each input, and coefficients for each connection, one for each
basis function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from koopmon import (
    ArchitectureAdapter,
    BlockList,
    ExampleModel,
    Observable,
    Stack,
    hookimpl,
    lists_holding,
    normalised,
    parts_of,
)


class KANAdapter(ArchitectureAdapter):
    """Blocks that contain spline layers, and networks of spline layers alone.

    Flags: "plain-chain" if the spline layers are the blocks themselves: they map the state and do not carry it forward.
    The stack of such a list is its longest run of layers of one width. Beside state spaces the claim is 15.

    Near zero, splines add a constant that does not depend on the state. In the update exponent this looks like
    normalisation. Blocks that do not normalise therefore count as unnormalised. The share of reliable modes weighs the
    risk by a quarter: a larger weight missed deaths, and a weight of zero gave three times as many false alarms
    (docs/evidence.md). All other settings, including KSS, are those of other families.
    """

    name = "kan"
    measures: ClassVar[Mapping[str, str]] = {
        "grid_overflow_ratio": "Share of a spline layer's inputs that lie outside of its grid.",
    }

    def specificity(self, model: nn.Module) -> int:
        if not self.stacks(model):
            return 0
        return 15 if any("A_log" in module._parameters for module in model.modules()) else 20

    def stacks(self, model: nn.Module) -> list[Stack]:
        found = [_of_one_width(blocks) for blocks in lists_holding(model, _is_spline_layer)]
        return [blocks.stack(residual=True) for blocks in found]

    def flags(self, model: nn.Module) -> frozenset[str]:
        plain = any(_is_spline_layer(point.module) for stack in self.stacks(model) for point in stack.points)
        return frozenset({"plain-chain"} if plain else ())

    def observables(self, stack: Stack) -> Sequence[Observable]:
        return [
            Observable("grid_overflow_ratio", point.layer, layer, self._overflow)
            for point in stack.points
            for layer in parts_of(point.module, _is_spline_layer)
        ]

    def thresholds(self) -> Mapping[str, float]:
        return {"reliability_weight": 0.25}

    def update_exponent(self, stack: Stack) -> float | None:
        return None if normalised(stack) else 1.0

    def _overflow(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Tensor | None:
        inputs, found = self.block_input(layer, args, kwargs), _splines(layer)
        if found is None or inputs is None or hasattr(inputs, "to_local"):
            return None
        grid, coefficients = found
        order = grid.shape[1] - coefficients.shape[2] - 1  # this many knots lie outside the range at each end
        if inputs.shape[-1] != grid.shape[0] or order < 0:
            return None
        return ((inputs < grid[:, order]) | (inputs > grid[:, -1 - order])).float().mean()


@hookimpl
def koopmon_architecture_adapters() -> list[ArchitectureAdapter]:
    return [KANAdapter()]


@hookimpl
def koopmon_example_models() -> list[ExampleModel]:
    # pykan needs the other two and does not declare them.
    if any(find_spec(package) is None for package in ("kan", "sklearn", "pandas")):
        return []
    return [ExampleModel("kan-transformer", KANAdapter.name, _kan_transformer)]


def _kan_transformer(seed: int) -> tuple[nn.Module, Tensor]:
    """A transformer with attention, and splines in place of each feed-forward part."""
    from kan.KANLayer import KANLayer

    class Splines(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = KANLayer(width, width, num=3, k=2)
            nn.init.normal_(self.layer.coef, std=0.1)  # pykan's fitted values differ in the last bit

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x.flatten(0, -2))[0]
            return y.view_as(x)

    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=True), 3, enable_nested_tensor=False
    )
    for layer in model.layers:
        layer.linear1, layer.linear2, layer.activation = nn.Identity(), Splines(8), nn.Identity()
    return model, torch.randn(4, 16, 8)


def _is_spline_layer(module: nn.Module) -> bool:
    return _splines(module) is not None


def _splines(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return knots (inputs, knots) and coefficients (inputs, outputs, basis functions), or (outputs, inputs, ...)."""
    grid = {**module._buffers, **module._parameters}.get("grid")
    if grid is None or grid.dim() != 2:
        return None
    inputs, knots = grid.shape
    for weight in module._parameters.values():
        if weight is not None and weight.dim() == 3 and inputs in weight.shape[:2] and 1 < weight.shape[2] < knots:
            return grid, weight
    return None


def _of_one_width(blocks: BlockList) -> BlockList:
    """Return `blocks`; of a list of spline layers, the longest run that keeps the width."""
    runs = [
        list(run) for keeps, run in groupby(enumerate(blocks.blocks), lambda item: _keeps_width(item[1][1])) if keeps
    ]
    if not all(_is_spline_layer(block) for _, block in blocks.blocks) or not runs:
        return blocks
    run = max(runs, key=len)
    first, last = run[0][0], run[-1][0]
    if len(run) == len(blocks.blocks):
        return blocks
    return BlockList(f"{blocks.name}[{first}:{last + 1}]", blocks.blocks[first : last + 1])


def _keeps_width(layer: nn.Module) -> bool:
    found = _splines(layer)
    return found is not None and found[1].shape[0] == found[1].shape[1]
