"""Lock files, files that only their owner can read, and secrets read from them. No secret appears in a message."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from koopmon.errors import ConfigError

MAX_FILE_BYTES = 4096


def xdg_directory(variable: str, default: str) -> Path:
    """Return the directory `koopmon` under the directory in `variable`, which is absolute, else under `default`."""
    given = os.environ.get(variable, "").strip()
    return Path(given if os.path.isabs(given) else os.path.expanduser(default)) / "koopmon"


def locked(path: Path) -> IO[bytes]:
    """Open the private file `path`, create it if missing, and hold its lock until it is closed.

    A crash releases the lock too. The holder may remove the file before it closes it. Raises BlockingIOError if another
    process holds it, OSError as `open_private` does.
    """
    while True:
        file = open_private(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_still_there(path, file):
                return file
        except BaseException:
            file.close()
            raise
        # The former holder removed the file after this process opened it: a lock on it excludes nobody.
        file.close()


def open_regular(path: Path) -> IO[bytes]:
    """Open an existing regular file for reading. A pipe, whose opening could wait for ever, raises OSError."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(number, "rb")


def is_locked(path: Path) -> bool:
    """Return True if a process holds the lock of `path`; False also for a missing file. Raises OSError."""
    try:
        with open_regular(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def is_still_there(path: Path, file: IO[bytes]) -> bool:
    """Return True if `path` is the name of the open `file`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def why_not_private(path: Path, status: os.stat_result, *, directory: bool = False, root: bool = False) -> str:
    """Return the reason, with the remedy, why others can own, read or enter `path`; empty if they cannot.

    `status` is that of the open file, so that the answer holds for the content that is read. With `root`, root may own
    the file, as it does in a container's mounted secrets.
    """
    what = "directory" if directory else "file"
    if not (stat.S_ISDIR if directory else stat.S_ISREG)(status.st_mode):
        return f"not a {what}; name another one"
    if status.st_uid != os.geteuid() and not (root and status.st_uid == 0):
        return f"belongs to user {status.st_uid}; use a {what} of your own"
    if status.st_mode & 0o077:
        # A shared directory such as /tmp must stay open to others.
        remedy = "in; use a directory of your own, or chmod 700" if directory else "read it; chmod 600"
        return f"mode {stat.S_IMODE(status.st_mode):04o} lets others {remedy} {path}"
    return ""


def open_private(path: Path, *, truncate: bool = False) -> IO[bytes]:
    """Open a file for reading and writing at its beginning; create it with mode 0600 if it is missing.

    The file must have this name alone. A link would lead the writer to a file that someone else chose. Raises OSError.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(number)
        raise OSError(errno.ELOOP, "a link or no regular file; remove it", str(path))
    if truncate:
        os.truncate(number, 0)
    return open(number, "r+b")


def write_whole(path: Path, text: str) -> None:
    """Write a file, or leave the one that is there: a full disk costs no earlier file. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_private(path: Path, name: str) -> None:
    """Refuse a file that others can read or own; `name` is its configuration field. Raises ConfigError."""
    try:
        why = why_not_private(path, path.stat(), root=True)
    except OSError as error:
        why = str(error.strerror)
    if why:
        raise ConfigError(f"{name} = {str(path)!r}: {why}")


def read_secret(file: str, environ: Mapping[str, str], variable: str, name: str) -> bytes | None:
    """Return the line in `file`, else the value of `variable` in `environ`; None when neither is given.

    `name` is the configuration field of the file, for the message. Raises ConfigError, which never quotes a secret.
    """
    if not file and variable not in environ:
        return None
    if not file:
        # Blanks are a mistake in a deployment. They must not mean "no secret", which opens what the secret guards.
        if not (given := environ[variable].strip()):
            raise ConfigError(f"{variable} is set and empty: give it a value, or unset it")
        return given.encode()
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
