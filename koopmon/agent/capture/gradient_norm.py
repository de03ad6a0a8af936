"""The norm of the gradients that the optimizers of one step use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from koopmon.agent.capture.scalar import Scalar, divided, on_host, stacked
from koopmon.no_gradients import without_gradients


class GradientNorm:
    """Euclidean norm of the gradients of all parameters given to `add`, each once."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all gradients."""
        self._norms: list[Scalar] = []
        self.last: dict[int, Scalar] = {}
        """The norm of each gradient of the last `add`, float32, without a scale, by the id of its parameter."""
        self._seen: set[int] = set()
        self._unknown = False

    @without_gradients
    def add(self, parameters: Iterable[Tensor], scale: Tensor | None = None) -> None:
        """Add the gradients of `parameters`; `scale` divides those that a GradScaler has left scaled."""
        self.last, seen = {}, self._seen
        new: dict[int, Tensor] = {}
        for each in parameters:
            gradient = each.grad
            if gradient is None or id(each) in seen:
                continue
            if type(gradient) is not Tensor and hasattr(gradient, "to_local"):
                self._unknown = True  # the norm of a DTensor needs the other ranks
            if gradient.is_sparse:
                gradient = gradient.coalesce().values()
            # The norm of complex numbers has no wider type.
            new[id(each)] = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
        seen.update(new)
        gradients = list(new.values())
        # A CUDA graph would repeat captured work in every replay.
        if _is_captured(gradients):
            self._unknown = True
        if not gradients or self._unknown:
            return
        # In 16 bits a sum of squares soon overflows.
        wide = torch.float64 if gradients[0].dtype == torch.float64 else torch.float32
        norms = on_host(torch._foreach_norm(gradients, 2.0, dtype=wide))
        if wide is torch.float32:
            self.last = dict(zip(new, norms, strict=True))
        self._norms.append(divided(_norm(norms), scale))

    @without_gradients
    def end(self) -> Scalar | None:
        """Return the norm; None without gradients, or if parts of them lie on other ranks. Forgets them."""
        norms, unknown = self._norms, self._unknown
        self.clear()
        if not norms or unknown:
            return None
        return norms[0] if len(norms) == 1 else _norm(norms)


def _is_captured(gradients: list[Tensor]) -> bool:
    return bool(gradients) and gradients[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _norm(parts: Sequence[Scalar]) -> Scalar:
    numbers = [each for each in parts if not isinstance(each, Tensor)]
    if len(numbers) == len(parts):
        return math.hypot(*numbers)
    norm: Tensor = torch.linalg.vector_norm(stacked(parts))
    return norm
