"""Token sampling: the same tokens at every depth, a pure function of (seed, step, data-parallel rank, mask).

It holds for one version of NumPy, which all ranks of a training share.

Shapes: a state is (..., T, D); its leading dimensions flattened, row-major, number its tokens 0 .. num_tokens - 1.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import torch
from torch import Tensor


def order_rows(
    num_tokens: int,
    num_samples: int,
    *,
    seed: int,
    step: int = 0,
    data_rank: int = 0,
    mask: Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Return token rows to sample, those that count first, without synchronising with the device.

    `mask`: boolean with num_tokens elements, True at tokens that count; None counts all.

    Returns (rows, num_valid), both on `device` (default the mask's, else the CPU). `rows` is int64 of shape
    (min(num_samples, num_tokens),), distinct, in random order. `num_valid` is a 0-d int64 tensor: only rows[:num_valid]
    are tokens that count.

    Raises ValueError if the mask has another number of elements or num_samples is below 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples = {num_samples}: must be at least 1")
    if mask is not None and mask.numel() != num_tokens:
        raise ValueError(f"mask has {mask.numel()} elements for {num_tokens} tokens")
    if device is None:
        device = torch.device("cpu") if mask is None else mask.device
    key = hashlib.blake2b(struct.pack("<3q", seed, step, data_rank), digest_size=8).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
    num_rows = min(num_samples, num_tokens)
    if mask is None:  # few of many tokens need no permutation of all
        rows = torch.from_numpy(generator.choice(num_tokens, num_rows, replace=False)).to(device, non_blocking=True)
        return rows, torch.full((), num_rows, dtype=torch.int64, device=device)
    rows = torch.from_numpy(generator.permutation(num_tokens)).to(device, non_blocking=True)
    ignored = ~mask.reshape(-1).to(device, torch.bool)[rows]
    rows = rows[torch.argsort(ignored.to(torch.uint8), stable=True)[:num_rows]]
    return rows, (num_tokens - ignored.sum()).clamp(max=num_rows)


def choose_rows(
    num_tokens: int,
    num_samples: int,
    *,
    seed: int,
    step: int = 0,
    data_rank: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the rows to sample: min(num_samples, tokens that count) distinct int64 indices, on the mask's device.

    The choice is that of `order_rows`. This form synchronises if the mask lies on an accelerator.
    """
    rows, num_valid = order_rows(num_tokens, num_samples, seed=seed, step=step, data_rank=data_rank, mask=mask)
    return rows if mask is None else rows[: int(num_valid)]


def take_rows(state: Tensor, rows: Tensor) -> Tensor:
    """Return the sampled tokens of a state (..., T, D) as a new tensor (N, D).

    A strided state is not copied as a whole.
    """
    if state.is_contiguous():
        return state.reshape(-1, state.shape[-1]).index_select(0, rows)
    index = []
    for size in reversed(state.shape[:-1]):
        index.append(rows % size)
        rows = rows // size
    return state[tuple(reversed(index))]


def align_mask(mask: Tensor | None, leading: torch.Size) -> Tensor | None:
    """Return `mask` in the layout of a state whose shape without D is `leading`; None if it cannot belong to it.

    A (B, T) mask is transposed for a (T, B, D) state. If B equals T it is returned unchanged.
    """
    if mask is None or mask.shape == leading:
        return mask
    if mask.dim() == 2 and mask.shape[::-1] == leading:
        return mask.T
    return None
