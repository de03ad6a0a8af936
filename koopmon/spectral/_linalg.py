"""Batched matrix inverses that never raise."""

from __future__ import annotations

import torch
from torch import Tensor


def inverses(matrices: Tensor) -> Tensor:
    """Invert each matrix of a batch.

    Args:
        matrices: (..., R, R), real or complex.

    Returns:
        The inverses, (..., R, R). The result for a singular matrix is undefined; no error is raised.
    """
    # On the CPU the matrices are inverted one after the other. oneMKL's batched factorisation of large matrices with
    # several threads reports wrong parameters and hangs (torch 2.13, two matrices of 768 x 768, two threads).
    if matrices.device.type != "cpu" or matrices.dim() == 2:
        inverse: Tensor = torch.linalg.inv_ex(matrices).inverse
        return inverse
    if not matrices.numel():
        return torch.empty_like(matrices)
    flat = [torch.linalg.inv_ex(matrix).inverse for matrix in matrices.flatten(0, -3)]
    return torch.stack(flat).view(matrices.shape)
