"""Announcements of the monitors of `koopmon run`: one file for each, in the state directory, while its job runs.

The launcher holds a lock on its file. A file without a lock belongs to a launcher that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated

import msgspec
from msgspec import Meta

from koopmon.cli.launch_inspection import state_directory
from koopmon.files import locked, open_regular
from koopmon.wire.messages import RunName

MAX_BYTES = 16_384
STALE_SECONDS = 60.0
"""Age in seconds from which a file without a lock is removed. A younger one may not have its lock yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveMonitor:
    """The monitor of one running job. `started` is in Unix seconds; `page` is the address of its live page."""

    run: RunName
    page: Annotated[str, Meta(pattern=r"^https?://[!-~]+\Z")]
    store: Annotated[str, Meta(pattern=r"^/[^\x00-\x1f\x7f]+\Z")]
    pid: int
    started: Annotated[float, Meta(ge=0.0, le=2.5e11)]


class Announcement:
    """The file of one monitor, from `announce` until `close`."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path

    def close(self) -> None:
        """Remove the file. Idempotent."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._file.close()


def announce(run: str, page: str, store: Path) -> Announcement | None:
    """Write the file of this process's monitor. None if that fails, because a job does not depend on the file."""
    directory = _directory()
    # A home directory may be shared between hosts.
    path = directory / f"{platform.node() or 'host'}-{os.getpid()}.json"
    monitor = LiveMonitor(run=run, page=page, store=str(store.absolute()), pid=os.getpid(), started=time.time())
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(directory)
        file = locked(path)
        file.truncate(0)
        file.write(json.dumps(asdict(monitor)).encode())
        file.flush()
    except OSError:
        return None
    return Announcement(file, path)


def live_monitors() -> list[LiveMonitor]:
    """Return the announced monitors that run, oldest first. A file that cannot be read is left out."""
    found = []
    for path in _files(_directory()):
        with contextlib.suppress(OSError), open_regular(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if (monitor := _monitor(file.read(MAX_BYTES))) is not None:
                    found.append(monitor)
    return sorted(found, key=lambda monitor: monitor.started)


def _directory() -> Path:
    return state_directory() / "live"


def _files(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from directory.glob("*.json")


def _monitor(text: bytes) -> LiveMonitor | None:
    """Decode one file; None if it is not one, such as one that is half written."""
    try:
        return msgspec.json.decode(text, type=LiveMonitor)
    except (msgspec.MsgspecError, RecursionError):
        return None


def _remove_stale(directory: Path) -> None:
    for path in _files(directory):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                with locked(path):
                    path.unlink(missing_ok=True)
