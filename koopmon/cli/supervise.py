"""Runs the user's command: inherits the standard streams, forwards signals, returns its exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from koopmon.errors import KoopmonError

_FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_FORWARDED |= {signal.SIGALRM, signal.SIGCONT, signal.SIGWINCH}
_FROM_TERMINAL = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH})
_SENT_BY_KERNEL = 0x80  # si_code SI_KERNEL
_WATCHED = _FORWARDED | {signal.SIGCHLD}


class CommandNotFoundError(KoopmonError):
    """The job's program does not exist."""

    exit_status = 127


class CommandNotRunnableError(KoopmonError):
    """The job's program exists but cannot be executed."""

    exit_status = 126


@contextlib.contextmanager
def signals_held() -> Iterator[set[signal.Signals]]:
    """Block all forwarded signals until `run_job` receives them; yield the previous mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    try:
        yield {signal.Signals(number) for number in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_job(
    command: Sequence[str],
    environ: Mapping[str, str],
    mask: set[signal.Signals],
    watch: Callable[[], float | None] = lambda: None,
) -> int:
    """Run `command` to its end inside `signals_held` and return its exit status. The job gets the previous signal mask.

    The job inherits the standard streams. The status is the job's own, or 128 + n when signal n ended it. `watch` is
    called after each state change of a child process, and after the seconds that it returned.

    Raises CommandNotFoundError and CommandNotRunnableError.
    """

    try:
        # Safe after fork because the launcher has one thread.
        job = subprocess.Popen(
            list(command), env=dict(environ), preexec_fn=partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        )
    except FileNotFoundError:
        raise CommandNotFoundError(f"{command[0]}: command not found") from None
    except OSError as error:
        raise CommandNotRunnableError(f"{command[0]}: {error.strerror}") from None
    while (status := job.poll()) is None:
        seconds = watch()
        info = signal.sigwaitinfo(_WATCHED) if seconds is None else signal.sigtimedwait(_WATCHED, seconds)
        if info is None or (number := signal.Signals(info.si_signo)) is signal.SIGCHLD:
            continue
        if not _reached_the_job_already(number, info):
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, number)
    return status if status >= 0 else 128 - status


def _reached_the_job_already(number: signal.Signals, info: signal.struct_siginfo) -> bool:
    # The terminal's keys signal the whole foreground group, so the job in the same group already has the signal. A
    # second SIGINT would interrupt torchrun's orderly shutdown.
    return number in _FROM_TERMINAL and info.si_code == _SENT_BY_KERNEL
