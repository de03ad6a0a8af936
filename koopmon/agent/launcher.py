"""The rank and the number of ranks that a launcher has announced, and log lines that one rank writes for the job."""

from __future__ import annotations

import logging
import os

_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
"""The launchers' variables of rank and world size. torchrun is first, because it may run inside a Slurm step."""
logger = logging.getLogger("koopmon.agent")


def announced_ranks() -> tuple[int, int]:
    """Return rank and world size from the first launcher that sets this process's rank; (0, 1) by default."""
    for rank, size in _VARIABLES:
        if os.environ.get(rank, "").isdecimal():
            world = os.environ.get(size, "")
            return int(os.environ[rank]), int(world) if world.isdecimal() else 1
    return 0, 1


def log_for_job(text: str, rank: int | None = None) -> None:
    """Log a line that every rank would write: a warning on rank 0 only. None takes the announced rank."""
    leads = (announced_ranks()[0] if rank is None else rank) == 0
    logger.log(logging.WARNING if leads else logging.DEBUG, "koopmon: %s", text)
