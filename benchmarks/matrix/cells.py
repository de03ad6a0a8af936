"""Cells of the support matrix: common combinations of training methods, and the reason for each.

The full product has thousands of cells, most of which test torch only. The matrix has every single variation of each
parallel layout, and the pairs in which two mechanisms meet inside one block or one step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Parallel = Literal[
    "single",
    "ddp",
    "ddp-static",
    "fsdp1",
    "fsdp2",
    "fsdp2-mixed",
    "hsdp",
    "tp",
    "fsdp2-tp",
    "tp-sequence",
    "pp-gpipe",
    "pp-1f1b",
]
Compile = Literal["eager", "block", "whole", "fullgraph", "inner"]
"""`inner`: compiled whole, and then wrapped for the layout."""
Checkpoint = Literal["none", "reentrant-outside", "reentrant-inside", "outside", "inside"]
Precision = Literal["fp32", "bf16", "scaler"]

WORLD_SIZES: dict[Parallel, int] = {"single": 1, "hsdp": 4, "fsdp2-tp": 4}
"""Number of ranks of a layout, if not two."""
PIPELINED: frozenset[Parallel] = frozenset({"pp-gpipe", "pp-1f1b"})

WHY = {
    "base": "the layout alone",
    "axis": "one thing varied around the layout",
    "pair": "two mechanisms that meet in one block or one step",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to train. `accumulate`: microbatches per optimizer step, all but the last without synchronisation."""

    parallel: Parallel
    compile: Compile = "eager"
    checkpoint: Checkpoint = "none"
    accumulate: int = 1
    precision: Precision = "fp32"
    why: str = "base"

    @property
    def name(self) -> str:
        accumulate = "no_sync" if self.accumulate > 1 else ""
        parts = [self.compile, self.checkpoint, accumulate, self.precision]
        plain = {"eager", "none", "", "fp32"}
        return "/".join([self.parallel, *(part for part in parts if part not in plain)])

    @property
    def world_size(self) -> int:
        return WORLD_SIZES.get(self.parallel, 2)


def cells() -> list[Cell]:
    """Return every cell, grouped by world size, with those that need a compiler last."""
    found = [cell for parallel in get_args(Parallel) for cell in _around(parallel)]
    return sorted(found, key=lambda cell: (cell.world_size, cell.compile != "eager"))


def _around(parallel: Parallel) -> Iterator[Cell]:
    yield Cell(parallel=parallel)
    for manner in get_args(Compile)[1:4]:
        yield Cell(parallel=parallel, compile=manner, why="axis")
    for place in get_args(Checkpoint)[1:]:
        yield Cell(parallel=parallel, checkpoint=place, why="axis")
    if parallel not in PIPELINED:  # its schedule accumulates microbatches by itself
        yield Cell(parallel=parallel, accumulate=2, why="axis")
    for precision in get_args(Precision)[1:]:
        yield Cell(parallel=parallel, precision=precision, why="axis")
    if parallel in ("single", "ddp", "fsdp2"):
        # Recomputation under a compiler, in half precision, and in each microbatch; a scaler over several microbatches.
        yield Cell(parallel=parallel, compile="block", checkpoint="outside", why="pair")
        yield Cell(parallel=parallel, compile="block", precision="bf16", why="pair")
        yield Cell(parallel=parallel, compile="block", accumulate=2, why="pair")
        yield Cell(parallel=parallel, checkpoint="outside", precision="bf16", why="pair")
        yield Cell(parallel=parallel, checkpoint="reentrant-outside", accumulate=2, why="pair")
        yield Cell(parallel=parallel, accumulate=2, precision="scaler", why="pair")
        whole: Compile = "inner" if parallel == "ddp" else "whole"
        yield Cell(parallel=parallel, compile=whole, checkpoint="outside", why="pair")
        yield Cell(parallel=parallel, compile=whole, precision="bf16", why="pair")
        yield Cell(parallel=parallel, compile=whole, accumulate=2, why="pair")
        yield Cell(parallel=parallel, compile=whole, accumulate=2, precision="scaler", why="pair")
    if parallel == "ddp":
        yield Cell(parallel=parallel, compile="inner", why="pair")


SLICE = (
    "ddp",
    "ddp-static/outside",
    "ddp/reentrant-outside/no_sync",
    "fsdp1",
    "fsdp2/bf16",
    "fsdp2-mixed",
    "tp",
    "tp-sequence",
    "pp-gpipe",
    "ddp/inner",
    "pp-gpipe/whole",
)
"""Names of the cells of two ranks in the tests."""
