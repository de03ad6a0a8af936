"""Summary of a finished run from its history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from koopmon.errors import StoreError
from koopmon.history.reader import DecisionRow, HeartbeatRow, HistoryReader, IncarnationRow

_SENT = frozenset({"sent", "applied", "unanswered", "pending"})


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
    num_kss: int
    """Number of commands that switched KSS on or raised its weight."""
    max_kss_alpha: float
    num_held_back: int
    """Number of commands not sent because of dry-run."""
    num_refused: int
    """Number of commands that the agents did not apply."""
    max_overhead_ratio: float | None
    store: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        if self.adapter is None:
            return ["no training process attached; if no line above says why, install koopmon for the job's own Python"]
        risk = "" if self.max_risk is None else f"; highest risk {self.max_risk:.2f} at step {self.max_risk_step}"
        seen = f"{self.num_snapshots} snapshots up to step {self.last_step}{risk}"
        acted = []
        if self.num_backoffs:
            acted.append(
                f"learning rate lowered {_times(self.num_backoffs)}, to {self.min_lr_scale:.3g} of its schedule"
            )
        if self.num_kss:
            acted.append(f"KSS raised {_times(self.num_kss)}, to alpha {self.max_kss_alpha:.3g}")
        if self.num_held_back:
            acted.append(f"{self.num_held_back} commands held back: this job was only watched")
        if self.num_refused:
            acted.append(f"{self.num_refused} commands not applied")
        return [seen, "; ".join(acted) or "nothing was done to the training", f"history: {self.store}"]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def summarise(store: Path, run: str) -> RunSummary | None:
    """Read the history of `run`; None when there is none to read."""
    try:
        with HistoryReader.open(store) as history:
            return _summarise(history, store, run)
    except StoreError:
        return None


def _summarise(history: HistoryReader, store: Path, run: str) -> RunSummary:
    return summary_of(
        run,
        store,
        history.incarnations(run),
        list(history.observations(run)),
        list(history.heartbeats(run)),
        list(history.decisions(run)),
    )


class Judged(Protocol):
    """A snapshot and its risk: a row of the history or a point of the report."""

    @property
    def step(self) -> int: ...
    @property
    def risk(self) -> float: ...


def summary_of(
    run: str,
    store: Path,
    incarnations: Sequence[IncarnationRow],
    observations: Sequence[Judged],
    beats: Sequence[HeartbeatRow],
    decisions: Sequence[DecisionRow],
) -> RunSummary:
    """Compute the counts and extremes from the rows of a history."""
    hellos = [row.hello for row in incarnations if row.hello is not None]
    worst = max(observations, key=lambda row: row.risk, default=None)
    steps = [row.step for row in observations] + [row.step for row in beats]
    backoffs, kss = _backoffs(decisions), _kss(decisions)
    outcomes = [row.outcome for decision in decisions for row in decision.commands]
    return RunSummary(
        run=run,
        adapter=hellos[-1].adapter if hellos else None,
        num_snapshots=len(observations),
        last_step=max(steps, default=None),
        max_risk=None if worst is None else worst.risk,
        max_risk_step=None if worst is None else worst.step,
        num_backoffs=len(backoffs),
        min_lr_scale=min(backoffs, default=1.0),
        num_kss=len(kss),
        max_kss_alpha=max(kss, default=0.0),
        num_held_back=outcomes.count("dry_run"),
        num_refused=sum(outcome in {"refused", "failed", "expired"} for outcome in outcomes),
        max_overhead_ratio=max((row.overhead_ratio for row in beats), default=None),
        store=str(store),
    )


def _backoffs(decisions: Sequence[DecisionRow]) -> list[float]:
    """Learning-rate scales of the sent commands that lowered the scale."""
    lowered, current = [], 1.0
    for row in (row for decision in decisions for row in decision.commands):
        if row.outcome in _SENT and row.command.lr_scale is not None:
            if row.command.lr_scale < current:
                lowered.append(row.command.lr_scale)
            current = row.command.lr_scale
    return lowered


def _kss(decisions: Sequence[DecisionRow]) -> list[float]:
    """KSS weights of the sent commands that raised the weight."""
    raised, current = [], 0.0
    for row in (row for decision in decisions for row in decision.commands):
        if row.outcome in _SENT and row.command.kss is not None:
            if row.command.kss.alpha > current:
                raised.append(row.command.kss.alpha)
            current = row.command.kss.alpha
    return raised
