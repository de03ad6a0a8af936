"""One snapshot at a time, from the first traversal of the kept stack by a training forward."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from koopmon.agent.capture.sampler import RankSnapshot, Sampler
from koopmon.agent.circuit_breaker import logger
from koopmon.agent.stats import AgentStats
from koopmon.api import Point, Stack
from koopmon.candidate_trace import MIN_SHARE_CALLED
from koopmon.logs import log_for_job
from koopmon.observables import Readings
from koopmon.walk import Walk
from koopmon.wire.messages import TrainingStep

MAX_UNCALLED = 20
"""Consecutive snapshots without a call of some block before one warning."""


class SnapshotCapture:
    """Takes the snapshot that is due: `enter` and `leave` around each call of a block, `end` after the forward.

    `on_end` receives each traversal's snapshot, None if it was dropped. `on_missed` is called instead if the states
    are incomplete.
    """

    def __init__(
        self, stats: AgentStats, on_end: Callable[[RankSnapshot | None], None], on_missed: Callable[[], None]
    ) -> None:
        self.due: tuple[Sampler, TrainingStep] | None = None
        """The snapshot to take in the next training forward."""
        self.interleaved = False
        """True if blocks are called for other inputs in between, as a block that takes two inputs in turn."""
        self._stats = stats
        self._on_end = on_end
        self._on_missed = on_missed
        self._sampler: Sampler | None = None
        """Takes the snapshot of this forward."""
        self._walk: Walk | None = None
        """The place of this forward in the chain, while a snapshot is taken."""
        self._uncalled: dict[int, int] = {}
        """Consecutive snapshots without a call, by layer."""

    @property
    def active(self) -> bool:
        """True while a snapshot is taken."""
        return self._sampler is not None

    @property
    def readings(self) -> Readings | None:
        """The readings of the snapshot that is taken now; None for none."""
        return None if self._sampler is None else self._sampler.readings

    def expects(self, point: Point) -> bool:
        """Return True if a call of the block of `point` may belong to the traversal that is captured."""
        walk = self._walk
        return walk is not None and walk.inside is None and (self.interleaved or walk.following(point) is not None)

    def begin(self, kept: Stack, state: Tensor, mask: Tensor | None) -> None:
        """Begin the snapshot that is due. The traversal enters `kept` with `state`."""
        if self.due is None:
            return
        (sampler, training), self.due = self.due, None
        if state.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # every replay of a CUDA graph would repeat a captured copy
        started = time.perf_counter()
        if sampler.begin(training, kept, state, mask):
            if kept.chained:
                sampler.put(0, state)
            self._sampler, self._walk = sampler, Walk(kept)
        self._stats.capture_seconds += time.perf_counter() - started

    def enter(self, kept: Stack, point: Point, state: Tensor) -> None:
        """Copy `state`, with which the block of `point` is called."""
        walk, sampler = self._walk, self._sampler
        if walk is None or sampler is None:
            return
        layer = walk.following(point)
        if layer is None:
            if walk.inside is None and not self.interleaved:
                self.end(kept)  # another traversal begins
            return
        started = time.perf_counter()
        # Blocks were skipped between the last one and this one: the state went by them.
        first = kept.entry_place(walk.position) + kept.chained  # in a chain it was put when it left a block
        if all(sampler.put(place, state) for place in range(first, kept.entry_place(layer) + 1)):
            walk.enter(layer)
        else:
            self._miss()
        self._stats.capture_seconds += time.perf_counter() - started

    def leave(self, kept: Stack, point: Point, state: Tensor) -> None:
        """Copy `state`, which leaves the block of `point`."""
        walk, sampler = self._walk, self._sampler
        layer = None if walk is None else walk.leave(point)
        if walk is None or sampler is None or layer is None:
            return
        started = time.perf_counter()
        if kept.form != "entries" and not sampler.put(kept.entry_place(layer) + 1, state):
            self._miss()
        elif layer + 1 == len(kept.points):
            self._finish(sampler, walk, kept)
        self._stats.capture_seconds += time.perf_counter() - started

    def take(self, kept: Stack, states: list[Tensor]) -> None:
        """Take the snapshot that is due from `states` (N, D), one for each point of `kept`."""
        if self.due is None:
            return
        (sampler, training), self.due = self.due, None
        if sampler.begin(training, kept, states[0], None):
            if not all(sampler.put(point, state) for point, state in enumerate(states)):
                self._on_missed()
            else:
                self._on_end(sampler.finish())

    def end(self, kept: Stack) -> None:
        """End the snapshot of a traversal that is over. Most blocks must have been called."""
        walk, sampler = self._walk, self._sampler
        if walk is None or sampler is None:
            return
        if walk.inside is None and len(walk.called) >= MIN_SHARE_CALLED * len(kept.points):
            self._finish(sampler, walk, kept)
        else:
            self.abandon()
            self._on_missed()

    def abandon(self) -> bool:
        """Drop the snapshot that was begun. Returns False if there is none."""
        sampler, self._sampler, self._walk = self._sampler, None, None
        if sampler is not None:
            sampler.abandon()
        return sampler is not None

    def _miss(self) -> None:
        self._sampler = self._walk = None
        self._on_missed()

    def _finish(self, sampler: Sampler, walk: Walk, kept: Stack) -> None:
        """Complete the snapshot. The blocks behind the last one called were skipped."""
        self._sampler = self._walk = None
        sampler.repeat_to_end()
        self._count_uncalled(kept, walk)
        self._on_end(sampler.finish())

    def _count_uncalled(self, kept: Stack, walk: Walk) -> None:
        """Log once the blocks that no forward calls any more. A replaced block looks like a skipped one."""
        if not self._uncalled and len(walk.called) == len(kept.points):
            return
        skipped = {point.layer for point in kept.points}.difference(walk.called)
        self._uncalled = {layer: self._uncalled.get(layer, 0) + 1 for layer in skipped}
        absent = [kept.points[layer].name for layer, count in self._uncalled.items() if count == MAX_UNCALLED]
        if absent:
            log_for_job(
                logger,
                f"{', '.join(sorted(absent))}: not called in {MAX_UNCALLED} snapshots, counts as skipped; if it was"
                " replaced, attach after that (`koopmon run` attaches when the optimizer is made)",
            )
