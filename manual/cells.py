"""Cells of Markdown tables for Python-Markdown."""

from __future__ import annotations

import re

CODE = re.compile(r"(`+.+?`+)")


def cell(text: str) -> str:
    """Format `text` on one line with escaped bars. Bars in code stay, because no escape works there."""
    parts = CODE.split(" ".join(text.split()))
    return "".join(part if CODE.fullmatch(part) else part.replace("|", "\\|") for part in parts)
