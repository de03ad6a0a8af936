"""Shards to snapshots: gather what the ranks send for one step, within bounds on memory and time.

Each sender's shards arrive in its own order. So when a step is complete, what an earlier step still misses was lost,
and snapshots leave here in the order of their steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from koopmon.errors import ProtocolError
from koopmon.spectral.profiles import finite_mean
from koopmon.wire.messages import MAX_OBSERVABLES, Shard

SHARD_OVERHEAD_BYTES = 1024
"""What one shard costs beside its tensors, so that many tiny ones are bounded too."""

RunKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All ranks' states of one step. `blocks[p]` holds the rows of point p, one tensor (n_i, D) for each sender.

    P points, N samples, D width. Row i is the same token at every point.
    """

    run: str
    incarnation: str
    step: int
    blocks: tuple[tuple[Tensor, ...], ...]
    masked: bool
    learning_rate: float | None
    loss: float | None
    grad_norm: float | None
    lr_scale: float
    kss_alpha: float
    num_shards: int
    observables: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    """What the model's family measures, by name: one value per transition, None where no rank had any."""

    @property
    def num_points(self) -> int:
        return len(self.blocks)

    @property
    def num_samples(self) -> int:
        return sum(block.shape[0] for block in self.blocks[0])

    @property
    def width(self) -> int:
        return int(self.blocks[0][0].shape[1])

    @property
    def num_bytes(self) -> int:
        return sum(block.nbytes for blocks in self.blocks for block in blocks)

    def without_states(self) -> Snapshot:
        """The same without its blocks, for what outlives the profiling."""
        return replace(self, blocks=())

    def states(self, device: torch.device | str = "cpu") -> Tensor:
        """The states as one float32 tensor (P, N, D) on `device`; they travel there in their own dtype."""
        states = torch.empty((self.num_points, self.num_samples, self.width), device=device)
        for point, blocks in zip(states, self.blocks, strict=True):
            row = 0
            for block in blocks:
                point[row : row + block.shape[0]].copy_(block)
                row += block.shape[0]
        return states


@dataclass(slots=True)
class _Pending:
    since: float
    num_senders: int
    width: int
    num_bytes: int = 0
    shards: dict[int, tuple[Shard, Sequence[Tensor]]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.num_senders


class Assembler:
    """Holds shards until their step is complete, passed by a later one, or `timeout_seconds` old; at most `max_bytes`.

    An incomplete snapshot is still used when at least half of its shards came and they hold `min_samples` rows.
    `on_drop(run, reason)` is called for each one that is not, `on_failure(run, error)` for one that raised while it was
    assembled; the other snapshots are not affected.
    """

    def __init__(
        self,
        *,
        timeout_seconds: float,
        max_bytes: int,
        min_samples: int,
        on_drop: Callable[[str, str], None],
        on_failure: Callable[[str, Exception], None],
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        self._min_samples = min_samples
        self._on_drop = on_drop
        self._on_failure = on_failure
        self._pending: dict[tuple[RunKey, int], _Pending] = {}
        self._done: dict[RunKey, int] = {}
        self.num_bytes = 0

    def add(self, now: float, shard: Shard, states: Sequence[Tensor]) -> list[Snapshot]:
        """Take one shard, `states` one (n, D) tensor for each of its points; return the snapshots that are ready now.

        Raises ProtocolError with reason "duplicate", "late" or "inconsistent".
        """
        run_key = (shard.run, shard.incarnation)
        if shard.step <= self._done.get(run_key, -1):
            raise ProtocolError("late", f"{_name(shard)} is already closed")
        key = (run_key, shard.step)
        pending = self._pending.get(key)
        if pending is None:
            pending = _Pending(since=now, num_senders=shard.num_senders, width=shard.width)
        else:
            _check(shard, pending)
        num_bytes = sum(state.nbytes for state in states) + SHARD_OVERHEAD_BYTES
        completes = len(pending.shards) + 1 == pending.num_senders
        if not completes and not self._make_room(num_bytes, key):
            return []
        self._pending[key] = pending
        pending.shards[shard.process_rank] = (shard, states)
        pending.num_bytes += num_bytes
        self.num_bytes += num_bytes
        if not pending.complete:
            return []
        return self._close_all(other for other in self._pending if other[0] == run_key and other[1] <= shard.step)

    def expire(self, now: float) -> list[Snapshot]:
        """Close what has waited too long; return the snapshots that are usable all the same."""
        due = [key for key, pending in self._pending.items() if now - pending.since >= self._timeout_seconds]
        return self._close_all(due)

    def flush(self) -> list[Snapshot]:
        """Close everything, as at shutdown."""
        return self._close_all(list(self._pending))

    def forget(self, run: str, incarnation: str) -> None:
        """Drop what waits for an incarnation that is gone, uncounted, and its step."""
        self._done.pop((run, incarnation), None)
        for key in [key for key in self._pending if key[0] == (run, incarnation)]:
            self._remove(key)

    def next_deadline(self) -> float:
        """When `expire` has something to do next; infinity when nothing waits."""
        return min((pending.since for pending in self._pending.values()), default=math.inf) + self._timeout_seconds

    def _make_room(self, num_bytes: int, key: tuple[RunKey, int]) -> bool:
        """Drop the oldest until `num_bytes` more fit beside what `key` holds; False when `key` itself had to go."""
        while self.num_bytes + num_bytes > self._max_bytes:
            oldest = next((other for other in self._pending if other != key), key)
            if oldest in self._pending:
                self._remove(oldest)
            self._done[oldest[0]] = max(oldest[1], self._done.get(oldest[0], -1))
            self._on_drop(oldest[0][0], "assembler_full")
            if oldest == key:
                return False
        return True

    def _remove(self, key: tuple[RunKey, int]) -> _Pending:
        pending = self._pending.pop(key)
        self.num_bytes -= pending.num_bytes
        return pending

    def _close_all(self, keys: Iterable[tuple[RunKey, int]]) -> list[Snapshot]:
        snapshots = []
        for key in sorted(keys):
            try:
                snapshot = self._close(key)
            except Exception as error:
                self._on_failure(key[0][0], error)
            else:
                snapshots += [] if snapshot is None else [snapshot]
        return snapshots

    def _close(self, key: tuple[RunKey, int]) -> Snapshot | None:
        run_key, step = key
        pending = self._remove(key)
        self._done[run_key] = max(step, self._done.get(run_key, -1))
        if not pending.complete and 2 * len(pending.shards) < pending.num_senders:
            self._on_drop(run_key[0], "incomplete")
            return None
        shards = [pending.shards[rank] for rank in sorted(pending.shards)]
        blocks = _join_stages(shards, pending.complete)
        if blocks is None or (not pending.complete and sum(map(len, blocks[0])) < self._min_samples):
            self._on_drop(run_key[0], "incomplete")
            return None
        return _snapshot([header for header, _ in shards], blocks)


def _name(shard: Shard) -> str:
    return f"run {shard.run} rank {shard.process_rank} step {shard.step}"


def _check(shard: Shard, pending: _Pending) -> None:
    if shard.process_rank in pending.shards:
        raise ProtocolError("duplicate", f"{_name(shard)} came twice")
    if shard.num_senders != pending.num_senders or shard.width != pending.width:
        raise ProtocolError(
            "inconsistent",
            f"{_name(shard)}: {shard.num_senders} senders of width {shard.width},"
            f" others said {pending.num_senders} of width {pending.width}",
        )
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
    """Blocks of every point, pipeline stages in order; None when stages or rows are missing or do not belong together.

    Neighbouring stages either share their boundary point, whose rows must then be the same bits, or follow one another.
    Only the former proves that rows belong together when shards are missing.
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
        elif first_point != len(blocks) or (blocks and not complete):
            return None
        if blocks and stage and sum(map(len, stage[0])) != sum(map(len, blocks[0])):
            return None
        blocks.extend(stage)
        ends = members[0][0].last_stage
    return tuple(blocks) if ends and len(blocks) > 1 else None


def _same_rows(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Bitwise equality of two lists of blocks, so that NaN equals itself."""
    if [(block.shape, block.dtype) for block in left] != [(block.shape, block.dtype) for block in right]:
        return False
    return all(
        torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
        for one, two in zip(left, right, strict=True)
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return finite_mean(known) if all(map(math.isfinite, known)) else math.nan


def _snapshot(headers: Sequence[Shard], blocks: tuple[tuple[Tensor, ...], ...]) -> Snapshot:
    first = headers[0]
    rates = [header.learning_rate for header in headers if header.learning_rate is not None]
    return Snapshot(
        run=first.run,
        incarnation=first.incarnation,
        step=first.step,
        blocks=blocks,
        masked=all(header.masked for header in headers),
        learning_rate=max(rates, default=None),
        loss=_mean(header.loss for header in headers),
        grad_norm=_mean(header.grad_norm for header in headers),
        lr_scale=first.lr_scale,
        kss_alpha=first.kss_alpha,
        num_shards=len(headers),
        observables=_observables(headers, len(blocks) - 1),
    )


def _observables(headers: Sequence[Shard], num_layers: int) -> dict[str, tuple[float | None, ...]]:
    """Means over the shards, each weighing as many samples as it has."""
    names = sorted({name for header in headers for name in header.observables})[:MAX_OBSERVABLES]
    return {name: tuple(_weighed(headers, name, layer) for layer in range(num_layers)) for name in names}


def _weighed(headers: Sequence[Shard], name: str, layer: int) -> float | None:
    known: list[tuple[float, int]] = []
    for header in headers:
        values, index = header.observables.get(name, ()), layer - header.first_point
        value = values[index] if 0 <= index < len(values) else None
        if value is not None:
            known.append((value, header.num_samples))
    num_samples = sum(count for _, count in known)
    # Weighed by shares and not by counts: a product with a count may be beyond a double.
    return sum(value * (count / num_samples) for value, count in known) if known else None
