"""Facts of a run report, as name and value: at the top of the page, and what `koopmon report` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from koopmon.report.run_report import RunReport
from koopmon.views.html import number, percent, span
from koopmon.views.run_summary import backoffs, times
from koopmon.views.run_view import CommandView

NOT_APPLIED = frozenset({"refused", "failed", "expired", "unanswered"})


def glance(report: RunReport) -> dict[str, str]:
    """Return what happened, when, and what was done. Texts of peers are in it: escape them."""
    return dict(_facts(report))


def _facts(report: RunReport) -> Iterator[tuple[str, str]]:
    step, points = report.summary.last_step, report.points
    at = "" if step is None else f" at step {step}"
    last = at and f", last seen{at}"  # a goodbye has no record of its step
    yield (
        "State",
        {
            "ended": f"ended{last}",
            "vanished": f"vanished without a goodbye{last}",
            "running": f"running{at}",
            "unheard": f"no message for a while, last{at or ' at its start'}; its end is not recorded",
        }[report.state],
    )
    yield "Risk", _risk(report)
    if (broken := report.not_finite_step) is not None:
        yield "States or loss", f"not finite from step {broken} on"
    if points:
        yield "Loss", _loss(report)
    yield from _actions(report.actions)
    verdicts = Counter(each.effect.verdict for each in report.actions if each.effect is not None)
    if verdicts:
        yield "Effect", ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    yield "Snapshots", str(len(points))
    if len(report.launches) > 1:
        yield "Launches", str(len(report.launches))
    if report.beside:
        yield "Other runs of the job", f"{', '.join(report.beside)}: `koopmon report NAME`"
    yield "Time span", span(report.last_seen - report.first_seen)
    agent = report.agent
    yield (
        "Share of step time",
        f"{percent(agent.mean_overhead_ratio)} on average, {percent(agent.max_overhead_ratio)} at most;"
        " a start has a credit above the budget",
    )


def _risk(report: RunReport) -> str:
    if not report.points:
        return "not known, no snapshot was judged"
    summary, level = report.summary, report.policy.act_risk
    highest = f"highest {summary.max_risk:.2f} at step {summary.max_risk_step}"
    if not report.episodes:
        return f"below {level:.2f} in all snapshots, {highest}"
    again = f", {len(report.episodes)} times in all" if len(report.episodes) > 1 else ""
    held = "; still high at the end" if report.episodes[-1].last_step is None else ""
    return f"{level:.2f} or more from step {report.episodes[0].first_step}{again}; {highest}{held}"


def _loss(report: RunReport) -> str:
    if (course := report.loss) is not None:
        return (
            f"{number(course.at_alarm)} at the first high risk, then at most {number(course.highest)},"
            f" {number(course.last)} at the end (first and last: medians)"
        )
    known = [point.training.loss for point in report.points if point.training.loss is not None]
    return f"{number(known[0])} at first, {number(known[-1])} at the end" if known else "not known"


def _actions(actions: Sequence[CommandView]) -> Iterator[tuple[str, str]]:
    restraints = [each for each in actions if each.applied_step is not None and each.direction == "restrain"]
    if not restraints:
        yield "Actions", "none was applied"
    scales = [
        (each.command.lr_scale, each.applied_step)
        for each in restraints
        if each.command.lr_scale is not None and each.command.max_rate is None
    ]
    if scales:
        yield "LR scale", f"down to {min(scales)[0]:.3g} by {backoffs(len(scales))}, first at step {scales[0][1]}"
    caps = [(each.command.max_rate, each.applied_step) for each in restraints if each.command.max_rate is not None]
    if caps:
        yield "Learning rate", f"capped at {min(caps)[0]:.3g}, first at step {caps[0][1]}"
    if returns := [each for each in restraints if each.command.rewind is not None]:
        yield "Weights", f"set back {times(len(returns))}; at step {returns[0].applied_step}: {returns[0].detail}"
    alphas = [(each.command.kss.alpha, each.applied_step) for each in restraints if each.command.kss is not None]
    if alphas:
        yield "KSS", f"raised {times(len(alphas))}, to alpha {max(alphas)[0]:.3g}, first at step {alphas[0][1]}"
    if held := [each for each in restraints if each.command.ceilings]:
        latest = [each for each in actions if each.applied_step is not None and each.command.ceilings is not None][-1]
        end = "" if latest.command.ceilings else f", released at step {latest.applied_step}"
        yield "Ceilings", f"on what layers write, {times(len(held))}, first at step {held[0].applied_step}{end}"
    if stops := [each for each in restraints if each.command.kind == "stop"]:
        yield "Stop", f"requested at step {stops[0].applied_step}"
    if failed := [each for each in actions if each.outcome in NOT_APPLIED]:
        detail = f" ({failed[0].detail})" if failed[0].detail else ""
        yield "Not applied", f"{_commands(len(failed))}; the first: {failed[0].outcome}{detail}"
    if unsent := sum(each.outcome == "dry_run" for each in actions):
        yield "Not sent", f"{_commands(unsent)}, because this job was only watched"


def _commands(count: int) -> str:
    return f"{count} command{'s' * (count != 1)}"
