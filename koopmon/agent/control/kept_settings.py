"""The settings in force, in a file that outlives the training processes: a restarted launch begins with them.

`koopmon run` names the file's directory in the environment. Rank 0 writes the file before the first update with a
changed setting, so that the file is right whenever the launch is killed. All ranks of the next launch read it before
their first step, also if torchrun restarts them in the same job. A training that ends sets it aside. One that raised
has not ended: on the ranks beside a killed one, the next collective raises. A script may catch the exception, or the
signal, and leave in order: `koopmon run` then puts the file back (`koopmon/cli/ended_settings.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from koopmon.errors import one_line
from koopmon.files import why_not_private
from koopmon.logs import log_for_job
from koopmon.run_names import file_name
from koopmon.wire.messages import Applied, RunName

logger = logging.getLogger("koopmon.agent")

VARIABLE = "KOOPMON_KEPT_SETTINGS"
"""Directory of the files, one for each run."""
MAX_BYTES = 4096


class _Process(Struct, frozen=True, array_like=True):
    """A process. A later one of the same number has another `started`. `parent` is the process that started it."""

    pid: int
    started: int
    parent: int

    @classmethod
    def of(cls, pid: int) -> _Process | None:
        """Return a living process; None if there is none, or no /proc."""
        try:
            # The name in parentheses may hold spaces: see proc_pid_stat(5).
            state, *words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            return None if state in (b"Z", b"X") else cls(pid, int(words[18]), int(words[0]))
        except (OSError, IndexError, ValueError):
            return None

    @property
    def is_another(self) -> bool:
        """True if it is alive, and not this one. Its parent may have changed."""
        found = None if self.pid == os.getpid() else _Process.of(self.pid)
        return found is not None and found.started == self.started


class _Kept(Struct, frozen=True, forbid_unknown_fields=True):
    run: RunName
    applied: Applied
    writer: _Process | None = None
    """Rank 0 of the launch. `koopmon run` reads it too."""


class KeptSettings:
    """The file of the run `run` in `directory`. `rank` is for the log lines; only rank 0 writes."""

    def __init__(self, directory: str, run: str, rank: int) -> None:
        self._path = Path(directory, f"{file_name(run)}.settings")
        self._ended = self._path.with_suffix(".ended")
        """The file of a training that has ended, until the next one begins."""
        self._run = run
        self._rank = rank
        self._pid = os.getpid()
        self._written = Applied()
        """The content of the file; the default if there is no file."""
        self._used = False
        self._is_anothers = False
        """True if the file belongs to another training of this name, which goes on."""
        self._error = id(getattr(sys, "last_value", None))

    @property
    def in_force(self) -> bool:
        """True if the file holds a setting."""
        return self._written != Applied()

    def read(self) -> Applied | None:
        """Return the settings that a killed launch left. A file that cannot be used is ignored with one line."""
        if self._rank == 0:
            with contextlib.suppress(OSError):
                self._ended.unlink(missing_ok=True)
        kept = self._content()
        if kept is None or kept.run != self._run:
            return None
        if self._leaves(kept):
            return None
        self._written = kept.applied
        return kept.applied

    def _content(self, *, silent: bool = False) -> _Kept | None:
        try:
            with open(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                flaw = why_not_private(self._path, os.fstat(file.fileno()))
                kept = None if flaw else msgspec.json.decode(file.read(MAX_BYTES), type=_Kept)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            flaw, kept = str(error), None
        if kept is None and not silent:
            self._warn(f"{self._path} is ignored: {one_line(flaw)}")
        return kept

    def _leaves(self, kept: _Kept) -> bool:
        """Return True, with one line, if the file belongs to another training of this name, which goes on."""
        writer = kept.writer
        # Rank 0 of the same job has the same parent.
        if writer is None or not writer.is_another or (self._rank != 0 and writer.parent == os.getppid()):
            return False
        self._is_anothers = True
        self._warn(
            f"another training of run {self._run} goes on in process {writer.pid}: its settings are left to it; "
            "give each job a run name of its own (KOOPMON_RUN)"
        )
        return True

    def keep(self, applied: Applied) -> None:
        """Write the settings in force, if they have changed. No reader sees half a file."""
        self._used = True
        # The next launch may begin with other weights, such as those of a checkpoint: it begins without ceilings.
        applied = msgspec.structs.replace(applied, held_layers=())
        if applied == self._written or self._rank != 0 or os.getpid() != self._pid or self._is_anothers:
            return
        if self._written == Applied() and (kept := self._content(silent=True)) is not None and self._leaves(kept):
            return
        self._written = applied
        try:
            if applied == Applied():
                self._path.unlink(missing_ok=True)
                return
            beside = self._path.with_name(f"{self._path.name}.{self._pid}")
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(msgspec.json.encode(_Kept(self._run, applied, _Process.of(self._pid))))
            beside.replace(self._path)
        except OSError as error:
            self._warn(f"{self._path}: {error.strerror}: a restarted launch begins without the settings in force")

    def clear(self) -> None:
        """Set the file aside at the end of a training. A launch without a step, or that raised, leaves it."""
        # Python sets this attribute before it reports an exception that ends the script, or a cell of a notebook.
        if not self._used or id(getattr(sys, "last_value", None)) != self._error:
            return
        if self.in_force and self._rank == 0 and os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                self._path.replace(self._ended)
        self.keep(Applied())

    def _warn(self, text: str) -> None:
        log_for_job(logger, text, rank=self._rank)
