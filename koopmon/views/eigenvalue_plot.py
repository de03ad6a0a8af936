"""SVG plot of the eigenvalues of all layers in the complex plane."""

from __future__ import annotations

import math
from collections.abc import Sequence

from koopmon.views.html import Markup, tag
from koopmon.views.run_view import LatestSpectrum
from koopmon.views.svg_charts import number

DEPTHS = 16
"""Number of shades from the first layer to the last: `.depth-0` to `.depth-15`."""
RING = (0.90, 1.05)
"""Range of moduli that count as near unit."""
MIN_MODULUS, MAX_MODULUS = 1.3, 3.0
"""Bounds of the plotted modulus, which follows the largest eigenvalue."""
EDGE = 190.0
"""Plot coordinate of the largest plotted modulus; the picture extends to 200."""


def circle(spectrum: LatestSpectrum) -> Markup:
    """Plot with the unit circle and the near-unit ring; colours show the depth."""
    moduli = [math.hypot(re, im) for pairs in spectrum.eigenvalues for re, im in _pairs(pairs)]
    limit = min(max(MIN_MODULUS, 1.08 * max(moduli, default=1.0)), MAX_MODULUS)
    scale, last = EDGE / limit, max(1, len(spectrum.eigenvalues) - 1)
    dots = []
    for row, pairs in enumerate(spectrum.eigenvalues):
        path = "".join(_dot(re, im, scale, limit) for re, im in _pairs(pairs))
        depth = round((DEPTHS - 1) * row / last)
        dots.append(tag("path", tag("title", f"layer {spectrum.labels[row]}"), d=path, class_=f"depth-{depth}"))
    return tag(
        "svg",
        tag("path", d=f"{_round(scale * RING[1])}{_round(scale * RING[0])}", fill_rule="evenodd", class_="ring"),
        tag("path", d="M-200,0H200M0,-200V200", class_="cross"),
        tag("circle", r=f"{scale:.1f}", class_="unit"),
        tag("g", *dots, class_="eigenvalues"),
        tag("text", "1", x=f"{scale + 5:.0f}", y=15),
        tag("text", "Re", x=198, y=-6, text_anchor="end"),
        tag("text", "Im", x=6, y=-188),
        class_="circle",
        viewBox="-200 -200 400 400",
        role="img",
        aria_label=_words(spectrum, moduli, limit),
    )


def depth_legend(labels: Sequence[str]) -> Markup:
    """Legend of the shades, from the first layer to the last."""
    width = f"{100 / DEPTHS + 0.5}%"
    shades = [
        tag("rect", x=f"{100 * shade / DEPTHS}%", width=width, height=10, class_=f"depth-{shade}")
        for shade in range(DEPTHS)
    ]
    first, last = (
        tag("text", f"layer {labels[0]}", x=0, y=26),
        tag("text", f"layer {labels[-1]}", x="100%", y=26, text_anchor="end"),
    )
    return tag("svg", *shades, first, last, class_="legend", height=30, width="100%", aria_hidden="true")


def _words(spectrum: LatestSpectrum, moduli: Sequence[float], limit: float) -> str:
    near = sum(RING[0] <= modulus <= RING[1] for modulus in moduli)
    beyond, outside = (sum(modulus > bound for modulus in moduli) for bound in (RING[1], limit))
    said = (
        f"Eigenvalues of {len(spectrum.labels)} layers at step {spectrum.step}: {near} of {len(moduli)} in the"
        f" near-unit ring, {beyond} beyond it; the largest modulus is {number(max(moduli, default=None))}."
    )
    return f"{said} {outside} beyond modulus {limit:g} are drawn at the rim." if outside else said


def _pairs(flat: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _dot(re: float, im: float, scale: float, limit: float) -> str:
    """SVG path of one point.

    A path of zero length with round caps needs a tenth of the bytes of a circle element.
    """
    modulus = math.hypot(re, im)
    scale = scale * limit / modulus if modulus > limit else scale
    return f"M{scale * re:.1f},{-scale * im:.1f}h0"


def _round(r: float) -> str:
    return f"M{-r:.1f},0a{r:.1f},{r:.1f} 0 1 0 {2 * r:.1f},0a{r:.1f},{r:.1f} 0 1 0 {-2 * r:.1f},0z"
