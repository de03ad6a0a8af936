"""What the live page shows, handed from the daemon's thread to the web server's.

The daemon writes: each call copies a few numbers under a lock and waits for nobody. Readers take frozen views. What is
kept is bounded: so many runs, and of each the last so many points, columns and decisions; the history has the rest.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from koopmon.history.schema import RunState
from koopmon.monitor.registry import Run
from koopmon.monitor.run_controller import Assessment, RunController
from koopmon.monitor.sample import Sample
from koopmon.policy import PolicyState
from koopmon.views.run_view import (
    AgentHealth,
    Column,
    CommandView,
    DecisionView,
    PolicyStatus,
    RunView,
    TimelinePoint,
    column_of,
    spectrum_of,
)
from koopmon.wire.messages import Ack

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

MAX_RUNS = 256
"""Runs that are shown; of more, those go that are over, the oldest first."""
MAX_POINTS = 400
MAX_COLUMNS = 240
MAX_DECISIONS = 50
HEALTH_SECONDS = 1.0
"""Least time between two looks at a run's ranks, of which there may be thousands."""

T = TypeVar("T", TimelinePoint, Column, DecisionView)


@dataclass(slots=True)
class _Kept:
    """One run, as the live state keeps it; `view` holds what is replaced, the rest grows and is cut."""

    view: RunView
    points: deque[TimelinePoint] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))
    columns: deque[Column] = field(default_factory=lambda: deque(maxlen=MAX_COLUMNS))
    decisions: deque[DecisionView] = field(default_factory=lambda: deque(maxlen=MAX_DECISIONS))
    lost: dict[str, int] = field(default_factory=dict)
    """Snapshots that the monitor itself lost, by reason."""
    health_at: float = float("-inf")

    def shown(self) -> RunView:
        points, columns, decisions = tuple(self.points), tuple(self.columns), tuple(self.decisions)
        return replace(self.view, points=points, columns=columns, decisions=decisions)


class LiveState:
    """`boot` names this board: revisions of another one mean nothing here."""

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
        """Grows with every change; reading it costs nothing."""
        return self._revision

    @property
    def num_hidden(self) -> int:
        """How often a run had to give way to another."""
        return self._num_hidden

    def names(self) -> list[str]:
        with self._lock:
            return list(self._kept)

    def view(self, name: str) -> RunView | None:
        with self._lock:
            kept = self._kept.get(name)
            return None if kept is None else kept.shown()

    def views(self, *, since: int = -1) -> list[RunView]:
        """Every run that changed after revision `since`, in the order in which they came."""
        with self._lock:
            return [kept.shown() for kept in self._kept.values() if kept.view.revision > since]

    def update_run(self, run: Run, *, sends: bool) -> None:
        """Take what the registry knows of a run, and how its agents are."""
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
        """A run ended or vanished; when it was last heard stays."""
        with self._lock:
            if (kept := self._kept.get(name)) is not None:
                self._change(kept, state=state.name.lower())

    def count_snapshot(self, name: str) -> None:
        """A snapshot came."""
        with self._lock:
            if (kept := self._kept.get(name)) is not None:
                kept.view = replace(kept.view, num_received=kept.view.num_received + 1)

    def count_drop(self, name: str, reason: str) -> None:
        """A snapshot was lost in the monitor."""
        with self._lock:
            if (kept := self._kept.get(name)) is not None:
                kept.lost[reason] = kept.lost.get(reason, 0) + 1

    def record_assessment(
        self, name: str, sample: Sample, profile: SpectralProfile | None, assessment: Assessment, status: PolicyStatus
    ) -> None:
        """One snapshot, with what it was found to say and what was decided."""
        column = None if profile is None else column_of(sample.step, profile)
        spectrum = None if profile is None else spectrum_of(sample.step, profile)
        at = self._wall()
        point = TimelinePoint(
            step=sample.step,
            time=at,
            risk=assessment.risk.value,
            forecast=assessment.risk.forecast,
            loss=sample.loss,
            learning_rate=sample.learning_rate,
            lr_scale=sample.lr_scale,
            kss_alpha=sample.kss_alpha,
        )
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                return
            kept.points.append(point)
            if column is not None:
                kept.columns.append(column)
            if assessment.decision is not None and assessment.remarkable:
                outcome = "pending" if kept.view.sends else "dry_run"
                kept.decisions.append(
                    DecisionView(
                        step=sample.step,
                        time=at,
                        phase=assessment.decision.phase,
                        reason=assessment.decision.reason,
                        risk=assessment.risk.value,
                        orders=tuple(CommandView(command=command, outcome=outcome) for command in assessment.commands),
                    )
                )
            self._change(kept, standing=status, spectrum=spectrum or kept.view.spectrum)

    def set_policy_state(self, name: str, state: PolicyState) -> None:
        """An answer changed where the policy stands."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is not None and kept.view.standing is not None:
                self._change(kept, standing=replace(kept.view.standing, state=state))

    def record_ack(self, ack: Ack) -> None:
        """Rank 0 answered a command."""
        self._settle(ack.run, ack.command_id, ack.outcome, ack.step, ack.detail)

    def record_outcome(self, name: str, command_id: str, outcome: str) -> None:
        """What became of a command when no answer tells."""
        self._settle(name, command_id, outcome)

    def backfill(
        self,
        view: RunView,
        *,
        points: Iterable[TimelinePoint] = (),
        columns: Iterable[Column] = (),
        decisions: Iterable[DecisionView] = (),
    ) -> None:
        """Put what the history knows before what was heard since, which stays as it is."""
        # Outside the lock: they may be read from a file only now.
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
        """A new launch goes on where the last one stood: points and decisions stay, the policy's state does not."""
        kept.lost.clear()
        kept.health_at = float("-inf")
        kept.view = replace(kept.view, incarnation=incarnation, standing=None, num_received=0)

    def _settle(self, name: str, command_id: str, outcome: str, step: int | None = None, detail: str = "") -> None:
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                return
            for index in range(len(kept.decisions) - 1, -1, -1):
                decided = kept.decisions[index]
                if any(order.command.id == command_id for order in decided.orders):
                    orders = tuple(
                        _with_outcome(order, outcome, step, detail) if order.command.id == command_id else order
                        for order in decided.orders
                    )
                    kept.decisions[index] = replace(decided, orders=orders)
                    self._change(kept)
                    return

    def _change(self, kept: _Kept, **values: object) -> None:
        self._revision += 1
        kept.view = replace(kept.view, revision=self._revision, **values)  # type: ignore[arg-type]


def policy_status_of(now: float, controller: RunController, assessment: Assessment) -> PolicyStatus:
    """`now` is of the clock that the controller is asked by."""
    return PolicyStatus(
        now=now,
        state=controller.policy_state,
        observation=assessment.observation,
        risk=assessment.risk,
        policy=controller.policy_config,
        kss=controller.kss_config,
    )


def _before(kept: deque[T], earlier: list[T]) -> None:
    """Put `earlier` in front, as far as it is older than what is there and there is room."""
    first = kept[0].step if kept else float("inf")
    room = (kept.maxlen or 0) - len(kept)
    older = [each for each in earlier if each.step < first]
    kept.extendleft(reversed(older[-room:] if room else []))


def _with_outcome(order: CommandView, outcome: str, step: int | None, detail: str) -> CommandView:
    # That a command is a duplicate says nothing of what became of it.
    if outcome == "duplicate" or (outcome == "unanswered" and order.outcome not in ("pending", "unanswered")):
        return order
    return replace(order, outcome=outcome, step=step, detail=detail)


def _health(run: Run, lost: dict[str, int]) -> AgentHealth:
    beats = [peer.heartbeat for peer in run.peers.values() if peer.heartbeat is not None]
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
