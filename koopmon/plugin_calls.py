"""Calls of plugins' code: they end in time, raise nothing but PluginError, and leave the training's state as it was.

Before a training begins, a plugin's code runs in a daemon thread while the caller waits. The user's Ctrl-C reaches the
caller, in the main thread; whatever ends the plugin's thread ends nothing else. Inside the training's forward passes a
plugin's code runs where it is called, without a time limit.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch

from koopmon.errors import PluginError, one_line, raise_from_signal
from koopmon.process_state import ProcessState

__all__ = ["SECONDS", "PluginCalls", "WrongResultError", "say_once", "told"]

logger = logging.getLogger("koopmon.plugins")

SECONDS = 10.0
"""What the code of one plugin may take altogether before a training begins."""
STOP_ATTEMPTS = 5
STOP_SECONDS = 0.1
"""Between two attempts to end a thread."""
T = TypeVar("T")
_turn = threading.RLock()
_here = threading.local()
_overdue: dict[str, str] = {}
"""By the label of each plugin that took too long, what it was: it is not tried again in this process."""


class WrongResultError(Exception):
    """A plugin's code returned what it may not; the message begins with "gives"."""


class PluginCalls:
    """Calls the code of one plugin: `name` is its entry point's, `package` its top-level module's."""

    def __init__(self, name: str, distribution: str = "", package: str = "") -> None:
        self.name = name
        self.distribution = distribution
        self.label = f"plugin {name} ({distribution})" if distribution else f"plugin {name}"
        self._package = package
        self._seconds_left = SECONDS

    def limited(self, what: str, call: Callable[[], T]) -> T:
        """`call()` in a thread of its own, which is left behind once the plugin's SECONDS are over.

        Raises PluginError, in which `what` names the call. What the call prints goes to standard error.
        """
        if getattr(_here, "is_plugin", False):  # a plugin calls koopmon, which calls plugins: the outer limit holds
            return self.contained(what, call)
        with _turn:
            if self.label in _overdue:
                raise PluginError(self.label, _overdue[self.label])
            state, work, began = ProcessState(), _Work(call), time.monotonic()
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    work.start()
                    work.join(max(0.0, self._seconds_left))
            except RuntimeError as error:  # the system allows no more threads
                raise PluginError(self.label, f"{what} {told(error)}") from error
            finally:  # also when the user's Ctrl-C ends the wait
                late = work.is_alive()
                if late:
                    _stop(work, self._package)
                    atexit.register(_stop, work, self._package)  # in torch's code it would abort the ending process
                changed = state.restore()
            self._seconds_left -= time.monotonic() - began
            if changed or work.changed:
                say_once(f"{self.label}: {what} changed {', '.join(changed + work.changed)}; koopmon has put it back")
            if late:
                _overdue[self.label] = reason = f"{what} was not over when the {SECONDS:g} s of this plugin were"
                if (rank := _rank()) != "0":  # it may be this rank's alone, which then has another adapter
                    logger.warning("koopmon: rank %s: %s: %s", rank, self.label, reason)
                raise PluginError(self.label, reason)
            if work.failure:
                raise PluginError(self.label, f"{what} {work.failure}")
            result: T = work.result
            return result

    def contained(self, what: str, call: Callable[..., T], *args: Any) -> T:
        """`call(*args)` here and now. Raises PluginError, and what a signal raises meanwhile; grad mode is kept."""
        grad_mode = torch.is_grad_enabled()
        try:
            return call(*args)
        except BaseException as error:
            raise_from_signal(error)
            raise PluginError(self.label, f"{what} {told(error)}") from error
        finally:
            if torch.is_grad_enabled() is not grad_mode:
                torch.set_grad_enabled(grad_mode)


class _Work(threading.Thread):
    """One call of a plugin's code. A daemon: the interpreter does not wait for it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(name="koopmon-plugin", daemon=True)
        self.result: Any = None
        self.failure = ""
        self.changed: list[str] = []
        self._call: Callable[[], Any] | None = call
        # A thread begins on the first GPU, where it would take up memory of another rank's.
        on_gpu: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._gpu = torch.cuda.current_device() if on_gpu else None

    def run(self) -> None:
        call, self._call = self._call, None
        _here.is_plugin = True
        num_threads = torch.get_num_threads()
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            assert call is not None
            self.result = call()
        except BaseException as error:
            self.failure = told(error)
        if torch.get_num_threads() != num_threads:  # each thread has its own number; new ones begin with the last set
            torch.set_num_threads(num_threads)
            self.changed.append("the number of threads")


def _stop(thread: threading.Thread, package: str) -> None:
    """Raise SystemExit in `thread` until it ends, or half a second is over.

    Not while it imports a module of another package, which would stay half made for the whole process: such an import
    goes on beside the training. What waits in C ends when that returns.
    """
    for _ in range(STOP_ATTEMPTS):
        frame = sys._current_frames().get(thread.ident or 0)
        if frame is None or _imports_others(frame, package):
            break
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        thread.join(STOP_SECONDS)


def _imports_others(frame: FrameType | None, package: str) -> bool:
    """Whether the code that runs in `frame` is an import which `package` has begun."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            return False
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def told(error: BaseException) -> str:
    """What code did that ended with `error`, in a few words that follow a call's name."""
    try:
        if isinstance(error, WrongResultError):
            return one_line(error, 300)
        if isinstance(error, SystemExit):
            return f"called sys.exit({one_line(repr(error.code), 100)})"
        text = (str(error).strip().splitlines() or [""])[0]
    except BaseException as second:  # the exception's own code
        raise_from_signal(second)
        text = ""
    return f"raised {type(error).__name__}: {one_line(text, 300)}".rstrip(": ")


@functools.cache
def say_once(text: str, *, level: int = logging.WARNING) -> None:
    """One log line per process, and per job: of all ranks the first alone says it above DEBUG."""
    logger.log(level if _rank() == "0" else logging.DEBUG, "koopmon: %s", text)


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
