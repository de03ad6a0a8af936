"""Per-run bookkeeping: reported drop totals, last judgement, pending restore."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from koopmon.monitor.registry import Run
from koopmon.monitor.run_controller import Assessment, RunController
from koopmon.telemetry.metrics import Metrics
from koopmon.wire.messages import Applied, Heartbeat, Judgement

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

HEARTBEAT_ROW_SECONDS = 10.0


@dataclass(slots=True)
class Watch:
    """State of one watched incarnation.

    `restore` holds values of an earlier incarnation, which each rank receives once.
    """

    controller: RunController
    restore: Applied | None = None
    judgement: Judgement | None = None
    """Judgement of the last assessed snapshot, which agents display."""
    _drops: dict[tuple[int, str], int] = field(default_factory=dict)
    _heartbeat_rows: dict[int, float] = field(default_factory=dict)
    _applied: Applied | None = None
    _not_finite_step: int = -1

    def new_drops(self, heartbeat: Heartbeat) -> Iterator[tuple[str, int]]:
        """Yield reasons and numbers of shards dropped since this rank's last heartbeat. Agents report totals."""
        for reason, total in heartbeat.dropped.items():
            key = (heartbeat.process_rank, reason)
            more = total - self._drops.get(key, 0)
            self._drops[key] = total
            if more > 0:
                yield reason, more

    def row_due(self, now: float, heartbeat: Heartbeat) -> bool:
        """Return True if this heartbeat must be recorded: one per rank every HEARTBEAT_ROW_SECONDS."""
        due = now - self._heartbeat_rows.get(heartbeat.process_rank, -math.inf) >= HEARTBEAT_ROW_SECONDS
        if due:
            self._heartbeat_rows[heartbeat.process_rank] = now
        return due

    def applied_changed(self, applied: Applied) -> bool:
        """Return True if rank 0 reports other values in force than the last time; stores them."""
        changed = applied != self._applied
        self._applied = applied
        return changed

    def newly_not_finite(self, step: int) -> bool:
        """Return True if `step` is later than every reported step with non-finite states; stores it."""
        newly = step > self._not_finite_step
        self._not_finite_step = max(step, self._not_finite_step)
        return newly

    def record_assessment(self, step: int, assessment: Assessment, profile: SpectralProfile | None) -> None:
        """Update the judgement from the assessment of the snapshot at `step`."""
        mass = profile.mean("near_unit_mass") if profile is not None and profile.informative else None
        before, decision = self.judgement, assessment.decision
        said, at = ("", None) if before is None else (before.decision, before.decision_step)
        if decision is not None and assessment.remarkable:
            said, at = decision.reason[:512], step
        self.judgement = Judgement(
            step=step,
            risk=_share(assessment.risk.value) or 0.0,
            forecast=_share(assessment.risk.forecast),
            near_unit_mass=_share(mass),
            divergence_probability=_share(self.controller.divergence_probability),
            decision=said,
            decision_step=at,
        )


def _share(value: float | None) -> float | None:
    """Clamp `value` to [0, 1]; None when it is unknown or not finite."""
    return None if value is None or not math.isfinite(value) else min(max(float(value), 0.0), 1.0)


def publish_run(metrics: Metrics, run: Run) -> None:
    """Update the series of a run that has not vanished from the registry."""
    if metrics.value("snapshots_received", run.name) is None:
        metrics.begin_run(run.name)
    metrics.set("run_state", run.state, run.name)
    metrics.set_training(run.name, run.training)
    heartbeats = [peer.heartbeat for peer in run.peers.values() if peer.heartbeat is not None]
    if heartbeats:
        metrics.set("agent_overhead_ratio", max(each.overhead_ratio for each in heartbeats), run.name)
        metrics.set("taps_missing", sum(each.taps_missing for each in heartbeats), run.name)
