"""Inverses of several matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def inverses(matrices: Tensor) -> Tensor:
    """The inverse of each matrix (..., R, R); of a singular one whatever the factorisation leaves, and never an error.

    On the CPU one after the other: oneMKL's batched factorisation, given large matrices and several threads, reports
    wrong parameters and does not come back (torch 2.13, two matrices of 768 x 768, two threads).
    """
    if matrices.device.type != "cpu" or matrices.dim() == 2:
        inverse: Tensor = torch.linalg.inv_ex(matrices).inverse
        return inverse
    if not matrices.numel():
        return torch.empty_like(matrices)
    flat = [torch.linalg.inv_ex(matrix).inverse for matrix in matrices.flatten(0, -3)]
    return torch.stack(flat).view(matrices.shape)
