"""The place of the blocks in the model: a change of it, after koopmon has found them, is noticed.

Wrappers around a block or around one of its parents, as of a compiler or of activation checkpointing, are no change.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import nn

from koopmon.api import Stack
from koopmon.block_finder import WRAPPER_ATTRIBUTES, canonical_name


class Structure:
    """The children of the modules that hold the blocks of `stacks`, up to the root of the model."""

    def __init__(self, stacks: Iterable[Stack]) -> None:
        names = {canonical_name(point.name) for stack in stacks for point in stack.points}
        self._holders = sorted({name[:end] for name in names for end in _ends(name)})
        """Paths of these modules, without the segments of wrappers."""
        self._children: list[weakref.ref[nn.Module] | None] = []

    def note(self, model: nn.Module) -> None:
        """Remember the children as they are now."""
        self._children = [None if each is None else weakref.ref(each) for each in self._look(model)]

    def has_changed(self, model: nn.Module) -> bool:
        """Return True if a child was added, removed or replaced since `note`."""
        before = [None if each is None else each() for each in self._children]
        now = self._look(model)
        return len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True))

    def _look(self, model: nn.Module) -> list[nn.Module | None]:
        """Return the children of every holder, each list behind a None."""
        found: list[nn.Module | None] = []
        for path in self._holders:
            holder: nn.Module | None = unwrapped(model)
            for name in filter(None, path.split(".")):
                child = None if holder is None else dict(holder._modules.items()).get(name)
                holder = None if child is None else unwrapped(child)
            found.append(None)
            if holder is not None:
                found += [unwrapped(child) for _, child in holder._modules.items() if child is not None]
        return found


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch around `module`."""
    while len(children := list(module._modules.items())) == 1:
        name, inner = children[0]
        if name not in WRAPPER_ATTRIBUTES or inner is None:
            break
        module = inner
    return module


def same_blocks(stack: Stack, candidates: Sequence[Stack]) -> bool:
    """Return True if one of `candidates` has the blocks of `stack`, in their order."""
    return any(_blocks(stack) == _blocks(each) for each in candidates)


def _blocks(stack: Stack) -> list[nn.Module]:
    return list(dict.fromkeys(unwrapped(point.module) for point in stack.points))


def _ends(name: str) -> list[int]:
    return [0, *(index for index, character in enumerate(name) if character == ".")]
