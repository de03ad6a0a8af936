"""Worker thread that computes spectral profiles of snapshots on its own device."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from koopmon.logs import LogLimit
from koopmon.monitor.assembler import Snapshot
from koopmon.monitor.device import choose_device, num_cpu_threads
from koopmon.spectral import SpectralProfile, profile_states

logger = logging.getLogger(__name__)

KreissMode = Literal["auto", "never"]

KREISS_SECONDS = 30.0
"""Minimum interval between Kreiss constants of one run. They cost far more than the profile, and no decision uses them.
"""


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one snapshot, without its states.

    `profile` is None when the states held a NaN or an infinity (`non_finite`) or the computation failed (`failed`). A
    result with `again` is the second one of the same snapshot: its profile also holds the Kreiss constants.
    """

    snapshot: Snapshot
    profile: SpectralProfile | None
    seconds: float
    non_finite: bool = False
    failed: bool = False
    again: bool = False


class Engine:
    """Profiles snapshots in the order of arrival. `on_result` is called in the worker thread.

    At most `queue_length` snapshots and `max_bytes` of states wait. Above that, the engine drops the oldest snapshot of
    the run with the most waiting. It then calls `on_drop(run)` in the thread of `submit`. `on_failure(run, error)` is
    called for an error outside profiling; that snapshot is lost, and the thread continues.
    """

    def __init__(
        self,
        *,
        device: str,
        svd_rank: int,
        queue_length: int,
        max_bytes: int,
        on_result: Callable[[Result], None],
        on_drop: Callable[[str], None],
        on_failure: Callable[[str, Exception], None],
    ) -> None:
        self._device_name = device
        self._device: torch.device | None = None
        self._svd_rank = svd_rank
        self._queue_length = queue_length
        self._max_bytes = max_bytes
        self._on_result = on_result
        self._on_drop = on_drop
        self._on_failure = on_failure
        self._queue: deque[Snapshot] = deque()
        self._busy = True  # warming up
        self._closing = False
        self._changed = threading.Condition()
        self._limit = LogLimit()
        self._kreiss_at: dict[str, float] = {}
        self._thread = threading.Thread(target=self._work, name="koopmon-engine", daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Number of waiting snapshots, without the one in progress."""
        return len(self._queue)

    def submit(self, snapshot: Snapshot, *, wait: bool = False) -> None:
        """Queue a snapshot. With `wait`, used at shutdown, block until there is room and drop nothing."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._queue)
            self._queue.append(snapshot)
            dropped = []
            while len(self._queue) > 1 and self._over_full():
                dropped.append(self._pop_oldest_of_most())
            self._changed.notify_all()
        for run in dropped:
            self._on_drop(run)

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until every submitted snapshot has its result; False after `timeout_seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout_seconds)

    def close(self) -> None:
        """Stop after the current snapshot; waiting snapshots are discarded."""
        with self._changed:
            self._closing = True
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def _over_full(self) -> bool:
        waiting = sum(snapshot.num_bytes for snapshot in self._queue)
        return len(self._queue) > self._queue_length or waiting > self._max_bytes

    def _pop_oldest_of_most(self) -> str:
        counts = Counter(snapshot.run for snapshot in self._queue)
        most = max(counts.values())
        oldest = next(index for index, snapshot in enumerate(self._queue) if counts[snapshot.run] == most)
        run = self._queue[oldest].run
        del self._queue[oldest]
        return run

    def _work(self) -> None:
        torch.set_num_threads(num_cpu_threads())
        self._warm_up()
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                snapshot = self._queue.popleft()
                self._busy = True
            try:
                self._handle(snapshot)
            except Exception as error:
                self._on_failure(snapshot.run, error)
            del snapshot

    def _handle(self, snapshot: Snapshot) -> None:
        result = self._profile(snapshot, kreiss="never")
        self._on_result(result)
        if result.profile is not None and self._kreiss_due(snapshot.run):
            result = self._profile(snapshot, kreiss="auto")
            if result.profile is not None:
                self._on_result(replace(result, again=True))

    def _warm_up(self) -> None:
        """Run one decomposition at startup, because the first one in a process loads libraries."""
        device = torch.device("cpu") if self._device_name == "auto" else torch.device(self._device_name)
        states = torch.randn((3, 64, 16), generator=torch.Generator().manual_seed(0))
        try:
            profile_states(states.to(device), svd_rank=4)
        except Exception:
            logger.exception("engine: warming up on %s failed", device)

    def _kreiss_due(self, run: str) -> bool:
        """Return True if the queue is empty and this run's Kreiss constants are due.

        A True result starts a new interval of KREISS_SECONDS.
        """
        now = time.monotonic()
        if self._queue or now - self._kreiss_at.get(run, -math.inf) < KREISS_SECONDS:
            return False
        self._kreiss_at = {name: at for name, at in self._kreiss_at.items() if now - at < KREISS_SECONDS}
        self._kreiss_at[run] = now
        return True

    def _profile(self, snapshot: Snapshot, *, kreiss: KreissMode) -> Result:
        start = time.perf_counter()
        profile, non_finite, failed = None, False, False
        try:
            profile = self._compute(snapshot, kreiss)
            non_finite = profile is None
        except Exception as error:
            failed = True
            self._log_failure(snapshot, error)
        return Result(snapshot.without_states(), profile, time.perf_counter() - start, non_finite, failed)

    def _compute(self, snapshot: Snapshot, kreiss: KreissMode) -> SpectralProfile | None:
        """Return the profile, or None when the states are not finite: their decomposition would crash the process."""
        if self._device is None:
            self._device = choose_device(self._device_name)
            logger.info("engine: computing on %s", self._device)
        try:
            return self._compute_on(self._device, snapshot, kreiss)
        except RuntimeError as error:
            if self._device.type == "cpu" or isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                raise
            logger.warning("engine: %s failed (%s), going on on the CPU", self._device, str(error).splitlines()[0])
            self._device = torch.device("cpu")
            return self._compute_on(self._device, snapshot, kreiss)

    def _compute_on(self, device: torch.device, snapshot: Snapshot, kreiss: KreissMode) -> SpectralProfile | None:
        states = snapshot.states(device)
        if not bool(torch.isfinite(states).all()):
            return None
        return profile_states(states, svd_rank=self._svd_rank, kreiss=kreiss)

    def _log_failure(self, snapshot: Snapshot, error: Exception) -> None:
        kind = type(error).__name__
        if (more := self._limit.admit(time.monotonic(), kind)) is not None:
            words = f"run {snapshot.run} step {snapshot.step}: {kind}: {error}"
            logger.error("engine: %s%s", words, more, exc_info=error)
