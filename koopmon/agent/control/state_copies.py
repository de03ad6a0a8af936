"""Copies of the weights, buffers and optimizer state of a training, in host memory.

A copy holds this rank's own shards, and what a checkpoint would hold: trained parameters, persistent buffers, the
optimizer's state per parameter, and the plain numbers of its groups except the learning rate. The memory of a copy is
used again for the next one. Restoring writes into the training's own tensors, so that compiled models, wrappers and
the user's references stay valid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from koopmon.agent.control.optimizer_set import OptimizerSet

NOT_COPIED = frozenset({"params", "lr", "initial_lr"})
"""Keys of a parameter group that a rewind leaves as they are: the schedule continues."""

Key = tuple[Any, ...]


class CannotCopyError(Exception):
    """The state of this training cannot be copied; the message is the reason."""


class TrainingState:
    """References to all tensors and plain values that one training step changes, by position.

    Raises CannotCopyError for a state that a copy would not hold completely.
    """

    @torch.no_grad()  # to_local() would otherwise record an operation
    def __init__(self, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer]) -> None:
        self.optimizers = list(OptimizerSet(optimizers))
        self.parameters = [each for one in self.optimizers for group in one.param_groups for each in group["params"]]
        updated = {id(each) for each in self.parameters}
        weights = list({id(each): each for each in self.parameters}.values())
        weights += [each for each in model.parameters() if each.requires_grad and id(each) not in updated]
        self.identity = tuple(map(id, [*self.optimizers, *self.parameters, *weights]))
        """A copy fits only the parameters that it was taken from."""
        self.tensors: dict[Key, Tensor] = {("weight", index): _local(each) for index, each in enumerate(weights)}
        self.tensors |= copied_buffers(model)
        self.plain: dict[Key, Any] = {}
        positions = {id(each): index for index, each in enumerate(self.parameters)}
        for number, optimizer in enumerate(self.optimizers):
            for parameter, entries in optimizer.state.items():
                if id(parameter) not in positions or not isinstance(entries, dict):
                    raise CannotCopyError("the optimizer has state that belongs to no parameter")
                for name, value in entries.items():
                    self._add(("state", number, positions[id(parameter)], name), value)
            for index, group in enumerate(optimizer.param_groups):
                if group.get("capturable"):
                    raise CannotCopyError("the optimizer is capturable")
                for name, value in group.items():
                    if name not in NOT_COPIED and _is_plain(value):
                        self.plain["group", number, index, name] = value

    def _add(self, key: Key, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensors[key] = _local(value)
        elif _is_plain(value):
            self.plain[key] = value
        else:
            raise CannotCopyError(f"the optimizer's {key[-1]} is a {type(value).__name__}")

    @property
    @torch.no_grad()
    def is_finite(self) -> bool:
        """True if no weight is NaN or infinite."""
        weights = [each for key, each in self.tensors.items() if key[0] == "weight" and _has_norm(each)]
        largest = torch._foreach_norm(weights, math.inf) if weights else ()
        return all(math.isfinite(each) for each in largest)

    @property
    def nbytes(self) -> int:
        """Bytes of a copy."""
        return sum(each.numel() * each.element_size() for each in self.tensors.values())


class StateCopy:
    """One copy, which knows its step and the learning rate that was in force."""

    def __init__(self) -> None:
        self.step: int | None = None
        """Optimizer steps done when it was taken; None while it holds nothing."""
        self.rate = 0.0
        self.rates: tuple[float, ...] = ()
        """The schedule's rate of each group; empty where one is unknown."""
        self.identity: tuple[int, ...] = ()
        self._tensors: dict[Key, Tensor] = {}
        self._plain: dict[Key, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(each.numel() * each.element_size() for each in self._tensors.values())

    @torch.no_grad()
    def take(self, state: TrainingState, step: int, rate: float, rates: tuple[float, ...] = ()) -> None:
        """Copy `state`. Allocates only for tensors that the last copy did not have."""
        self.step = None  # what follows may raise
        old = self._tensors
        self._tensors = {
            key: old[key] if key in old and _alike(old[key], each) else torch.empty_like(each)
            for key, each in state.tensors.items()
        }
        torch._foreach_copy_(list(self._tensors.values()), list(state.tensors.values()))
        self._plain, self.identity = dict(state.plain), state.identity
        self.step, self.rate, self.rates = step, rate, rates

    def fits(self, state: TrainingState) -> bool:
        """Return True if `restore` can put this copy into `state`: same parameters, and a place for each tensor."""
        return (
            self.step is not None
            and self.identity == state.identity
            and all(key in state.tensors and _alike(each, state.tensors[key]) for key, each in self._tensors.items())
        )

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Write this copy into the training, in place. Where the copy has no state, the optimizer starts from none."""
        torch._foreach_copy_([state.tensors[key] for key in self._tensors], list(self._tensors.values()))
        for key in [key for key in (*state.tensors, *state.plain) if key[0] == "state"]:
            if key not in self._tensors and key not in self._plain:
                del state.optimizers[key[1]].state[state.parameters[key[2]]][key[3]]
        for (kind, number, index, name), value in self._plain.items():
            optimizer = state.optimizers[number]
            owner = optimizer.param_groups[index] if kind == "group" else optimizer.state[state.parameters[index]]
            owner[name] = value
        for optimizer in state.optimizers:
            for parameter in [each for each, entries in optimizer.state.items() if not entries]:
                del optimizer.state[parameter]

    def clear(self) -> None:
        """Forget the content, and keep the memory for the next copy."""
        self.step = None


@torch.no_grad()
def copied_buffers(model: nn.Module) -> dict[Key, Tensor]:
    """Return the persistent buffers of `model`. The others are caches, which no checkpoint holds either."""
    return {
        ("buffer", f"{prefix}.{name}"): _local(buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of `tensor`. Raises CannotCopyError if an exact copy is not proven to be possible."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.device.type != "cpu":
        raise CannotCopyError(f"the training has tensors on {local.device.type}, where rewinds are not proven")
    if local.layout is not torch.strided or local.is_quantized or is_traceable_wrapper_subclass(local):
        raise CannotCopyError("the training has sparse or quantised tensors")
    strides = local.stride()
    if 0 in strides and any(not stride and size > 1 for stride, size in zip(strides, local.shape, strict=True)):
        raise CannotCopyError("the training has tensors whose elements share memory")
    return local


def _has_norm(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and (tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() > 1))


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
