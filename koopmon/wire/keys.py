"""Key files of the monitor and of the agents, with the permitted runs of each agent.

A directory that only its owner can enter holds a secret and a public TOML file for each name. A key is the 40-character
Z85 form of the 32 bytes of a ZeroMQ CURVE key:

    monitor.secret   monitor.key        the monitor's pair; agents need the .key file
    agent.secret     agent.key          an agent's pair; the monitor needs the .key file
    agents/NAME.key                     public files of the agents that this monitor serves, each with its runs

This module is independent of sockets. `koopmon.wire.curve` generates keys and applies them to sockets.
"""

from __future__ import annotations

import os
import re
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from koopmon.errors import KeysError, one_line
from koopmon.files import open_regular, why_not_private, xdg_directory

MONITOR = "monitor"
"""Name of the monitor's own pair."""
AGENTS = "agents"
"""Subdirectory of a monitor's key directory with the public files of its agents."""
MAX_FILE_BYTES = 16384
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Z85 = Annotated[str, Meta(pattern=r"^[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\Z")]
# Control characters and surrogates cannot stand in a TOML file.
RunPattern = Annotated[str, Meta(min_length=1, max_length=128, pattern="^[^\\x00-\\x1f\\x7f\\ud800-\\udfff]*\\Z")]
RunPatterns = Annotated[tuple[RunPattern, ...], Meta(min_length=1, max_length=256)]
T = TypeVar("T")


class PublicKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Content of a `.key` file. After a rotation, `previous` is also valid until `previous_until`."""

    public: Z85
    previous: Z85 | None = None
    previous_until: datetime | None = None
    runs: RunPatterns = ("*",)
    """Patterns (`*`, `?`, `[...]`) of the names of this agent's permitted runs."""

    def keys(self, now: datetime | None = None) -> tuple[str, ...]:
        """Return the keys that are valid at `now`, by default the present, the newest first."""
        now = now or datetime.now(UTC)
        until = self.previous_until
        if self.previous is None or until is None:
            return (self.public,)
        aware = until if until.tzinfo is not None else until.replace(tzinfo=UTC)
        return (self.public, self.previous) if now < aware else (self.public,)


class _Secret(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    secret: Z85


def keys_directory(configured: str, environ: Mapping[str, str]) -> Path:
    """Return the key directory: `configured`, else KOOPMON_KEYS, else `koopmon/keys` under XDG_CONFIG_HOME."""
    if named := configured or environ.get("KOOPMON_KEYS", ""):
        return Path(named).expanduser().absolute()
    return xdg_directory("XDG_CONFIG_HOME", "~/.config") / "keys"


def check_name(name: str) -> str:
    """Return `name` if it is a valid name for a pair. Raises KeysError."""
    if _NAME.fullmatch(name) is None or name == AGENTS:
        raise KeysError(
            f"key name {name!r}: allowed are 1 to 64 letters, digits and . _ -, beginning with a letter or a digit,"
            f" and not {AGENTS!r}"
        )
    return name


def check_runs(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of an agent's runs if a key file can hold them. Raises KeysError."""
    try:
        checked = msgspec.convert(patterns, RunPatterns)
    except msgspec.ValidationError as error:
        shown = one_line(" ".join(map(repr, patterns)))[:200]
        raise KeysError(f"--runs {shown}: {error}: allowed are patterns such as 'alice-*'") from None
    if not all(map(str.strip, checked)):
        raise KeysError("--runs: a pattern of blanks matches no run: allowed are patterns such as 'alice-*'")
    if sum(len(pattern.encode()) for pattern in checked) > MAX_FILE_BYTES // 2:
        raise KeysError(
            f"--runs: {len(checked)} patterns are too long together: allowed are {MAX_FILE_BYTES // 2} bytes"
        )
    return checked


def secret_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.secret"


def public_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.key"


def check_directory(directory: Path) -> None:
    """Refuse a key directory that is missing, or that others own or can enter. Raises KeysError."""
    try:
        status = directory.stat()
    except OSError as error:
        raise KeysError(f"keys {directory}: {_why(error)}; `koopmon keys make` makes them there") from None
    if why := why_not_private(directory, status, directory=True):
        raise KeysError(f"keys {directory}: {why}")


def read_secret(directory: Path, name: str) -> str:
    """Read the secret key of `name`. Raises KeysError for a file that is missing, malformed or accessible to others."""
    check_directory(directory)
    path = secret_file(directory, name)
    raw = _read(path, "secret key", f"`koopmon keys make {name}` makes it", private=True)
    # The error message never quotes the content, because it is a secret.
    return _parse(raw, _Secret, path, 'secret = "40 characters"', quote=False).secret


def read_public(path: Path) -> PublicKey:
    """Read a public file. Raises KeysError."""
    raw = _read(path, "public key", "copy it from where `koopmon keys make` made it", private=False)
    return _parse(raw, PublicKey, path, 'public = "40 characters"')


def _read(path: Path, what: str, remedy: str, *, private: bool) -> bytes:
    try:
        with open_regular(path) as file:
            if private and (why := why_not_private(path, os.fstat(file.fileno()))):
                raise KeysError(f"{what} {path}: {why}")
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysError(f"{what} {path}: {_why(error)}; {remedy}") from None


def write_secret(directory: Path, name: str, secret: str) -> None:
    """Write or replace a secret file atomically, mode 0600. Raises KeysError."""
    text = f'# koopmon: secret key of {name}. Whoever has it is {name}.\nsecret = "{secret}"\n'
    _write(secret_file(directory, name), text, 0o600)


def write_public(path: Path, key: PublicKey) -> None:
    """Write or replace a public file atomically. Raises KeysError."""
    lines = [f"# koopmon: public key of {path.stem}.", f'public = "{key.public}"']
    if key.previous is not None and key.previous_until is not None:
        until = key.previous_until.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        lines += [f'previous = "{key.previous}"', f"previous_until = {until}"]
    if path.stem != MONITOR:
        quoted = ", ".join(msgspec.json.encode(pattern).decode() for pattern in key.runs)
        lines += ["# Runs of this agent: patterns with * ? [...]", f"runs = [{quoted}]"]
    _write(path, "\n".join(lines) + "\n", 0o644)


def make_directory(directory: Path) -> None:
    """Create a key directory, mode 0700, or check the existing one. Raises KeysError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeysError(f"keys {directory}: {_why(error)}; name another with KOOPMON_KEYS") from None
    check_directory(directory)


def _write(path: Path, text: str, mode: int) -> None:
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), mode)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise KeysError(f"{path}: cannot be written: {_why(error)}") from None


def _parse(raw: bytes, kind: type[T], path: Path, expected: str, *, quote: bool = True) -> T:
    if len(raw) > MAX_FILE_BYTES:
        raise KeysError(f"{path}: more than {MAX_FILE_BYTES} bytes, so no key file; expected {expected}")
    try:
        return msgspec.convert(tomllib.loads(raw.decode()), kind, strict=True)
    except (ValueError, msgspec.ValidationError) as error:
        what = f": {str(error).splitlines()[0]}" if quote else ""
        raise KeysError(f"{path}: not a key file of koopmon{what}; expected {expected}") from None


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
