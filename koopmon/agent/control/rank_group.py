"""A process group of koopmon's own, over which rank 0 broadcasts the state to apply at one optimizer step.

It uses Gloo over its own connection to the default store, under its own prefix. The user's groups, and those of any
accelerator, are not touched. A background thread forms it once every rank has registered in the store. The ranks then
agree, over the group itself, on the time of the first exchange. Any failure ends the generation: control is off, and
the values in force stay. The next generation forms once all ranks have registered again.

Ranks may have different counts of steps: one attached later, skips a step by itself or accumulates longer. They wait
for each other in an exchange until its time-out. From the next generation on, where every step contains collectives of
the training, their count is the common time. A rank that does not step then takes part at its next forward.
"""

from __future__ import annotations

import atexit
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from koopmon.agent.control.state import ControlUpdate
from koopmon.agent.rank_identity import RankContext, own_connection
from koopmon.agent.stats import AgentStats
from koopmon.config import ControlConfig

logger = logging.getLogger("koopmon.agent")

MESSAGE_BYTES = 2048
"""Length of every exchange. Its first two bytes hold the length of the rest."""
POLL_SECONDS = 0.1
"""First interval between two reads of the store; it grows to LAST_POLL_SECONDS."""
LAST_POLL_SECONDS = 2.0
START_SECONDS = 0.3
"""Lead time of the first exchange, so that every rank knows its step in time."""
START_STEPS = 3
"""Least lead of the first exchange, in steps."""
OPERATION_SECONDS = 60.0
"""Longest duration of an exchange.

Only the training thread's own wait is shorter. A slow exchange is no failure while the ranks wait for each other in the
backward pass.
"""
CONNECT_SECONDS = 5.0
"""Longest time in which all registered ranks connect to each other; more for more than 250 ranks."""
JOIN_SECONDS = 0.2
"""Longest wait for a background thread that does not wait in torch."""
WAIT_POLL_SECONDS = 0.002
"""First interval between two looks at an operation in a background thread; it grows to POLL_SECONDS."""
FIRST_PAUSE_SECONDS = 1.0
"""First pause before a group is formed again. It doubles with each failure, up to LAST_PAUSE_SECONDS."""
LAST_PAUSE_SECONDS = 60.0
NUM_PACES = 3
"""Steps that must contain collectives for their count to be the common time."""
COUNTED_FROM = 1
"""The first generation in which collectives may be the common time."""
HEALTHY_SECONDS = 120.0
"""Time without a failure that resets the pause."""

_interpreter_ends = threading.Event()
atexit.register(_interpreter_ends.set)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ControlUpdate)


@dataclass(frozen=True, slots=True)
class ReplicaFingerprint:
    """One rank's entry if several share one model: its data rank, and a fingerprint of its first block's input."""

    data_rank: int
    fingerprint: int


class RankGroup:
    """Exchanges between ranks. The training thread calls `is_due`, `is_overdue`, `launch` and `receive`.

    A background thread that returns from a wait in torch while the interpreter ends aborts the process. These threads
    therefore wait in Python, where they end silently. The one wait in torch is bounded by CONNECT_SECONDS.

    `place` is the key of one training in the store (`store_prefix`). `share` is set if several ranks share one model.
    `collectives` counts the collectives of the training so far, equal on all ranks; None if it cannot be counted.
    """

    def __init__(
        self,
        world: RankContext,
        config: ControlConfig,
        stats: AgentStats,
        place: str,
        share: ReplicaFingerprint | None = None,
        collectives: Callable[[], int] | None = None,
    ) -> None:
        self.splits_tokens = share is not None
        """True if ranks that share one model hold different tokens of its data. Assumed until the group is ready."""
        self.steps_may_differ = False
        """True if the count of collectives is the common time. Each rank then follows rank 0's count of steps."""
        self._collectives = collectives
        self._num_paces = 0
        self._least_pace = sys.maxsize
        """Least number of collectives in one of `_num_paces` steps."""
        self._last: tuple[int, int] | None = None
        """Step and number of collectives at the last look."""
        self._share = share
        self._world = world
        self._timeout_seconds = config.timeout_seconds
        self._stats = stats
        self._prefix = f"{place}/control"
        self._generation = 0
        self._streak = 0
        """Failures in a row, each less than HEALTHY_SECONDS after the one before."""
        self._failed = -HEALTHY_SECONDS
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._connecting = threading.Lock()
        """Held while the background thread waits in torch."""
        self._threads: list[threading.Thread] = []
        self._group: Any = None
        self._work: Any = None
        self._buffer = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device="cpu")
        self._next: int | None = None
        """Time of the next exchange, in steps or collectives done; None while none is agreed."""
        self._agreed = threading.Event()
        """Set once all ranks know the first exchange."""
        self._start(self._form, 0, 0.0)

    @property
    def ready(self) -> bool:
        """True while exchanges run: rank 0's decisions reach every rank."""
        return self._agreed.is_set() and not self._closed.is_set()

    @property
    def leads(self) -> bool:
        """True on rank 0, which decides for all."""
        return self._world.rank == 0

    @property
    def in_flight(self) -> bool:
        """True while an exchange was launched and not yet received."""
        return self._work is not None

    @property
    def next_exchange(self) -> int | None:
        """The step after which the next exchange takes place; None if it is unknown, or work comes before it."""
        quiet = self.ready and self._work is None and not self.steps_may_differ
        return self._next if quiet else None

    def is_due(self, step: int) -> bool:
        """Return True if an exchange takes place after `step` optimizer steps. Call it after each step with work.

        The result is the same on all ranks, except for those that do not step.
        """
        if self._collectives is not None:
            count = self._collectives()
            if self._last is not None and step <= self._last[0] + 1:
                self._num_paces += 1
                # A default group that was made again counts from 0.
                self._least_pace = min(self._least_pace, max(0, count - self._last[1]))
            self._last = step, count
        return self._is_time(step)

    def is_overdue(self, step: int) -> bool:
        """Return True if an exchange takes place before a forward because the count of collectives has reached it."""
        return self.steps_may_differ and self._work is None and self._is_time(step)

    def _is_time(self, step: int) -> bool:
        due, now = self._next, self._now(step)
        if due is None or now < due:
            return False
        # The other ranks' agreement may still be in transit. The exchange of this step must not be missed.
        if not self._agreed.is_set() and not self._agreed.wait(self._timeout_seconds):
            self.fail("the ranks did not agree on a first step")
            return False
        if self._next is None or (now > self._next and not self.steps_may_differ):
            self.fail(f"the exchange of step {self._next} was missed")
            return False
        return now >= self._next

    def _now(self, step: int) -> int:
        return self._collectives() if self.steps_may_differ and self._collectives is not None else step

    def launch(self, exchange: ControlUpdate | None) -> None:
        """Start an exchange: rank 0 passes it, the other ranks pass None. Returns at once.

        Raises ValueError if the encoded exchange exceeds MESSAGE_BYTES - 2 bytes.
        """
        if exchange is not None:
            if self.steps_may_differ:
                count = self._now(exchange.step) + (exchange.next_step - exchange.step) * max(1, self._pace)
                exchange = msgspec.structs.replace(exchange, next_count=count)
            packed = _encoder.encode(exchange)
            if len(packed) > MESSAGE_BYTES - 2:
                raise ValueError(f"exchange of {len(packed)} bytes, at most {MESSAGE_BYTES - 2} fit")
            frame = bytearray(len(packed).to_bytes(2, "little") + packed)
            self._buffer[: len(frame)] = torch.frombuffer(frame, dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self._work = self._group.broadcast([self._buffer], options)
        except RuntimeError as error:
            self.fail(_reason(error))

    def receive(self) -> ControlUpdate | None:
        """Return the exchange in flight, after a wait of at most the time-out; None if it failed."""
        work = self._work
        try:
            work.wait(timedelta(seconds=self._timeout_seconds))
            length = int.from_bytes(self._buffer[:2].numpy().tobytes(), "little")
            exchange = _decoder.decode(self._buffer[2 : 2 + length].numpy().tobytes())
        except (RuntimeError, msgspec.DecodeError) as error:
            self.fail(_reason(error))
            return None
        finally:
            self._work = None
        self._next = exchange.next_count if self.steps_may_differ else exchange.next_step
        return exchange

    def agree(self, value: bool) -> bool:
        """Return True if every rank passes True. Waits for them, at most the time-out. A failure returns False."""
        if not self.ready:
            return False
        tensor = torch.tensor([value], dtype=torch.int64, device="cpu")
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        work = None
        try:
            # No local variable may hold the group: see _drop.
            work = self._group.allreduce([tensor], options)
            work.wait(timedelta(seconds=self._timeout_seconds))
        except RuntimeError as error:
            self.fail(_reason(error), work)
            return False
        return bool(tensor)

    def fail(self, reason: str, work: Any = None) -> None:
        """Turn control off and drop the group. A new one forms once all ranks have registered.

        `work` is an operation that failed in another way than an exchange.
        """
        with self._lock:
            if self._closed.is_set():
                return
            now = time.monotonic()
            self._streak = self._streak + 1 if now - self._failed < HEALTHY_SECONDS else 1
            self._failed = now
            self._drop(work)
            self._generation += 1
            pause = min(FIRST_PAUSE_SECONDS * 2.0 ** (self._streak - 1), LAST_PAUSE_SECONDS)
            self._start(self._form, self._generation, pause)
        # Most trainings end with ranks that leave: that is not a warning.
        level = logging.INFO if "closed by peer" in reason or "reset by peer" in reason else logging.WARNING
        logger.log(
            level if self._streak <= 3 else logging.DEBUG,
            "koopmon: control is off, training goes on, the settings in force stay: %s",
            reason,
        )

    def close(self, *, wait: bool = False) -> None:
        """Close the group for good. Idempotent. `wait` returns when no background thread waits in torch."""
        with self._lock:
            if not self._closed.is_set():
                self._closed.set()
                self._drop()
        if wait and self._connecting.acquire(timeout=self._connect_seconds + 1.0):
            self._connecting.release()
            for thread in self._threads:
                thread.join(JOIN_SECONDS)

    @property
    def _connect_seconds(self) -> float:
        return max(CONNECT_SECONDS, 0.02 * self._world.size)

    def _drop(self, work: Any = None) -> None:
        held = [self._group, self._work, work]
        self._group = self._work = self._next = None
        self._agreed.clear()
        self._buffer = torch.zeros(
            MESSAGE_BYTES, dtype=torch.uint8, device="cpu"
        )  # an operation may still write to the old one
        if held[0] is not None:
            # The thread that drops the last reference to a group waits for its operations: use another thread.
            self._start(self._release, held)

    def _start(self, target: Any, *args: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, args=args, name="koopmon-control", daemon=True)
        self._threads.append(thread)
        thread.start()

    # Called in the background thread.

    def _release(self, held: list[Any]) -> None:
        """Drop a group, which is the first of `held`, once its operations have ended."""
        for work in held[1:]:
            if work is not None:
                self._wait(work)
        _end_with_interpreter()
        held.clear()

    def _wait(self, work: Any) -> None:
        """Wait for an operation, whatever its outcome."""
        pause = WAIT_POLL_SECONDS
        while not work.is_completed():
            _end_with_interpreter()
            time.sleep(pause)
            pause = min(2.0 * pause, POLL_SECONDS)

    def _form(self, generation: int, pause_seconds: float) -> None:
        self._closed.wait(pause_seconds)
        try:
            if self._closed.is_set():
                return
            # A connection of its own: a wait of one thread for a key holds the connection's lock.
            store = PrefixStore(f"{self._prefix}/{generation}", own_connection(self._world.store))
            store.add("ready", 1)
            pause = POLL_SECONDS
            while store.add("ready", 0) < self._world.size:
                self._closed.wait(pause)
                if self._closed.is_set():
                    store.add("ready", -1)
                    return
                pause = min(1.02 * pause, LAST_POLL_SECONDS)
            if (group := self._connect(store)) is not None:
                self._agree(group, generation)
        except Exception as error:
            if generation == self._generation:
                self.fail(f"no group of {self._world.size} ranks: {_reason(error)}")

    def _connect(self, store: Any) -> Any:
        """Return the group of all ranks; None if this one was closed. Raises RuntimeError if a rank is missing."""
        with self._connecting:
            if self._closed.is_set():
                return None
            timeout = timedelta(seconds=self._connect_seconds)
            group = dist.ProcessGroupGloo(store, self._world.rank, self._world.size, timeout)
        group.set_timeout(timedelta(seconds=max(OPERATION_SECONDS, self._timeout_seconds)))
        return group

    def _agree(self, group: Any, generation: int) -> None:
        """Agree with all ranks on the time of the first exchange, ahead of every rank's current one."""
        self.steps_may_differ = generation >= COUNTED_FROM and self._all_count_collectives(group)
        if self._closed.is_set():
            return
        margin = START_STEPS
        while True:
            seconds = self._stats.step_seconds
            ahead = margin if seconds is None else max(margin, math.ceil(START_SECONDS / max(seconds, 1e-6)))
            if self.steps_may_differ:
                ahead *= max(1, self._pace)
            first = self._all_reduce(group, self._now(self._stats.step) + ahead, dist.ReduceOp.MAX)
            with self._lock:
                if self._closed.is_set() or generation != self._generation:
                    return
                self._group, self._next = group, first
            if self._all_reduce(group, int(self._now(self._stats.step) < first), dist.ReduceOp.MIN):
                break
            margin *= 4
        if self._share is not None:
            self.splits_tokens = self._differ_within(group, self._share)
        self._agreed.set()
        unit = "collective" if self.steps_may_differ else "step"
        logger.info("koopmon: commands reach all %d ranks from %s %d on", self._world.size, unit, first)

    def _all_count_collectives(self, group: Any) -> bool:
        """Return True if the last steps of every rank contained collectives. Waits until each has taken some."""
        least = -1
        while least < 0 and not self._closed.is_set():
            least = self._all_reduce(group, 0 if self._collectives is None else self._pace, dist.ReduceOp.MIN)
            if least < 0:
                self._closed.wait(POLL_SECONDS)
        return least > 0

    def _differ_within(self, group: Any, share: ReplicaFingerprint) -> bool:
        """Return True if ranks of one data rank saw different states enter their blocks. The same on all ranks."""
        mine = torch.tensor([share.data_rank, share.fingerprint], dtype=torch.int64, device="cpu")
        every = [torch.empty_like(mine) for _ in range(self._world.size)]
        work = group.allgather([every], [mine])
        self._wait(work)
        work.wait()
        told = {tuple(each.tolist()) for each in every}
        return len(told) > len({data_rank for data_rank, _ in told})

    def _all_reduce(self, group: Any, value: int, operation: Any) -> int:
        tensor = torch.tensor([value], dtype=torch.int64, device="cpu")
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        work = group.allreduce([tensor], options)
        self._wait(work)
        work.wait()
        return int(tensor)

    @property
    def _pace(self) -> int:
        """Least number of collectives in a step so far; -1 before enough steps."""
        return self._least_pace if self._num_paces >= NUM_PACES else -1


def _end_with_interpreter() -> None:
    """Let this background thread do no more once the interpreter ends."""
    while _interpreter_ends.is_set():
        time.sleep(1.0)


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
