"""SVG charts, drawn on the server, so that they do not need JavaScript; templates/charts.html has the elements.

Widths are percentages of the page, so that text keeps its size on a telephone. The style sheet sets the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self, TypeGuard, TypeVar

from markupsafe import Markup

from koopmon.config import PolicyConfig
from koopmon.views.html import decimal, macro, number
from koopmon.views.run_view import (
    SCALARS,
    DecisionView,
    LoggedPoint,
    Scalar,
    TimelinePoint,
    training_commands,
    upper_limits,
)
from koopmon.views.spectra import Spectrum

RISK_HEIGHT, SMALL_HEIGHT, SPARK_HEIGHT = 220, 90, 24
MAX_HINTS = 80
"""Number of strips of the risk chart that show their values to the mouse."""
SPARK_POINTS = 120
MAX_POINTS = 2000
"""Maximum number of points of one line; a longer one is drawn by the extremes of adjacent points."""
MAX_MARKS = 200
"""Maximum number of marked commands: more would hide the curves."""
LOG_RATIO = 20.0
"""A chart of positive values is logarithmic when the largest exceeds the smallest by this factor."""
DEPTHS = 16
"""Number of shades from the first layer to the last: `.depth-0` to `.depth-15`."""
Point = TypeVar("Point", TimelinePoint, LoggedPoint)
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


@dataclass(frozen=True, slots=True)
class StepAxis:
    """Axis of optimizer steps, from `first` to `last`. Charts below each other share one."""

    first: int = 0
    last: int = 0
    launches: tuple[int, ...] = ()
    """First step of each launch after the first one."""

    @classmethod
    def of(cls, *series: Sequence[TimelinePoint] | Sequence[LoggedPoint]) -> Self:
        """Axis that holds all points of all series."""
        steps = [point.step for points in series for point in points]
        starts: dict[str, int] = {}
        for point in (point for points in series for point in points):
            starts[point.incarnation] = min(starts.get(point.incarnation, point.step), point.step)
        return cls(min(steps, default=0), max(steps, default=0), tuple(list(starts.values())[1:]))

    def place(self, step: int) -> float:
        """Return the x coordinate of a step in percent of the width."""
        return 100.0 * (step - self.first) / (self.last - self.first or 1)

    @property
    def ticks(self) -> list[tuple[int, str, str]]:
        """Step, place and text anchor of each label."""
        ticks = [(self.first, "0", "start"), ((self.first + self.last) // 2, "50%", "middle")]
        return [*ticks, (self.last, "100%", "end")] if self.last - self.first > 1 else ticks[:1]

    @property
    def marks(self) -> list[tuple[int, int, float]]:
        """Number, first step and place of each later launch."""
        return [(number, step, self.place(step)) for number, step in enumerate(self.launches, 2)][:MAX_MARKS]


def risk_chart(
    points: Sequence[TimelinePoint],
    decisions: Sequence[DecisionView],
    policy: PolicyConfig,
    axis: StepAxis | None = None,
) -> Markup:
    """Chart of risk and forecast over steps.

    The thresholds of `policy` are drawn with their names; commands that change training are marked, and so are
    launches and snapshots that were not finite.
    """
    axis = axis or StepAxis.of(points)
    place = axis.place
    levels = (("severe", policy.severe_risk), ("act", policy.act_risk), ("calm", policy.release_risk))
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
            *_lines(axis, points, [point.forecast for point in points], "forecast", RISK_HEIGHT),
            *_lines(axis, points, [point.risk for point in points], "risk", RISK_HEIGHT),
        ],
        levels=[(f"{name} {value:g}", _up(value, RISK_HEIGHT)) for name, value in levels],
        axis=axis,
        hints=_hints(axis, points),
        marks=marks[:MAX_MARKS],
        broken=[(point.step, place(point.step)) for point in points if point.broken][:MAX_MARKS],
        height=RISK_HEIGHT,
        description=description,
    )


def scalar_chart(points: Sequence[TimelinePoint], scalar: Scalar, axis: StepAxis | None = None) -> Markup:
    """Chart of one scalar over steps below its current value; empty while all values are the idle one."""
    axis = axis or StepAxis.of(points)
    values = [scalar.of(point) for point in points]
    known = [value for value in values if value is not None]
    if known and all(value == scalar.idle for value in known):
        return Markup("")
    scaled, is_log = _scale(known, unit=scalar.unit_scale)
    lines = _lines(axis, points, values, scalar.chart, SMALL_HEIGHT, scaled, held=scalar.held)
    limits = (0.0, 1.0) if scalar.unit_scale else None
    # A limit far above the values does not stretch the chart: the band then reaches its top.
    tops = [(10 * axis.place(each.step), scaled(high)) for each, high in upper_limits(points, scalar) if scalar.banded]
    edge = [*tops, *((x, 0.0) for x, _ in (tops[-1:] + tops[:1]))]
    band = _polyline(((x, y) for x, y in edge if y is not None), SMALL_HEIGHT) if tops else ""
    return _small_chart(scalar.title, known, limits, scaled, lines, axis, is_log, band)


def logged_charts(points: Sequence[LoggedPoint], axis: StepAxis | None = None) -> list[Markup]:
    """Charts of the scalars that the user's loop logs, each with the band of its own history."""
    axis = axis or StepAxis.of(points)
    return [
        _logged_chart(name, points, axis) for name in dict.fromkeys(name for point in points for name in point.readings)
    ]


def _logged_chart(name: str, points: Sequence[LoggedPoint], axis: StepAxis) -> Markup:
    series = [(point, point.readings[name]) for point in points if name in point.readings]
    known = [each.value for _, each in series if _is_finite(each.value)]
    limits = [limit for _, each in series for limit in (each.low, each.high) if _is_finite(limit)]
    scaled, is_log = _scale([*known, *limits])

    banded = [(10 * axis.place(each.step), each.low, each.high) for _, each in series if _is_finite(each.low)]
    edge = [(x, high) for x, _, high in banded] + [(x, low) for x, low, _ in reversed(banded)]
    band = _polyline(((x, scaled(y)) for x, y in edge if y is not None), SMALL_HEIGHT)
    readings = [point.readings.get(name) for point in points]
    values = [each.value if each is not None and _is_finite(each.value) else None for each in readings]
    lines = _lines(axis, points, values, "loss", SMALL_HEIGHT, scaled)
    return _small_chart(name, known, None, scaled, lines, axis, is_log, band)


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _small_chart(
    title: str,
    known: Sequence[float],
    limits: tuple[float, float] | None,
    scaled: Callable[[float], float],
    lines: Iterable[tuple[str, Markup]],
    axis: StepAxis,
    is_log: bool,
    band: Markup | str = "",
) -> Markup:
    """Draw a chart; its y axis names the lowest and the highest value, or `limits`."""
    low, high = limits or (min(known, default=0.0), max(known, default=0.0))
    labels = {f"{value:.3g}": _up(scaled(value), SMALL_HEIGHT) for value in (high, low)}
    return macro(
        "charts.html",
        "scalar_chart",
        title=title,
        known=[known[-1], min(known), max(known)] if known else [],
        is_log=is_log,
        levels=labels.items(),
        lines=lines,
        band=band,
        axis=axis,
        height=SMALL_HEIGHT,
    )


def _hints(axis: StepAxis, points: Sequence[TimelinePoint]) -> list[tuple[float, float, str]]:
    """Place, width and text of strips of the chart that show the values of a snapshot to the mouse."""
    size = math.ceil(len(points) / MAX_HINTS) or 1
    chosen = [max(points[start : start + size], key=lambda each: each.risk) for start in range(0, len(points), size)]
    chosen.sort(key=lambda each: each.step)
    places = [axis.place(each.step) for each in chosen]
    edges = [0.0, *((left + right) / 2 for left, right in pairwise(places)), 100.0]
    return [
        (
            left,
            right - left,
            f"step {each.step}: risk {decimal(each.risk)}, forecast {decimal(each.forecast)}, "
            + ", ".join(f"{scalar.title.lower()} {number(scalar.of(each))}" for scalar in SCALARS),
        )
        for each, (left, right) in zip(chosen, pairwise(edges), strict=False)
    ]


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
        description=description,
        rim=EDGE if outside else 0.0,
        beyond=f"At the dashed rim: {outside} beyond modulus {limit:g}, the largest {number(max(moduli))}."
        if outside
        else "",
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
    axis: StepAxis,
    points: Sequence[Point],
    values: Sequence[float | None],
    kind: str,
    height: float,
    place: Callable[[float], float] = float,
    *,
    held: bool = False,
) -> Iterator[tuple[str, Markup]]:
    """Yield the class and points of one polyline per launch; an earlier launch has the class `earlier` too.

    `values` has one number per point; the increasing function `place` maps them to [0, 1].
    """
    launches: dict[str, list[tuple[Point, float]]] = {}
    for point, value in zip(points, values, strict=True):
        if value is not None:
            launches.setdefault(point.incarnation, []).append((point, value))
    latest = points[-1].incarnation if points else ""
    for incarnation, line in launches.items():
        drawn = [(10 * axis.place(point.step), place(value)) for point, value in _extremes(line)]
        yield kind if incarnation == latest else f"{kind} earlier", _polyline(_steps(drawn) if held else drawn, height)


def _extremes(line: Sequence[tuple[Point, float]]) -> Iterable[tuple[Point, float]]:
    """Return the line, or the lowest and the highest of adjacent points if it has more than MAX_POINTS."""
    if len(line) <= MAX_POINTS:
        return line
    size = math.ceil(2 * len(line) / MAX_POINTS)
    values = [value for _, value in line]
    groups = (range(start, min(start + size, len(line))) for start in range(0, len(line), size))
    return [
        line[index]
        for group in groups
        for index in sorted({min(group, key=values.__getitem__), max(group, key=values.__getitem__)})
    ]


def _steps(line: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Add the corners of a line whose values hold until the next point."""
    yield from line[:1]
    for (_, before), (x, y) in pairwise(line):
        yield x, before
        yield x, y


def _polyline(places: Iterable[tuple[float, float]], height: float) -> Markup:
    return Markup(" ".join(f"{x:.1f},{_up(y, height):.1f}" for x, y in places))  # noqa: S704 - numbers


def _scale(known: Sequence[float], *, unit: bool = False) -> tuple[Callable[[float], float], bool]:
    """Return the map from values to [0, 1] with a margin, and True if it is logarithmic.

    With `unit`, the values are from 0 to 1.
    """
    low, high = (0.0, 1.0) if unit or not known else (min(known), max(known))
    is_log = not unit and low > 0 and high > LOG_RATIO * low
    if is_log:
        low, high = math.log(low), math.log(high)
    width = (high - low) or 1.0

    def scaled(value: float) -> float:
        # The difference of two large values could overflow.
        return 0.06 + 0.88 * ((math.log(value) if is_log else value) / width - low / width)

    return scaled, is_log


def _up(value: float, height: float) -> float:
    """SVG y coordinate of a value from 0 to 1, with a margin for the line width. The y axis of SVG points down."""
    return (height - 2) - (height - 4) * min(max(value, 0.0), 1.0)
