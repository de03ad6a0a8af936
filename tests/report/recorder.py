"""Writer of histories with the real store, like a monitor, one snapshot after another."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from koopmon.history.plain_profile import PlainProfile
from koopmon.history.reader import HistoryReader
from koopmon.history.writer import HistoryWriter
from koopmon.report.run_report import RunReport, build_report
from koopmon.risk.band import BandReading
from koopmon.spectral import profile_states
from koopmon.wire.messages import Ack, AckOutcome, Applied, Command, Heartbeat, KssSettings, TrainingStep
from tests.factories import hello, record_observation

RUN, FIRST = "team/run-1", "0123abcd"


def states(scale: float = 1.0) -> torch.Tensor:
    """Draw a residual stream of three transitions, (4, 64, 6)."""
    generator = torch.Generator().manual_seed(3)
    return torch.cumsum(scale * torch.randn((4, 64, 6), generator=generator), dim=0)


class Recorder:
    """A history with one run. Times start half a minute ago, so the run may still be active."""

    def __init__(self, path: Path, run: str = RUN, incarnation: str = FIRST) -> None:
        self.path, self.run, self.incarnation = path, run, incarnation
        self.store = HistoryWriter.open(path)
        self.began = time.time() - 30.0
        self.scale, self.alpha, self.count = 1.0, 0.0, 0

    def hello(self, **fields: Any) -> None:
        shape = {"world_size": 2, "num_senders": 2, "num_layers": 3, "width": 6}
        versions = {"koopmon_version": "0.1", "torch_version": "2.13"}
        self.store.record_hello(self.began, hello(self.run, self.incarnation, **{**shape, **versions, **fields}))

    def saw(
        self,
        step: int,
        risk: float,
        loss: float | None = None,
        *,
        profiled: bool = False,
        non_finite: bool = False,
        components: Mapping[str, float] | None = None,
        num_shards: int = 2,
    ) -> None:
        at = self.began + 0.01 * step
        if profiled or non_finite:
            profile = None if non_finite else PlainProfile.of(profile_states(states(1.0 + risk)))
            self.store.record_profile(
                at,
                self.run,
                self.incarnation,
                step,
                num_shards=num_shards,
                masked=False,
                seconds=0.01,
                profile=profile,
                observables={},
            )
        record_observation(
            self.store,
            at,
            step,
            self.run,
            self.incarnation,
            learning_rate=0.01,
            loss=loss,
            lr_scale=self.scale,
            kss_alpha=self.alpha,
            non_finite=non_finite,
            observation={"informative": not non_finite},
            risk=risk,
            reason=f"unsteadiness at {step}",
            components=dict(components or {}),
        )

    def did(
        self,
        step: int,
        risk: float,
        outcome: AckOutcome | None = "applied",
        *,
        after: int = 1,
        detail: str = "",
        reason: str = "because",
        lr_scale: float | None = None,
        alpha: float | None = None,
        ceilings: dict[int, float] | None = None,
        dense: bool = False,
    ) -> None:
        """Record a decision with one command; `outcome` None means not sent. `after` is the number of steps until the
        ack.
        """
        self.count += 1
        name = f"{self.count:08x}"
        shapes = "set_kss" if ceilings is None else "set_ceilings"
        kind = "set_cadence" if dense else "set_lr_scale" if lr_scale is not None else shapes
        command = Command(
            run=self.run,
            incarnation=self.incarnation,
            id=name,
            kind=kind,
            reason=reason,
            expires_step=step + 50,
            lr_scale=lr_scale,
            kss=None if alpha is None else KssSettings(alpha=alpha),
            ceilings=ceilings,
            cadence_steps=1 if dense else None,
        )
        at = self.began + 0.01 * step
        self.store.record_decision(
            at,
            self.run,
            self.incarnation,
            step,
            phase="acting",
            reason=reason,
            risk=risk,
            commands=[command],
            outcome="dry_run" if outcome is None else "pending",
        )
        if outcome is None:
            return
        ack = Ack(
            run=self.run,
            incarnation=self.incarnation,
            command_id=name,
            outcome=outcome,
            step=step + after,
            detail=detail,
            applied=Applied(),
        )
        self.store.record_ack(at, ack)
        if outcome == "applied":
            self.scale = lr_scale if lr_scale is not None else self.scale
            self.alpha = alpha if alpha is not None else self.alpha

    def beat(self, step: int, overhead_ratio: float = 0.01, logged: Mapping[str, BandReading] | None = None) -> None:
        beat = Heartbeat(
            run=self.run,
            incarnation=self.incarnation,
            process_rank=0,
            training=TrainingStep(step=step),
            applied=Applied(lr_scale=self.scale),
            overhead_ratio=overhead_ratio,
            step_seconds=0.2,
        )
        self.store.record_heartbeat(self.began + 0.01 * step, beat, logged)

    def ended(self, reason: str = "goodbye") -> None:
        self.store.record_state(self.began + 20.0, self.run, self.incarnation, 0, end_reason=reason)

    def facts(self) -> RunReport:
        """Return its report, read beside the writer."""
        self.store.commit()
        with HistoryReader.open(self.path) as history:
            return build_report(history, self.path, self.run)

    def close(self) -> None:
        self.store.close()


def guarded(recorder: Recorder, *, profiled: bool = False) -> Recorder:
    """Record a run of 200 steps.

    The risk rises above 0.8 at step 40, the rate is halved two steps later, and the loss recovers.
    """
    recorder.hello()
    for step in range(0, 40, 2):
        recorder.saw(step, 0.05, 3.0, profiled=profiled and step % 8 == 0)
    recorder.saw(40, 0.85, 3.1, profiled=profiled)
    recorder.did(40, 0.85, lr_scale=0.5, after=2)
    for step in range(42, 50, 2):
        recorder.saw(step, 0.3, 4.5, profiled=profiled)
    for step in range(50, 202, 2):
        recorder.saw(step, 0.05, 3.0 - 0.001 * step, profiled=profiled and step % 40 == 0)
    recorder.beat(200)
    recorder.ended()
    return recorder


NAN = math.nan
