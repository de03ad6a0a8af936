"""Names of runs: the allowed characters, and the name of a job that was given none."""

from __future__ import annotations

import re
import secrets

import msgspec

from koopmon.errors import ConfigError
from koopmon.wire.messages import RunName


def check_run_name(name: str, field: str = "run =") -> str:
    """Return `name` if it is a valid name of a run. Raises ConfigError, which begins with `field`."""
    try:
        return msgspec.convert(name, RunName)
    except msgspec.ValidationError:
        raise ConfigError(
            f"{field} {name!r}: allowed are 1 to 128 letters, digits and . _ : / + -, beginning with a letter or a"
            " digit"
        ) from None


def new_run_name(script: str) -> str:
    """Return a unique name: that of the script, in allowed characters, and 8 hexadecimal digits."""
    kept = re.sub(r"[^A-Za-z0-9._+-]+", "-", script).strip("-._+")[:64] or "job"
    return f"{kept}-{secrets.token_hex(4)}"
