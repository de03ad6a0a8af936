"""Circuit breaker between koopmon and the training loop: no exception of a hook reaches the loop."""

from __future__ import annotations

import functools
import logging
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from koopmon.errors import describe_error, raise_from_signal

logger = logging.getLogger("koopmon.agent")
_breakers: weakref.WeakSet[CircuitBreaker] = weakref.WeakSet()
# Looked up once, because each forward asks for them.
_tracing_state, _transform = torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack
_dispatch_mode, _is_tracing = torch._C._get_dispatch_mode, torch.compiler.is_dynamo_compiling
_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


class CircuitBreaker:
    """Runs koopmon's code inside the user's loop. The first exception disables it for good, is logged once and counted.

    The bound method `on_trip` is called once, with the reason, after the circuit breaker has tripped. An exception of
    `on_trip` is counted too. The breaker does not keep its object alive.
    """

    def __init__(self, name: str, on_trip: Callable[[str], None] | None = None) -> None:
        self.name = name
        self.tripped = False
        self.reason = ""
        self.num_errors = 0
        self._on_trip = None if on_trip is None else weakref.WeakMethod(on_trip)
        _breakers.add(self)

    def trip(self, where: str, error: BaseException) -> None:
        """Disable the guarded code because of `error`, which was raised in `where`."""
        self.num_errors += 1
        if self.tripped:
            return
        self.tripped = True
        self.reason = f"{where}: {describe_error(error)}"
        logger.warning("koopmon: %s is off, training goes on: %s", self.name, self.reason)
        logger.debug("koopmon: %s", where, exc_info=error)
        if self._on_trip is not None and (on_trip := self._on_trip()) is not None:
            try:
                on_trip(self.reason)
            except Exception as second:
                self.num_errors += 1
                logger.debug("koopmon: while %s was switched off", self.name, exc_info=second)

    def run(self, body: Callable[..., Any], *args: Any) -> Any:
        """Call `body`. Returns None after a failure, also an earlier one."""
        if self.tripped:
            return None
        try:
            return body(*args)
        except Exception as error:
            self.caught(body, error)
            return None

    def caught(self, body: Callable[..., Any], error: Exception) -> None:
        """Handle `error`, which `body` has raised."""
        raise_from_signal(error)  # raised by a signal handler of the user's that ran during the hook
        if not is_foreign():
            self.trip(getattr(body, "__name__", "hook"), error)

    def hook(self, body: Callable[..., Any], traced: Callable[..., Any] | None = None) -> GuardedHook:
        """Return `body` as a hook for a module or an optimizer. A compiler puts `traced` into its graph instead."""
        return GuardedHook(self, body, traced)


class GuardedHook:
    """A hook whose exceptions trip the circuit breaker.

    Copies and pickles of it do nothing. An exception in a foreign forward does not count.
    """

    __slots__ = ("_body", "_breaker", "_traced")

    def __init__(
        self, breaker: CircuitBreaker, body: Callable[..., Any], traced: Callable[..., Any] | None = None
    ) -> None:
        self._breaker = breaker
        self._body = body
        self._traced = traced

    def __call__(self, *args: Any) -> Any:
        # A compiler that traced the hook body would break the graph at every block.
        if _is_tracing() or torch.compiler._is_compiling_flag:
            if self._traced is not None and _is_tracing() and not torch.compiler.is_exporting():
                self._traced(*args)
            return None
        breaker = self._breaker
        if breaker.tripped:
            return None
        try:  # as `CircuitBreaker.run`, without its call
            return self._body(*args)
        except Exception as error:
            breaker.caught(self._body, error)
            return None

    def __reduce__(self) -> tuple[Any, ...]:
        # A callable of the standard library that takes anything and returns None: no file needs koopmon to be read.
        return functools.partial, (sys.audit, "module hook")


def _run_as_python() -> None:
    """Keep the compiler from graphs of hooks alone. A hook in the middle of a graph becomes a part of that."""
    compiler: Any = torch._C._dynamo.eval_frame
    skip = compiler._FrameAction.SKIP
    compiler.set_code_exec_strategy(GuardedHook.__call__.__code__, compiler._FrameExecStrategy(skip, skip))


if hasattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy"):  # torch 2.7 has it under another name
    _run_as_python()


def is_foreign() -> bool:
    """Return True while a forward runs for another purpose than its values.

    It is traced by torch.jit, run on fake tensors, or transformed by torch.func.
    """
    return (
        _tracing_state() is not None
        or _transform() is not None
        or _dispatch_mode(_FAKE) is not None
        or _dispatch_mode(_PROXY) is not None
    )


def _trip_in_child() -> None:
    for breaker in _breakers:
        breaker.tripped = True
        breaker.reason = "a forked child: the agent is the parent's"


# A DataLoader worker inherits the hooks, but not the threads and sockets that they use.
os.register_at_fork(after_in_child=_trip_in_child)
