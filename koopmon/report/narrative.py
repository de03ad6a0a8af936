"""Summary of a run in sentences.

Each sentence follows from the data alone. Unknown values are named as unknown.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from koopmon.views.action_effects import MIN_SNAPSHOTS, EffectVerdict

if TYPE_CHECKING:
    from koopmon.report.run_report import RunReport
    from koopmon.views.action_effects import RecordedCommand, RecordedPoint

NOTABLE_LOSS = 0.1
"""Relative difference within which the loss counts as recovered to its value before the alarm."""
LEAP = 1.5
"""Above this ratio of the last loss to the median around it, the sentence gives the last loss."""
CLOSE = 5
"""Number of snapshots in the median that represents one moment."""
NOT_APPLIED = frozenset({"refused", "failed", "expired", "unanswered"})


def headline(facts: RunReport) -> str:
    """Summarise the run in one sentence."""
    if not facts.points:
        return f"No snapshot of this run was judged; {_end(facts)}."
    clauses = [_rise(facts)]
    if facts.episodes or facts.actions:
        clauses += [_done(facts), _came_of_it(facts)]
    else:
        clauses.append("nothing had to be done")
    sentence = "; ".join([*(clause for clause in clauses if clause), _end(facts)])
    return f"{sentence[0].upper()}{sentence[1:]}."


def helped(facts: RunReport) -> str:
    """Describe the effect of the actions in one or two sentences."""
    verdicts = Counter(action.effect.verdict for action in facts.actions if action.effect is not None)
    if not verdicts:
        return f"Nothing that brakes was {_unapplied(facts)}, so there is nothing to compare."
    order: tuple[EffectVerdict, ...] = ("helped", "not enough", "did not help", "unclear", "cannot be told")
    told = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in order if verdict in verdicts)
    were = "were" if verdicts.total() > 1 else "was"
    return (
        f"Of {_number(verdicts.total(), 'action')} that {were} applied: {told}. Before and after are compared within"
        " this run; what it would have done untouched is not known."
    )


def _unapplied(facts: RunReport) -> str:
    return "sent" if _only_watched(facts) else "applied"


def _only_watched(facts: RunReport) -> bool:
    if any(action.outcome == "dry_run" for decision in facts.decisions for action in decision.actions):
        return True
    hello = facts.launches[-1].hello if facts.launches else None
    return hello is not None and not hello.get("acts", True)


def _rise(facts: RunReport) -> str:
    worst = max(facts.points, key=lambda point: point.risk)
    if not facts.episodes:
        return f"the risk never reached {facts.act_risk:.2f} (highest {worst.risk:.2f} at step {worst.step})"
    first = facts.episodes[0]
    at_once = first.peak_step == first.first_step and first.peak >= facts.severe_risk
    level = facts.severe_risk if at_once else facts.act_risk
    again = f", {len(facts.episodes)} times in all" if len(facts.episodes) > 1 else ""
    highest = f" (highest {worst.risk:.2f} at step {worst.step})" if worst.step != first.first_step else ""
    return f"risk rose above {level:.2f} at step {first.first_step}{again}{highest}"


def _done(facts: RunReport) -> str:
    actions = facts.actions
    applied = [action for action in actions if action.outcome == "applied" and action.direction == "brake"]
    if applied:
        rates = [action for action in applied if action.lr_scale is not None]
        weights = [action for action in applied if action.kss_alpha is not None]
        parts = [_lowered(rates)] if rates else []
        parts += [f"KSS was put in force at step {weights[0].step}"] if weights else []
        parts += ["the job was told to stop"] if any(action.kind == "stop" for action in applied) else []
        return " and ".join(parts)
    failed = [action for action in actions if action.outcome in NOT_APPLIED]
    if failed:
        detail = f" ({failed[0].detail})" if failed[0].detail else ""
        return f"{_number(len(failed), 'command')} came to nothing: {failed[0].outcome}{detail}"
    return "nothing was done, since this job was only watched" if _only_watched(facts) else "nothing was done"


def _lowered(rates: Sequence[RecordedCommand]) -> str:
    first = rates[0]
    least = min(action.lr_scale for action in rates if action.lr_scale is not None)
    if len(rates) == 1:
        how = "halved" if first.lr_scale == 0.5 else f"lowered to {least:.2g} of its schedule"
        return f"the learning rate was {how} at step {first.step}"
    return f"the learning rate was lowered {len(rates)} times from step {first.step} on, to {least:.2g} of its schedule"


def _came_of_it(facts: RunReport) -> str:
    """Describe risk and loss at the end, compared with their values before the alarm."""
    last = facts.points[-CLOSE:]
    if any(point.broken for point in last):
        return f"from step {facts.not_finite_step} on the states or the loss were not finite"
    if not facts.episodes:
        return ""
    risk = statistics.median(point.risk for point in last)
    if facts.episodes[-1].last_step is None:
        words = f"the risk was {facts.points[-1].risk:.2f} at last"
    elif risk < facts.release_risk:
        words = "the risk came down"
    else:
        words = f"the risk was about {risk:.2f} at the end"
    return f"{words}, {_loss(facts)}"


def _loss(facts: RunReport) -> str:
    alarm = facts.episodes[0].incarnation, facts.episodes[0].first_step
    place = next(index for index, point in enumerate(facts.points) if (point.incarnation, point.step) == alarm)
    before, later = _finite(facts.points[: place + 1])[-CLOSE:], _finite(facts.points[place + 1 :])
    if not before and not later:
        return "what the loss did is not known, since it was not logged"
    if min(len(before), len(later)) < MIN_SNAPSHOTS:
        return "too few losses are known to compare them"
    old, new, top = statistics.median(before), statistics.median(later[-CLOSE:]), max(later)
    # A divergence may appear only in the last snapshot, and a median would hide it.
    new = later[-1] if later[-1] > new * LEAP else new
    span = f"{old:.3g} at the alarm, {new:.3g} at the end"
    if new > old * (1 + NOTABLE_LOSS):
        return f"the loss rose ({span})"
    if top > old * (1 + NOTABLE_LOSS):
        return f"the loss, {top:.3g} at its highest, came back ({span})"
    return f"the loss went on falling ({span})" if new < old * (1 - NOTABLE_LOSS) else f"the loss held ({span})"


def _finite(points: Sequence[RecordedPoint]) -> list[float]:
    losses = (point.training.loss for point in points)
    return [loss for loss in losses if loss is not None and math.isfinite(loss)]


def _end(facts: RunReport) -> str:
    step = facts.summary.last_step
    at = "" if step is None else f" at step {step}"
    launch = f" in its launch {len(facts.launches)}" if len(facts.launches) > 1 else ""
    return {
        "ended": f"the run ended{at}{launch}",
        "vanished": f"the run fell silent{at}{launch}, without a goodbye",
        "running": f"the run goes on{launch}" + ("" if step is None else f" (step {step} at last)"),
        "unheard": f"the run was last heard of{at}{launch}, and its end was not recorded",
    }[facts.state]


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
