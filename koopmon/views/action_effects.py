"""Decisions of a run with the outcome and effect of each command: snapshots before and after an action are compared.

This comparison is not an experiment: the course of the run without the action is unknown.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from koopmon.history.reader import CommandRow, DecisionRow
from koopmon.wire.messages import AtStep, TrainingStep

WINDOW = 8
"""Maximum number of snapshots compared on each side of an action."""
MIN_SNAPSHOTS = 3
"""Minimum number of snapshots after an action for a verdict."""
RISK_CHANGE = 0.05
"""Smaller changes of the risk count as no change."""
LOSS_CHANGE = 0.05
"""Smaller relative changes of the loss count as no change."""
EffectVerdict = Literal["helped", "not enough", "did not help", "unclear", "cannot be told"]
Direction = Literal["brake", "give back", "watch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPoint(AtStep):
    """One snapshot with its assessment. `risk` and `forecast` are in [0, 1]; `reason` is the detector's."""

    incarnation: str
    training: TrainingStep
    time: float
    risk: float
    forecast: float | None
    non_finite: bool
    informative: bool
    reason: str

    @property
    def broken(self) -> bool:
        """True if the states or the loss were not finite."""
        loss = self.training.loss
        return self.non_finite or (loss is not None and not math.isfinite(loss))


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Risk and loss before and after a command.

    `risk_before` is the risk at the decision. `risk_after` is the median over the snapshots after the command, up to
    the next action. `loss_before` and `loss_after` are medians over `num_losses_before` and `num_losses_after`
    snapshots.
    """

    num_before: int
    num_after: int
    risk_before: float | None
    risk_after: float | None
    num_losses_before: int
    num_losses_after: int
    loss_before: float | None
    loss_after: float | None
    verdict: EffectVerdict
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCommand:
    """One command.

    `step` is the step of its ack; `delay_steps` is the number of steps from the assessed snapshot to its application.
    """

    id: str
    kind: str
    what: str
    direction: Direction
    reason: str
    outcome: str
    detail: str
    step: int | None
    delay_steps: int | None
    lr_scale: float | None
    kss_alpha: float | None
    effect: Effect | None
    """None for a command that was not applied, and for one that is not a brake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedDecision:
    """One decision of the policy with its commands."""

    incarnation: str
    step: int
    time: float
    phase: str
    risk: float
    reason: str
    actions: tuple[RecordedCommand, ...]


def read_decisions(rows: Sequence[DecisionRow], points: Sequence[RecordedPoint]) -> Iterator[RecordedDecision]:
    """Yield the decisions of a run in order; each applied brake has its effect."""
    directions = dict(_directions(rows, points))
    in_force = sorted(_training_steps(rows, directions))
    launches: dict[str, list[RecordedPoint]] = {}
    for point in sorted(points, key=_step):
        launches.setdefault(point.incarnation, []).append(point)
    for row in rows:
        actions = []
        for each in row.commands:
            direction, effect, step = directions[each.command.id], None, each.acked_step
            if each.outcome == "applied" and step is not None and direction == "brake":
                following = next((one for one in in_force if one[0] == row.incarnation and one[1] > step), None)
                effect = effect_of(row, step, following, launches.get(row.incarnation, []))
            actions.append(_action(row, each, direction, effect))
        yield RecordedDecision(
            incarnation=row.incarnation,
            step=row.step,
            time=row.time,
            phase=row.phase,
            risk=row.risk,
            reason=row.reason,
            actions=tuple(actions),
        )


def _directions(rows: Sequence[DecisionRow], points: Sequence[RecordedPoint]) -> Iterator[tuple[str, Direction]]:
    """Yield the id and direction of each command, compared with the values in force before it."""
    scale, alpha, incarnation = 1.0, 0.0, ""
    for row in rows:
        if row.incarnation != incarnation:
            incarnation = row.incarnation
            seen = next((point for point in points if point.incarnation == incarnation), None)
            scale, alpha = (1.0, 0.0) if seen is None else (seen.training.lr_scale, seen.training.kss_alpha)
        for each in row.commands:
            command, applied = each.command, each.outcome == "applied"
            if command.lr_scale is not None:
                yield command.id, "brake" if command.lr_scale < scale else "give back"
                scale = command.lr_scale if applied else scale
            elif command.kss is not None:
                yield command.id, "brake" if command.kss.alpha > alpha else "give back"
                alpha = command.kss.alpha if applied else alpha
            else:
                yield command.id, "brake" if command.kind == "stop" else "watch"


Following = tuple[str, int, Direction]
"""An applied action: its incarnation, step and direction."""


def effect_of(row: DecisionRow, step: int, following: Following | None, points: Sequence[RecordedPoint]) -> Effect:
    """Compare the snapshots up to the decision with those after `step`, up to the `following` action.

    `points` are those of the decision's own launch, sorted by step.
    """
    place = bisect_right(points, row.step, key=_step)
    before = points[max(0, place - WINDOW) : place]
    # The snapshot at `step` itself was taken before the optimizer stepped with the new value.
    first = bisect_right(points, step, key=_step)
    last = len(points) if following is None else bisect_right(points, following[1], key=_step)
    after = points[first : min(last, first + WINDOW)]
    losses = [[p.training.loss for p in side if p.training.loss is not None] for side in (before, after)]
    risk_after = _median(point.risk for point in after)
    verdict, why = _verdict(row.risk, risk_after, losses, after, following if len(after) < WINDOW else None)
    return Effect(
        num_before=len(before),
        num_after=len(after),
        risk_before=row.risk,
        risk_after=risk_after,
        num_losses_before=len(losses[0]),
        num_losses_after=len(losses[1]),
        loss_before=_median(losses[0]),
        loss_after=_median(losses[1]),
        verdict=verdict,
        why=why,
    )


def _verdict(
    answered: float,
    risk_after: float | None,
    losses: Sequence[Sequence[float]],
    after: Sequence[RecordedPoint],
    cut: Following | None,
) -> tuple[EffectVerdict, str]:
    """Return the verdict and its reason; `cut` is the action that ended the comparison early."""
    if any(point.broken for point in after):
        return "did not help", "afterwards the states or the loss were not finite"
    if len(after) < MIN_SNAPSHOTS or risk_after is None:
        seen = f"{len(after)} snapshot{'s' * (len(after) != 1)} after it"
        if cut is not None:
            return "cannot be told", f"{seen} before the next action at step {cut[1]}: the two cannot be told apart"
        return "cannot be told", f"{seen}, {MIN_SNAPSHOTS} are needed"
    risk = _moved(risk_after - answered, RISK_CHANGE)
    loss, words = 0, f"the risk {_WORDS[risk]}, the loss was not logged"
    if min(map(len, losses)) >= MIN_SNAPSHOTS:
        old, new = statistics.median(losses[0]), statistics.median(losses[1])
        loss = _moved(new - old, LOSS_CHANGE * abs(old))
        words = f"the risk {_WORDS[risk]}, the loss {_WORDS[loss]}"
    if cut is not None and cut[2] == "brake":
        return "not enough", f"{words}, and another brake followed at step {cut[1]}"
    if risk > 0 or (risk == 0 and loss > 0):
        return "did not help", words
    return ("helped" if risk < 0 and loss <= 0 else "unclear"), words


_WORDS = {-1: "fell", 0: "held", 1: "rose"}


def _step(point: RecordedPoint) -> int:
    return point.step


def _moved(difference: float, least: float) -> int:
    return 0 if abs(difference) < least else 1 if difference > 0 else -1


def _training_steps(rows: Iterable[DecisionRow], directions: Mapping[str, Direction]) -> Iterator[Following]:
    for row in rows:
        for each in row.commands:
            direction = directions[each.command.id]
            if direction != "watch" and each.outcome == "applied" and each.acked_step is not None:
                yield row.incarnation, each.acked_step, direction


def _action(row: DecisionRow, each: CommandRow, direction: Direction, effect: Effect | None) -> RecordedCommand:
    command = each.command
    if command.lr_scale is not None:
        what = f"learning rate × {command.lr_scale:.3g}"
    elif command.kss is not None:
        what = f"KSS alpha {command.kss.alpha:.3g}" if command.kss.alpha else "KSS off"
    elif command.cadence_steps is not None:
        until = "" if command.cadence_until_step is None else f" until step {command.cadence_until_step}"
        every = "every step" if command.cadence_steps == 1 else f"every {command.cadence_steps} steps"
        what = f"a snapshot {every}{until}"
    else:
        what = "stop"
    in_force = each.acked_step if each.outcome == "applied" else None
    return RecordedCommand(
        id=command.id,
        kind=command.kind,
        what=what,
        direction=direction,
        reason=command.reason,
        outcome=each.outcome,
        detail=each.detail or "",
        step=each.acked_step,
        delay_steps=None if in_force is None else in_force - row.step,
        lr_scale=command.lr_scale,
        kss_alpha=None if command.kss is None else command.kss.alpha,
        effect=effect,
    )


def _median(values: Iterable[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return statistics.median(known) if known else None
