"""The agents that a monitor serves, with their keys and their permitted runs.

The monitor rereads the files when the directory or a file changes. The user can therefore add, restrict, rotate or
remove an agent without a restart of the monitor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from koopmon.errors import KeysError
from koopmon.wire.keys import AGENTS, PublicKey, check_directory, read_public

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Interval between checks for changed files, in seconds."""
MAX_AGENTS = 4096


class _Stamp(NamedTuple):
    """File attributes that change when the file changes."""

    path: Path
    modified_ns: int
    inode: int
    size: int


class AuthorizedKeys:
    """Public files in `directory`/agents, each named after an agent. Raises KeysError when a file is not usable.

    After construction, an unusable file causes one log line and the monitor does not serve its agent.
    """

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._directory = directory / AGENTS
        self._clock = clock
        self._now = now
        self._files: dict[_Stamp, PublicKey | None] = {}
        self._agents: dict[str, PublicKey] = {}
        self._owners: dict[str, str] = {}
        """Agent name by key, including previous keys that a rotation may have expired."""
        self._checked_at = clock()
        for stamp in self._stamps():
            self._files[stamp] = read_public(stamp.path)
        self._list()

    def name_of(self, key: str) -> str | None:
        """Return the name of the agent that owns `key`; None for an unknown or expired key."""
        self._refresh()
        name = self._owners.get(key)
        return name if name is not None and key in self._agents[name].keys(self._now()) else None

    def is_authorized(self, name: str, run: str) -> bool:
        """Return True if the agent `name` may send data for `run`."""
        agent = self._agents.get(name)
        return agent is not None and any(fnmatchcase(run, pattern) for pattern in agent.runs)

    def _refresh(self) -> None:
        if self._clock() < self._checked_at + CHECK_SECONDS:
            return
        self._checked_at = self._clock()
        try:
            stamps = self._stamps()
        except KeysError as error:
            if self._files:
                logger.warning("no agent with a key is served: %s", error)
            stamps = []
        if stamps != list(self._files):
            self._files = {stamp: self._files.get(stamp) or self._read(stamp.path) for stamp in stamps}
            self._list()

    @staticmethod
    def _read(path: Path) -> PublicKey | None:
        try:
            return read_public(path)
        except KeysError as error:
            logger.warning("an agent is not served: %s", error)
            return None

    def _list(self) -> None:
        self._agents = {stamp.path.stem: key for stamp, key in self._files.items() if key is not None}
        self._owners = {key.previous: name for name, key in self._agents.items() if key.previous is not None}
        self._owners |= {key.public: name for name, key in self._agents.items()}

    def _stamps(self) -> list[_Stamp]:
        check_directory(self._directory)
        try:
            paths = sorted(self._directory.glob("*.key"))[:MAX_AGENTS]
            stats = [(path, path.stat()) for path in paths]
        except OSError as error:
            raise KeysError(f"keys {self._directory}: {(error.strerror or str(error)).lower()}") from None
        return [_Stamp(path, status.st_mtime_ns, status.st_ino, status.st_size) for path, status in stats]
