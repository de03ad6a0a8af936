"""Heatmap of layers over steps: a PNG with one pixel per value, which the browser enlarges."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from koopmon.views.html import macro, number
from koopmon.views.spectra import QUANTITIES, Column

ANCHORS = (
    (0x00, 0x20, 0x51), (0x11, 0x36, 0x6C), (0x3C, 0x4D, 0x6E), (0x62, 0x64, 0x6F), (0x7F, 0x7C, 0x75),
    (0x9A, 0x94, 0x78), (0xBB, 0xAF, 0x71), (0xE2, 0xCB, 0x5C), (0xFD, 0xEA, 0x45),
)  # fmt: skip
"""Colours of cividis, which is readable with and without colour vision deficiency."""
MAX_RADIUS = 3.0
NOTHING = 255
"""Palette index of transparent pixels; smaller indices go from low to high."""


def heatmap(
    columns: Sequence[Column], quantity: str, labels: Sequence[str] = (), *, num_snapshots: int | None = None
) -> Markup:
    """Figure of one of QUANTITIES, with the scale of its colours. Needs a column.

    `labels` are those of the rows. `num_snapshots` may exceed the number of columns, which are then a selection.
    """
    low, high = scale_of(columns, quantity)
    shades = _shades(columns, quantity, low, high)
    height, width = shades.shape
    newest = [value for value in columns[-1].values[quantity] if math.isfinite(value)]
    description = (
        f"{QUANTITIES[quantity].capitalize()} of {height} layers in {width} snapshots, step {columns[0].step} to"
        f" {columns[-1].step}. At the last one: mean {number(sum(newest) / len(newest) if newest else None)}, highest"
        f" {number(max(newest, default=None))}."
    )
    return macro(
        "charts.html",
        "heatmap",
        url=png_url(shades),
        description=description,
        labels=labels or ("0", str(height - 1)),
        steps=(columns[0].step, columns[-1].step),
        low=low,
        high=high,
        is_cut=high == MAX_RADIUS,
        num_snapshots=num_snapshots or width,
        num_columns=width,
        ramp=png_url(np.arange(NOTHING, dtype=np.uint8)[None]),
    )


def scale_of(columns: Sequence[Column], quantity: str) -> tuple[float, float]:
    """Return the lowest and highest value of the colour scale: 0 to 1 for masses, 0 to the largest value for radii."""
    if quantity != "spectral_radius":
        return 0.0, 1.0
    found = [value for column in columns for value in column.values[quantity] if math.isfinite(value)]
    return 0.0, min(max(max(found, default=1.0), 1.2), MAX_RADIUS)


def _shades(columns: Sequence[Column], quantity: str, low: float, high: float) -> Any:
    """Palette indices, (rows, columns); the last layer is on top."""
    height = max(len(column.values[quantity]) for column in columns)
    values = np.full((len(columns), height), np.nan)
    for row, column in zip(values, columns, strict=True):
        row[: len(column.values[quantity])] = column.values[quantity]
    known = np.isfinite(values)
    top = NOTHING - 1
    shades = np.clip(np.rint(top * (np.where(known, values, low) - low) / (high - low)), 0, top)
    return np.where(known, shades, NOTHING).astype(np.uint8).T[::-1]


def png_url(shades: Any) -> Markup:
    """Data URL of a PNG with one pixel for each palette index of a (rows, columns) array."""
    height, width = shades.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in shades), 6)
    chunks = ((b"IHDR", head), (b"PLTE", _PALETTE), (b"tRNS", _ALPHA), (b"IDAT", data), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)
    return Markup("data:image/png;base64," + base64.b64encode(png).decode("ascii"))  # noqa: S704 - base64


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _palette() -> bytes:
    places = np.linspace(0, len(ANCHORS) - 1, NOTHING)
    channels = [np.interp(places, range(len(ANCHORS)), channel) for channel in zip(*ANCHORS, strict=True)]
    return bytes(np.rint(np.array(channels).T).astype(np.uint8)) + bytes(3)


_PALETTE = _palette()
_ALPHA = bytes([255] * NOTHING + [0])
