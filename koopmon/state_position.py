"""Position of a residual state among a block's call arguments and in its return value.

A path is a tuple of keys: an index of a tuple or list, a key of a mapping, a name of a field or an attribute. The path
of an argument begins with its index or its name. The path SUM stands for the sum of the first two states of one shape,
as in blocks that carry (hidden, residual) and add them at the start of the next block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, Path, Stack

SUM: Path = ("+",)
MAX_DEPTH = 3
"""Levels of containers in which a state is looked for."""
MAX_TENSORS = 8
"""Tensors that are considered in one call, and again in its result."""


def block_input(
    adapter: ArchitectureAdapter, stack: Stack, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Return the state among the call arguments of a block of `stack`; None if it is absent."""
    if stack.position is None:
        return adapter.block_input(module, args, kwargs)
    if stack.position.entered == SUM:
        return summed(argument_tensors(args, kwargs), alone=True)
    return _at((dict(enumerate(args)) | dict(kwargs)), stack.position.entered)


def block_output(adapter: ArchitectureAdapter, stack: Stack, module: nn.Module, output: Any) -> Tensor | None:
    """Return the state in the return value of a block of `stack`; None if it is absent."""
    if stack.position is None:
        return adapter.block_output(module, output)
    return summed(output_tensors(output)) if stack.position.left == SUM else _at(output, stack.position.left)


def with_block_output(adapter: ArchitectureAdapter, stack: Stack, module: nn.Module, output: Any, state: Tensor) -> Any:
    """Return `output` with its state replaced. An attribute is set in place.

    Raises TypeError for a container that cannot be rebuilt.
    """
    if stack.position is None:
        return adapter.with_block_output(module, output, state)
    return _with(output, stack.position.left, state)


def argument_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Path, Tensor]]:
    """Return the tensors among call arguments that may be a state, with their paths."""
    return _found(dict(enumerate(args)) | dict(kwargs))


def output_tensors(output: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors in a return value that may be a state, with their paths."""
    return _found(output)


def summed(tensors: list[tuple[Path, Tensor]], *, alone: bool = False) -> Tensor | None:
    """Return the sum of the first of `tensors` and the next one of its shape.

    Without another one it is None, or the first `alone`.
    """
    if not tensors:
        return None
    first = tensors[0][1]
    other = next((tensor for _, tensor in tensors[1:] if tensor.shape == first.shape), None)
    if other is None:
        return first if alone else None
    return first + other.to(first.device)


def is_state(tensor: Tensor) -> bool:
    """Return True for a dense floating-point tensor of shape (..., T, D) that holds a token."""
    dense = not tensor.is_nested and tensor.layout is torch.strided
    return dense and tensor.is_floating_point() and tensor.dim() >= 2 and tensor.numel() > 0


def _found(value: Any) -> list[tuple[Path, Tensor]]:
    # Attributes of objects come last: most objects among arguments are caches and settings.
    for attributes in (False, True):
        found = [each for each, _ in zip(_tensors(value, (), attributes), range(MAX_TENSORS), strict=False)]
        if found:
            return found
    return []


def _tensors(value: Any, path: Path, attributes: bool) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        if is_state(value):
            yield path, value
    elif len(path) <= MAX_DEPTH:
        for key, part in _parts(value) or (_attributes(value) if attributes else []):
            yield from _tensors(part, (*path, key), attributes)


def _attributes(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, (type, nn.Module, Mapping, tuple, list)):
        return []
    names = [name for kind in type(value).__mro__ for name in _slots(kind)]
    slots = [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    return slots + list(getattr(value, "__dict__", {}).items())


def _slots(kind: type) -> tuple[str, ...]:
    """Return the names in the `__slots__` of a class that Python code has defined."""
    names: Any = vars(kind).get("__slots__", ())
    return tuple(name for name in ([names] if isinstance(names, str) else names) if not name.startswith("__"))


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name, None)) for each in dataclasses.fields(value)]
    return []


def _at(value: Any, path: Path) -> Tensor | None:
    for key in path:
        value = next((part for name, part in _parts(value) or _attributes(value) if name == key), None)
    return value if isinstance(value, Tensor) else None


def _with(value: Any, path: Path, state: Tensor) -> Any:
    if not path:
        return state
    key, rest = path[0], path[1:]
    parts = {name: part if name != key else _with(part, rest, state) for name, part in _parts(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # also transformers' ModelOutput
        return dataclasses.replace(value, **{key: parts[key]})
    if type(value) is dict:
        return parts
    if not parts and any(name == key for name, _ in _attributes(value)):
        setattr(value, key, _with(getattr(value, key), rest, state))
        return value
    if type(value) in (tuple, list):
        return type(value)(parts.values())
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*parts.values())
    raise TypeError(f"cannot put a state back into {type(value).__name__}")
