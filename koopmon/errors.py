"""Exceptions that koopmon raises. Each message is one line with the remedy."""

from __future__ import annotations

import opcode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

NOT_WATCHED = (
    "NOT WATCHED: no training process attached; if no line above says why, the job ended before its training reached "
    "the monitor, its Python has no koopmon, it replaces the PYTHONPATH of `koopmon run`, or it made no torch optimizer"
)
"""Closing line of a job without a launch."""
_RAISE = opcode.opmap["RAISE_VARARGS"]
_VARARGS = 0x04
"""inspect.CO_VARARGS; importing inspect takes 4 ms."""


def one_line(text: object, limit: int = 400) -> str:
    """Return printable text of at most `limit` characters for a log line. `text` may come from a file or a peer."""
    line = "".join(character if character.isprintable() else "?" for character in str(text))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def describe_error(error: BaseException, limit: int = 400) -> str:
    """Return the type and the message of an exception as one line."""
    return one_line(f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": "), limit)


def _arguments(frame: FrameType) -> list[object]:
    """Return the positional arguments of a function's frame."""
    code, values = frame.f_code, frame.f_locals
    found = [values.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & _VARARGS:
        more = values.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount])
        found += more if isinstance(more, tuple) else ()
    return found


def came_from_signal(error: BaseException) -> bool:
    """Return True if a signal handler raised `error`, as for Ctrl-C, rather than the interrupted code.

    Python calls a signal handler between two instructions of the main thread and passes the interrupted frame as an
    argument. The handler of Ctrl-C is written in C and has no frame of its own. The exception then starts at an
    instruction that raises nothing.
    """
    trace, frame, instruction = error.__traceback__, None, 0
    while trace is not None:
        frame, instruction = trace.tb_frame, trace.tb_lasti
        if frame.f_back is not None and any(each is frame.f_back for each in _arguments(frame)):
            return True
        trace = trace.tb_next
    return isinstance(error, KeyboardInterrupt) and frame is not None and frame.f_code.co_code[instruction] != _RAISE


def raise_from_signal(error: BaseException) -> None:
    """Raise `error` again if a signal raised it. Call it before handling exceptions of foreign code."""
    if came_from_signal(error):
        raise error


class KoopmonError(Exception):
    """Base class of koopmon's exceptions. `exit_status` is the status that the CLI returns for the exception."""

    exit_status = 1


@contextmanager
def foreign_code(refused: Callable[[str], Exception], *passing: type[Exception]) -> Iterator[None]:
    """Run the code of a user or a plugin. An exception becomes `refused("raised ...")`.

    The exceptions of koopmon, of the types `passing`, and of a signal, such as Ctrl-C, pass unchanged.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KoopmonError, *passing)):
            raise
        raise_from_signal(error)
        raise refused(f"raised {describe_error(error)}") from error


class ConfigError(KoopmonError, ValueError):
    """Malformed configuration value; the message contains the field, the value and the allowed values."""

    exit_status = 2


class MissingExtraError(KoopmonError, ImportError):
    """Missing library of an optional extra; the message contains the library and the command that installs it."""

    exit_status = 2

    def __init__(self, module: str, library: str, install: str) -> None:
        super().__init__(f"{module} needs {library}, which is not installed: pip install {install!r}")


class AdapterError(KoopmonError):
    """Failed selection of an architecture adapter: its name is unknown, or no adapter claims the model."""

    exit_status = 2


class PluginError(AdapterError):
    """Failure in a plugin's code. `plugin` is its name; `reason` is a short description of the failure."""

    def __init__(self, plugin: str, reason: str) -> None:
        super().__init__(f"{plugin}: {reason}")
        self.plugin = plugin
        self.reason = reason


class DiscoveryError(AdapterError):
    """Missing or unverified residual chain in a model; the message lists the candidates."""


class ProtocolError(KoopmonError):
    """Message that breaks PROTOCOL.md.

    `reason` is one of `koopmon.wire.headers.REJECTION_REASONS`: a bounded label for metrics.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class EndpointError(KoopmonError):
    """Unusable endpoint: malformed, in use, unreachable, or reachable from other hosts without keys."""

    exit_status = 2


class KeysError(KoopmonError):
    """Unusable key file: missing, malformed, or accessible to others. The message contains its path but never a key."""

    exit_status = 2


class StoreError(KoopmonError):
    """Unusable history store: it cannot be opened, is in use, or has an unknown schema."""

    exit_status = 2


class CalibrationError(KoopmonError):
    """Unusable calibrator or calibration data; the message contains the fault and the requirement."""

    exit_status = 2


class GrafanaError(KoopmonError):
    """Failed request to Grafana, or a response that no supported version of Grafana returns."""


class GrafanaDeniedError(GrafanaError):
    """Token that Grafana rejects, or a token without the required permission."""

    exit_status = 3


class GrafanaUnreachableError(GrafanaError):
    """Grafana that cannot be reached, or that does not answer in time."""

    exit_status = 4


class GrafanaKeptError(GrafanaError):
    """Grafana resource that koopmon must not overwrite: others created it, or a user edited it after the last push."""

    exit_status = 5
