"""Worker thread that computes spectral profiles of snapshots on its own device."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from koopmon.errors import ConfigError
from koopmon.logs import LogLimit
from koopmon.monitor.assembler import Snapshot
from koopmon.spectral import SpectralProfile, profile_states

logger = logging.getLogger(__name__)

SPARE_MEMORY_MIB = 512
"""A device with more memory in use than this counts as occupied."""
QUERY = ("nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one snapshot, without its states.

    `profile` is None when the states held a NaN or an infinity (`non_finite`) or the computation failed (`failed`).
    """

    snapshot: Snapshot
    profile: SpectralProfile | None
    seconds: float
    non_finite: bool = False
    failed: bool = False


@dataclass(kw_only=True)
class Engine:
    """Profiles snapshots in the order of arrival. `on_result` is called in the worker thread.

    At most `max_waiting` snapshots and `max_bytes` of states wait. Above that, the engine drops the oldest snapshot of
    the run with the most waiting. `on_failure(run, error)` is called for an error outside profiling; that snapshot is
    lost, and the thread continues.
    """

    device: str
    svd_rank: int
    max_waiting: int
    max_bytes: int
    on_result: Callable[[Result], None]
    on_failure: Callable[[str, Exception], None]

    def __post_init__(self) -> None:
        self._device: torch.device | None = None
        self._queue: deque[Snapshot] = deque()
        self._busy = True  # warming up
        self._closing = False
        self._changed = threading.Condition()
        self._limit = LogLimit()
        self._thread = threading.Thread(target=self._work, name="koopmon-engine", daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Number of waiting snapshots, without the one in progress."""
        return len(self._queue)

    def submit(self, snapshot: Snapshot, *, wait: bool = False) -> list[str]:
        """Queue a snapshot; return the run of each snapshot that was dropped for it.

        With `wait`, used at shutdown, block until there is room and drop nothing.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._queue)
            self._queue.append(snapshot)
            dropped = []
            while len(self._queue) > 1 and self._over_full():
                dropped.append(self._pop_oldest_of_most())
            self._changed.notify_all()
            return dropped

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
        return len(self._queue) > self.max_waiting or waiting > self.max_bytes

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
                self.on_result(self._profile(snapshot))
            except Exception as error:
                self.on_failure(snapshot.run, error)
            del snapshot

    def _warm_up(self) -> None:
        """Run one decomposition at startup, because the first one in a process loads libraries."""
        device = torch.device("cpu") if self.device == "auto" else torch.device(self.device)
        states = torch.randn((3, 64, 16), generator=torch.Generator().manual_seed(0))
        try:
            profile_states(states.to(device), svd_rank=4, kreiss="never")
        except Exception:
            logger.exception("engine: warming up on %s failed", device)

    def _profile(self, snapshot: Snapshot) -> Result:
        start = time.perf_counter()
        profile, non_finite, failed = None, False, False
        try:
            profile = self._compute(snapshot)
            non_finite = profile is None
        except Exception as error:
            failed, kind = True, type(error).__name__
            if (more := self._limit.admit(time.monotonic(), kind)) is not None:
                words = f"run {snapshot.run} step {snapshot.step}: {kind}: {error}"
                logger.error("engine: %s%s", words, more, exc_info=error)
        return Result(snapshot.without_states(), profile, time.perf_counter() - start, non_finite, failed)

    def _compute(self, snapshot: Snapshot) -> SpectralProfile | None:
        """Return the profile, or None when the states are not finite: their decomposition would crash the process."""
        if self._device is None:
            self._device = choose_device(self.device)
            logger.info("engine: computing on %s", self._device)
        try:
            return self._compute_on(self._device, snapshot)
        except RuntimeError as error:
            if self._device.type == "cpu" or isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                raise
            logger.warning("engine: %s failed (%s), going on on the CPU", self._device, str(error).splitlines()[0])
            self._device = torch.device("cpu")
            return self._compute_on(self._device, snapshot)

    def _compute_on(self, device: torch.device, snapshot: Snapshot) -> SpectralProfile | None:
        states = snapshot.states(device)
        if not bool(torch.isfinite(states).all()):
            return None
        # The Kreiss constant costs far more than the rest.
        return profile_states(states, svd_rank=self.svd_rank, kreiss="never", paired=snapshot.paired)


def check_device(name: str) -> str:
    """Return `name` if it is "auto", "cpu" or a present CUDA device. Raises ConfigError otherwise."""
    if name in {"auto", "cpu"}:
        return name
    match = re.fullmatch(r"cuda:(\d{1,3})", name)
    count = torch.cuda.device_count()
    if match and int(match[1]) < count:
        return name
    present = f"cuda:0 to cuda:{count - 1}" if count else "no CUDA device is present"
    raise ConfigError(f"device = {name!r}: allowed are auto, cpu and cuda:N ({present})")


def choose_device(name: str) -> torch.device:
    """Return the device for `name`.

    Resolve "auto" after training has started: before that, every device is unused.
    """
    if name != "auto":
        return torch.device(name)
    return _spare_cuda_device() or torch.device("cpu")


def num_cpu_threads() -> int:
    """Number of CPU threads for linear algebra: one per 16 cores, at least 1 and at most 4."""
    return max(1, min(4, (os.cpu_count() or 1) // 16))


def _spare_cuda_device() -> torch.device | None:
    # A query of free memory through CUDA would create a context, which uses memory, on every device.
    if torch.cuda.device_count() == 0:
        return None
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("device auto: nvidia-smi gave no answer (%s), computing on the CPU", error)
        return None
    used = dict(_memory_used(answer.splitlines()))
    spare = []
    for index in range(torch.cuda.device_count()):
        memory = used.get(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        if memory is not None and memory <= SPARE_MEMORY_MIB:
            spare.append((memory, index))
    return torch.device("cuda", min(spare)[1]) if spare else None


def _memory_used(lines: Iterable[str]) -> Iterable[tuple[str, int]]:
    for line in lines:
        uuid, _, memory = line.partition(",")
        if memory.strip().isdigit():
            yield uuid.strip(), int(memory)
