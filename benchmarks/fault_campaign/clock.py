"""A wall clock that the fault campaign can put wrong in one process: the machine's own is never touched.

Imported before anything of koopmon, it makes `time.time` add the number of seconds in the file that FAULT_CLOCK names.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "FAULT_CLOCK"


def falsify(path: Path) -> None:
    """From now on `time.time` in this process adds what `path` holds."""
    true_time = time.time

    def false_time() -> float:
        try:
            return true_time() + float(path.read_text())
        except (OSError, ValueError):  # not there yet, or being written
            return true_time()

    time.time = false_time


if os.environ.get(VARIABLE):
    falsify(Path(os.environ[VARIABLE]))
