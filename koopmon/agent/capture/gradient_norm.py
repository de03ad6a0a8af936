"""The norm of the gradients that the optimizers of one step use."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class GradientNorm:
    """Euclidean norm of the gradients of all parameters given to `add`, each once. It stays on the device."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all gradients."""
        self._norms: list[Tensor] = []
        self._seen: set[int] = set()
        self._unknown = False

    def add(self, parameters: Iterable[Tensor], scale: Tensor | None = None) -> None:
        """Add the gradients of `parameters`; `scale` divides those that a GradScaler has left scaled."""
        new = {id(each): each.grad for each in parameters if each.grad is not None and id(each) not in self._seen}
        self._seen.update(new)
        gradients = [_values(each) for each in new.values()]
        # The norm of a DTensor needs the other ranks. A CUDA graph would repeat captured work in every replay.
        if any(hasattr(each, "to_local") for each in gradients) or _is_captured(gradients):
            self._unknown = True
        if not gradients or self._unknown:
            return
        with torch.no_grad():
            # In 16 bits a sum of squares soon overflows.
            wide = torch.float64 if gradients[0].dtype == torch.float64 else torch.float32
            norm = _norm(list(torch._foreach_norm(gradients, 2.0, dtype=wide)))
            self._norms.append(norm if scale is None else norm / scale.reshape(()).to(norm.device, norm.dtype))

    def end(self) -> Tensor | None:
        """Return the norm, a scalar; None without gradients, or if parts of them lie on other ranks. Forgets them."""
        norms, unknown = self._norms, self._unknown
        self.clear()
        with torch.no_grad():
            return _norm(norms) if norms and not unknown else None


def _is_captured(gradients: list[Tensor]) -> bool:
    return bool(gradients) and gradients[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norm(parts: list[Tensor]) -> Tensor:
    first = parts[0]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([each.to(first.device, first.dtype) for each in parts]))
    return norm
