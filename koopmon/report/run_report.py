"""Report of one recorded run as frozen dataclasses, the source of the page, the pictures and `--json`.

Steps are optimizer steps, times Unix seconds; None means unknown. All risks and decisions are those recorded by the
detector and the policy. Module `action_effects` computes the effects of actions.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from koopmon.config import PolicyConfig
from koopmon.errors import StoreError, one_line
from koopmon.history.reader import HeartbeatRow, HistoryReader, IncarnationRow, ObservationRow
from koopmon.history.schema import RunState
from koopmon.numbers import mean
from koopmon.risk.online_detector import foresight
from koopmon.views.action_effects import RecordedCommand, RecordedDecision, RecordedPoint, read_decisions
from koopmon.views.run_summary import RunSummary, summary_of
from koopmon.views.run_view import plain
from koopmon.views.spectra import Heatmap, RecordedSpectrum, read_profiles

UNHEARD_SECONDS = 120.0
"""A run recorded as running without a write for this many seconds has the state "unheard"."""
State = Literal["running", "unheard", "vanished", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One incarnation: a first start, or a restart."""

    incarnation: str
    started: float
    ended: float | None
    end_reason: str | None
    first_step: int | None
    last_step: int | None
    num_snapshots: int
    lr_scale: float
    """Learning-rate scale in force at the end of the launch."""
    kss_alpha: float
    hello: dict[str, Any] | None
    """Hello of rank 0 (adapter, sizes, versions, the adapter's thresholds); None when none was recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A period of high risk from `first_step` to `last_step`, where it is calm again; None while the risk is high."""

    incarnation: str
    first_step: int
    last_step: int | None
    peak: float
    peak_step: int
    reason: str
    """The detector's reason at the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSummary:
    """Overhead of the agents and lost snapshots, as far as the history records them."""

    num_heartbeats: int
    mean_overhead_ratio: float | None
    max_overhead_ratio: float | None
    median_step_seconds: float | None
    num_incomplete: int
    """Number of snapshots profiled without the shards of some ranks."""
    num_not_finite: int
    num_not_informative: int
    mean_profile_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Data of a report.

    The three risk thresholds come from the given configuration, because a history does not record them.
    """

    run: str
    store: str
    written: float
    state: State
    first_seen: float
    last_seen: float
    act_risk: float
    severe_risk: float
    release_risk: float
    summary: RunSummary
    agent: AgentSummary
    launches: tuple[Launch, ...]
    episodes: tuple[Episode, ...]
    decisions: tuple[RecordedDecision, ...]
    points: tuple[RecordedPoint, ...]
    spectra: tuple[RecordedSpectrum, ...]
    heatmap: Heatmap | None

    @property
    def actions(self) -> list[RecordedCommand]:
        """Commands that change the training, in order."""
        return [action for decision in self.decisions for action in decision.actions if action.direction != "watch"]

    @property
    def not_finite_step(self) -> int | None:
        """Step of the first states or loss that were not finite; None without one."""
        return next((point.step for point in self.points if point.broken), None)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types; a number that is not finite becomes null."""
        values = msgspec.to_builtins(self) | {"points": [plain(point) for point in self.points]}
        finite: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(values))
        return finite


def build_report(history: HistoryReader, store: Path, run: str, policy: PolicyConfig | None = None) -> RunReport:
    """Read all data of `run` from `history`. Raises StoreError for an unknown run."""
    row = history.run(run)
    if row is None:
        raise StoreError(f"run {run!r}: not in {store}")
    policy = policy or PolicyConfig()
    incarnations = history.incarnations(run)
    points = [_point(each) for each in history.observations(run)]
    beats = list(history.heartbeats(run))
    rows = list(history.decisions(run))
    episodes = tuple(_episodes(points, policy))
    alarm = episodes[0] if episodes else None
    try:
        profiles = read_profiles(
            history.profiles(run),
            {(point.incarnation, point.step): point.risk for point in points},
            None if alarm is None else (alarm.incarnation, alarm.first_step),
            {each.incarnation: each.hello.num_senders for each in incarnations if each.hello is not None},
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:  # a forged or damaged file
        raise StoreError(f"store {store}: a profile of run {run!r} cannot be read: {one_line(error)}") from None
    last_seen = max([row.last_seen, *(point.time for point in points[-1:]), *(beat.time for beat in beats[-1:])])
    now = time.time()
    return RunReport(
        run=run,
        store=str(store),
        written=now,
        state=_state(row.state, last_seen, now),
        first_seen=row.first_seen,
        last_seen=last_seen,
        act_risk=policy.act_risk,
        severe_risk=policy.severe_risk,
        release_risk=policy.release_risk,
        summary=summary_of(run, store, incarnations, points, beats, rows),
        agent=AgentSummary(
            num_heartbeats=len(beats),
            mean_overhead_ratio=mean([beat.overhead_ratio for beat in beats]),
            max_overhead_ratio=max((beat.overhead_ratio for beat in beats), default=None),
            median_step_seconds=_median([beat.step_seconds for beat in beats]),
            num_incomplete=profiles.num_incomplete,
            num_not_finite=sum(point.non_finite for point in points),
            num_not_informative=sum(not point.informative and not point.non_finite for point in points),
            mean_profile_seconds=profiles.mean_seconds,
        ),
        launches=tuple(_launches(incarnations, points, beats)),
        episodes=episodes,
        decisions=tuple(read_decisions(rows, points)),
        points=tuple(points),
        spectra=profiles.spectra,
        heatmap=profiles.heatmap,
    )


def _point(row: ObservationRow) -> RecordedPoint:
    components = {name: value for name, value in row.components.items() if value is not None}
    foreseen = None
    if "prior" in components and ("growth" in components or "loss" in components):
        foreseen = foresight(components)
    return RecordedPoint(
        incarnation=row.incarnation,
        training=row.training,
        time=row.time,
        risk=row.risk,
        forecast=1.0 if row.non_finite else foreseen,
        non_finite=row.non_finite,
        informative=row.observation.get("informative") is True,
        reason=row.reason,
    )


def _state(state: int, last_seen: float, now: float) -> State:
    if state == RunState.ENDED:
        return "ended"
    if state == RunState.VANISHED:
        return "vanished"
    return "running" if now - last_seen < UNHEARD_SECONDS else "unheard"


def _episodes(points: Iterable[RecordedPoint], policy: PolicyConfig) -> list[Episode]:
    """Periods of high risk: each starts at the policy's act threshold and ends below its release threshold."""
    found: list[Episode] = []
    current: list[RecordedPoint] = []

    def close(last: RecordedPoint | None) -> None:
        if current:
            first, worst = current[0], max(current, key=lambda point: point.risk)
            found.append(
                Episode(
                    incarnation=first.incarnation,
                    first_step=first.step,
                    last_step=None if last is None else last.step,
                    peak=worst.risk,
                    peak_step=worst.step,
                    reason=first.reason,
                )
            )
            current.clear()

    for point in points:
        if current and point.incarnation != current[0].incarnation:
            close(current[-1])
        if current and point.risk < policy.release_risk:
            close(point)
        elif current or point.risk >= policy.act_risk:
            current.append(point)
    close(None)
    return found


def _launches(
    rows: Sequence[IncarnationRow], points: Sequence[RecordedPoint], beats: Sequence[HeartbeatRow]
) -> Iterator[Launch]:
    steps: dict[str, list[int]] = {row.incarnation: [] if row.hello is None else [row.hello.step] for row in rows}
    for point in points:
        steps.setdefault(point.incarnation, []).append(point.step)
    for beat in beats:
        steps.setdefault(beat.incarnation, []).append(beat.step)
    snapshots = Counter(point.incarnation for point in points)
    for row in rows:
        yield Launch(
            incarnation=row.incarnation,
            started=row.started,
            ended=row.ended,
            end_reason=row.end_reason,
            first_step=min(steps[row.incarnation], default=None),
            last_step=max(steps[row.incarnation], default=None),
            num_snapshots=snapshots[row.incarnation],
            lr_scale=1.0 if row.applied is None else row.applied.lr_scale,
            kss_alpha=0.0 if row.applied is None else row.applied.kss.alpha,
            hello=None if row.hello is None else msgspec.to_builtins(row.hello),
        )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else None
