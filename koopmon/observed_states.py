"""States that are observed in a forward: checksums and measurements of a few rows, without a wait for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from koopmon.spectral import update_exponent

SAMPLED_ROWS = 1024
"""Rows of each state in which the update of a block is measured."""
COMPARED_VALUES = 1 << 18
"""Values of each state that are compared between the end of one block and the start of the next, if not all are."""
MIN_COMPARED_ROWS = 32
_NARROWER = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131
"""2^64 / golden ratio as a signed integer: multiples of it spread over all 64 bits."""


@dataclass(slots=True, eq=False)
class State:
    """One tensor at the entry or the exit of a call. `sums` are checksums of its rows, in each type of `dtypes`."""

    shape: torch.Size
    local_shape: torch.Size
    dtypes: tuple[torch.dtype, ...]
    sums: Tensor
    rows: Tensor | None
    requires_grad: bool
    on_host: tuple[int, ...] = ()

    def equals(self, other: State) -> bool:
        """Compare in the narrower of both types, because mixed precision may cast between blocks."""
        narrow = min(self.dtypes[0], other.dtypes[0], key=lambda dtype: dtype.itemsize)
        if self.shape != other.shape or self.local_shape != other.local_shape:
            return False  # in the second case one of them is sharded and the other is not
        if narrow not in self.dtypes or narrow not in other.dtypes:
            return False
        return self.on_host[self.dtypes.index(narrow)] == other.on_host[other.dtypes.index(narrow)]


@torch.no_grad()
def observe(tensor: Tensor) -> State:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # to gather nothing
    rows = sample_rows(local.detach())
    dtypes = (rows.dtype, *(dtype for dtype in _NARROWER if dtype.itemsize < rows.dtype.itemsize))
    compared = rows[:: max(1, len(rows) * rows.shape[-1] // COMPARED_VALUES)]
    if len(compared) < MIN_COMPARED_ROWS:
        compared = rows[:: max(1, len(rows) // MIN_COMPARED_ROWS)]
    sums = torch.stack([_checksum(compared.to(dtype)) for dtype in dtypes])
    return State(tensor.shape, local.shape, dtypes, sums, rows, tensor.requires_grad)


def _checksum(rows: Tensor) -> Tensor:
    """Return a 0-d int64 that differs for different rows, with a probability of error near 2^-64."""
    bits = (rows + 0).contiguous().view(_BITS[rows.dtype.itemsize]).flatten().to(torch.int64)  # -0 + 0 is 0
    place = torch.arange(1, bits.numel() + 1, device=bits.device) * _ODD
    mixed = (bits + place) * _ODD
    mixed = (mixed ^ (mixed >> 31)) * (place | 1)
    return mixed.sum()


@torch.no_grad()
def sample_rows(state: Tensor) -> Tensor:
    """Return a copy of at most SAMPLED_ROWS evenly spread rows of `state` (..., D), of shape (rows, D).

    Never synchronises with the device.
    """
    leading = state.shape[:-1]
    num_rows = leading.numel()
    flat = torch.arange(min(num_rows, SAMPLED_ROWS), device=state.device)
    flat = flat * num_rows // len(flat)
    index = []
    for size in reversed(leading):
        index.append(flat % size)
        flat = flat // size
    return state[tuple(reversed(index))]


@torch.no_grad()
def measure_update(x: Tensor | None, y: Tensor | None) -> Tensor:
    """Return (3,) float64: the exponent of the update from x to y, its relative size, and their correlation.

    The correlation is centred over rows. It is NaN if either has no variance.
    """
    assert x is not None
    assert y is not None
    y = y.to(x.device)
    size = (y.double() - x.double()).norm() / x.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    a, b = x.float() - x.float().mean(0), y.float() - y.float().mean(0)
    correlation = (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()
    return torch.stack([update_exponent(x, y).double(), size, correlation.double()])


def describe(state: Tensor) -> str:
    if state.is_nested or state.layout is not torch.strided:
        return "a nested or sparse tensor"
    return f"a {str(state.dtype).removeprefix('torch.')} tensor of shape {tuple(state.shape)}"
