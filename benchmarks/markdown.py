"""Lines of Markdown for the writers of pages."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Format a table with a row for each of `rows`, each with as many cells as `heading`."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heading, *rows)]
    return [lines[0], "|" + "---|" * len(heading), *lines[1:]]


def paragraph(parts: Sequence[str]) -> list[str]:
    """Join `parts` to one paragraph with a width of 120 columns."""
    return textwrap.wrap(" ".join(parts), width=120)
