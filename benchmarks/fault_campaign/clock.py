"""Wall clock with a false offset in one process. The clock of the machine stays unchanged.

Import it before any module of koopmon. `time.time` then adds the number of seconds in the file FAULT_CLOCK.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "FAULT_CLOCK"


def falsify(path: Path) -> None:
    """Make `time.time` in this process add the number in `path` from now on."""
    true_time = time.time

    def false_time() -> float:
        try:
            return true_time() + float(path.read_text())
        except (OSError, ValueError):  # the file is missing or being written
            return true_time()

    time.time = false_time


if os.environ.get(VARIABLE):
    falsify(Path(os.environ[VARIABLE]))
