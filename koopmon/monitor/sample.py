"""The scalars of one step of one run, from a snapshot or a heartbeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from koopmon.monitor.assembler import Snapshot
from koopmon.wire.messages import Heartbeat


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Scalars that the detector uses beside the profile; None means unknown."""

    step: int
    learning_rate: float | None
    loss: float | None
    grad_norm: float | None
    lr_scale: float
    kss_alpha: float

    @classmethod
    def of_snapshot(cls, snapshot: Snapshot) -> Self:
        return cls(
            step=snapshot.step,
            learning_rate=snapshot.learning_rate,
            loss=snapshot.loss,
            grad_norm=snapshot.grad_norm,
            lr_scale=snapshot.lr_scale,
            kss_alpha=snapshot.kss_alpha,
        )

    @classmethod
    def of_heartbeat(cls, heartbeat: Heartbeat) -> Self:
        return cls(
            step=heartbeat.step,
            learning_rate=heartbeat.learning_rate,
            loss=heartbeat.loss,
            grad_norm=heartbeat.grad_norm,
            lr_scale=heartbeat.applied.lr_scale,
            kss_alpha=heartbeat.applied.kss.alpha,
        )
