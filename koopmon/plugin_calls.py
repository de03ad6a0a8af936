"""Calls of plugins' code, with a time limit. They raise only PluginError, and preserve the state of the training.

Before a training begins, a plugin's code runs in a daemon thread while the caller waits. The user's Ctrl-C reaches the
caller, in the main thread. An end of the plugin's thread does not end the caller. Inside the training's forward passes
a plugin's code runs in the caller's thread, without a time limit.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, TypeVar

import torch

from koopmon.errors import PluginError, one_line, raise_from_signal
from koopmon.logs import announced, log_for_job
from koopmon.process_state import ProcessState

logger = logging.getLogger("koopmon.plugins")

SECONDS = 10.0
"""Total time for the code of one plugin before a training begins."""
STOP_ATTEMPTS = 5
"""Made before the training goes on; a thread of koopmon's own makes REAPER_ATTEMPTS more."""
REAPER_ATTEMPTS = 600
STOP_SECONDS = 0.1
"""Interval between two attempts to end a thread."""
MAX_ITEMS = 10_000
"""Items of one result of a plugin."""
T = TypeVar("T")
_turn = threading.RLock()
_here = threading.local()
_overdue: dict[str, str] = {}
"""The call that exceeded the time limit, by the plugin's label. Such a plugin is not tried again in this process."""


class WrongResultError(Exception):
    """A plugin's code returned an invalid value. The message begins with "gives"."""


def bounded_list(values: Iterable[T]) -> list[T]:
    """Return the items of a plugin's result, which may be a generator.

    Raises WrongResultError above MAX_ITEMS. An endless iterable would fill the memory; `list` of an iterator written in
    C runs no bytecode, so no exception could end it.
    """
    found = list(itertools.islice(values, MAX_ITEMS + 1))
    if len(found) > MAX_ITEMS:
        raise WrongResultError(f"gives more than {MAX_ITEMS} items")
    return found


class PluginCalls:
    """Calls the code of one plugin. `name` is that of its entry point, `package` that of its top-level module."""

    def __init__(self, name: str, distribution: str = "", package: str = "") -> None:
        self.name = name
        self.distribution = distribution
        self.label = f"plugin {name} ({distribution})" if distribution else f"plugin {name}"
        self._package = package
        self._seconds_left = SECONDS

    def run(self, what: str, call: Callable[[], T], *, limited: bool) -> T:
        """Return `call()`, in a separate thread if `limited`, as koopmon's own plugins need not be."""
        return self.limited(what, call) if limited else self.contained(what, call)

    def limited(self, what: str, call: Callable[[], T]) -> T:
        """Return `call()`, run in a separate thread, which is abandoned after the plugin's SECONDS.

        Raises PluginError, in which `what` names the call. Output of the call goes to standard error.
        """
        if getattr(_here, "is_plugin", False):  # a plugin calls koopmon, which calls plugins: the outer limit applies
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
                raise PluginError(self.label, f"{what} {describe_failure(error)}") from error
            finally:  # also when the user's Ctrl-C ends the wait
                late = work.is_alive()
                if late:
                    _stop(work, self._package)
                    if work.is_alive():  # the exception may strike where Python ignores it, as in a destructor
                        rest = (work, self._package, REAPER_ATTEMPTS)
                        threading.Thread(target=_stop, args=rest, name="koopmon-reaper", daemon=True).start()
                    atexit.register(_stop, work, self._package)  # in torch's code it would abort the ending process
                changed = state.restore()
            self._seconds_left -= time.monotonic() - began
            if changed or work.changed:
                say_once(f"{self.label}: {what} changed {', '.join(changed + work.changed)}; koopmon has put it back")
            if late:
                _overdue[self.label] = reason = f"{what} was not over when the {SECONDS:g} s of this plugin were"
                if (rank := announced()[0]) != 0:  # only this rank may be late; it then has another adapter
                    logger.warning("koopmon: rank %s: %s: %s", rank, self.label, reason)
                raise PluginError(self.label, reason)
            if work.failure:
                raise PluginError(self.label, f"{what} {work.failure}")
            result: T = work.result
            return result

    def contained(self, what: str, call: Callable[..., T], *args: Any) -> T:
        """Return `call(*args)`, run in this thread.

        Raises PluginError, and the exceptions of signals. Keeps grad mode.
        """
        grad_mode = torch.is_grad_enabled()
        try:
            return call(*args)
        except BaseException as error:
            raise_from_signal(error)
            raise PluginError(self.label, f"{what} {describe_failure(error)}") from error
        finally:
            if torch.is_grad_enabled() is not grad_mode:
                torch.set_grad_enabled(grad_mode)


class _Work(threading.Thread):
    """One call of a plugin's code, in a daemon thread: the interpreter does not wait for it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(name="koopmon-plugin", daemon=True)
        self.result: Any = None
        self.failure = ""
        self.changed: list[str] = []
        self._call: Callable[[], Any] | None = call
        # A new thread starts on the first GPU, where it would use memory of another rank's GPU.
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
            self.failure = describe_failure(error)
        if torch.get_num_threads() != num_threads:  # per thread; a new thread starts with the last number set
            torch.set_num_threads(num_threads)
            self.changed.append("the number of threads")


def _stop(thread: threading.Thread, package: str, attempts: int = STOP_ATTEMPTS) -> None:
    """Raise SystemExit in `thread` until it ends, or `attempts` x STOP_SECONDS have passed.

    A thread that imports a module of another package is not stopped, because that module would stay half imported for
    the whole process. Such an import continues beside the training. A thread that waits in C ends when that call
    returns.
    """
    for _ in range(attempts):
        frame = sys._current_frames().get(thread.ident or 0)
        if frame is None or _imports_others(frame, package):
            break
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        thread.join(STOP_SECONDS)


def _imports_others(frame: FrameType | None, package: str) -> bool:
    """Return True if the code in `frame` is an import that `package` has begun."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            return False
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def describe_failure(error: BaseException) -> str:
    """Return a description of `error` in a few words that follow a call's name."""
    try:
        if isinstance(error, WrongResultError):
            return one_line(error, 300)
        if isinstance(error, SystemExit):
            return f"called sys.exit({one_line(repr(error.code), 100)})"
        text = (str(error).strip().splitlines() or [""])[0]
    except BaseException as second:  # str() and repr() run the exception's own code
        raise_from_signal(second)
        text = ""
    return f"raised {type(error).__name__}: {one_line(text, 300)}".rstrip(": ")


@functools.cache
def say_once(text: str, *, level: int = logging.WARNING) -> None:
    """Log one line per process and per job (`log_for_job`)."""
    log_for_job(logger, text, level=level)
