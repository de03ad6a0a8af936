"""PNGs of spectra, of the calibration and of the demonstration. Only this file imports matplotlib, when it draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koopmon.errors import KoopmonError

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

DEAD = "#c0392b"
ALIVE = "#1f77b4"
REFERENCE = "#7f8c8d"
BACKOFF = "#e67e22"
KSS = "#27ae60"
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
    from matplotlib.ticker import MaxNLocator

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
    colours.locator = MaxNLocator(integer=True)
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
    losses.set(ylabel="loss (nats per byte)")
    if any(curve.diverged for curve in curves):
        losses.set(yscale="log", ylim=(None, LOSS_TOP))
    losses.set_title(title, fontsize=11)
    if curves:
        losses.legend(loc="upper right", fontsize=9)
    risk.plot(watched.steps, watched.risks, color=DEAD, linewidth=1.4, marker=".", markersize=4)
    risk.set(ylabel="risk", ylim=(-0.03, 1.03))
    applied.step(watched.steps, watched.lr_scales, where="post", color=BACKOFF, linewidth=1.6)
    applied.set(xlabel="optimizer step (dotted: commands that all ranks applied)", ylim=(0, 1.08))
    applied.set_ylabel("LR scale", color=BACKOFF)
    if any(watched.kss_alphas):
        beside = applied.twinx()
        beside.step(watched.steps, watched.kss_alphas, where="post", color=KSS, linewidth=1.6)
        beside.set(ylim=(0, None))
        beside.set_ylabel("KSS alpha", color=KSS)
    colours = {"set_lr_scale": BACKOFF, "set_kss": KSS, "rewind": DEAD}
    for step, kind in watched.commands:
        for panel in panels:
            panel.axvline(step, color=colours.get(kind, REFERENCE), linewidth=1.0, alpha=0.7, linestyle=":")
    _save(figure, path)


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
