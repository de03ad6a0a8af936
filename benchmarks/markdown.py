"""What the writers of pages are made of: lines of Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A row for each of `rows`, as many cells in each as in `heading`."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heading, *rows)]
    return [lines[0], "|" + "---|" * len(heading), *lines[1:]]


def paragraph(parts: Sequence[str]) -> list[str]:
    """One paragraph of `parts`, 120 columns wide."""
    return textwrap.wrap(" ".join(parts), width=120)
