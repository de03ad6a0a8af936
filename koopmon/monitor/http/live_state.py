"""State of the live page, shared between the daemon's thread and the web server's.

The daemon writes: each call copies a few numbers under a lock and never blocks on readers. Readers take frozen views.
The number of runs is bounded, and so are the points, columns and decisions of each; the history has the rest.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from koopmon.history.schema import RunState
from koopmon.monitor.registry import Run
from koopmon.monitor.run_controller import Assessment, RunController
from koopmon.policy import PolicyState
from koopmon.views.run_view import (
    AgentHealth,
    CommandView,
    DecisionView,
    PolicyStatus,
    RunView,
    TimelinePoint,
)
from koopmon.views.spectra import Column, Spectrum
from koopmon.wire.messages import Ack

MAX_RUNS = 256
"""Maximum number of runs on the page; above it the oldest finished run is removed."""
MAX_POINTS = 400
MAX_COLUMNS = 240
MAX_DECISIONS = 50
HEALTH_SECONDS = 1.0
"""Minimum interval between health updates of a run, which may have thousands of ranks."""

T = TypeVar("T", TimelinePoint, Column, DecisionView)


@dataclass(slots=True)
class _Kept:
    """One run in the live state; `view` holds values that are replaced, the bounded deques hold series."""

    view: RunView
    points: deque[TimelinePoint] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))
    columns: deque[Column] = field(default_factory=lambda: deque(maxlen=MAX_COLUMNS))
    decisions: deque[DecisionView] = field(default_factory=lambda: deque(maxlen=MAX_DECISIONS))
    lost: dict[str, int] = field(default_factory=dict)
    """Snapshots lost inside the monitor, by reason."""
    health_at: float = float("-inf")

    def shown(self) -> RunView:
        points, columns, decisions = tuple(self.points), tuple(self.columns), tuple(self.decisions)
        return replace(self.view, points=points, columns=columns, decisions=decisions)


class LiveState:
    """Live state of all runs. `boot` identifies this instance; revisions of other instances are not comparable."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.boot = secrets.token_hex(4)
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._revision = 0
        self._num_hidden = 0

    @property
    def revision(self) -> int:
        """Revision number, incremented by every change; reading it takes no lock."""
        return self._revision

    @property
    def num_hidden(self) -> int:
        """Number of runs removed from the page to make room for other runs."""
        return self._num_hidden

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

    def update_run(self, run: Run, *, sends: bool) -> None:
        """Update a run from the registry, and the health of its agents."""
        now, hello = self._clock(), run.hello
        with self._lock:
            kept = self._kept.get(run.name)
            if kept is None:
                kept = self._keep(RunView(name=run.name, incarnation=run.incarnation))
            elif kept.view.incarnation != run.incarnation:
                self._follow(kept, run.incarnation)
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
                sends=sends,
                hostname=hello.hostname,
                step=run.step,
                lr_scale=run.applied.lr_scale,
                kss_alpha=run.applied.kss.alpha,
                health=health,
            )
            changed = view != kept.view
            kept.view = replace(view, last_heard=self._wall())
            if changed:
                self._change(kept)

    def mark_ended(self, name: str, state: RunState) -> None:
        """Mark a run as ended or vanished; the time of its last message stays."""
        with self._lock:
            if (kept := self._kept.get(name)) is not None:
                self._change(kept, state=state.name.lower())

    def count_snapshot(self, name: str) -> None:
        """Count a received snapshot."""
        with self._lock:
            if (kept := self._kept.get(name)) is not None:
                kept.view = replace(kept.view, num_received=kept.view.num_received + 1)

    def count_drop(self, name: str, reason: str) -> None:
        """Count a snapshot that was lost in the monitor."""
        with self._lock:
            if (kept := self._kept.get(name)) is not None:
                kept.lost[reason] = kept.lost.get(reason, 0) + 1

    def record_assessment(self, name: str, assessment: Assessment, controller: RunController) -> None:
        """Add one snapshot with its assessment."""
        seen, risk, profile = assessment.observation, assessment.risk, assessment.profile
        # The history stores the same form of a profile: the page and the report cannot disagree.
        plain = None if profile is None else profile.to_dict()
        column = None if plain is None else Column.of(seen.step, plain["layers"])
        spectrum = None if plain is None else Spectrum.of(seen.step, plain)
        at = self._wall()
        status = PolicyStatus(
            now=self._clock(),
            state=controller.policy_state,
            observation=seen,
            risk=risk,
            policy=controller.config.policy,
            kss=controller.kss_config,
        )
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                return
            incarnation = kept.view.incarnation
            kept.points.append(TimelinePoint.of_assessment(incarnation, at, assessment.observation, assessment.risk))
            if column is not None:
                kept.columns.append(column)
            self._change(kept, standing=status, spectrum=spectrum or kept.view.spectrum)

    def record_decision(self, name: str, assessment: Assessment) -> None:
        """Add the decision of an assessment."""
        with self._lock:
            kept, decision = self._kept.get(name), assessment.decision
            if kept is None or decision is None:
                return
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

    def set_policy_state(self, name: str, state: PolicyState) -> None:
        """Update the policy state after an ack."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is not None and kept.view.standing is not None:
                self._change(kept, standing=replace(kept.view.standing, state=state))

    def record_ack(self, ack: Ack) -> None:
        """Record the outcome of a command from rank 0's ack."""
        self._settle(ack.run, ack.command_id, ack.outcome, ack.step, ack.detail)

    def record_outcome(self, name: str, command_id: str, outcome: str) -> None:
        """Record the outcome of a command without an ack."""
        self._settle(name, command_id, outcome)

    def backfill(
        self,
        view: RunView,
        *,
        points: Iterable[TimelinePoint] = (),
        columns: Iterable[Column] = (),
        decisions: Iterable[DecisionView] = (),
    ) -> None:
        """Insert values of the history before the live values, which stay unchanged."""
        # Evaluate the iterables outside the lock: they may read from a file.
        points, columns, decisions = list(points), list(columns), list(decisions)
        with self._lock:
            kept = self._kept.get(view.name)
            if kept is None:
                kept = self._keep(view)
            elif kept.view.spectrum is None:
                kept.view = replace(kept.view, spectrum=view.spectrum)
            _before(kept.points, points)
            _before(kept.columns, columns)
            _before(kept.decisions, decisions)
            self._change(kept)

    def _keep(self, view: RunView) -> _Kept:
        if len(self._kept) >= MAX_RUNS:
            over = (kept.view.name for kept in self._kept.values() if kept.view.state != "running")
            del self._kept[next(over, next(iter(self._kept)))]
            self._num_hidden += 1
        kept = self._kept[view.name] = _Kept(view)
        return kept

    def _follow(self, kept: _Kept, incarnation: str) -> None:
        """Switch to a new launch of the run: keep points and decisions, reset the policy status."""
        kept.lost.clear()
        kept.health_at = float("-inf")
        kept.view = replace(kept.view, incarnation=incarnation, standing=None, num_received=0)

    def _settle(self, name: str, command_id: str, outcome: str, step: int | None = None, detail: str = "") -> None:
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                return
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
        self._revision += 1
        kept.view = replace(kept.view, revision=self._revision, **values)  # type: ignore[arg-type]


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
