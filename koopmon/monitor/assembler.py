"""Assembly of shards into snapshots: all ranks' states of one step, within bounds on memory and time.

The shards of each sender arrive in the order of its steps. When a step is complete, the missing shards of earlier steps
are therefore lost. Snapshots leave in the order of their steps. A sender that missed a time-out is silent: later steps
do not wait for it until it sends in time again.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import torch
from torch import Tensor

from koopmon.errors import ProtocolError
from koopmon.logs import LogLimit
from koopmon.numbers import LARGEST, mean
from koopmon.wire.messages import MAX_OBSERVABLES, MEASURED, AtStep, Shard, TrainingStep

logger = logging.getLogger(__name__)

SHARD_OVERHEAD_BYTES = 1024
"""Memory of one shard beside its tensors, in bytes, so that `max_bytes` bounds many tiny shards too. Chosen by hand."""

RunKey = tuple[str, str]
"""Run and incarnation."""


@dataclass(frozen=True, slots=True)
class Snapshot(AtStep):
    """States of all ranks at one step: P points, N samples, D width. Row i is the same token at every point."""

    run: str
    incarnation: str
    training: TrainingStep
    """The scalars of the ranks, reduced by `over_ranks`."""
    blocks: tuple[tuple[Tensor, ...], ...]
    """P entries by depth. An entry holds one tensor (n_i, D) for each sender of the point; the n_i add up to N."""
    masked: bool
    """True when all ranks left out padding tokens."""
    num_shards: int
    """Number of shards in the snapshot."""
    observables: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """Measurements of the adapter, by name: one value for each transition, None where no rank has one."""
    since: float = 0.0
    """Arrival of the first shard, in seconds of the assembler's clock."""
    paired: bool = False
    """True when the points are the input and the output of each block, and no chain."""

    @property
    def num_bytes(self) -> int:
        """Memory of the states, in bytes."""
        return sum(block.nbytes for blocks in self.blocks for block in blocks)

    def without_states(self) -> Snapshot:
        """Return a copy without blocks, so that the states can be freed after profiling."""
        return replace(self, blocks=())

    def states(self, device: torch.device | str = "cpu") -> Tensor:
        """Copy the states into one float32 tensor (P, N, D) on `device`."""
        # The blocks move to the device in their own dtype and are converted there: half precision moves half the bytes.
        num_samples = sum(block.shape[0] for block in self.blocks[0])
        states = torch.empty((len(self.blocks), num_samples, self.blocks[0][0].shape[1]), device=device)
        for point, blocks in zip(states, self.blocks, strict=True):
            row = 0
            for block in blocks:
                point[row : row + block.shape[0]].copy_(block)
                row += block.shape[0]
        return states


@dataclass(slots=True)
class _Pending:
    """Shards of one step that is not complete. `since` is the arrival of the first one, in seconds."""

    since: float
    num_senders: int
    width: int
    paired: bool
    num_bytes: int = 0
    shards: dict[int, tuple[Shard, Sequence[Tensor]]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.num_senders


@dataclass(frozen=True, slots=True)
class _Silence:
    """Senders of a run after a time-out: `heard` sent their shards, the others are silent.

    `closed_early` is the last step that did not wait for the silent ones, and `since` the arrival of its first shard.
    """

    heard: frozenset[int]
    closed_early: int = -1
    since: float = -math.inf


@dataclass(slots=True, kw_only=True)
class Assembler:
    """Store of shards until their step is complete, a later step is complete, or `timeout_seconds` have passed.

    An incomplete snapshot is used when at least half of its shards arrived and they hold `min_samples` rows.

    Args:
        timeout_seconds: largest wait of a step, from its first shard on.
        max_bytes: bound on the memory of all stored shards. The shard that completes a step may exceed it. When it is
            full, the run that holds the most loses its oldest step.
        min_samples: smallest number of rows of an incomplete snapshot.
        on_drop: called with (run, reason) for each dropped snapshot.
        on_failure: called with (run, error) for a snapshot whose assembly raised. Other snapshots continue.
    """

    timeout_seconds: float
    max_bytes: int
    min_samples: int
    on_drop: Callable[[str, str], None]
    on_failure: Callable[[str, Exception], None]
    _held_bytes: Counter[RunKey] = field(default_factory=Counter, init=False)
    """Memory of the shards of each run."""
    _pending: dict[tuple[RunKey, int], _Pending] = field(default_factory=dict, init=False)
    _done: dict[RunKey, int] = field(default_factory=dict, init=False)
    _silent: dict[RunKey, _Silence] = field(default_factory=dict, init=False)
    _limit: LogLimit = field(default_factory=LogLimit, init=False)

    @property
    def num_bytes(self) -> int:
        """Memory of all stored shards."""
        return self._held_bytes.total()

    def add(self, now: float, shard: Shard, states: Sequence[Tensor]) -> list[Snapshot]:
        """Store one shard and return the snapshots that are ready, in the order of their steps.

        Args:
            now: seconds of a monotonic clock.
            shard: header of the shard.
            states: one tensor (n, D) for each point of the shard.

        Raises:
            ProtocolError: with the reason "duplicate", "late" or "inconsistent". The shard is not stored.
        """
        run_key = (shard.run, shard.incarnation)
        if shard.step <= self._done.get(run_key, -1):
            self._note_late(now, run_key, shard)
            raise ProtocolError("late", f"{_name(shard)} is already closed")
        key = (run_key, shard.step)
        pending = self._pending.get(key)
        if pending is None:
            pending = _Pending(since=now, num_senders=shard.num_senders, width=shard.width, paired=shard.paired)
        else:
            _check(shard, pending)
        num_bytes = sum(state.nbytes for state in states) + SHARD_OVERHEAD_BYTES
        # The shard that completes a step frees its memory in this call, so it needs no room.
        silence = self._silent.get(run_key)
        if silence is not None and shard.process_rank not in silence.heard:
            del self._silent[run_key]
            silence = None
        heard = {*pending.shards, shard.process_rank}
        early = silence is not None and heard >= silence.heard
        completes = early or len(heard) == pending.num_senders
        if not completes and not self._make_room(num_bytes, key):
            return []
        self._pending[key] = pending
        pending.shards[shard.process_rank] = (shard, states)
        pending.num_bytes += num_bytes
        self._held_bytes[run_key] += num_bytes
        if not completes:
            return []
        if silence is not None:
            self._silent[run_key] = replace(silence, closed_early=shard.step, since=pending.since)
        # Earlier steps of this run get no more shards (see the module's docstring), so they close too.
        return self._close_all(other for other in self._pending if other[0] == run_key and other[1] <= shard.step)

    def expire(self, now: float) -> list[Snapshot]:
        """Close the steps that are `timeout_seconds` old at `now`; return their usable snapshots."""
        due = [key for key, pending in self._pending.items() if now - pending.since >= self.timeout_seconds]
        for run_key, step in due:
            pending = self._pending[run_key, step]
            self._silent[run_key] = _Silence(frozenset(pending.shards))
            if (more := self._limit.admit(now, run_key[0])) is not None:
                num_silent = pending.num_senders - len(pending.shards)
                words = f"{num_silent} of {pending.num_senders} ranks sent no snapshot of step {step} in"
                rest = "later snapshots do not wait for them until they send again"
                logger.warning("run %s: %s %g s: %s%s", run_key[0], words, self.timeout_seconds, rest, more)
        return self._close_all(due)

    def flush(self) -> list[Snapshot]:
        """Close all steps, at shutdown; return their usable snapshots."""
        return self._close_all(list(self._pending))

    def forget(self, run: str, incarnation: str) -> None:
        """Drop the shards and the last step of an incarnation that ended, without a call of `on_drop`."""
        self._done.pop((run, incarnation), None)
        self._silent.pop((run, incarnation), None)
        for key in [key for key in self._pending if key[0] == (run, incarnation)]:
            self._remove(key)

    def next_deadline(self) -> float:
        """Compute the time of the next due `expire`, in seconds of the clock of `now`; infinity without shards."""
        return min((pending.since for pending in self._pending.values()), default=math.inf) + self.timeout_seconds

    def _note_late(self, now: float, run_key: RunKey, shard: Shard) -> None:
        """Wait for all senders again if a silent one sent a shard that a wait would have caught."""
        silence = self._silent.get(run_key)
        if silence is None or shard.process_rank in silence.heard or shard.step != silence.closed_early:
            return
        if now - silence.since < self.timeout_seconds:
            del self._silent[run_key]

    def _make_room(self, num_bytes: int, key: tuple[RunKey, int]) -> bool:
        """Drop the oldest step of the run that holds the most memory until `num_bytes` more fit.

        Return False when `key` itself was dropped, which is the last one of its run. Each dropped step counts as
        closed, so its later shards are "late".
        """
        while self.num_bytes + num_bytes > self.max_bytes:
            held = self._held_bytes + Counter({key[0]: num_bytes})
            largest = max(held, key=held.__getitem__)
            # Dictionaries keep the order of insertion, so the first key is the oldest step.
            oldest = next((other for other in self._pending if other[0] == largest and other != key), key)
            if oldest in self._pending:
                self._remove(oldest)
            self._done[oldest[0]] = max(oldest[1], self._done.get(oldest[0], -1))
            self.on_drop(oldest[0][0], "assembler_full")
            if oldest == key:
                return False
        return True

    def _remove(self, key: tuple[RunKey, int]) -> _Pending:
        """Remove a step and its bytes from the count."""
        pending = self._pending.pop(key)
        self._held_bytes[key[0]] -= pending.num_bytes
        if not self._held_bytes[key[0]]:
            del self._held_bytes[key[0]]
        return pending

    def _close_all(self, keys: Iterable[tuple[RunKey, int]]) -> list[Snapshot]:
        """Close the steps in order; return their usable snapshots."""
        snapshots = []
        for key in sorted(keys):
            try:
                snapshot = self._close(key)
            except Exception as error:
                self.on_failure(key[0][0], error)
            else:
                snapshots += [] if snapshot is None else [snapshot]
        return snapshots

    def _close(self, key: tuple[RunKey, int]) -> Snapshot | None:
        """Close one step; return its snapshot, or None where too much is missing."""
        run_key, step = key
        pending = self._remove(key)
        self._done[run_key] = max(step, self._done.get(run_key, -1))
        # Half of the ranks was chosen by hand. One lost shard of many must not cost the snapshot. The detector compares
        # snapshots, so a snapshot of few ranks would look like a change.
        if not pending.complete and 2 * len(pending.shards) < pending.num_senders:
            self.on_drop(run_key[0], "incomplete")
            return None
        # The order of the ranks keeps row i at the same token at every point, whatever the order of arrival.
        shards = [pending.shards[rank] for rank in sorted(pending.shards)]
        blocks = _join_stages(shards, pending.complete)
        if blocks is None or (not pending.complete and sum(map(len, blocks[0])) < self.min_samples):
            self.on_drop(run_key[0], "incomplete")
            return None
        headers = [header for header, _ in shards]
        return Snapshot(
            run=headers[0].run,
            incarnation=headers[0].incarnation,
            training=over_ranks([header.training for header in headers]),
            blocks=blocks,
            masked=all(header.masked for header in headers),
            paired=pending.paired,
            num_shards=len(headers),
            observables=_observables(headers, len(blocks) // 2 if pending.paired else len(blocks) - 1),
            since=pending.since,
        )


def _name(shard: Shard) -> str:
    return f"run {shard.run} rank {shard.process_rank} step {shard.step}"


def _check(shard: Shard, pending: _Pending) -> None:
    """Raise ProtocolError for a shard that repeats or contradicts an earlier one of its step."""
    if shard.process_rank in pending.shards:
        raise ProtocolError("duplicate", f"{_name(shard)} came twice")
    if shard.num_senders != pending.num_senders or shard.width != pending.width:
        raise ProtocolError(
            "inconsistent",
            f"{_name(shard)}: {shard.num_senders} senders of width {shard.width},"
            f" others said {pending.num_senders} of width {pending.width}",
        )
    if shard.paired != pending.paired:
        raise ProtocolError("inconsistent", f"{_name(shard)}: paired {shard.paired}, others said {pending.paired}")
    for other, _ in pending.shards.values():
        if other.first_point == shard.first_point and (other.num_points, other.last_stage) != (
            shard.num_points,
            shard.last_stage,
        ):
            raise ProtocolError(
                "inconsistent",
                f"{_name(shard)}: {shard.num_points} points from {shard.first_point},"
                f" rank {other.process_rank} sent {other.num_points}",
            )


def _join_stages(
    shards: Sequence[tuple[Shard, Sequence[Tensor]]], complete: bool
) -> tuple[tuple[Tensor, ...], ...] | None:
    """Join the pipeline stages in order; return the blocks of every point.

    Neighbouring stages share their boundary point or follow one another. A shared point must have the same bits in both
    stages.

    Returns:
        The blocks, or None when stages or rows are missing or do not match.
    """
    stages: dict[int, list[tuple[Shard, Sequence[Tensor]]]] = {}
    for header, states in shards:
        stages.setdefault(header.first_point, []).append((header, states))
    blocks: list[tuple[Tensor, ...]] = []
    ends = False
    for first_point in sorted(stages):
        members = stages[first_point]
        stage = list(zip(*(states for _, states in members), strict=True))
        if ends:
            return None
        if blocks and first_point == len(blocks) - 1:
            if not _same_rows(blocks[-1], stage[0]):
                return None
            stage = stage[1:]
        # Without a shared point, equal ranks alone match the rows. A missing shard would move them against each other,
        # so only a complete step may join such stages.
        elif first_point != len(blocks) or (blocks and not complete):
            return None
        if blocks and stage and sum(map(len, stage[0])) != sum(map(len, blocks[0])):
            return None
        blocks.extend(stage)
        ends = members[0][0].last_stage
    return tuple(blocks) if ends and len(blocks) > 1 else None


def _same_rows(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Compare two lists of blocks bit by bit, so that NaN equals itself."""
    if [(block.shape, block.dtype) for block in left] != [(block.shape, block.dtype) for block in right]:
        return False
    return all(
        torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
        for one, two in zip(left, right, strict=True)
    )


def over_ranks(steps: Sequence[TrainingStep]) -> TrainingStep:
    """Reduce the scalars of the ranks, by rank, to those of the run.

    The result has the largest learning rate, and the means of the other measured values: NaN where a rank's value is
    not finite, None where no rank knows it. Its other values are those of the lowest rank.
    """
    means = {name: mean(getattr(step, name) for step in steps) for name in MEASURED}
    rates = [step.learning_rate for step in steps if step.learning_rate is not None]
    return msgspec.structs.replace(steps[0], **means | {"learning_rate": max(rates, default=None)})


def _observables(headers: Sequence[Shard], num_layers: int) -> dict[str, tuple[float | None, ...]]:
    """Compute the means of the observables over the shards, weighted by their numbers of samples.

    Of an observable "max_..." the largest value counts.
    """
    names = sorted({name for header in headers for name in header.observables})[:MAX_OBSERVABLES]
    return {name: tuple(_weighed(headers, name, layer) for layer in range(num_layers)) for name in names}


def _weighed(headers: Sequence[Shard], name: str, layer: int) -> float | None:
    """Reduce one observable at one transition over the shards; None where none has a value."""
    known: list[tuple[float, int]] = []
    for header in headers:
        values, index = header.observables.get(name, ()), layer - header.first_layer
        value = values[index] if 0 <= index < len(values) else None
        if value is not None:
            known.append((value, header.num_samples))
    if name.startswith(LARGEST):
        return max((value for value, _ in known), default=None)
    num_samples = sum(count for _, count in known)
    # The weights are shares: the product of a value and a count could overflow.
    return sum(value * (count / num_samples) for value, count in known) if known else None
