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


def file_name(run: str) -> str:
    """Return a file name for `run`, another one for each run: no name of a run has a comma."""
    return run.replace("/", ",")


def stack_run_name(run: str, part: str) -> str:
    """Return the name of the run that watches a further part of the job `run`, in allowed characters."""
    return f"{run}.{_allowed(part) or 'model'}"[:128]


def new_run_name(script: str) -> str:
    """Return a unique name: that of the script, in allowed characters, and 8 hexadecimal digits."""
    return f"{_allowed(script)[:64] or 'job'}-{secrets.token_hex(4)}"


def _allowed(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-._+")
