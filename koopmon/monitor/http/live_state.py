"""State of the live page, shared between the daemon's thread and the web server's.

The daemon writes: each event copies a few numbers under a lock, for about a millisecond. Readers take frozen views.
The number of runs is bounded, and so are the points, columns and decisions of each; the history has the rest.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from koopmon.history.plain_profile import PlainProfile
from koopmon.history.schema import RunState
from koopmon.monitor import events
from koopmon.monitor.run import Run
from koopmon.monitor.run_controller import Assessment, RunController
from koopmon.policy import Decision
from koopmon.risk.band import BandReading
from koopmon.views.run_view import (
    AgentHealth,
    CommandView,
    DecisionView,
    LoggedPoint,
    PolicyStatus,
    RunView,
    TimelinePoint,
)
from koopmon.views.spectra import Column, Spectrum

MAX_RUNS = 256
"""Maximum number of runs on the page; above it the oldest finished run is removed."""
MAX_POINTS = 400
MAX_COLUMNS = 240
MAX_DECISIONS = 50
HEALTH_SECONDS = 1.0
"""Minimum interval between health updates of a run, which may have thousands of ranks."""

T = TypeVar("T", TimelinePoint, LoggedPoint, Column, DecisionView)


@dataclass(slots=True)
class _Kept:
    """One run in the live state; `view` holds values that are replaced, the bounded deques hold series."""

    view: RunView
    points: deque[TimelinePoint] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))
    logged: deque[LoggedPoint] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))
    columns: deque[Column] = field(default_factory=lambda: deque(maxlen=MAX_COLUMNS))
    decisions: deque[DecisionView] = field(default_factory=lambda: deque(maxlen=MAX_DECISIONS))
    lost: dict[str, int] = field(default_factory=dict)
    """Snapshots lost inside the monitor, by reason."""
    health_at: float = float("-inf")

    def shown(self) -> RunView:
        points, columns, decisions = tuple(self.points), tuple(self.columns), tuple(self.decisions)
        return replace(self.view, points=points, logged=tuple(self.logged), columns=columns, decisions=decisions)


class LiveState:
    """Live state of all runs. `boot` identifies this instance; revisions of other instances are not comparable."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.boot = secrets.token_hex(4)
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self.revision = 0
        """Incremented by every change; reading it takes no lock."""
        self.num_hidden = 0
        """Number of runs removed from the page to make room for other runs."""

    def names(self) -> list[str]:
        with self._lock:
            return list(self._kept)

    def view(self, name: str) -> RunView | None:
        with self._lock:
            kept = self._kept.get(name)
            return None if kept is None else kept.shown()

    def views(self, *, since: int = -1) -> list[RunView]:
        """Views of all runs that changed after revision `since`, in order of arrival."""
        with self._lock:
            return [kept.shown() for kept in self._kept.values() if kept.view.revision > since]

    def __call__(self, at: float, event: events.Event) -> None:
        """Show an event: this is a sink of the monitor."""
        with self._lock:
            if isinstance(event, events.RunChanged):
                self._update_run(event.run)
            elif event.run is not None and (kept := self._kept.get(event.run.name)) is not None:
                self._show(kept, event)

    def _show(self, kept: _Kept, event: events.Event) -> None:
        match event:
            case events.SnapshotReceived():
                kept.view = replace(kept.view, num_received=kept.view.num_received + 1)
            case events.SnapshotDropped(_, reason):
                kept.lost[reason] = kept.lost.get(reason, 0) + 1
            case events.HeartbeatReceived(run) if event.logged:
                self._add_logged(kept, event.logged)
            case events.Assessed(run, assessment) if assessment is not None:
                self._add_assessment(kept, assessment, event.plain, run.controller)
            case events.Decided(_, assessment) if assessment.decision is not None:
                self._add_decision(kept, assessment, assessment.decision)
            case events.CommandUnanswered(_, command):
                self._settle(kept, command.id, "unanswered")
            case events.CommandAcked(run, ack, answered) if answered is not None and answered.first:
                self._settle(kept, ack.command_id, ack.outcome, ack.step, ack.detail)
                if (standing := kept.view.standing) is not None:
                    self._change(kept, standing=replace(standing, state=run.controller.policy_state))
            case events.RunClosed(run) if run.state is RunState.VANISHED:  # the time of its last message stays
                self._change(kept, state=run.state.name.lower())

    def _update_run(self, run: Run) -> None:
        """Update a run from the registry, and the health of its agents."""
        now, hello, training = self._clock(), run.hello, run.training
        kept = self._kept.get(run.name)
        if kept is None:
            kept = self._keep(RunView(name=run.name, incarnation=run.incarnation))
        elif kept.view.incarnation != run.incarnation:
            # A new launch of the run: points and decisions stay, the policy starts afresh.
            kept.lost.clear()
            kept.health_at = float("-inf")
            kept.view = replace(kept.view, incarnation=run.incarnation, standing=None, num_received=0)
        health = kept.view.health
        if now - kept.health_at >= HEALTH_SECONDS or run.state is not RunState.RUNNING:
            kept.health_at = now
            health = _health(run, kept.lost)
        view = replace(
            kept.view,
            state=run.state.name.lower(),
            adapter=hello.adapter,
            width=hello.width,
            num_layers=hello.num_layers,
            acts=hello.acts,
            sends=run.controller.sends,
            hostname=hello.hostname,
            step=training.step,
            lr_scale=training.lr_scale,
            kss_alpha=training.kss_alpha,
            num_held_layers=int(training.kss_held_layers),
            health=health,
        )
        changed = view != kept.view
        kept.view = replace(view, last_heard=self._wall())
        if changed:
            self._change(kept)

    def _add_assessment(
        self, kept: _Kept, assessment: Assessment, plain: PlainProfile | None, controller: RunController
    ) -> None:
        seen, risk, incarnation = assessment.observation, assessment.risk, kept.view.incarnation
        spectrum = kept.view.spectrum
        if plain is not None:
            spectrum = Spectrum.of(seen.step, plain)
            kept.columns.append(Column.of(seen.step, plain))
        kept.points.append(TimelinePoint.of_assessment(incarnation, self._wall(), seen, risk))
        standing = PolicyStatus(
            now=self._clock(),
            state=controller.policy_state,
            observation=seen,
            risk=risk,
            policy=controller.config.policy,
            kss=controller.kss_config,
        )
        self._change(kept, standing=standing, spectrum=spectrum)

    def _add_logged(self, kept: _Kept, readings: Mapping[str, BandReading]) -> None:
        point = LoggedPoint.of(kept.view.incarnation, readings)
        if point is not None and not point.repeats(kept.logged[-1] if kept.logged else None):
            kept.logged.append(point)
            self._change(kept)

    def _add_decision(self, kept: _Kept, assessment: Assessment, decision: Decision) -> None:
        outcome = "pending" if kept.view.sends else "dry_run"
        view = DecisionView(
            incarnation=kept.view.incarnation,
            step=assessment.observation.step,
            time=self._wall(),
            phase=decision.phase,
            reason=decision.reason,
            risk=assessment.risk.value,
            commands=tuple(CommandView(command=command, outcome=outcome) for command in assessment.commands),
        )
        kept.decisions.append(view)
        self._change(kept)

    def backfill(
        self,
        view: RunView,
        *,
        points: Iterable[TimelinePoint] = (),
        logged: Iterable[LoggedPoint] = (),
        columns: Iterable[Column] = (),
        decisions: Iterable[DecisionView] = (),
    ) -> None:
        """Insert values of the history before the live values, which stay unchanged."""
        # Evaluate the iterables outside the lock: they may read from a file.
        points, logged, columns, decisions = list(points), list(logged), list(columns), list(decisions)
        with self._lock:
            kept = self._kept.get(view.name)
            if kept is None:
                kept = self._keep(view)
            elif kept.view.spectrum is None:
                kept.view = replace(kept.view, spectrum=view.spectrum)
            _before(kept.points, points)
            _before(kept.logged, logged)
            _before(kept.columns, columns)
            _before(kept.decisions, decisions)
            self._change(kept)

    def _keep(self, view: RunView) -> _Kept:
        if len(self._kept) >= MAX_RUNS:
            over = (kept.view.name for kept in self._kept.values() if kept.view.state != "running")
            del self._kept[next(over, next(iter(self._kept)))]
            self.num_hidden += 1
        kept = self._kept[view.name] = _Kept(view)
        return kept

    def _settle(self, kept: _Kept, command_id: str, outcome: str, step: int | None = None, detail: str = "") -> None:
        for index in range(len(kept.decisions) - 1, -1, -1):
            decision = kept.decisions[index]
            if any(each.command.id == command_id for each in decision.commands):
                commands = tuple(
                    _with_outcome(each, outcome, step, detail) if each.command.id == command_id else each
                    for each in decision.commands
                )
                kept.decisions[index] = replace(decision, commands=commands)
                self._change(kept)
                return

    def _change(self, kept: _Kept, **values: object) -> None:
        self.revision += 1
        kept.view = replace(kept.view, revision=self.revision, **values)  # type: ignore[arg-type]


def _before(kept: deque[T], earlier: list[T]) -> None:
    """Insert the items of `earlier` that are older than the first item, as far as there is room."""
    first = kept[0].step if kept else float("inf")
    room = (kept.maxlen or 0) - len(kept)
    older = [each for each in earlier if each.step < first]
    kept.extendleft(reversed(older[-room:] if room else []))


def _with_outcome(command: CommandView, outcome: str, step: int | None, detail: str) -> CommandView:
    # The outcome "duplicate" does not contain the result of the command.
    if outcome == "duplicate" or (outcome == "unanswered" and command.outcome not in ("pending", "unanswered")):
        return command
    return replace(command, outcome=outcome, step=step, detail=detail)


def _health(run: Run, lost: dict[str, int]) -> AgentHealth:
    beats = run.heartbeats
    dropped = dict(lost)
    for beat in beats:
        for reason, count in beat.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return AgentHealth(
        num_ranks=sum(not peer.gone for peer in run.peers.values()),
        world_size=run.hello.world_size,
        overhead_ratio=max((beat.overhead_ratio for beat in beats), default=None),
        step_seconds=max((beat.step_seconds for beat in beats if beat.step_seconds is not None), default=None),
        taps_missing=sum(beat.taps_missing for beat in beats),
        control_ready=all(beat.control_ready for beat in beats),
        dropped=dropped,
    )
