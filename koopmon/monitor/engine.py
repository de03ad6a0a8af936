"""Worker thread that computes spectral profiles of snapshots on its own device."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from koopmon.errors import ConfigError
from koopmon.logs import LogLimit
from koopmon.monitor.assembler import Snapshot
from koopmon.spectral import NonFiniteError, SpectralProfile, profile_in_batches, profile_states

logger = logging.getLogger(__name__)

DropReason = Literal["superseded", "engine_queue_full"]
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


Profiling = Generator[None, None, SpectralProfile | None]
"""A computation in parts of bounded cost; it returns None for states that are not finite."""


@dataclass(slots=True)
class _Job:
    """A snapshot in progress; `seconds` is its computing time so far."""

    snapshot: Snapshot
    profiling: Profiling
    seconds: float = 0.0


@dataclass(kw_only=True)
class Engine:
    """Profiles the newest snapshot of each run. `on_result` is called in the worker thread.

    A newer snapshot replaces the waiting one of its run, because only the newest matters for an action. A snapshot that
    came when nothing of its run waited stays, so that the first one of a run has its profile.

    The worker computes one batch of layers at a time, for the run that has used the least computing time (start-time
    fair queueing, Goyal et al. 1997). Neither a fast run nor a large snapshot holds up the others.

    At most `max_waiting` snapshots and `max_bytes` of states wait. Above the former, the engine drops the snapshot of
    the run that has used the most time, above the latter the largest one. `on_failure(run, error)` is called for an
    error outside profiling; that snapshot is lost, and the thread continues.
    """

    device: str
    svd_rank: int
    max_waiting: int
    max_bytes: int
    on_result: Callable[[Result], None]
    on_failure: Callable[[str, Exception], None]

    def __post_init__(self) -> None:
        self._device: torch.device | None = None
        self._first: dict[str, Snapshot] = {}
        self._newest: dict[str, Snapshot] = {}
        self._started: dict[str, _Job] = {}
        self._used_seconds: dict[str, float] = {}
        self._least_used = 0.0
        self._busy = True  # warming up
        self._closing = False
        self._changed = threading.Condition()
        self._limit = LogLimit()
        self._thread = threading.Thread(target=self._work, name="koopmon-engine", daemon=True)
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Number of waiting snapshots, without those in progress."""
        return len(self._first) + len(self._newest)

    def submit(self, snapshot: Snapshot, *, wait: bool = False) -> list[tuple[str, DropReason]]:
        """Queue a snapshot; return run and reason of each snapshot that was dropped for it.

        With `wait`, used at shutdown, block until there is room and drop nothing.
        """
        run, dropped = snapshot.run, list[tuple[str, DropReason]]()
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self.queue_length == 0 or self._closing)
            if not any(run in some for some in (self._first, self._newest, self._started)):
                # Time without work earns no credit.
                self._used_seconds[run] = max(self._used_seconds.get(run, 0.0), self._least_used)
                self._first[run] = snapshot
            else:
                if self._newest.pop(run, None) is not None:
                    dropped.append((run, "superseded"))
                self._newest[run] = snapshot
            while (victim := self._victim()) is not None:
                self._take_waiting(victim)
                dropped.append((victim, "engine_queue_full"))
            self._changed.notify_all()
            return dropped

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until every submitted snapshot has its result; False after `timeout_seconds`."""
        with self._changed:
            idle = lambda: not (self.queue_length or self._started or self._busy)  # noqa: E731
            return self._changed.wait_for(idle, timeout_seconds)

    def close(self, timeout_seconds: float = 5.0) -> bool:
        """Stop after the current batch of layers; the other snapshots are discarded. False if it is still computing."""
        with self._changed:
            self._closing = True
            self._first.clear()
            self._newest.clear()
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _victim(self) -> str | None:
        """Return the run that loses a waiting snapshot; None while there is room, and for a single snapshot."""
        waiting = [*self._first.values(), *self._newest.values()]
        if len(waiting) > 1 and sum(each.num_bytes for each in waiting) > self.max_bytes:
            return max(waiting, key=lambda each: each.num_bytes).run
        if len(waiting) > self.max_waiting:
            return max((each.run for each in waiting), key=self._used_seconds.__getitem__)
        return None

    def _take_waiting(self, run: str) -> Snapshot:
        return (self._first if run in self._first else self._newest).pop(run)

    def _work(self) -> None:
        torch.set_num_threads(num_cpu_threads())
        self._warm_up()
        while (job := self._next()) is not None:
            start = time.perf_counter()
            result = self._advance(job)
            self._add_time(job, time.perf_counter() - start, done=result is not None)
            if result is not None:
                try:
                    self.on_result(result)
                except Exception as error:
                    self.on_failure(job.snapshot.run, error)
            del job, result

    def _next(self) -> _Job | None:
        """Wait for work; return the job of the run that has used the least time, or None at the end."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.queue_length or self._started or self._closing)
            if self._closing:
                return None
            self._busy = True
            run = min([*self._started, *self._first, *self._newest], key=self._used_seconds.__getitem__)
            self._least_used = self._used_seconds[run]
            if run not in self._started:
                snapshot = self._take_waiting(run)
                self._started[run] = _Job(snapshot, self._profile(snapshot))
                self._changed.notify_all()
            return self._started[run]

    def _add_time(self, job: _Job, seconds: float, *, done: bool) -> None:
        run = job.snapshot.run
        with self._changed:
            job.seconds += seconds
            self._used_seconds[run] += seconds
            if done:
                del self._started[run]
                active = {*self._started, *self._first, *self._newest}
                self._used_seconds = {
                    name: used for name, used in self._used_seconds.items() if name in active or used > self._least_used
                }

    def _advance(self, job: _Job) -> Result | None:
        """Compute one batch of layers; return the result after the last one."""
        start = time.perf_counter()
        snapshot, profile, failed = job.snapshot, None, False
        try:
            next(job.profiling)
            return None
        except StopIteration as end:
            profile = end.value
        except Exception as error:
            failed, kind = True, type(error).__name__
            if (more := self._limit.admit(time.monotonic(), kind)) is not None:
                words = f"run {snapshot.run} step {snapshot.step}: {kind}: {error}"
                logger.error("engine: %s%s", words, more, exc_info=error)
        seconds = job.seconds + time.perf_counter() - start
        return Result(snapshot.without_states(), profile, seconds, profile is None and not failed, failed)

    def _warm_up(self) -> None:
        """Run one decomposition at startup, because the first one in a process loads libraries."""
        device = torch.device("cpu") if self.device == "auto" else torch.device(self.device)
        states = torch.randn((3, 64, 16), generator=torch.Generator().manual_seed(0), device="cpu")
        try:
            profile_states(states.to(device), svd_rank=4, kreiss="never")
        except Exception:
            logger.exception("engine: warming up on %s failed", device)

    def _profile(self, snapshot: Snapshot) -> Profiling:
        if self._device is None:
            self._device = choose_device(self.device)
            logger.info("engine: computing on %s", self._device)
        device = self._device
        try:
            return (yield from self._profile_on(device, snapshot))
        except RuntimeError as error:
            if device.type == "cpu" or isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                raise
            logger.warning("engine: %s failed (%s), going on on the CPU", device, str(error).splitlines()[0])
            self._device = torch.device("cpu")
        return (yield from self._profile_on(self._device, snapshot))

    def _profile_on(self, device: torch.device, snapshot: Snapshot) -> Profiling:
        # The Kreiss constant costs far more than the rest.
        profiling = profile_in_batches(
            snapshot.states(device), svd_rank=self.svd_rank, kreiss="never", paired=snapshot.paired
        )
        try:
            return (yield from profiling)
        except NonFiniteError:
            return None


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
