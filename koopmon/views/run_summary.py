"""A recorded run, read once for the report and the command line, and its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from koopmon.errors import StoreError
from koopmon.history.reader import HeartbeatRow, HistoryReader, IncarnationRow
from koopmon.views.run_view import DecisionView, TimelinePoint

_SENT = frozenset({"sent", "applied", "unanswered", "pending"})


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
            points=[TimelinePoint.of_row(row) for row in history.observations(name)],
            beats=list(history.heartbeats(name)),
            decisions=[DecisionView.of_row(row) for row in history.decisions(name)],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Counts and extremes of one run; a step is an optimizer step, None means unknown."""

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
    num_held_back: int
    """Number of commands not sent because of dry-run."""
    num_refused: int
    """Number of commands that the agents did not apply."""
    max_overhead_ratio: float | None
    store: str

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        if self.adapter is None:
            return ["no training process attached; if no line above says why, install koopmon for the job's own Python"]
        return [self.seen, "; ".join(self.actions()) or "nothing was done to the training", f"history: {self.store}"]

    @property
    def seen(self) -> str:
        """One phrase for the snapshots and the highest risk."""
        risk = "" if self.max_risk is None else f"; highest risk {self.max_risk:.2f} at step {self.max_risk_step}"
        return f"{self.num_snapshots} snapshots up to step {self.last_step}{risk}"

    def beside_line(self) -> str:
        """Return one line for a further stack or model of a job."""
        done = "; ".join(self.actions())
        return f"beside it, run {self.run}: {self.seen}{f'; {done}' if done else ''}"

    def actions(self) -> list[str]:
        """Return one phrase for each kind of action."""
        acted = []
        if self.num_backoffs:
            acted.append(
                f"learning rate lowered {times(self.num_backoffs)}, to {self.min_lr_scale:.3g} of its schedule"
            )
        if self.max_rate is not None:
            acted.append(f"learning rate capped at {self.max_rate:.3g}")
        if self.num_rewinds:
            acted.append(f"went back to earlier weights {times(self.num_rewinds)}")
        if self.num_kss:
            acted.append(f"KSS raised {times(self.num_kss)}, to alpha {self.max_kss_alpha:.3g}")
        if self.num_held_back:
            acted.append(f"{_commands(self.num_held_back)} held back: this job was only watched")
        if self.num_refused:
            acted.append(f"{_commands(self.num_refused)} not applied")
        return acted


def times(count: int) -> str:
    """Format a number of times."""
    return "once" if count == 1 else f"{count} times"


def _commands(count: int) -> str:
    return "1 command" if count == 1 else f"{count} commands"


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
    """Compute the counts and extremes of a run."""
    hellos = [row.hello for row in run.launches if row.hello is not None]
    worst = max(run.points, key=lambda point: point.risk, default=None)
    commands = [each for decision in run.decisions for each in decision.commands]
    sent = [each.command for each in commands if each.outcome in _SENT]
    scales = [1.0, *(command.lr_scale for command in sent if command.lr_scale is not None)]
    alphas = [0.0, *(command.kss.alpha for command in sent if command.kss is not None)]
    backoffs = [new for old, new in pairwise(scales) if new < old]
    raised = [new for old, new in pairwise(alphas) if new > old]
    outcomes = [each.outcome for each in commands]
    return RunSummary(
        run=run.name,
        adapter=hellos[-1].adapter if hellos else None,
        num_snapshots=len(run.points),
        last_step=max([point.step for point in run.points] + [row.step for row in run.beats], default=None),
        max_risk=None if worst is None else worst.risk,
        max_risk_step=None if worst is None else worst.step,
        num_backoffs=len(backoffs),
        min_lr_scale=min(backoffs, default=1.0),
        num_rewinds=sum(command.rewind is not None for command in sent),
        max_rate=min((command.max_rate for command in sent if command.max_rate is not None), default=None),
        num_kss=len(raised),
        max_kss_alpha=max(raised, default=0.0),
        num_held_back=outcomes.count("dry_run"),
        num_refused=sum(outcome in {"refused", "failed", "expired"} for outcome in outcomes),
        max_overhead_ratio=max((row.overhead_ratio for row in run.beats), default=None),
        store=str(store),
    )
