"""The wait for the monitor that `koopmon run` starts beside the job: the training begins when it serves.

A wrong learning rate does its damage within tens of steps, and a fast training takes more of these while a monitor
starts. Job and monitor import torch side by side, so that the wait is the difference of their starts.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from koopmon.logs import log_for_job

logger = logging.getLogger("koopmon.agent")

VARIABLE = "KOOPMON_READY_FILE"
"""A file that appears when the monitor serves, or has failed to start. Its directory goes with the launcher."""
MAX_SECONDS = 60.0
PATIENCE_SECONDS = 5.0
"""Time in seconds after which a line reports the wait."""
POLL_SECONDS = 0.02


def wait_for_monitor(environ: Mapping[str, str] = os.environ) -> None:
    """Return when the monitor of this job serves or has failed to start, after MAX_SECONDS at the latest."""
    if not (name := environ.get(VARIABLE)):
        return
    file, started, told = Path(name), time.monotonic(), False
    while file.parent.exists() and not file.exists():
        seconds = time.monotonic() - started
        if seconds > PATIENCE_SECONDS and not told:
            told = True
            log_for_job(
                logger, f"the training waits for its monitor to start, at most {MAX_SECONDS:.0f} s", level=logging.INFO
            )
        if seconds > MAX_SECONDS:
            log_for_job(logger, f"the training begins unguarded: no monitor has started in {MAX_SECONDS:.0f} s")
            return
        time.sleep(POLL_SECONDS)
