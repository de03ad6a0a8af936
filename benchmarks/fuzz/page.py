"""The fuzzing's figures as lines of Markdown, for docs/security.md: what `benchmarks.readme` writes there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import table

WORDS = {
    "codec": "messages, decoded",
    "composition": "legal messages with extreme numbers, and what the monitor makes of them",
    "sockets": "a monitor's own sockets and pages, over TCP, by strangers and liars",
    "http": "the pages' server",
    "config": "a configuration",
    "calibrator": "a calibrator",
    "recording": "a history file, damaged, then read and written",
}
MEGABYTE = 1 << 20


def fuzz(told: Mapping[str, Any]) -> list[str]:
    """One row per target, in the order of WORDS."""
    heading = ("what is fed", "executions", "minutes", "memory grew by, MB", "crashes")
    rows = []
    for name, words in WORDS.items():
        row = told["targets"][name]
        growth = max(row["growth_bytes"], row.get("peak_growth_bytes", 0)) / MEGABYTE
        minutes, crashes = f"{row['seconds'] / 60.0:.1f}", str(row["crashes"])
        rows.append((words, f"{row['executions']:,}", minutes, f"{growth:.1f}", crashes))
    rejected = told["targets"]["sockets"]["rejected"]
    reasons = ", ".join(f"`{name}` {count:,}" for name, count in sorted(rejected.items()) if count)
    silent = ", ".join(f"`{name}`" for name, count in sorted(rejected.items()) if not count)
    return [*table(heading, rows), "", f"What that monitor counted meanwhile: {reasons}. Not met there: {silent}."]


WRITERS = {"fuzz": fuzz}
