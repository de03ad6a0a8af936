"""Report of one recorded run as frozen dataclasses, the source of the page and `--json`.

Steps are optimizer steps, times Unix seconds; None means unknown. All risks and decisions are those recorded by the
detector and the policy. Module `action_effects` computes the effects of actions.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec

from koopmon.config import PolicyConfig
from koopmon.errors import StoreError
from koopmon.history.reader import HistoryReader
from koopmon.numbers import mean
from koopmon.views.action_effects import MIN_SNAPSHOTS, median, with_effects
from koopmon.views.run_summary import RecordedRun, RunSummary, State, runs_beside, state_of, summary_of
from koopmon.views.run_view import CommandView, DecisionView, LoggedPoint, TimelinePoint
from koopmon.views.spectra import Profiles, layers_to_dict, read_profiles

CLOSE = 5
"""Number of snapshots in the median that represents one moment."""


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
class LossCourse:
    """Loss around the first period of high risk: medians at its start and at the end of the run, and the highest after
    it.
    """

    at_alarm: float
    highest: float
    last: float


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
    policy: PolicyConfig
    summary: RunSummary
    agent: AgentSummary
    launches: tuple[Launch, ...]
    episodes: tuple[Episode, ...]
    loss: LossCourse | None
    decisions: tuple[DecisionView, ...]
    points: tuple[TimelinePoint, ...]
    logged: tuple[LoggedPoint, ...]
    profiles: Profiles
    beside: tuple[str, ...]
    """Names of the job's other runs, of further stacks or models."""

    @property
    def actions(self) -> list[CommandView]:
        """Commands that change the training, in order."""
        return [each for decision in self.decisions for each in decision.commands if each.changes_training]

    @property
    def not_finite_step(self) -> int | None:
        """Step of the first states or loss that were not finite; None without one."""
        return next((point.step for point in self.points if point.broken), None)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types; a number that is not finite becomes null."""
        names = ("run", "store", "written", "state", "first_seen", "last_seen", "summary", "agent", "launches")
        thresholds = ("act_risk", "severe_risk", "release_risk")
        plain = {
            **{name: getattr(self, name) for name in names},
            **{name: getattr(self.policy, name) for name in thresholds},
            "beside": self.beside,
            "episodes": self.episodes,
            "loss": self.loss,
            "decisions": [_decision(decision) for decision in self.decisions],
            "points": [point.to_dict() for point in self.points],
            "logged": self.logged,
            "spectra": [each.to_dict() for each in self.profiles.spectra],
            "layers": {"incarnation": self.profiles.incarnation, **layers_to_dict(self.profiles.columns)},
        }
        return dict(msgspec.json.decode(msgspec.json.encode(plain)))


def _decision(decision: DecisionView) -> dict[str, Any]:
    """Plain values of a decision with what is known only afterwards: the effect and the delay of each command."""
    plain = decision.to_dict()
    for command, each in zip(plain["commands"], decision.commands, strict=True):
        command |= {"direction": each.direction, "delay_steps": delay_steps(decision, each), "effect": each.effect}
    return plain


def delay_steps(decision: DecisionView, command: CommandView) -> int | None:
    """Return the number of steps from the assessed snapshot to the application; None for a command not applied."""
    return None if command.applied_step is None else command.applied_step - decision.step


def build_report(history: HistoryReader, store: Path, name: str, policy: PolicyConfig | None = None) -> RunReport:
    """Read all data of a run from `history`. Raises StoreError for an unknown run."""
    row = history.run(name)
    if row is None:
        raise StoreError(f"run {name!r}: not in {store}")
    policy = policy or PolicyConfig()
    run = RecordedRun.read(history, name)
    points, beats = run.points, run.beats
    episodes = tuple(_episodes(points, policy))
    alarm = (episodes[0].incarnation, episodes[0].first_step) if episodes else None
    profiles = read_profiles(
        history.profile_heads(name),
        history.profiles_at,
        {(point.incarnation, point.step): point.risk for point in points},
        alarm,
        {each.incarnation: each.hello.num_senders for each in run.launches if each.hello is not None},
    )
    last_seen = max([row.last_seen, *(point.time for point in points[-1:]), *(beat.time for beat in beats[-1:])])
    now = time.time()
    return RunReport(
        run=name,
        store=str(store),
        written=now,
        state=state_of(row.state, last_seen, now),
        first_seen=row.first_seen,
        last_seen=last_seen,
        policy=policy,
        summary=summary_of(run, store),
        agent=AgentSummary(
            num_heartbeats=len(beats),
            mean_overhead_ratio=mean([beat.overhead_ratio for beat in beats]),
            max_overhead_ratio=max((beat.overhead_ratio for beat in beats), default=None),
            median_step_seconds=median(beat.step_seconds for beat in beats),
            num_incomplete=profiles.num_incomplete,
            num_not_finite=sum(point.non_finite for point in points),
            num_not_informative=sum(not point.informative and not point.non_finite for point in points),
            mean_profile_seconds=profiles.mean_seconds,
        ),
        launches=tuple(_launches(run)),
        episodes=episodes,
        loss=_loss_course(points, alarm),
        decisions=tuple(with_effects(run.decisions, points)),
        points=tuple(points),
        logged=tuple(LoggedPoint.of_rows(beats)),
        profiles=profiles,
        beside=tuple(runs_beside(history.runs(), name)),
    )


def _episodes(points: Sequence[TimelinePoint], policy: PolicyConfig) -> Iterator[Episode]:
    """Yield the periods of high risk: each starts at the act threshold and ends below the release threshold.

    The end of a launch ends a period, except at the end of the run.
    """
    high: list[TimelinePoint] = []
    for point, following in zip_longest(points, points[1:]):
        if not high and point.risk < policy.act_risk:
            continue
        is_calm = bool(high) and point.risk < policy.release_risk
        if not is_calm:
            high.append(point)
        if is_calm or (following is not None and following.incarnation != point.incarnation):
            yield _episode(high, point.step)
            high = []
    if high:
        yield _episode(high, None)


def _episode(high: Sequence[TimelinePoint], last_step: int | None) -> Episode:
    first, worst = high[0], max(high, key=lambda point: point.risk)
    return Episode(
        incarnation=first.incarnation,
        first_step=first.step,
        last_step=last_step,
        peak=worst.risk,
        peak_step=worst.step,
        reason=first.reason,
    )


def _loss_course(points: Sequence[TimelinePoint], alarm: tuple[str, int] | None) -> LossCourse | None:
    """Compare the loss before and after the first alarm; None without an alarm or with too few losses."""
    place = next((index for index, point in enumerate(points, 1) if (point.incarnation, point.step) == alarm), 0)
    # A launch that starts again from the first step is another training.
    later = [point for point in points[place:] if alarm is None or point.step >= alarm[1]]
    before, after = _losses(points[:place])[-CLOSE:], _losses(later)
    if min(len(before), len(after)) < MIN_SNAPSHOTS:
        return None
    last = statistics.median(after[-CLOSE:])
    return LossCourse(at_alarm=statistics.median(before), highest=max(after), last=last)


def _losses(points: Sequence[TimelinePoint]) -> list[float]:
    losses = [point.training.loss for point in points]
    return [loss for loss in losses if loss is not None and math.isfinite(loss)]


def _launches(run: RecordedRun) -> Iterator[Launch]:
    snapshots = Counter(point.incarnation for point in run.points)
    seen: dict[str, list[int]] = {}
    for incarnation, step in ((each.incarnation, each.step) for rows in (run.points, run.beats) for each in rows):
        seen.setdefault(incarnation, []).append(step)
    for row in run.launches:
        steps = [*seen.get(row.incarnation, ()), *(() if row.hello is None else (row.hello.step,))]
        yield Launch(
            incarnation=row.incarnation,
            started=row.started,
            ended=row.ended,
            end_reason=row.end_reason,
            first_step=min(steps, default=None),
            last_step=max(steps, default=None),
            num_snapshots=snapshots[row.incarnation],
            lr_scale=1.0 if row.applied is None else row.applied.lr_scale,
            kss_alpha=0.0 if row.applied is None else row.applied.kss.alpha,
            hello=None if row.hello is None else msgspec.to_builtins(row.hello),
        )
