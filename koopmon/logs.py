"""Log lines of a job with many ranks: one line for all ranks, and one line a minute for a trouble that repeats.

Handlers and filters belong to the application. One that raises ends no training: see `_contain`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable

from koopmon.errors import raise_from_signal

MINUTE = 60.0
MAX_KEYS = 1024
"""Keys with a stored time of their last line."""
_LAUNCHED = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
"""The launchers' variables of rank and world size. torchrun is first, because it may run inside a Slurm step."""


_IN_A_TRAINING = ("agent", "config", "integrations", "observables", "plugins")
"""Loggers below `koopmon` that training processes use."""


def _contain(logger: logging.Logger) -> None:
    """Drop the exceptions of the application's handlers and filters, which `logging` passes on to the caller."""
    handle = logger.handle

    def contained(record: logging.LogRecord) -> None:
        try:
            handle(record)
        except Exception as error:
            raise_from_signal(error)

    logger.handle = contained  # type: ignore[method-assign]


for _name in _IN_A_TRAINING:
    _contain(logging.getLogger(f"koopmon.{_name}"))


def announced() -> tuple[int, int]:
    """Return rank and world size from the first launcher that sets this process's rank; (0, 1) by default."""
    for rank, size in _LAUNCHED:
        if os.environ.get(rank, "").isdecimal():
            world = os.environ.get(size, "")
            return int(os.environ[rank]), int(world) if world.isdecimal() else 1
    return 0, 1


def log_for_job(logger: logging.Logger, text: str, *, level: int = logging.WARNING, rank: int | None = None) -> None:
    """Log a line that every rank would log alike: rank 0 at `level`, the others at DEBUG.

    `rank` is by default the one that the launcher announced.
    """
    first = (announced()[0] if rank is None else rank) == 0
    logger.log(level if first else logging.DEBUG, "koopmon: %s", text)


def tell(logger: logging.Logger, text: str, *, rank: int | None = None) -> None:
    """Show a line of news that is no fault to the person who started the job: of rank 0 only.

    It is logged at INFO. Where the application shows no log of that level, it goes to standard error.
    """
    if (announced()[0] if rank is None else rank) != 0:
        logger.debug("koopmon: %s", text)
    elif logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("koopmon: %s", text)
    elif sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # a closed standard error
            sys.stderr.write(f"koopmon: {text}\n")
            sys.stderr.flush()


class LogLimit:
    """Admits one log line a minute for each key. Thread-safe. It forgets the oldest of more than MAX_KEYS keys."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logged_at: OrderedDict[Hashable, float] = OrderedDict()
        self._held_back: dict[Hashable, int] = {}

    def admit(self, now: float, key: Hashable = "", *, count: int = 1) -> str | None:
        """Return None if the line about `key` must wait, else the line's ending.

        The ending is the number of lines held back since the last one. `count` is the number of events in this line.
        """
        with self._lock:
            logged_at = self._logged_at.get(key)
            if logged_at is not None and now - logged_at < MINUTE:
                self._held_back[key] = self._held_back.get(key, 0) + count
                return None
            self._logged_at[key] = now
            self._logged_at.move_to_end(key)
            if len(self._logged_at) > MAX_KEYS:
                oldest, _ = self._logged_at.popitem(last=False)
                self._held_back.pop(oldest, None)
            held_back = self._held_back.pop(key, 0)
        return f" ({held_back} more since the last such line)" if held_back else ""
