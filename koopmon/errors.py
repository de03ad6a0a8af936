"""Errors that koopmon raises. Each message is one line that says what to do."""

from __future__ import annotations

import opcode
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

_RAISE = opcode.opmap["RAISE_VARARGS"]
_VARARGS = 0x04
"""inspect.CO_VARARGS; importing inspect takes 4 ms."""


def one_line(text: object, limit: int = 400) -> str:
    """A text that may quote a file or a peer, fit for a log line: printable, and at most `limit` characters."""
    line = "".join(character if character.isprintable() else "?" for character in str(text))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _arguments(frame: FrameType) -> list[object]:
    """The positional arguments of a function's frame."""
    code, values = frame.f_code, frame.f_locals
    found = [values.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & _VARARGS:
        more = values.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount])
        found += more if isinstance(more, tuple) else ()
    return found


def came_from_signal(error: BaseException) -> bool:
    """Whether a signal raised `error`, as Ctrl-C does, and not the code that happened to run.

    Python runs a signal's handler between two instructions of the main thread, with the frame that it interrupts as an
    argument. The handler of Ctrl-C is written in C and has no frame of its own: the exception then starts at an
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
    """Raise `error` again if a signal raised it: called where anything else that foreign code raises is handled."""
    if came_from_signal(error):
        raise error


class KoopmonError(Exception):
    """Parent of every error koopmon raises on purpose; `exit_status` is what the CLI returns for it."""

    exit_status = 1


class ConfigError(KoopmonError, ValueError):
    """A configuration value is malformed: names the field, the value and what is allowed."""

    exit_status = 2


class MissingExtraError(KoopmonError, ImportError):
    """A library that comes with an extra of koopmon is not installed: names it, and what installs it."""

    exit_status = 2

    def __init__(self, module: str, library: str, install: str) -> None:
        super().__init__(f"{module} needs {library}, which is not installed: pip install {install!r}")


class AdapterError(KoopmonError):
    """An architecture adapter cannot be selected: its name is unknown, or no adapter claims the model."""

    exit_status = 2


class PluginError(AdapterError):
    """A plugin's code failed: `plugin` names it, `reason` says in a few words what it did."""

    def __init__(self, plugin: str, reason: str) -> None:
        super().__init__(f"{plugin}: {reason}")
        self.plugin = plugin
        self.reason = reason


class DiscoveryError(AdapterError):
    """No residual chain was found or verified in a model; lists what was seen."""


class ProtocolError(KoopmonError):
    """A message breaks PROTOCOL.md.

    `reason` is one of `koopmon.wire.codec.REJECTION_REASONS`: a bounded label for metrics.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class EndpointError(KoopmonError):
    """An endpoint cannot be used: malformed, in use, unreachable, or within others' reach and without keys."""

    exit_status = 2


class KeysError(KoopmonError):
    """A key file cannot be used: missing, malformed, or open to others. Names the file, never what it holds."""

    exit_status = 2


class StoreError(KoopmonError):
    """The history store cannot be opened, is in use, or has a schema that this version does not know."""

    exit_status = 2


class CalibrationError(KoopmonError):
    """A calibrator, or what it is to be fitted on, does not fit: says what is wrong and what would do."""

    exit_status = 2


class GrafanaError(KoopmonError):
    """Grafana did not do what it was asked for, or answered what no Grafana that is served here would."""


class GrafanaDeniedError(GrafanaError):
    """Grafana does not know the token, or the token may not do what it was used for."""

    exit_status = 3


class GrafanaUnreachableError(GrafanaError):
    """Nobody answers where Grafana should be, or not in time."""

    exit_status = 4


class GrafanaKeptError(GrafanaError):
    """Something in Grafana is not ours to overwrite: made by others, or edited by hand since it was pushed."""

    exit_status = 5
