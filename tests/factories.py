"""Messages, observations and rows with every field filled in. A test gives the fields that matter to it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

from koopmon.config import Config
from koopmon.history.plain_profile import QUANTITIES, PlainProfile
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.registry import Admission, RunRegistry
from koopmon.monitor.run_controller import RunController
from koopmon.risk.online_detector import Observation
from koopmon.views.run_view import TimelinePoint
from koopmon.wire.buffer_pool import BufferPool
from koopmon.wire.messages import Ack, Applied, Command, Heartbeat, Hello, TrainingStep

RUN, INCARNATION = "job", "aaaaaaaa"


def gathered(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with those of a `TrainingStep` collected under `training`."""
    names = TrainingStep.__struct_fields__
    training = TrainingStep(**{name: value for name, value in fields.items() if name in names})
    return {"training": training, **{name: value for name, value in fields.items() if name not in names}}


def hello(run: str = RUN, incarnation: str = INCARNATION, **fields: Any) -> Hello:
    """Hello of one acting rank of a transformer with 4 layers of width 8."""
    values = {
        "process_rank": 0,
        "world_size": 1,
        "num_senders": 1,
        "adapter": "transformer",
        "num_layers": 4,
        "width": 8,
        "acts": True,
        "step": 0,
        "applied": Applied(),
        "koopmon_version": "0",
        "torch_version": "0",
    }
    return Hello(run=run, incarnation=incarnation, **{**values, **fields})


def admit(registry: RunRegistry, now: float, said: Hello, identity: bytes, **fields: Any) -> Admission:
    """Send a hello to a registry whose runs get a controller with the default configuration."""
    return registry.admit(now, said, identity, lambda _: (RunController(Config(), said, said.applied), None), **fields)


def heartbeat(step: int, run: str = RUN, incarnation: str = INCARNATION, **fields: Any) -> Heartbeat:
    """Heartbeat of rank 0 with nothing applied."""
    values = {"process_rank": 0, "applied": Applied(), **fields}
    in_force = {"lr_scale": values["applied"].lr_scale, "kss_alpha": values["applied"].kss.alpha}
    return Heartbeat(run=run, incarnation=incarnation, **gathered({"step": step, **in_force, **values}))


def command(number: int = 0, run: str = RUN, incarnation: str = INCARNATION, **fields: Any) -> Command:
    """Back-off to one half, with an id from `number`."""
    values = {"kind": "set_lr_scale", "reason": "risk 0.9", "expires_step": 60}
    if fields.get("kind", "set_lr_scale") == "set_lr_scale":
        values["lr_scale"] = 0.5
    return Command(run=run, incarnation=incarnation, id=f"{number:08x}", **{**values, **fields})


def ack(number: int = 0, run: str = RUN, incarnation: str = INCARNATION, **fields: Any) -> Ack:
    """Ack of `command(number)`: applied at step 12."""
    values = {"outcome": "applied", "step": 12, "applied": Applied()}
    return Ack(run=run, incarnation=incarnation, command_id=f"{number:08x}", **{**values, **fields})


def observation(step: int, **fields: Any) -> Observation:
    """Informative observation; missing fields are unknown."""
    return Observation(**gathered({"step": step, "informative": True, **fields}))


def plain_profile(*values: float, eigenvalues: Sequence[Sequence[float]] | None = None) -> PlainProfile:
    """Profile of one layer for each value: its numbers are the value, and so is its only eigenvalue by default."""
    each = tuple(array("f", flat) for flat in eigenvalues or [(value, 0.0) for value in values])
    return PlainProfile(
        columns=dict.fromkeys(QUANTITIES, values),
        eigenvalues=each,
        informative=(True,) * len(values),
        reasons=("",) * len(values),
        num_samples=8,
        svd_rank=None,
        is_informative=True,
        reason="",
    )


def noisy_profile(size: int) -> PlainProfile:
    """Profile of one layer that takes about `size` bytes of a history."""
    return plain_profile(1.0, eigenvalues=[[random.uniform(-1.0, 1.0) for _ in range(size // 3 * 2)]])


def record_observation(
    store: HistoryWriter, at: float, step: int, run: str = RUN, incarnation: str = INCARNATION, **fields: Any
) -> None:
    """Row of the history: a calm snapshot without logged values. `observation` may be an `Observation`."""
    values: dict[str, Any] = {
        "step": step,
        "non_finite": False,
        "observation": {},
        "risk": 0.0,
        "reason": "",
        "components": {},
        **fields,
    }
    store.record_observation(at, run, incarnation, **gathered(values))


def point(step: int, incarnation: str = INCARNATION, **fields: Any) -> TimelinePoint:
    """Calm snapshot of a view; scalars of the training are given beside the other fields."""
    values = {"time": 0.0, "risk": 0.1, "forecast": None, "reason": "", "informative": True, "non_finite": False}
    return TimelinePoint(incarnation=incarnation, **gathered({"step": step, **values, **fields}))


def num_free(pool: BufferPool) -> int:
    """Count the slots that a pool could give now."""
    slots = list(iter(lambda: pool.acquire(1), None))
    for slot in slots:
        slot.release()
    return len(slots)
