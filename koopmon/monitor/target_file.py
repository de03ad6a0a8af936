"""File that announces the monitor to Prometheus (file_sd), for as long as the monitor serves.

The monitor holds a lock on its file. A file without a lock is that of a monitor that was killed; the next one removes
it. A process id would not do: another process, or another host of a shared directory, may have the same.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MODE, DIRECTORY_MODE = 0o644, 0o755
"""Prometheus runs as another user."""


@dataclass(frozen=True, slots=True)
class TargetDirectory:
    """Directory of target files. `run` is the one run of the monitor, if it serves no other."""

    path: Path
    run: str = ""
    wanted: bool = True
    """False for the default directory, which a service may not have: a failure there is no warning."""


@contextmanager
def announced(directory: TargetDirectory, address: str, scheme: str) -> Iterator[None]:
    """Keep a target file for `address`. A failure is one log line.

    Its label `job` is koopmon, which the dashboards select. It has no label `run`: Prometheus would rename the label
    `run` of every series. `__meta_koopmon_run` and `__meta_koopmon_host` are for relabelling.
    """
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    path = directory.path / f"koopmon-{host}-{os.getpid()}.json"
    labels = {"job": "koopmon", "__scheme__": scheme, "__meta_koopmon_host": host, "__meta_koopmon_run": directory.run}
    if directory.run:
        labels["ephemeral"] = "true"  # it ends with its job, and no alert misses it
    lock = -1
    try:
        if not directory.path.is_dir():
            directory.path.mkdir(parents=True, exist_ok=True)
            directory.path.chmod(DIRECTORY_MODE)  # the umask of a service is often 077
        _remove_stale(directory.path)
        lock = _write_locked(path, json.dumps([{"targets": [address], "labels": labels}]))
    except OSError as error:
        level = logging.WARNING if directory.wanted else logging.INFO
        words = "no file there announces this monitor to Prometheus"
        logger.log(level, "%s: %s: %s", directory.path, words, error.strerror)
    try:
        yield
    finally:
        if lock >= 0:
            with suppress(OSError):
                path.unlink()
            os.close(lock)


def _write_locked(path: Path, text: str) -> int:
    """Write the file at once and whole; return the descriptor that holds its lock."""
    # Prometheus reads *.json, also if the name begins with a dot.
    temporary = path.with_name(f"{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(descriptor, MODE)
        os.write(descriptor, text.encode())
        temporary.replace(path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_stale(directory: Path) -> None:
    """Remove the files of monitors that were killed."""
    for path in directory.glob("koopmon-*.json"):
        with suppress(OSError):  # locked, not ours, or removed by another monitor
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
