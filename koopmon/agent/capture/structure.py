"""The place of the blocks in the model: a change of it, after koopmon has found them, is noticed.

Wrappers around a block or around one of its parents, as of a compiler or of activation checkpointing, are no change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from koopmon.agent.circuit_breaker import logger
from koopmon.api import Stack, unwrapped
from koopmon.block_finder import canonical_name
from koopmon.errors import KoopmonError
from koopmon.logs import log_for_job
from koopmon.plugins import Selection

MAX_CHANGES = 16
"""Changes of the blocks that are followed."""
MAX_UNVERIFIED = 3
"""Consecutive changes without a verified chain between them, as of a model that makes new blocks in each step."""


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


class BlockChanges:
    """Finds the candidates of a model again whose blocks were added, removed or replaced.

    `find_again` returns the candidates; without it no change is followed.
    """

    def __init__(self, find_again: Callable[[nn.Module], Selection] | None) -> None:
        self._find_again = find_again
        self._structure = Structure(())
        self._num_changes = self._num_unverified = 0

    def watch(self, model: nn.Module, stacks: Iterable[Stack]) -> None:
        """Look for changes of the blocks of `stacks` from now on."""
        self._structure = Structure(stacks)
        self._structure.note(model)

    def note_verified(self) -> None:
        """Note that a chain was verified since the last change."""
        self._num_unverified = 0

    def find(self, model: nn.Module, kept: Stack | None, *, traced: bool) -> Selection | None:
        """Return the candidates after a change of the blocks; None if those that are watched stay.

        `kept` is the verified chain. `traced`: a compiled graph holds taps, which stay in it.
        """
        if self._find_again is None or self._num_changes == MAX_CHANGES or self._num_unverified == MAX_UNVERIFIED:
            return None
        if not self._structure.has_changed(model):
            return None
        self._structure.note(model)
        changed = f"the blocks of {type(model).__name__} have changed since koopmon attached"
        try:
            selection = self._find_again(model)
        except KoopmonError as error:
            log_for_job(logger, f"{changed}, and it watches those that it knows: {error}")
            return None
        if kept is not None and same_blocks(kept, selection.candidates):
            return None
        if all(len(each.points) == 1 for each in selection.candidates):
            log_for_job(logger, f"{changed} to single ones, and it watches those that it knows")
            return None
        if traced:
            log_for_job(
                logger, f"{changed}, in a compiled graph, and it watches those that it knows; attach afterwards"
            )
            return None
        if not self._num_unverified:
            log_for_job(logger, f"{changed}: looks for the stack again")
        self._num_changes += 1
        self._num_unverified += 1
        return selection


def same_blocks(stack: Stack, candidates: Sequence[Stack]) -> bool:
    """Return True if one of `candidates` has the blocks of `stack`, in their order."""
    return any(_blocks(stack) == _blocks(each) for each in candidates)


def _blocks(stack: Stack) -> list[nn.Module]:
    return list(dict.fromkeys(unwrapped(point.module) for point in stack.points))


def _ends(name: str) -> list[int]:
    return [0, *(index for index, character in enumerate(name) if character == ".")]
