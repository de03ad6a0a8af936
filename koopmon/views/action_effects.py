"""Effects of commands: snapshots before and after each applied command that restrains the training are compared.

This comparison is not an experiment: the course of the run without the action is unknown.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from koopmon.views.run_view import DecisionView, Direction, TimelinePoint

WINDOW = 8
"""Maximum number of snapshots compared on each side of an action."""
MIN_SNAPSHOTS = 3
"""Minimum number of snapshots after an action for a verdict."""
RISK_CHANGE = 0.05
"""Smaller changes of the risk count as no change."""
LOSS_CHANGE = 0.05
"""Smaller relative changes of the loss count as no change."""
EffectVerdict = Literal["helped", "not enough", "did not help", "unclear", "cannot be told"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Risk and loss before and after a command.

    `risk_before` is the risk at the decision. `risk_after` is the median over the snapshots after the command, up to
    the next action. `loss_before` and `loss_after` are medians.
    """

    num_before: int
    num_after: int
    risk_before: float
    risk_after: float | None
    loss_before: float | None
    loss_after: float | None
    verdict: EffectVerdict
    why: str


class AppliedAction(NamedTuple):
    """An action in force from `step` on."""

    incarnation: str
    step: int
    direction: Direction


def with_effects(decisions: Iterable[DecisionView], points: Sequence[TimelinePoint]) -> Iterator[DecisionView]:
    """Yield the decisions of a run in order.

    Each command has its direction, and an effect if it restrained the training.
    """
    launches: dict[str, list[TimelinePoint]] = {}
    for point in sorted(points, key=_step):
        launches.setdefault(point.incarnation, []).append(point)
    directed = list(_directed(decisions, launches))
    applied = sorted(
        AppliedAction(decision.incarnation, each.applied_step, each.direction)
        for decision in directed
        for each in decision.commands
        if each.applied_step is not None and each.direction is not None and each.direction != "observe"
    )
    for decision in directed:
        commands = []
        for each in decision.commands:
            if each.applied_step is not None and each.direction == "restrain":
                later = (one for one in applied if one[0] == decision.incarnation and one.step > each.applied_step)
                known = launches.get(decision.incarnation, [])
                effect = effect_of(
                    decision, each.applied_step, next(later, None), known, by_loss=each.command.ceilings is not None
                )
                each = replace(each, effect=effect)
            commands.append(each)
        yield replace(decision, commands=tuple(commands))


def _directed(
    decisions: Iterable[DecisionView], launches: Mapping[str, Sequence[TimelinePoint]]
) -> Iterator[DecisionView]:
    """Yield the decisions with the direction of each command, compared with the values in force before it."""
    scale, alpha, incarnation = 1.0, 0.0, ""
    for decision in decisions:
        if decision.incarnation != incarnation:
            incarnation = decision.incarnation
            start = launches.get(incarnation, ())[:1]
            scale, alpha = (start[0].training.lr_scale, start[0].training.kss_alpha) if start else (1.0, 0.0)
        commands = []
        for each in decision.commands:
            command, applied = each.command, each.outcome == "applied"
            restrains = command.kind in ("stop", "rewind")
            if command.lr_scale is not None:
                restrains = command.lr_scale < scale or command.max_rate is not None
                scale = command.lr_scale if applied else scale
            elif command.kss is not None:
                restrains = command.kss.alpha > alpha
                alpha = command.kss.alpha if applied else alpha
            elif command.ceilings is not None:
                restrains = bool(command.ceilings) and not command.corrects
            releases = each.changes_training and command.kind != "checkpoint"
            direction: Direction = "restrain" if restrains else "release" if releases else "observe"
            commands.append(replace(each, direction=direction))
        yield replace(decision, commands=tuple(commands))


def effect_of(
    decision: DecisionView,
    step: int,
    following: AppliedAction | None,
    points: Sequence[TimelinePoint],
    *,
    by_loss: bool = False,
) -> Effect:
    """Compare the snapshots up to the decision with those after `step`, up to the `following` action.

    `points` are those of the decision's own launch, sorted by step. With `by_loss` the risk does not count, as for
    ceilings: the rate stays, and the risk with it.
    """
    place = bisect_right(points, decision.step, key=_step)
    before = points[max(0, place - WINDOW) : place]
    # The snapshot at `step` itself was taken before the optimizer stepped with the new value.
    first = bisect_right(points, step, key=_step)
    last = len(points) if following is None else bisect_right(points, following.step, key=_step)
    after = points[first : min(last, first + WINDOW)]
    old, new = _losses(before), _losses(after)
    risk_after = median([point.risk for point in after])
    cut = following if len(after) < WINDOW else None
    verdict, why = _verdict(decision.risk, risk_after, old, after, cut, by_loss=by_loss)
    return Effect(
        num_before=len(before),
        num_after=len(after),
        risk_before=decision.risk,
        risk_after=risk_after,
        loss_before=median(old),
        loss_after=median(new),
        verdict=verdict,
        why=why,
    )


def _verdict(
    risk_before: float,
    risk_after: float | None,
    old: Sequence[float],
    after: Sequence[TimelinePoint],
    cut: AppliedAction | None,
    *,
    by_loss: bool,
) -> tuple[EffectVerdict, str]:
    """Return the verdict and its reason; `cut` is the action that ended the comparison early."""
    if any(point.broken for point in after):
        return "did not help", "afterwards the states or the loss were not finite"
    if len(after) < MIN_SNAPSHOTS or risk_after is None:
        seen = f"{len(after)} snapshot{'s' * (len(after) != 1)} after it"
        if cut is not None:
            return "cannot be told", f"{seen} before the next action at step {cut.step}: the two cannot be told apart"
        return "cannot be told", f"{seen}, {MIN_SNAPSHOTS} are needed"
    risk, new = _moved(risk_after - risk_before, RISK_CHANGE), _losses(after)
    loss, words = 0, f"the risk {_WORDS[risk]}, the loss is not known"
    if min(len(old), len(new)) >= MIN_SNAPSHOTS:
        loss = _moved(statistics.median(new) - statistics.median(old), LOSS_CHANGE * abs(statistics.median(old)))
        words = f"the risk {_WORDS[risk]}, the loss {_WORDS[loss]}"
    if cut is not None and cut.direction == "restrain":
        return "not enough", f"{words}, and another such command followed at step {cut.step}"
    if by_loss:
        return ("helped" if loss < 0 else "did not help" if loss > 0 else "unclear"), f"{words}; the rate stays"
    if risk > 0 or (risk == 0 and loss > 0):
        return "did not help", words
    return ("helped" if risk < 0 and loss <= 0 else "unclear"), words


_WORDS = {-1: "fell", 0: "held", 1: "rose"}


def _step(point: TimelinePoint) -> int:
    return point.step


def _moved(difference: float, least: float) -> int:
    return 0 if abs(difference) < least else 1 if difference > 0 else -1


def _losses(points: Sequence[TimelinePoint]) -> list[float]:
    return [point.training.loss for point in points if point.training.loss is not None]


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the finite values; None without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else None
