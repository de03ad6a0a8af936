"""Reads secrets from files or the environment. No secret appears in a message."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from koopmon.errors import ConfigError

MAX_FILE_BYTES = 4096


def read_secret(file: str, from_environment: str, name: str) -> bytes | None:
    """Return the line in `file`, else `from_environment`; None when neither is given.

    `name` is the configuration field of the file, for the message. Raises ConfigError, which never quotes a secret.
    """
    if not file:
        return from_environment.strip().encode() or None
    path = Path(file)
    check_private(path, name)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} = {file!r}: {error.strerror}") from None
    secret = raw.strip()
    if not secret or len(raw) > MAX_FILE_BYTES or b"\n" in secret:
        raise ConfigError(f"{name} = {file!r}: expected one line of at most {MAX_FILE_BYTES} bytes")
    return secret


def check_private(path: Path, name: str) -> None:
    """Refuse a file that other users can read or own. Raises ConfigError."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{name} = {str(path)!r}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{name} = {str(path)!r}: not a file")
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{name} = {str(path)!r}: belongs to user {status.st_uid}; use a file of your own")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{name} = {str(path)!r}: mode {mode:04o} lets others read it; chmod 600 {path}")
