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


class _Kept(Struct, frozen=True, forbid_unknown_fields=True):
    run: RunName
    applied: Applied


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

    @property
    def in_force(self) -> bool:
        """True if the file holds a setting."""
        return self._written != Applied()

    def read(self) -> Applied | None:
        """Return the settings that a killed launch left. A file that cannot be used is ignored with one line."""
        if self._rank == 0:
            with contextlib.suppress(OSError):
                self._ended.unlink(missing_ok=True)
        try:
            with open(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                flaw = why_not_private(self._path, os.fstat(file.fileno()))
                kept = None if flaw else msgspec.json.decode(file.read(MAX_BYTES), type=_Kept)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            flaw, kept = str(error), None
        if kept is None:
            self._warn(f"{self._path} is ignored: {one_line(flaw)}")
            return None
        if kept.run != self._run:
            return None
        self._written = kept.applied
        return kept.applied

    def keep(self, applied: Applied) -> None:
        """Write the settings in force, if they have changed. No reader sees half a file."""
        self._used = True
        if applied == self._written or self._rank != 0 or os.getpid() != self._pid:
            return
        self._written = applied
        try:
            if applied == Applied():
                self._path.unlink(missing_ok=True)
                return
            beside = self._path.with_name(f"{self._path.name}.{self._pid}")
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(msgspec.json.encode(_Kept(self._run, applied)))
            beside.replace(self._path)
        except OSError as error:
            self._warn(f"{self._path}: {error.strerror}: a restarted launch begins without the settings in force")

    def clear(self) -> None:
        """Set the file aside at the end of a training. A launch without a step, or that raised, leaves it."""
        # Python sets this attribute before it reports an exception that ends the script.
        if not self._used or getattr(sys, "last_type", None) is not None:
            return
        if self.in_force and self._rank == 0 and os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                self._path.replace(self._ended)
        self.keep(Applied())

    def _warn(self, text: str) -> None:
        log_for_job(logger, text, rank=self._rank)
