"""SVG line charts over steps, drawn on the server, so that they do not need JavaScript.

Widths are percentages of the page, so that text keeps its size on a telephone. The style sheet sets the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from koopmon.views.html import Markup, join, tag
from koopmon.views.run_view import CommandView, DecisionView, TimelinePoint

TRAINING = ("set_lr_scale", "set_kss", "stop")
"""Kinds of commands that change training; the others change only the observation."""
RISK_HEIGHT, SMALL_HEIGHT, SPARK_HEIGHT = 220, 90, 24
SPARK_POINTS = 120


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits; a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def decimal(value: float | None) -> str:
    """Format a risk or another value from 0 to 1; a dash for None."""
    return "–" if value is None else f"{value:.2f}"


def sparkline(points: Sequence[TimelinePoint], act_risk: float) -> Markup:
    """Small chart of the latest risks for a table cell."""
    values = [point.risk for point in points[-SPARK_POINTS:]]
    if len(values) < 2:
        return Markup("")
    xs = [100 * index / (len(values) - 1) for index in range(len(values))]
    line = " ".join(f"{x:.1f},{_up(value, SPARK_HEIGHT):.1f}" for x, value in zip(xs, values, strict=True))
    level = f"{_up(act_risk, SPARK_HEIGHT):.1f}"
    return tag(
        "svg",
        tag("line", x1=0, x2=100, y1=level, y2=level, class_="threshold", vector_effect="non-scaling-stroke"),
        tag("polyline", points=line, class_="line risk", vector_effect="non-scaling-stroke"),
        class_="spark",
        viewBox=f"0 0 100 {SPARK_HEIGHT}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def risk_chart(
    points: Sequence[TimelinePoint], decisions: Sequence[DecisionView], thresholds: Sequence[tuple[str, float]]
) -> Markup:
    """Chart of risk and forecast over steps.

    `thresholds` are drawn with their names; commands that change training are marked.
    """
    height, place = RISK_HEIGHT, _placed(points)
    levels, names = [], []
    for name, value in thresholds:
        y = _up(value, height)
        levels.append(tag("line", x1="0", x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}"))
        names.append(tag("text", f"{name} {value:g}", x="100%", y=f"{y - 4:.1f}", text_anchor="end"))
    marks = [_mark(order, step, place(step)) for order, step in commands(decisions) if 0.0 <= place(step) <= 100.0]
    lines = [
        _line(points, place, lambda point: point.forecast, "line forecast", height),
        _line(points, place, lambda point: point.risk, "line risk", height),
    ]
    said = "No snapshot was judged yet."
    if points:
        first, last = points[0], points[-1]
        said = (
            f"Risk and forecast from step {first.step} to {last.step}, {len(marks)} commands. Now: risk"
            f" {decimal(last.risk)}, forecast {decimal(last.forecast)}. The values are in the table below."
        )
    return tag(
        "svg",
        tag("g", tag("line", x1="0", x2="100%", y1=height, y2=height), class_="axis"),
        tag("g", *levels, class_="threshold"),
        _plot(lines, height),
        tag("g", *marks),
        tag("g", *names, class_="names"),
        _steps_axis(points, height + 28),
        class_="chart",
        height=height + 34,
        width="100%",
        role="img",
        aria_label=said,
    )


def small_chart(
    points: Sequence[TimelinePoint],
    value: Callable[[TimelinePoint], float | None],
    name: str,
    kind: str,
    *,
    unit_scale: bool = False,
) -> Markup:
    """Chart of one quantity over steps below its current value.

    The scale fits the data, or with `unit_scale` is 0 to 1.
    """
    known = [found for point in points if (found := value(point)) is not None and math.isfinite(found)]
    if not known:
        return tag("p", f"No {name.lower()} is known.", class_="quiet")
    low, high = (0.0, 1.0) if unit_scale else (min(known), max(known))

    def scaled(point: TimelinePoint) -> float | None:
        found = value(point)
        if found is None or not math.isfinite(found):
            return None
        return 0.06 + 0.88 * (found - low) / ((high - low) or 1.0)

    height = SMALL_HEIGHT
    now, reach = number(known[-1]), f"from {number(min(known))} to {number(max(known))}"
    chart = tag(
        "svg",
        tag("g", tag("line", x1="0", x2="100%", y1=height, y2=height), class_="axis"),
        _plot([_line(points, _placed(points), scaled, f"line {kind}", height)], height),
        _steps_axis(points, height + 16),
        class_="chart",
        height=height + 22,
        width="100%",
        role="img",
        aria_label=f"{name} over steps: {reach}, now {now}.",
    )
    return join(tag("p", f"{name} ", tag("strong", now), tag("span", f" {reach}", class_="quiet")), chart)


def commands(decisions: Sequence[DecisionView]) -> list[tuple[CommandView, int]]:
    """Commands that change training, each with the step of its ack, else of its decision."""
    return [
        (order, decided.step if order.step is None else order.step)
        for decided in decisions
        for order in decided.orders
        if order.command.kind in TRAINING
    ]


def order_words(order: CommandView) -> str:
    """Describe the command's action."""
    command = order.command
    if command.kind == "set_lr_scale":
        return f"learning rate x {number(command.lr_scale)}"
    if command.kind == "set_kss":
        alpha = 0.0 if command.kss is None else command.kss.alpha
        return f"KSS alpha {number(alpha)}" if alpha else "KSS off"
    if command.kind == "set_cadence":
        every = command.cadence_steps or 1
        return "snapshots at every step" if every == 1 else f"snapshots every {every} steps"
    return command.kind


def _mark(order: CommandView, step: int, at: float) -> Markup:
    """Marker of a command: a line, and a triangle below the axis that is hollow while the command is not in force."""
    x = f"{at:.2f}%"
    return tag(
        "g",
        tag("title", f"step {step}: {order_words(order)}, {order.outcome}"),
        tag("line", x1=x, x2=x, y1=0, y2=RISK_HEIGHT),
        tag("svg", tag("path", d=f"M0,{RISK_HEIGHT + 2}l6,10h-12z"), x=x, overflow="visible"),
        class_=f"command {'applied' if order.outcome == 'applied' else 'not-applied'}",
    )


def _up(value: float, height: float) -> float:
    """SVG y coordinate of a value from 0 to 1, with a margin for the line width. The y axis of SVG points down."""
    return (height - 2) - (height - 4) * min(max(value, 0.0), 1.0)


def _placed(points: Sequence[TimelinePoint]) -> Callable[[float], float]:
    """Return a function from a step to its x coordinate in percent of the width."""
    first = min((point.step for point in points), default=0)
    span = max((point.step for point in points), default=0) - first or 1
    return lambda step: 100.0 * (step - first) / span


def _line(
    points: Sequence[TimelinePoint],
    place: Callable[[float], float],
    value: Callable[[TimelinePoint], float | None],
    kind: str,
    height: float,
) -> Markup:
    found = [(place(point.step), value(point)) for point in points]
    line = " ".join(f"{10 * x:.1f},{_up(y, height):.1f}" for x, y in found if y is not None)
    return tag("polyline", points=line, class_=kind, vector_effect="non-scaling-stroke")


def _plot(lines: Sequence[Markup], height: int) -> Markup:
    """Chart of lines with x from 0 to 1000, stretched to the full width. The stroke width does not scale."""
    return tag("svg", *lines, viewBox=f"0 0 1000 {height}", preserveAspectRatio="none", width="100%", height=height)


def _steps_axis(points: Sequence[TimelinePoint], y: int) -> Markup:
    if not points:
        return Markup("")
    first, last = min(point.step for point in points), max(point.step for point in points)
    ticks = [(first, "0", "start"), ((first + last) // 2, "50%", "middle"), (last, "100%", "end")]
    seen = [tag("text", f"step {step:,}", x=x, y=y, text_anchor=anchor) for step, x, anchor in ticks]
    return tag("g", *(seen if last - first > 1 else seen[:1]), class_="ticks")
