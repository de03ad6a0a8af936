"""Earlier launches of each run, in memory, so that a hello never waits for the disk."""

from __future__ import annotations

import logging
import sqlite3
from dataclasses import dataclass
from typing import Any

import msgspec

from koopmon.errors import one_line
from koopmon.history.schema import SQLITE_ERRORS
from koopmon.wire.messages import Ack, Applied, Hello

logger = logging.getLogger(__name__)

MAX_RUNS = 4096
"""Number of runs, those seen last, whose launches are kept."""
MAX_LAUNCHES = 256
"""Number of launches of one run that are kept: a hello is compared with them."""
_QUERY = f"""
SELECT name, incarnation, applied, applied_step, ended, CASE WHEN ended IS NULL THEN memory END
FROM incarnations AS t JOIN runs ON runs.id = run_id
WHERE run_id IN (SELECT id FROM runs ORDER BY last_seen DESC, id DESC LIMIT {MAX_RUNS}) ORDER BY t.id
"""


@dataclass(slots=True)
class LaunchState:
    """One incarnation: the values in force that rank 0 reported last, and the controller's checkpoint."""

    applied: Applied | None = None
    step: int = 0
    has_ended: bool = False
    memory: bytes | None = None


class Launches:
    """The last launches of each run, in the order of their starts.

    The methods from `joined` on have the arguments of the records of `HistoryWriter`.
    """

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, LaunchState]] = {}

    @classmethod
    def read(cls, database: sqlite3.Connection) -> Launches:
        """Read the launches of an open store. A file that cannot be read gives a log line and no launches."""
        found = cls()
        try:
            for name, incarnation, applied, step, ended, memory in database.execute(_QUERY):
                launch = found._launch(str(name), str(incarnation))
                launch.applied = None if applied is None else _decoded(name, applied)
                launch.step = step if isinstance(step, int) else 0
                launch.has_ended, launch.memory = ended is not None, memory if isinstance(memory, bytes) else None
        except SQLITE_ERRORS as error:
            logger.warning("store: earlier launches cannot be read: %s", one_line(error))
        return found

    def incarnations(self, run: str) -> list[str]:
        """Return the last MAX_LAUNCHES incarnations of `run`; empty for an unknown run."""
        return list(self._runs.get(run, ()))

    def last_applied(self, run: str, *, other_than: str) -> Applied | None:
        """Return the values in force in the latest incarnation of `run` except `other_than`; None when unknown.

        An incarnation that has ended leaves nothing. One that did no step had what the one before it left.
        """
        for incarnation, launch in reversed(self._runs.get(run, {}).items()):
            if incarnation == other_than:
                continue
            if launch.has_ended:
                return None
            if launch.applied is not None and (launch.step or launch.applied != Applied()):
                return launch.applied
        return None

    def memory(self, run: str, incarnation: str) -> bytes | None:
        """Return the last controller checkpoint of this incarnation; None if there is none."""
        launch = self._runs.get(run, {}).get(incarnation)
        return None if launch is None else launch.memory

    def joined(self, _: float, hello: Hello) -> None:
        is_new = hello.incarnation not in self._runs.get(hello.run, ())
        launch = self._launch(hello.run, hello.incarnation)
        if is_new or hello.process_rank == 0:
            launch.has_ended = False

    def closed(self, _: float, run: str, incarnation: str, state: int, *, end_reason: str | None = None) -> None:
        if end_reason is not None:
            self._launch(run, incarnation).has_ended = True

    def reported(self, _: float, run: str, incarnation: str, step: int, applied: Applied) -> None:
        launch = self._launch(run, incarnation)
        launch.step, launch.applied = step, applied

    def acked(self, at: float, ack: Ack) -> None:
        self.reported(at, ack.run, ack.incarnation, ack.step, ack.applied)

    def remembered(self, _: float, run: str, incarnation: str, memory: bytes) -> None:
        self._launch(run, incarnation).memory = memory

    def _launch(self, run: str, incarnation: str) -> LaunchState:
        launches = self._runs[run] = self._runs.pop(run, {})
        if len(self._runs) > MAX_RUNS:
            del self._runs[next(iter(self._runs))]
        if (known := launches.get(incarnation)) is not None:
            return known
        for earlier in launches.values():
            earlier.memory = None  # no hello of an earlier launch is accepted
        while len(launches) >= MAX_LAUNCHES:
            del launches[next(iter(launches))]
        launches[incarnation] = LaunchState()
        return launches[incarnation]


def _decoded(run: Any, text: Any) -> Applied | None:
    try:
        return msgspec.json.decode(text, type=Applied)
    except (msgspec.DecodeError, TypeError, ValueError, RecursionError) as error:
        logger.warning("store: what run %s had applied cannot be used: %s", one_line(run), one_line(error))
        return None
