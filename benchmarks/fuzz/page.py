"""Writer of the fuzzing results for docs/security.md, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import table

WORDS = {
    "codec": "the decoder of messages",
    "composition": "the monitor's handling of legal messages with extreme numbers",
    "sockets": "sockets and pages of a monitor, over TCP, with unknown peers and with false data",
    "http": "the HTTP server",
    "config": "the configuration parser",
    "calibrator": "the calibrator parser",
    "recording": "the reader and writer of damaged history files",
}
MEGABYTE = 1 << 20


def fuzz(told: Mapping[str, Any]) -> list[str]:
    """Write one row for each target, in the order of WORDS."""
    heading = ("target", "executions", "minutes", "memory growth, MB", "crashes")
    rows = []
    for name, words in WORDS.items():
        row = told["targets"][name]
        growth = max(row["growth_bytes"], row.get("peak_growth_bytes", 0)) / MEGABYTE
        minutes, crashes = f"{row['seconds'] / 60.0:.1f}", str(row["crashes"])
        rows.append((words, f"{row['executions']:,}", minutes, f"{growth:.1f}", crashes))
    rejected = told["targets"]["sockets"]["rejected"]
    reasons = ", ".join(f"`{name}` {count:,}" for name, count in sorted(rejected.items()) if count)
    silent = ", ".join(f"`{name}`" for name, count in sorted(rejected.items()) if not count)
    return [
        *table(heading, rows),
        "",
        f"The monitor counted these rejections meanwhile: {reasons}. It counted none of {silent}.",
    ]


WRITERS = {"fuzz": fuzz}
