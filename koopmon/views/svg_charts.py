"""SVG charts, drawn on the server, so that they do not need JavaScript; templates/charts.html has the elements.

Widths are percentages of the page, so that text keeps its size on a telephone. The style sheet sets the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from markupsafe import Markup

from koopmon.config import PolicyConfig
from koopmon.views.html import decimal, macro, number
from koopmon.views.run_view import DecisionView, Scalar, TimelinePoint, training_commands
from koopmon.views.spectra import Spectrum

RISK_HEIGHT, SMALL_HEIGHT, SPARK_HEIGHT = 220, 90, 24
SPARK_POINTS = 120
MAX_POINTS = 2000
"""Maximum number of points of one line; a longer one is drawn by the extremes of adjacent points."""
MAX_MARKS = 200
"""Maximum number of marked commands: more would hide the curves."""
LOG_RATIO = 20.0
"""A chart of positive values is logarithmic when the largest exceeds the smallest by this factor."""
DEPTHS = 16
"""Number of shades from the first layer to the last: `.depth-0` to `.depth-15`."""
RING = (0.90, 1.05)
"""Range of moduli that count as near unit."""
MIN_MODULUS, MAX_MODULUS = 1.3, 3.0
"""Bounds of the plotted modulus, which follows the largest eigenvalue."""
EDGE = 190.0
"""Plot coordinate of the largest plotted modulus; the picture extends to 200."""


def sparkline(points: Sequence[TimelinePoint], act_risk: float) -> Markup:
    """Small chart of the latest risks for a table cell; empty for fewer than two points."""
    risks = [point.risk for point in points[-SPARK_POINTS:]]
    if len(risks) < 2:
        return Markup("")
    line = _polyline(((100 * index / (len(risks) - 1), risk) for index, risk in enumerate(risks)), SPARK_HEIGHT)
    return macro("charts.html", "sparkline", line=line, level=_up(act_risk, SPARK_HEIGHT), height=SPARK_HEIGHT)


def risk_chart(points: Sequence[TimelinePoint], decisions: Sequence[DecisionView], policy: PolicyConfig) -> Markup:
    """Chart of risk and forecast over steps.

    The thresholds of `policy` are drawn with their names; commands that change training are marked, and so are
    snapshots that were not finite.
    """
    place = _placed(points)
    levels = (("severe", policy.severe_risk), ("act", policy.act_risk), ("calm below", policy.release_risk))
    marks = [(each, step, place(step)) for each, step in training_commands(decisions) if 0.0 <= place(step) <= 100.0]
    description = "No snapshot was judged yet."
    if points:
        first, last = points[0], points[-1]
        worst = max(points, key=lambda point: point.risk)
        description = (
            f"Risk and forecast from step {first.step} to {last.step}, {len(marks)} commands. Highest risk"
            f" {decimal(worst.risk)} at step {worst.step}; last risk {decimal(last.risk)}, forecast"
            f" {decimal(last.forecast)}. The values are in the table below."
        )
    return macro(
        "charts.html",
        "risk_chart",
        lines=[
            *_lines(points, lambda point: point.forecast, "forecast", RISK_HEIGHT),
            *_lines(points, lambda point: point.risk, "risk", RISK_HEIGHT),
        ],
        levels=[(name, value, _up(value, RISK_HEIGHT)) for name, value in levels],
        marks=marks[:MAX_MARKS],
        broken=[(point.step, place(point.step)) for point in points if point.broken][:MAX_MARKS],
        ticks=_ticks(points),
        height=RISK_HEIGHT,
        description=description,
    )


def scalar_chart(points: Sequence[TimelinePoint], scalar: Scalar) -> Markup:
    """Chart of one scalar over steps below its current value; empty while all values are the idle one."""
    known = [value for point in points if (value := scalar.of(point)) is not None]
    if known and all(value == scalar.idle for value in known):
        return Markup("")
    scaled, is_log = _scale(known, scalar)
    return macro(
        "charts.html",
        "scalar_chart",
        title=scalar.title,
        known=[known[-1], min(known), max(known)] if known else [],
        is_log=is_log,
        lines=_lines(points, lambda point: scaled(scalar.of(point)), scalar.chart, SMALL_HEIGHT, held=scalar.held),
        ticks=_ticks(points),
        height=SMALL_HEIGHT,
    )


def eigenvalue_plot(spectrum: Spectrum, limit: float | None = None) -> Markup:
    """Plot of all eigenvalues with the unit circle and the near-unit ring; colours show the depth.

    `limit` is the largest plotted modulus, for plots on one scale.
    """
    moduli = spectrum.moduli()
    limit = limit or plotted_modulus(moduli)
    near = sum(RING[0] <= modulus <= RING[1] for modulus in moduli)
    beyond, outside = (sum(modulus > bound for modulus in moduli) for bound in (RING[1], limit))
    description = (
        f"Eigenvalues of {len(spectrum.labels)} layers at step {spectrum.step}: {near} of {len(moduli)} in the"
        f" near-unit ring, {beyond} beyond it; the largest modulus is {number(max(moduli, default=None))}."
    )
    scale, last = EDGE / limit, max(1, len(spectrum.labels) - 1)
    return macro(
        "charts.html",
        "eigenvalue_plot",
        layers=[
            (label, round((DEPTHS - 1) * row / last), _dots(spectrum.pairs(row), scale, limit))
            for row, label in enumerate(spectrum.labels)
        ],
        scale=scale,
        ring=[scale * modulus for modulus in reversed(RING)],
        description=f"{description} {outside} beyond modulus {limit:g} are drawn at the rim."
        if outside
        else description,
    )


def plotted_modulus(moduli: Sequence[float]) -> float:
    """Largest modulus of a plot."""
    return min(max(MIN_MODULUS, 1.08 * max(moduli, default=1.0)), MAX_MODULUS)


def depth_legend(labels: Sequence[str]) -> Markup:
    """Legend of the shades, from the first layer to the last."""
    return macro("charts.html", "depth_legend", first=labels[0], last=labels[-1], depths=DEPTHS)


def _dots(pairs: Sequence[tuple[float, float]], scale: float, limit: float) -> Markup:
    """SVG path of the eigenvalues of one row; those beyond `limit` lie on the rim.

    A path of zero length with round caps needs a tenth of the bytes of a circle element.
    """
    places = []
    for re, im in pairs:
        shrink = scale * min(1.0, limit / max(math.hypot(re, im), 1e-9))
        places.append(f"M{shrink * re:.1f},{-shrink * im:.1f}h0")
    return Markup("".join(places))  # noqa: S704 - numbers


def _lines(
    points: Sequence[TimelinePoint],
    value: Callable[[TimelinePoint], float | None],
    kind: str,
    height: float,
    *,
    held: bool = False,
) -> Iterator[tuple[str, Markup]]:
    """Yield the class and points of one polyline per launch; an earlier launch has the class `earlier` too."""
    place = _placed(points)
    launches: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        found = value(point)
        if found is not None:
            launches.setdefault(point.incarnation, []).append((10 * place(point.step), found))
    latest = points[-1].incarnation if points else ""
    for incarnation, line in launches.items():
        drawn = _extremes(line)
        yield kind if incarnation == latest else f"{kind} earlier", _polyline(_steps(drawn) if held else drawn, height)


def _extremes(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the line, or the lowest and highest of adjacent points if it has more than MAX_POINTS."""
    if len(line) <= MAX_POINTS:
        return line
    size = math.ceil(2 * len(line) / MAX_POINTS)
    groups = (line[start : start + size] for start in range(0, len(line), size))
    return [
        place
        for group in groups
        for place in sorted({min(group, key=lambda each: each[1]), max(group, key=lambda each: each[1])})
    ]


def _steps(line: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Add the corners of a line whose values hold until the next point."""
    yield from line[:1]
    for (_, before), (x, y) in pairwise(line):
        yield x, before
        yield x, y


def _polyline(places: Iterable[tuple[float, float]], height: float) -> Markup:
    return Markup(" ".join(f"{x:.1f},{_up(y, height):.1f}" for x, y in places))  # noqa: S704 - numbers


def _scale(known: Sequence[float], scalar: Scalar) -> tuple[Callable[[float | None], float | None], bool]:
    """Return the map from values to [0, 1] with a margin, and True if it is logarithmic."""
    low, high = (0.0, 1.0) if scalar.unit_scale or not known else (min(known), max(known))
    is_log = not scalar.unit_scale and low > 0 and high > LOG_RATIO * low
    if is_log:
        low, high = math.log(low), math.log(high)
    width = (high - low) or 1.0

    def scaled(value: float | None) -> float | None:
        if value is None:
            return None
        # The difference of two large values could overflow.
        return 0.06 + 0.88 * ((math.log(value) if is_log else value) / width - low / width)

    return scaled, is_log


def _up(value: float, height: float) -> float:
    """SVG y coordinate of a value from 0 to 1, with a margin for the line width. The y axis of SVG points down."""
    return (height - 2) - (height - 4) * min(max(value, 0.0), 1.0)


def _placed(points: Sequence[TimelinePoint]) -> Callable[[float], float]:
    """Return a function from a step to its x coordinate in percent of the width."""
    first = min((point.step for point in points), default=0)
    span = max((point.step for point in points), default=0) - first or 1
    return lambda step: 100.0 * (step - first) / span


def _ticks(points: Sequence[TimelinePoint]) -> list[tuple[int, str, str]]:
    """Step, place and text anchor of each label of the axis."""
    if not points:
        return []
    first, last = min(point.step for point in points), max(point.step for point in points)
    ticks = [(first, "0", "start"), ((first + last) // 2, "50%", "middle"), (last, "100%", "end")]
    return ticks if last - first > 1 else ticks[:1]
