"""A recorded run, read once for the report and the command line, and its summary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from koopmon.errors import NOT_WATCHED, StoreError
from koopmon.history.reader import HistoryReader
from koopmon.history.rows import HeartbeatRow, IncarnationRow
from koopmon.history.schema import RunState
from koopmon.views.run_view import DecisionView, TimelinePoint
from koopmon.wire.messages import TrainingStep

UNHEARD_SECONDS = 120.0
"""A run recorded as running without a write for this many seconds has the state "unheard"."""
State = Literal["running", "unheard", "vanished", "ended"]
MAX_LAUNCHES = 5
"""Launches of one job with a closing line of their own."""
SHOWN_RISK = 0.005
"""A lower risk is 0.00 in words."""
_OPEN = frozenset({"unanswered", "pending"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """The rows of one run without its profiles; empty for a run that the history does not hold."""

    name: str
    launches: Sequence[IncarnationRow]
    points: Sequence[TimelinePoint]
    beats: Sequence[HeartbeatRow]
    decisions: Sequence[DecisionView]

    @classmethod
    def read(cls, history: HistoryReader, name: str) -> RecordedRun:
        """Read a run. Raises StoreError."""
        return cls(
            name=name,
            launches=history.incarnations(name),
            points=[TimelinePoint.of_row(row) for row in history.assessments(name)],
            beats=list(history.heartbeats(name)),
            decisions=[DecisionView.of_row(row) for row in history.decisions(name)],
        )

    def launch(self, row: IncarnationRow) -> RecordedRun:
        """Return the part of one launch."""
        mine = row.incarnation
        return RecordedRun(
            name=self.name,
            launches=[row],
            points=[each for each in self.points if each.incarnation == mine],
            beats=[each for each in self.beats if each.incarnation == mine],
            decisions=[each for each in self.decisions if each.incarnation == mine],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Counts and extremes of one run, or of one launch; a step is an optimizer step, None means unknown."""

    run: str
    adapter: str | None
    """The agents' architecture adapter; None when no agent connected."""
    num_snapshots: int
    last_step: int | None
    max_risk: float | None
    max_risk_step: int | None
    num_backoffs: int
    """Number of commands that lowered the learning rate."""
    min_lr_scale: float
    num_rewinds: int
    """Number of returns to earlier weights."""
    max_rate: float | None
    """Lowest cap on the learning rate; None without one."""
    num_kss: int
    """Number of commands that switched KSS on or raised its weight."""
    max_kss_alpha: float
    num_ceilings: int
    """Number of commands that set ceilings on layers, without corrections."""
    num_held_back: int
    """Number of commands not sent because of dry-run."""
    num_refused: int
    """Number of commands that the agents did not apply."""
    max_overhead_ratio: float | None
    store: str
    num_stops: int = 0
    """Number of applied requests to stop."""
    num_checkpoints: int = 0
    """Number of applied requests for a checkpoint."""
    first_lr_scale: float = 1.0
    """LR scale at the first snapshot: below 1 if an earlier launch left it in force."""
    first_kss_alpha: float = 0.0
    num_unanswered: int = 0
    """Number of commands to change the training that no agent has answered, as at the end of a job."""
    broken_step: int | None = None
    """Step from which on states or loss were not finite, to the last snapshot; None if the last one was finite."""
    launch: int = 0
    """Number of the launch, from 1; 0 for the whole run."""
    started: float = 0.0
    """Unix seconds; 0 for the whole run."""
    launches: tuple[RunSummary, ...] = ()

    def lines(self, since: float = 0.0, *, brief: bool = False) -> list[str]:
        """Return the launches that started after `since` as lines of text.

        `brief`: the job ended just after its monitor served.
        """
        mine = [each for each in self.launches if each.started >= since]
        where = f"`koopmon report {self.run}` shows the run; history: {self.store}"
        if not mine and brief:
            return ["NOT WATCHED: no training process attached: the job ended within seconds of its monitor's start"]
        if not mine:
            return [NOT_WATCHED]
        if len(mine) == 1:
            return [mine[0].seen(), *mine[0].done(), where]
        lines = ["; ".join([f"launch {each.launch}: {each.seen()}", *each.done()]) for each in mine[-MAX_LAUNCHES:]]
        if len(mine) > MAX_LAUNCHES:
            lines.insert(0, f"{len(mine)} launches, of which the last {MAX_LAUNCHES}:")
        return [*lines, where]

    def seen(self) -> str:
        """Return the snapshots of one launch in words."""
        up_to = f" up to step {self.last_step}" if self.last_step else ""
        if not self.num_snapshots:
            return f"NOT WATCHED: no snapshot was seen{up_to}; if no line above says why, run `koopmon doctor`"
        count = "1 snapshot" if self.num_snapshots == 1 else f"{self.num_snapshots} snapshots"
        highest = "risk 0.00 throughout"
        if self.max_risk is not None and self.max_risk >= SHOWN_RISK:
            highest = f"highest risk {self.max_risk:.2f} at step {self.max_risk_step}"
        finite = "finite at the end"
        if self.broken_step is not None:
            finite = f"NOT FINITE (states or loss) from step {self.broken_step} on"
        return f"{count}{up_to}; {highest}; {finite}"

    def done(self) -> list[str]:
        """Return the actions in words; empty if nothing was seen or done."""
        if acted := "; ".join(self.actions()):
            return [acted]
        return ["nothing was done to the training"] if self.num_snapshots else []

    def beside_line(self) -> str:
        """Return one line for a further stack or model of a job."""
        parts = [self.launches[-1].seen(), *self.launches[-1].done()] if self.launches else ["no snapshot was seen"]
        return f"beside it, run {self.run}: {'; '.join(parts)}"

    def actions(self) -> list[str]:
        """Return one phrase for each kind of action."""
        acted = []
        if self.first_lr_scale < 1.0:
            acted.append(f"LR scale {self.first_lr_scale:.3g} in force from the start, from the launch before")
        if self.first_kss_alpha > 0.0:
            acted.append(f"KSS alpha {self.first_kss_alpha:.3g} in force from the start, from the launch before")
        if self.num_backoffs:
            acted.append(f"{backoffs(self.num_backoffs)}, LR scale down to {self.min_lr_scale:.3g}")
        if self.max_rate is not None:
            acted.append(f"learning rate capped at {self.max_rate:.3g}")
        if self.num_rewinds:
            acted.append(f"went back to earlier weights {times(self.num_rewinds)}")
        if self.num_kss:
            acted.append(f"KSS raised {times(self.num_kss)}, to alpha {self.max_kss_alpha:.3g}")
        if self.num_ceilings:
            acted.append(f"ceilings set on what layers write {times(self.num_ceilings)}")
        if self.num_checkpoints:
            acted.append(f"a checkpoint requested {times(self.num_checkpoints)}")
        if self.num_stops:
            acted.append("the training was asked to stop")
        if self.num_held_back:
            acted.append(f"{_commands(self.num_held_back)} held back: this job was only watched")
        if self.num_refused:
            acted.append(f"{_commands(self.num_refused)} not applied")
        if self.num_unanswered:
            acted.append(f"{_commands(self.num_unanswered)} without an answer")
        return acted


def times(count: int) -> str:
    """Format a number of times."""
    return "once" if count == 1 else f"{count} times"


def backoffs(count: int) -> str:
    """Format a number of back-offs."""
    return "1 back-off" if count == 1 else f"{count} back-offs"


def _commands(count: int) -> str:
    return "1 command" if count == 1 else f"{count} commands"


def runs_beside(names: Iterable[str], run: str) -> list[str]:
    """Return the other runs of the job of `run` among `names`: the job's own, and its further stacks and models."""
    return [each for each in names if each.startswith(f"{run}.") or run.startswith(f"{each}.")]


def summarise_beside(store: Path, run: str) -> list[RunSummary]:
    """Return the summaries of the job's further stacks and models, whose names begin with that of `run` and a dot."""
    try:
        with HistoryReader.open(store) as history:
            names = [name for name in history.runs() if name.startswith(f"{run}.")]
            return [summary_of(RecordedRun.read(history, name), store) for name in names]
    except StoreError:
        return []


def summarise(store: Path, run: str) -> RunSummary | None:
    """Read the history of `run`; None when there is none to read."""
    try:
        with HistoryReader.open(store) as history:
            return summary_of(RecordedRun.read(history, run), store)
    except StoreError:
        return None


def summary_of(run: RecordedRun, store: Path) -> RunSummary:
    """Compute the counts and extremes of a run and of each of its launches."""
    launches = tuple(
        replace(_summary(run.launch(row), store), launch=number, started=row.started)
        for number, row in enumerate(run.launches, 1)
        if row.hello is not None
    )
    total = replace(_summary(run, store), launches=launches)
    if not launches:
        return total
    # A launch may begin with the user's own settings again.
    counts = {name: sum(getattr(each, name) for each in launches) for name in ("num_backoffs", "num_kss")}
    lowest = min(each.min_lr_scale for each in launches)
    return replace(total, min_lr_scale=lowest, max_kss_alpha=max(each.max_kss_alpha for each in launches), **counts)


def _broken_step(points: Sequence[TimelinePoint]) -> int | None:
    """Return the first step of the broken snapshots at the end; None if the last snapshot is finite."""
    first = None
    for point in reversed(points):
        if not point.broken:
            break
        first = point.step
    return first


def _summary(run: RecordedRun, store: Path) -> RunSummary:
    hellos = [row.hello for row in run.launches if row.hello is not None]
    worst = max(run.points, key=lambda point: point.risk, default=None)
    commands = [each for decision in run.decisions for each in decision.commands]
    applied = [each.command for each in commands if each.outcome == "applied"]
    held = run.points[0].training if run.points else TrainingStep(step=0)
    scales = [held.lr_scale, *(command.lr_scale for command in applied if command.lr_scale is not None)]
    alphas = [held.kss_alpha, *(command.kss.alpha for command in applied if command.kss is not None)]
    backoffs = [new for old, new in pairwise(scales) if new < old]
    raised = [new for old, new in pairwise(alphas) if new > old]
    outcomes = [each.outcome for each in commands]
    kinds = [command.kind for command in applied]
    return RunSummary(
        run=run.name,
        adapter=hellos[-1].adapter if hellos else None,
        num_snapshots=len(run.points),
        last_step=max([point.step for point in run.points] + [row.step for row in run.beats], default=None),
        max_risk=None if worst is None else worst.risk,
        max_risk_step=None if worst is None else worst.step,
        num_backoffs=len(backoffs),
        min_lr_scale=min(backoffs, default=1.0),
        num_rewinds=sum(command.rewind is not None for command in applied),
        max_rate=min((command.max_rate for command in applied if command.max_rate is not None), default=None),
        num_kss=len(raised),
        max_kss_alpha=max(raised, default=0.0),
        num_ceilings=sum(bool(command.ceilings) and not command.corrects for command in applied),
        num_held_back=outcomes.count("dry_run"),
        num_refused=sum(outcome in {"refused", "failed", "expired"} for outcome in outcomes),
        num_unanswered=sum(each.outcome in _OPEN and each.command.kind != "set_cadence" for each in commands),
        max_overhead_ratio=max((row.overhead_ratio for row in run.beats), default=None),
        store=str(store),
        num_stops=kinds.count("stop"),
        num_checkpoints=kinds.count("checkpoint"),
        first_lr_scale=held.lr_scale,
        first_kss_alpha=held.kss_alpha,
        broken_step=_broken_step(run.points),
    )


def state_of(state: int, last_seen: float, now: float) -> State:
    """Return the state of a recorded run at the time `now`, from its recorded `RunState`."""
    if state == RunState.ENDED:
        return "ended"
    if state == RunState.VANISHED:
        return "vanished"
    return "running" if now - last_seen < UNHEARD_SECONDS else "unheard"
