"""Heatmap of layers over steps: a PNG with one pixel per value, which the browser enlarges."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

from koopmon.views.run_view import Column

ANCHORS = (
    (0x00, 0x20, 0x51), (0x11, 0x36, 0x6C), (0x3C, 0x4D, 0x6E), (0x62, 0x64, 0x6F), (0x7F, 0x7C, 0x75),
    (0x9A, 0x94, 0x78), (0xBB, 0xAF, 0x71), (0xE2, 0xCB, 0x5C), (0xFD, 0xEA, 0x45),
)  # fmt: skip
"""Colours of cividis, which is readable with and without colour vision deficiency."""
MAX_RADIUS = 3.0
NOTHING = 255
"""Palette index of transparent pixels; smaller indices go from low to high."""


def scale_of(columns: Sequence[Column], quantity: str) -> tuple[float, float]:
    """Return the lowest and highest value of the colour scale: 0 to 1 for masses, 0 to the largest value for radii."""
    if quantity != "spectral_radius":
        return 0.0, 1.0
    found = [value for column in columns for value in column.values[quantity] if math.isfinite(value)]
    return 0.0, min(max(max(found, default=1.0), 1.2), MAX_RADIUS)


def picture(columns: Sequence[Column], quantity: str) -> tuple[str, int, int]:
    """Return a data URL and the numbers of steps and rows of the picture; the last layer is on top.

    `columns` must not be empty.
    """
    low, high = scale_of(columns, quantity)
    height = max(len(column.values[quantity]) for column in columns)
    drawn = [_shades(column.values[quantity], low, high, height) for column in columns]
    rows = [bytes(column[row] for column in drawn) for row in reversed(range(height))]
    return _data_url(rows, len(drawn)), len(drawn), height


def legend() -> str:
    """Colour scale from low to high as a data URL."""
    return _data_url([bytes(range(NOTHING))], NOTHING)


def _shades(values: Sequence[float], low: float, high: float, height: int) -> bytes:
    top = NOTHING - 1
    known = [
        min(top, max(0, round(top * (value - low) / (high - low)))) if math.isfinite(value) else NOTHING
        for value in values
    ]
    return bytes(known + [NOTHING] * (height - len(known)))


def _data_url(rows: Sequence[bytes], width: int) -> str:
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 6)
    head = struct.pack(">IIBBBBB", width, len(rows), 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"PLTE", _PALETTE), (b"tRNS", _ALPHA), (b"IDAT", data), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _palette() -> bytes:
    colours = []
    for index in range(NOTHING):
        at = index / (NOTHING - 1) * (len(ANCHORS) - 1)
        left = min(int(at), len(ANCHORS) - 2)
        pairs = zip(ANCHORS[left], ANCHORS[left + 1], strict=True)
        colours += [round(a + (at - left) * (b - a)) for a, b in pairs]
    return bytes([*colours, 0, 0, 0])


_PALETTE = _palette()
_ALPHA = bytes([255] * NOTHING + [0])
