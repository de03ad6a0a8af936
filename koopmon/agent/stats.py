"""Counters and measurements of one agent. The training thread writes, the sender reads; neither waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from koopmon.wire.messages import (
    DROP_REASONS,
    MAX_LOGGED,
    MEASURED,
    DropReason,
    Judgement,
    LoggedScalar,
    ScalarName,
    TrainingStep,
)

_NUM_UNDERWAY = 4


@dataclass(frozen=True, slots=True)
class StrideLimit:
    """Least number of steps between snapshots, as the monitor asks: `steps` from `from_step` on, `before` until then.

    It is a pure function of the step, so that all ranks that know it agree.
    """

    steps: int = 1
    from_step: int = 0
    before: int = 1

    def at(self, step: int) -> int:
        """Return the limit at `step`."""
        return self.steps if step >= self.from_step else self.before

    def followed_by(self, steps: int, from_step: int) -> StrideLimit:
        """Return the limit after a message of the monitor."""
        if (steps, from_step) == (self.steps, self.from_step):
            return self
        return StrideLimit(steps, from_step, before=self.at(from_step - 1))


@dataclass(frozen=True, slots=True)
class Reading:
    """One measured value; None is unknown. `host` holds one from a device, valid after the event `ready`."""

    value: float | None = None
    step: int = 0
    """Number of optimizer steps done when it was stored."""
    host: Tensor | None = None
    ready: Any = None

    @property
    def arrived(self) -> bool:
        """True once the value is on the host."""
        return self.ready is None or bool(self.ready.query())

    def get(self) -> float | None:
        """Return the value. It has arrived."""
        return self.value if self.host is None else float(self.host)

    def wait(self) -> float | None:
        """Return the value after it has arrived. For the I/O thread: the training thread must not wait."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.get()


class AsyncScalar:
    """The latest value of a scalar that may live on a device. Storing never synchronises, reading never waits."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque([Reading()], maxlen=_NUM_UNDERWAY)
        """The newest is first."""

    def put(self, value: float | Tensor | None, step: int = 0) -> None:
        """Store a number or a tensor with one element.

        Raises TypeError for other shapes, complex values and DTensors.
        """
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.is_complex():
                raise TypeError(f"expected a number or a tensor with one element, got shape {tuple(value.shape)}")
            if hasattr(value, "to_local"):
                raise TypeError("a DTensor's value lies on several ranks: pass its full_tensor()")
            value = value.detach()
            if value.device.type == "cuda":
                # A CUDA graph would repeat a captured copy in every replay.
                if not torch.cuda.is_current_stream_capturing():
                    self._readings.appendleft(_copied(value, step))
                return
        self._readings.appendleft(Reading(None if value is None else float(value), step))

    def get(self) -> float | None:
        """Return the latest value that has arrived; None if there is none."""
        return self.arrived.get()

    @property
    def arrived(self) -> Reading:
        """The latest value that has arrived; an empty reading if there is none."""
        return next((reading for reading in tuple(self._readings) if reading.arrived), Reading())

    @property
    def latest(self) -> Reading:
        """The value that was stored last."""
        return self._readings[0]


@torch.no_grad()
def _copied(value: Tensor, step: int) -> Reading:
    stream = torch.cuda.current_stream(value.device)
    host = torch.empty((), dtype=torch.float32, pin_memory=True, device="cpu")
    host.copy_(value.reshape(()), non_blocking=True)
    value.record_stream(stream)  # a backward pass may have made it on another one
    ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    ready.record(stream)
    return Reading(step=step, host=host, ready=ready)


class AgentStats:
    """Counters and gauges of one agent. Only the training thread writes the plain attributes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_edge_seconds: float | None = None
        self.step = 0
        """Optimizer steps done."""
        self.step_seconds: float | None = None
        """Running mean of the duration of one optimizer step."""
        self.elapsed_seconds = 0.0
        """Time between the first step edge and the last."""
        self.hook_seconds = 0.0
        """Time spent in the optimizer's hooks."""
        self.capture_seconds = 0.0
        """Time spent copying snapshots."""
        self.sending_seconds = 0.0
        """CPU time spent sending snapshots. Only the sender's thread writes it."""
        self.action_seconds = 0.0
        """Time that actions spent in forwards."""
        self.taps_missing = 0
        """Snapshots in which a tap did not fire."""
        self.sent = 0
        self.finite = True
        """False if the states of the last snapshot were not finite. Only the sender's thread writes it."""
        self.dropped: dict[DropReason, int] = dict.fromkeys(DROP_REASONS, 0)
        self.rejected: dict[str, int] = {}
        """Refused messages of the monitor, by reason. Only the sender's thread writes it."""
        self.judgement: Judgement | None = None
        """The monitor's latest judgement of this training. Only the sender's thread writes it."""
        self.stride_limit = StrideLimit()
        """The cadence that the monitor can judge. Only the sender's thread writes it."""
        self.measured = {name: AsyncScalar() for name in MEASURED}
        self.logged: set[str] = set()
        """Names of measured values that the user's loop logs itself."""
        self.named: dict[str, AsyncScalar] = {}
        """Further values of the user's loop, by name."""

    @property
    def busy_seconds(self) -> float:
        """Seconds that koopmon has used in the training thread."""
        return self.hook_seconds + self.capture_seconds + self.action_seconds

    @property
    def snapshot_seconds(self) -> float:
        """Seconds that snapshots have used, in the training thread and in the sender's."""
        return self.capture_seconds + self.sending_seconds

    def log(self, name: str, value: float | Tensor) -> None:
        """Store a value from the user's loop. From now on it replaces koopmon's own measurement, if there is one.

        Raises TypeError like `AsyncScalar.put`, and ValueError for a name that the wire does not allow.
        """
        if name in self.measured:
            self.measured[name].put(value)
            self.logged.add(name)
            return
        if name not in self.named:
            msgspec.convert(name, ScalarName)
            if len(self.named) >= MAX_LOGGED:
                raise ValueError(f"at most {MAX_LOGGED} names are sent")
        self.named.setdefault(name, AsyncScalar()).put(value, self.step)

    def logged_scalars(self) -> dict[str, LoggedScalar]:
        """Return the latest values that have arrived of the names without a measurement."""
        arrived = {name: scalar.arrived for name, scalar in list(self.named.items())}
        return {
            name: LoggedScalar(step=each.step, value=value)
            for name, each in arrived.items()
            if (value := each.get()) is not None
        }

    def measure(self, name: str, value: float | Tensor | None) -> None:
        """Store koopmon's own measurement, unless the user's loop logs this value."""
        if name not in self.logged:
            self.measured[name].put(value)

    def readings(self) -> Mapping[str, Reading]:
        """Return the measured values of this moment. Those on a device have not arrived yet."""
        return {name: scalar.latest for name, scalar in self.measured.items()}

    def with_measured(self, training: TrainingStep) -> TrainingStep:
        """Return `training` with the latest measured values that have arrived."""
        return msgspec.structs.replace(training, **{name: scalar.get() for name, scalar in self.measured.items()})

    def drop(self, reason: DropReason, count: int = 1) -> None:
        """Count snapshots of which this rank did not send its part."""
        with self._lock:
            self.dropped[reason] += count

    def reject(self, reason: str) -> None:
        """Count a refused message."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def on_step_edge(self, now_seconds: float) -> float:
        """Count one optimizer step that ends now. Returns the time since the step before; 0 for the first."""
        last, self._last_edge_seconds = self._last_edge_seconds, now_seconds
        elapsed = 0.0 if last is None else now_seconds - last
        self.tick(elapsed)
        return elapsed

    def tick(self, elapsed_seconds: float) -> None:
        """Count one optimizer step, `elapsed_seconds` after the one before."""
        self.step += 1
        if elapsed_seconds > 0.0:
            self.elapsed_seconds += elapsed_seconds
            mean = self.step_seconds
            self.step_seconds = elapsed_seconds if mean is None else mean + 0.2 * (elapsed_seconds - mean)
