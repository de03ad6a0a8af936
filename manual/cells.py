"""Cells of Markdown tables, as Python-Markdown reads them."""

from __future__ import annotations

import re

CODE = re.compile(r"(`+.+?`+)")


def cell(text: str) -> str:
    """On one line, its bars escaped; within code they end no cell, and a backslash would be shown."""
    parts = CODE.split(" ".join(text.split()))
    return "".join(part if CODE.fullmatch(part) else part.replace("|", "\\|") for part in parts)
