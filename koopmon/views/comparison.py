"""Comparison of recorded runs: their figures side by side, and the facts that only the bad runs have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from koopmon.history.reader import HistoryReader
from koopmon.history.rows import ObservationRow
from koopmon.views.run_summary import RecordedRun, State, state_of, summary_of
from koopmon.views.run_view import TimelinePoint

Fact = str | float | bool
_INITIAL = {
    "near_unit_mass": "near-unit mass at the start",
    "expansive_mass": "expansive mass at the start",
    "spectral_radius": "spectral radius at the start",
    "update_ratio": "update ratio at the start",
}
"""Measurements of the first informative snapshot that count as facts, with their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """The figures of one run. Steps are optimizer steps; None means unknown."""

    run: str
    state: State
    problem: str | None
    """Reason why the run counts as bad; None for a good run."""
    num_launches: int
    num_snapshots: int
    last_step: int | None
    first_loss: float | None
    last_loss: float | None
    max_risk: float | None
    max_risk_step: int | None
    peak_learning_rate: float | None
    min_lr_scale: float
    """Lowest LR scale of a snapshot."""
    actions: tuple[str, ...]
    """One phrase for each kind of action."""
    facts: Mapping[str, Fact] = field(default_factory=dict)
    """Known facts by name: settings, sizes, versions, and measurements at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFact:
    """A fact that all bad runs share and no good run has.

    `relation` is "equal" for one common value, "above" or "below" if all values of bad runs are above or below those
    of good runs. `bad` and `good` have the distinct values in order.
    """

    fact: str
    relation: Literal["equal", "above", "below"]
    bad: tuple[Fact, ...]
    good: tuple[Fact, ...]

    @property
    def words(self) -> str:
        """The fact as a phrase."""
        if self.relation == "equal":
            return f"{self.fact}: {_shown(self.bad[0])} (good runs: {', '.join(map(_shown, self.good))})"
        if self.relation == "above":
            return f"{self.fact}: {_shown(self.bad[0])} or more (good runs: {_shown(self.good[-1])} or less)"
        return f"{self.fact}: {_shown(self.bad[-1])} or less (good runs: {_shown(self.good[0])} or more)"


def compared_run(history: HistoryReader, store: Path, name: str, act_risk: float, now: float) -> ComparedRun:
    """Read the figures of one run. It is bad after a risk of at least `act_risk` or values that are not finite.

    Raises StoreError.
    """
    row = history.run(name)
    run = RecordedRun.read(history, name)
    summary, points = summary_of(run, store), run.points
    losses = [loss for point in points if (loss := point.training.loss) is not None and math.isfinite(loss)]
    rates = [rate for point in points if (rate := point.training.learning_rate) is not None and math.isfinite(rate)]
    peak = max(rates, default=None)
    return ComparedRun(
        run=name,
        state="ended" if row is None else state_of(row.state, row.last_seen, now),
        problem=_problem(points, act_risk),
        num_launches=len(run.launches),
        num_snapshots=len(points),
        last_step=summary.last_step,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        max_risk=summary.max_risk,
        max_risk_step=summary.max_risk_step,
        peak_learning_rate=peak,
        min_lr_scale=min((point.training.lr_scale for point in points), default=1.0),
        actions=tuple(summary.actions()),
        facts=dict(_facts(run, history.observations(name), peak)),
    )


def shared_facts(runs: Sequence[ComparedRun]) -> list[SharedFact]:
    """Return the facts that are known of all runs and separate the bad ones from the good ones.

    It is empty unless there are runs of both kinds.
    """
    bad = [run.facts for run in runs if run.problem is not None]
    good = [run.facts for run in runs if run.problem is None]
    if not bad or not good:
        return []
    names = [name for name in bad[0] if all(name in facts for facts in (*bad, *good))]
    found = (_separation(name, [facts[name] for facts in bad], [facts[name] for facts in good]) for name in names)
    return [fact for fact in found if fact is not None]


def _separation(name: str, bad: Sequence[Fact], good: Sequence[Fact]) -> SharedFact | None:
    ordered = all(isinstance(value, float) for value in (*bad, *good))

    def distinct(values: Sequence[Fact]) -> tuple[Fact, ...]:
        return tuple(sorted(set(values), key=lambda value: value if ordered else str(value)))

    bads, goods = distinct(bad), distinct(good)
    if len(bads) == 1 and bads[0] not in goods:
        return SharedFact(fact=name, relation="equal", bad=bads, good=goods)
    if ordered and bads[0] > goods[-1]:  # type: ignore[operator]
        return SharedFact(fact=name, relation="above", bad=bads, good=goods)
    if ordered and bads[-1] < goods[0]:  # type: ignore[operator]
        return SharedFact(fact=name, relation="below", bad=bads, good=goods)
    return None


def _problem(points: Sequence[TimelinePoint], act_risk: float) -> str | None:
    broken = next((point for point in points if point.broken), None)
    if broken is not None:
        return f"states or loss not finite from step {broken.step} on"
    high = next((point for point in points if point.risk >= act_risk), None)
    return None if high is None else f"risk {act_risk:.2f} or more from step {high.step} on"


def _facts(run: RecordedRun, rows: Iterator[ObservationRow], peak: float | None) -> Iterator[tuple[str, Fact]]:
    hello = next((launch.hello for launch in reversed(run.launches) if launch.hello is not None), None)
    if hello is not None:
        yield "adapter", hello.adapter
        yield "layers", float(hello.num_layers)
        yield "width", float(hello.width)
        yield "ranks", float(hello.world_size)
        yield "koopmon may act", hello.acts
        yield "host", hello.hostname
        yield "koopmon", hello.koopmon_version
        yield "torch", hello.torch_version
    if peak is not None:
        yield "peak learning rate", peak
    first = next((row for row in rows if row.observation.get("informative") is True), None)
    if first is not None:
        known: dict[str, Any] = {name: first.observation.get(key) for key, name in _INITIAL.items()}
        known["gradient norm at the start"] = first.training.grad_norm
        known["loss at the start"] = first.training.loss
        for name, value in known.items():
            # The file may be forged.
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                yield name, float(value)


def _shown(value: Fact) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else value
