"""One target under atheris in its own process: `python -m benchmarks.fuzz.drive TARGET STATS LIBFUZZER_ARGS...`.

Every few seconds it writes a JSON object to STATS with the number of each outcome and the growth of the process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import atheris

INSTRUMENTED = {
    "codec": ["koopmon.wire"],
    "http": ["koopmon.monitor.http.server", "uvicorn", "h11", "starlette"],
    "config": ["koopmon.config", "tomllib"],
    "calibrator": ["koopmon.risk"],
    "recording": ["koopmon.monitor", "benchmarks.campaign"],
    "composition": ["koopmon.monitor", "koopmon.risk"],
}
"""Packages by target whose branches guide the fuzzer. Native code (msgspec, SQLite) is not instrumented."""
WRITE_SECONDS = 2.0
WARM_EXECUTIONS = 20_000
WARM_SECONDS = 10.0
"""Executions and seconds of the warm-up: imports, caches and the corpus do not count as growth."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int | str = "self") -> int:
    """Return the memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


class Progress:
    """Counts outcomes and measures the memory. It reads the clock at each execution."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: Counter[str] = Counter()
        self._executions = 0
        self._began = self._written = time.monotonic()
        self._warm: int | None = None

    def count(self, outcome: str) -> None:
        self._outcomes[outcome] += 1
        self._executions += 1
        now = time.monotonic()
        if now - self._written < WRITE_SECONDS:
            return
        self._written = now
        resident = resident_bytes()
        if (self._warm is None and self._executions >= WARM_EXECUTIONS) or now - self._began >= WARM_SECONDS:
            self._warm = self._warm or resident
        told = {
            "executions": self._executions,
            "seconds": now - self._began,
            "outcomes": dict(self._outcomes.most_common()),
            "growth_bytes": 0 if self._warm is None else resident - self._warm,
        }
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(told), encoding="utf-8")
        partial.replace(self._path)


def main() -> None:
    target, stats, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=INSTRUMENTED[target], enable_loader_override=False):
        harness: Any = importlib.import_module(f"benchmarks.fuzz.{target}")
    progress = Progress(Path(stats))
    options: dict[str, Any] = {}
    if hasattr(harness, "mutate"):
        options["custom_mutator"] = lambda data, size, seed: harness.mutate(data, size, seed, atheris.Mutate)
    atheris.Setup([sys.argv[0], *arguments], lambda data: progress.count(harness.run(data)), **options)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
