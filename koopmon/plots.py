"""Plots of spectra, runs and the demonstration. Only this file imports matplotlib, and only when it draws."""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from koopmon.errors import KoopmonError

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

P = ParamSpec("P")
DEAD = "#c0392b"
ALIVE = "#1f77b4"
REFERENCE = "#7f8c8d"
BACKOFF = "#e67e22"
KSS = "#27ae60"
INK, GRID = "#1f2933", "#d9dee4"
FORECAST = "#8e6bbf"
LOSS_TOP = 100.0
"""Upper limit of the loss axis in nats: twice the loss at which a training counts as diverged."""


class PlotError(KoopmonError):
    """A plot cannot be drawn or written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One training run: `losses` in nats by `steps`. `diverged` marks a run that ends with its last step."""

    label: str
    steps: Sequence[int]
    losses: Sequence[float]
    diverged: bool
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """Observations of the guarded run's monitor at `steps`. `commands` holds (step, kind) of each applied command."""

    steps: Sequence[int]
    risks: Sequence[float]
    lr_scales: Sequence[float]
    kss_alphas: Sequence[float]
    commands: Sequence[tuple[int, str]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """One launch of a run, one value per snapshot; None is unknown. `not_finite` holds steps with NaN or infinities."""

    steps: Sequence[int]
    risks: Sequence[float]
    forecasts: Sequence[float | None]
    losses: Sequence[float | None]
    lr_scales: Sequence[float]
    kss_alphas: Sequence[float]
    not_finite: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """Eigenvalues of one snapshot: pairs (Re, Im) for each layer."""

    title: str
    layers: Sequence[Sequence[tuple[float, float]]]


def require(what: str) -> None:
    """Raise PlotError with the name `what` when matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise PlotError(f"{what}: drawing needs matplotlib: pip install 'koopmon[plots]'")


def spectrum(profile: SpectralProfile, path: Path, *, title: str) -> None:
    """Write a PNG of the eigenvalues of all layers, coloured by depth: all, and the region of 98% of them."""
    points = [
        (value.real, value.imag, index)
        for index, layer in enumerate(profile.layers)
        for value in layer.eigenvalues.tolist()
    ]
    real, imaginary, depth = (list(column) for column in zip(*points, strict=True)) if points else ([], [], [])
    figure, panels = _figure(1, 2, (11.6, 5.4))
    from matplotlib.patches import Annulus, Circle

    for plane in panels:
        plane.add_patch(Annulus((0, 0), 1.05, 0.15, facecolor="#f1c40f", alpha=0.25, edgecolor="none"))
        plane.add_patch(Circle((0, 0), 1.0, fill=False, edgecolor="#555555", linewidth=1))
        deepest = max(1, profile.num_layers - 1)
        dots = plane.scatter(real, imaginary, c=depth, s=9, alpha=0.8, cmap="viridis", vmin=0, vmax=deepest)
        plane.set(aspect="equal", xlabel="Re λ", ylabel="Im λ")
    reach = 1.08 * max([1.2, *(abs(complex(x, y)) for x, y, _ in points)])
    panels[0].set(xlim=(-reach, reach), ylim=(-reach, reach), title="all, with the near-unit band 0.90 to 1.05")
    middle = [_bulk(real), _bulk(imaginary)]
    half = 0.62 * max(0.02, *(high - low for low, high in middle))
    (left, right), (bottom, top) = (((low + high) / 2 - half, (low + high) / 2 + half) for low, high in middle)
    panels[1].set(xlim=(left, right), ylim=(bottom, top), title="where 98% of them lie")
    colours = figure.colorbar(dots, ax=panels, label="layer", shrink=0.9)
    colours.locator = _whole_numbers()
    colours.update_ticks()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def reliability(bins: Sequence[tuple[float, float, int]], path: Path, *, title: str) -> None:
    """Write a PNG of a reliability diagram; `bins` hold (mean probability, share diverged, runs) of each bin."""
    figure, (axes,) = _figure(1, 1, (6.4, 6.2))
    axes.plot([0, 1], [0, 1], color=REFERENCE, linewidth=1, linestyle="dashed", label="as often as it says")
    said, came, counts = zip(*bins, strict=True)
    axes.plot(said, came, color=ALIVE, linewidth=1.5)
    axes.scatter(said, came, s=[20 + 8 * math.sqrt(count) for count in counts], color=ALIVE, zorder=3)
    for x, y, count in bins:
        axes.annotate(str(count), (x, y), textcoords="offset points", xytext=(7, -11), fontsize=8)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set(xlabel="probability of divergence said of runs held out", ylabel="share that diverged (number of runs)")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left", fontsize=9)
    _save(figure, path)


def demo(curves: Sequence[Curve], watched: Watched, path: Path, *, title: str) -> None:
    """Write a PNG of the losses, the monitor's risk and the settings in force, over one axis of steps."""
    figure, panels = _figure(3, 1, (9.0, 8.4), heights=(3, 1.6, 1.4))
    losses, risk, applied = panels
    for curve in curves:
        _draw_loss(losses, curve)
    losses.set(ylabel="loss (nats per byte)", yscale="log", ylim=(None, LOSS_TOP))
    losses.set_title(title, fontsize=11)
    if curves:
        losses.legend(loc="upper right", fontsize=9)
    risk.plot(watched.steps, watched.risks, color=DEAD, linewidth=1.4, marker=".", markersize=4)
    risk.set(ylabel="risk", ylim=(-0.03, 1.03))
    applied.step(watched.steps, watched.lr_scales, where="post", color=BACKOFF, linewidth=1.6)
    applied.set(xlabel="optimizer step (dotted: commands that all ranks applied)", ylim=(0, 1.08))
    applied.set_ylabel("learning-rate scale", color=BACKOFF)
    if any(watched.kss_alphas):
        beside = applied.twinx()
        beside.step(watched.steps, watched.kss_alphas, where="post", color=KSS, linewidth=1.6)
        beside.set(ylim=(0, None))
        beside.set_ylabel("KSS alpha", color=KSS)
    colours = {"set_lr_scale": BACKOFF, "set_kss": KSS}
    for step, kind in watched.commands:
        for panel in panels:
            panel.axvline(step, color=colours.get(kind, REFERENCE), linewidth=1.0, alpha=0.7, linestyle=":")
    _save(figure, path)


def _inked(draw: Callable[P, Any]) -> Callable[P, Any]:
    """Draw in INK and REFERENCE instead of black, because the dark mode of a page replaces these colours."""

    @functools.wraps(draw)
    def inked(*args: P.args, **kwargs: P.kwargs) -> Any:
        require("picture")
        import matplotlib as mpl

        named = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK)
        named |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "patch.edgecolor"), REFERENCE)
        with mpl.rc_context({**named, "grid.color": REFERENCE, "axes.axisbelow": True, "legend.frameon": False}):
            return draw(*args, **kwargs)

    return inked


@_inked
def timeline(
    tracks: Sequence[Track], marks: Sequence[tuple[int, str]], levels: Sequence[float], *, narrow: bool = False
) -> Any:
    """Return a figure of risk, loss and settings in force over steps.

    `marks` holds (step, kind) of each applied command. `levels` are risks at which a line is drawn. Earlier launches
    are paler.
    """
    with_loss = any(loss is not None for track in tracks for loss in track.losses)
    with_kss = any(any(track.kss_alphas) for track in tracks)
    heights = [2.0, *([1.6] if with_loss else []), 1.2, *([0.9] if with_kss else [])]
    figure, panels = _figure(len(heights), 1, (4.2 if narrow else 9.6, 1.25 * sum(heights) + 0.3), heights)
    risk, *others = panels
    loss = others.pop(0) if with_loss else None
    scale, alpha = others[0], others[1] if with_kss else None
    for level in levels:
        risk.axhline(level, color=REFERENCE, linewidth=0.9, linestyle="dashed")
    for track in tracks:
        latest = track is tracks[-1]
        pale = 1.0 if latest else 0.45
        dots = {"marker": ".", "markersize": 3} if len(track.steps) < 400 else {}
        named = ("risk", "forecast, which only warns") if latest else (None, None)
        risk.plot(track.steps, _known(track.forecasts), color=FORECAST, lw=0.9, alpha=0.55 * pale, label=named[1])
        risk.plot(track.steps, track.risks, color=DEAD, linewidth=1.5, alpha=pale, label=named[0], **dots)
        risk.plot(track.not_finite, [1.0] * len(track.not_finite), "x", color=DEAD, markersize=8, mew=2)
        if loss is not None:
            loss.plot(track.steps, _known(track.losses), color=ALIVE, linewidth=1.4, alpha=pale)
        scale.step(track.steps, track.lr_scales, where="post", color=BACKOFF, linewidth=1.8, alpha=pale)
        if alpha is not None:
            alpha.step(track.steps, track.kss_alphas, where="post", color=KSS, linewidth=1.8, alpha=pale)
    risk.set(ylabel="risk", ylim=(-0.03, 1.05))
    risk.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, fontsize=8, borderaxespad=0.1)
    scale.set(ylabel="rate ×", ylim=(0, 1.08))
    if loss is not None:
        known = [value for track in tracks for value in _known(track.losses) if math.isfinite(value)]
        logarithmic = bool(known) and min(known) > 0 and max(known) > 20 * min(known)
        loss.set(ylabel="loss", yscale="log" if logarithmic else "linear")
    if alpha is not None:
        alpha.set(ylabel="KSS α", ylim=(0, None))
    for step, kind in marks:
        colour = {"set_lr_scale": BACKOFF, "set_kss": KSS}.get(kind, REFERENCE)
        for panel in panels:
            panel.axvline(step, color=colour, linewidth=0.9, alpha=0.7, linestyle=":")
    panels[-1].set_xlabel("optimizer step")
    figure.align_ylabels(panels)
    return figure


@_inked
def planes(shown: Sequence[Plane], *, narrow: bool = False) -> Any:
    """Return a figure of eigenvalues and the unit circle, coloured by depth: one panel per snapshot, on one scale."""
    from matplotlib.patches import Annulus, Circle

    moduli = sorted(math.hypot(*pair) for plane in shown for layer in plane.layers for pair in layer)
    reach = 1.12 * max(1.2, moduli[int(0.95 * (len(moduli) - 1))] if moduli else 1.2)
    size = (4.2, 4.0 * len(shown)) if narrow else (3.5 * max(2, len(shown)) + 0.9, 3.9)
    figure, panels = _figure(*((len(shown), 1) if narrow else (1, len(shown))), size)
    deepest = max(1, *(len(plane.layers) - 1 for plane in shown))
    for panel, plane in zip(panels, shown, strict=True):
        points = [(x, y, depth) for depth, layer in enumerate(plane.layers) for x, y in layer]
        panel.add_patch(Annulus((0, 0), 1.05, 0.15, facecolor="#f1c40f", alpha=0.3, edgecolor="none"))
        panel.add_patch(Circle((0, 0), 1.0, fill=False, edgecolor=REFERENCE, linewidth=1))
        real, imaginary, depths = zip(*points, strict=True) if points else ((), (), ())
        dots = panel.scatter(
            real, imaginary, c=depths, s=13, cmap="viridis", vmin=0, vmax=deepest, ec=REFERENCE, lw=0.3
        )
        outside = sum(max(abs(x), abs(y)) > reach for x, y, _ in points)
        beyond = f"\n{outside} of {len(points)} lie outside" if outside else ""
        panel.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach), xlabel="Re λ", ylabel="Im λ")
        panel.set_title(f"{plane.title}{beyond}", fontsize=9)
    place = {"location": "bottom", "aspect": 40} if narrow else {"shrink": 0.85}
    colours = figure.colorbar(dots, ax=panels, label="layer", **place)
    colours.locator = _whole_numbers()
    colours.update_ticks()
    return figure


@_inked
def heatmaps(
    steps: Sequence[int], named: Sequence[tuple[str, Sequence[Sequence[float | None]]]], *, narrow: bool = False
) -> Any:
    """Return a figure of values by layer (row) and step (column), one panel for each (title, rows).

    Masses use a scale from 0 to 1. Other values use their range, logarithmic when it spans a factor of 20.
    """
    from matplotlib.colors import LogNorm, Normalize

    figure, panels = _figure(len(named), 1, (4.2 if narrow else 9.6, 1.9 * len(named)))
    middles = [(low + high) / 2 for low, high in itertools.pairwise(steps)]
    edges = [steps[0] - 0.5, *middles, steps[-1] + 0.5]
    for panel, (title, rows) in zip(panels, named, strict=True):
        values = [_known(row) for row in rows]
        known = [value for row in values for value in row if math.isfinite(value)]
        low, high = min(known, default=0.0), max(known, default=1.0)
        linear = Normalize(0.0 if high <= 1.0 else low, max(high, 1.0))
        norm = LogNorm(low, high) if low > 0 and high > 20 * low else linear
        depths = [layer - 0.5 for layer in range(len(rows) + 1)]
        drawn = panel.pcolormesh(edges, depths, values, norm=norm, cmap="viridis", rasterized=True)
        panel.set(ylabel="layer")
        panel.set_title(title, fontsize=9, loc="left")
        panel.yaxis.set_major_locator(_whole_numbers())
        panel.invert_yaxis()
        panel.grid(visible=False)
        figure.colorbar(drawn, ax=panel, pad=0.02)
    panels[-1].set_xlabel("optimizer step")
    return figure


def svg(figure: Any) -> str:
    """Return a figure as an SVG document without a background. The same figure gives the same document."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "koopmon"}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata, dpi=110)
    return text.getvalue()


def png(figure: Any, path: Path) -> None:
    """Write a figure as a PNG. Raises PlotError."""
    _save(figure, path)


def _known(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _draw_loss(panel: Any, curve: Curve) -> None:
    panel.plot(curve.steps, curve.losses, color=curve.colour, linewidth=1.4, label=curve.label)
    if not curve.diverged or not curve.steps:
        return
    step, loss = curve.steps[-1], curve.losses[-1]
    # The final loss may lie above the axis, so its mark is drawn at the edge.
    edge = 0.8 * LOSS_TOP
    panel.plot(step, min(loss, edge) if math.isfinite(loss) else edge, marker="x", markersize=11, mew=2.5, color=DEAD)
    panel.annotate(
        f"died at step {step}, loss {loss:.3g}",
        (step, edge),
        xytext=(10, -14),
        textcoords="offset points",
        color=DEAD,
        fontsize=9,
    )


def _figure(
    rows: int, columns: int, size: tuple[float, float], heights: Sequence[float] | None = None
) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, row by row; the panels of a column share their horizontal axis."""
    require("picture")
    # The object interface needs no window system and shares no state with the importing program.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex="col", squeeze=False, height_ratios=heights).ravel().tolist()
    for panel in panels:
        panel.grid(alpha=0.25)
    return figure, panels


def _bulk(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of `values` without the outermost 2%."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    return (ordered[cut], ordered[-1 - cut]) if ordered else (-1.0, 1.0)


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise PlotError(f"{path}: cannot be written: {error.strerror}") from None
