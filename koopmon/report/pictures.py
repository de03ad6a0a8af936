"""Pictures of a report. Each has a wide and a narrow version, in colours for light and dark mode."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koopmon import plots
from koopmon.views.spectra import WORDS

if TYPE_CHECKING:
    from koopmon.report.run_report import RunReport
    from koopmon.views.action_effects import RecordedPoint

MAX_MARKS = 200
"""Maximum number of commands marked in the timeline: more lines would hide the curves."""
DARK = {
    plots.INK: "#e4e8ec",
    plots.GRID: "#39424e",
    plots.REFERENCE: "#9aa6b2",
    plots.DEAD: "#ff7f6e",
    plots.ALIVE: "#6cb6f5",
    plots.BACKOFF: "#f5a65b",
    plots.KSS: "#5fd08f",
    plots.FORECAST: "#b79be6",
}
"""Replacement of each colour in dark mode."""
TITLES = {"calm": "at the calmest", "alarm": "at the alarm", "after": "at last"}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the page: `wide` and `narrow` are data URIs; `alternative` is its text description."""

    name: str
    wide: str
    narrow: str
    alternative: str


def draw(facts: RunReport, directory: Path) -> dict[str, Picture]:
    """Draw the pictures for which there is data, by name; write each also as a PNG in `directory`. Raises PlotError."""
    found = {}
    for name, (make, alternative) in _makers(facts).items():
        wide = make(False)
        plots.png(wide, directory / f"{name}.png")
        found[name] = Picture(name, _uri(wide), _uri(make(True)), alternative)
    return found


def _makers(facts: RunReport) -> dict[str, tuple[Callable[[bool], Any], str]]:
    makers: dict[str, tuple[Callable[[bool], Any], str]] = {}
    if facts.points:
        makers["timeline"] = lambda narrow: _timeline(facts, narrow), _timeline_words(facts)
    if facts.spectra:
        shown = [
            plots.Plane(title=f"{TITLES[spectrum.name]}: step {spectrum.step}", layers=spectrum.eigenvalues)
            for spectrum in facts.spectra
        ]
        steps = ", ".join(f"step {spectrum.step} ({TITLES[spectrum.name]})" for spectrum in facts.spectra)
        words = f"Eigenvalues of every layer beside the unit circle at {steps}; their masses are in the table below."
        makers["spectra"] = lambda narrow: plots.planes(shown, narrow=narrow), words
    heatmap = facts.heatmap
    if heatmap is not None:
        named = [(WORDS[name], rows) for name, rows in heatmap.values.items()]
        words = (
            f"Near-unit mass, expansive mass and spectral radius by layer, steps {heatmap.steps[0]} to"
            f" {heatmap.steps[-1]}, {heatmap.num_snapshots} snapshots."
        )
        makers["layers"] = lambda narrow: plots.heatmaps(heatmap.steps, named, narrow=narrow), words
    return makers


def _timeline(facts: RunReport, narrow: bool) -> Any:
    launches: dict[str, list[RecordedPoint]] = {}
    for point in facts.points:
        launches.setdefault(point.incarnation, []).append(point)
    tracks = [_track(points) for points in launches.values()]
    marks = [(a.step, a.kind) for a in facts.actions if a.outcome == "applied" and a.step is not None]
    return plots.timeline(tracks, marks[:MAX_MARKS], (facts.act_risk, facts.severe_risk), narrow=narrow)


def _track(points: list[RecordedPoint]) -> plots.Track:
    return plots.Track(
        steps=[point.step for point in points],
        risks=[point.risk for point in points],
        forecasts=[point.forecast for point in points],
        losses=[point.training.loss for point in points],
        lr_scales=[point.training.lr_scale for point in points],
        kss_alphas=[point.training.kss_alpha for point in points],
        not_finite=[point.step for point in points if point.broken],
    )


def _timeline_words(facts: RunReport) -> str:
    points = facts.points
    worst = max(points, key=lambda point: point.risk)
    least = min(points, key=lambda point: point.training.lr_scale)
    return (
        f"Risk, loss and what was in force over steps {points[0].step} to {points[-1].step}. Highest risk"
        f" {worst.risk:.2f} at step {worst.step}; lowest learning-rate scale {least.training.lr_scale:.3g}."
    )


def _uri(figure: Any) -> str:
    text = plots.svg(figure)
    names = {light: f"--c{index}" for index, light in enumerate(DARK)}
    for light, name in names.items():
        text = text.replace(light, f"var({name})")
    light_rule = "".join(f"{name}:{light};" for light, name in names.items())
    dark_rule = "".join(f"{names[light]}:{dark};" for light, dark in DARK.items())
    dark = f"@media (prefers-color-scheme:dark){{:root{{{dark_rule}}}}}"
    text = text.replace("<defs>", f"<style>:root{{{light_rule}fill:var(--c0)}}{dark}</style><defs>", 1)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"
