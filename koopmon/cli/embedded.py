"""The monitor process of `koopmon run`: it serves one job, at a lower priority, and ends with the job."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from koopmon.cli.live_monitors import Announcement, announce
from koopmon.errors import KoopmonError
from koopmon.files import is_locked, open_private
from koopmon.wire.endpoints import socket_directory

READY_SECONDS = 120.0
"""Startup limit in seconds. A cold import of torch from a network file system is slow."""
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 2.0
STOP_SECONDS = 65.0
"""Shutdown limit in seconds, above the monitor's own limit for the analysis of received snapshots."""
NICE = 5
"""Lower priority than the training ranks, but high enough for answers within a few steps on busy cores."""


class MonitorNotReadyError(KoopmonError):
    """The embedded monitor did not start; the message contains the last line of its log, if any."""


class EmbeddedMonitor:
    """One `koopmon monitor` on an ipc endpoint in its own directory, from its creation until `close`."""

    def __init__(
        self, run: str, store: Path, environ: Mapping[str, str], mask: set[signal.Signals], options: Sequence[str]
    ) -> None:
        """Start the monitor of `run` with the signal mask `mask`, without waiting. Its log file lies beside `store`.

        `options` are further arguments for `koopmon monitor`. Raises MonitorNotReadyError if it cannot be started.
        """
        self.run = run
        self.store = store
        self.log = store.with_name(f"{store.name}.log")
        self.page = ""
        """Address of its live page, once it serves."""
        self._announcement: Announcement | None = None
        try:
            store.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory = socket_directory()
        except OSError as error:
            raise _not_started(error) from None
        with contextlib.suppress(OSError):
            if is_locked(store.with_name(f"{store.name}.lock")):  # the log there is that of another job's monitor
                self.log = self._directory / "log"
        self._said = ""
        self.endpoint = f"ipc://{self._directory / 'control'}"
        self.ready_file = self._directory / "ready"
        """It appears when the monitor serves, or has failed to start."""
        sockets = ["--bind", self.endpoint, "--bind-data", f"ipc://{self._directory / 'data'}"]
        files = ["--store", str(store), "--ready-file", str(self.ready_file)]
        # The accelerators belong to the job.
        words = ["monitor", *sockets, *files, "--device", "cpu", "--with-parent", *options]
        try:
            with open_private(self.log, truncate=True) as log:
                # A separate session: the terminal's Ctrl-C reaches only the job, and the monitor outlives it. The
                # monitor's standard input is our pipe: when this process dies for any reason, the monitor reads end of
                # file.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "koopmon", *words],
                    env=dict(environ),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask),
                )
        except OSError as error:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise _not_started(error) from None
        self._deadline = time.monotonic() + READY_SECONDS
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + NICE)

    def ready(self) -> bool:
        """Return True once the monitor serves.

        Raises MonitorNotReadyError when it died instead, or took longer than READY_SECONDS, which ends it.
        """
        with contextlib.suppress(OSError, ValueError):
            addresses = json.loads(self.ready_file.read_text(encoding="utf-8"))
            self.page = f"{addresses['scheme']}://{addresses['http']}/"
            self._announcement = announce(self.run, self.page, self.store)
            return True
        failure = ""
        if (status := self._process.poll()) is not None:
            failure = self._last_words() or f"it ended with status {status}"
        elif time.monotonic() > self._deadline:
            self._process.kill()
            failure = f"not ready after {READY_SECONDS:.0f} s; its log is {self.log}"
        if failure:
            with contextlib.suppress(OSError):
                self.ready_file.touch()
            raise MonitorNotReadyError(failure)
        return False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def failure(self) -> MonitorNotReadyError | None:
        """The reason why the monitor ended by itself before it served; None otherwise. Call it after `close`."""
        if self.page or self._process.returncode in (0, -signal.SIGTERM, -signal.SIGKILL):
            return None
        return MonitorNotReadyError(self._said or f"it ended with status {self._process.returncode}")

    def close(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Stop the monitor, wait until it has written its history, and remove its directory. Idempotent.

        It calls `on_wait` when the monitor takes more than PATIENCE_SECONDS, and kills it after STOP_SECONDS more.
        """
        assert self._process.stdin is not None
        if self._announcement is not None:
            self._announcement.close()
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            on_wait()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdin.close()
        if self._process.returncode == 0:
            self._remove_calm_log()
        self._said = self._last_words()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _remove_calm_log(self) -> None:
        """Remove the log unless it has a warning or an error: a run at rest is one file."""
        with contextlib.suppress(OSError):
            text = self.log.read_text(encoding="utf-8", errors="replace")
            if not any(f" {level} " in text for level in ("WARNING", "ERROR", "CRITICAL")):
                self.log.unlink()

    def _last_words(self) -> str:
        """Return the last line of the monitor's log without koopmon's prefix."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return ""
        said = [line.strip() for line in lines if line.strip()]
        return said[-1].removeprefix("koopmon: ") if said else ""


def _not_started(error: OSError) -> MonitorNotReadyError:
    return MonitorNotReadyError(f"{error.filename or 'monitor'}: {error.strerror}")
