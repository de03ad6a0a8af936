"""Runs the user's command: inherits the standard streams, forwards signals, returns its exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

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


def check_command(command: Sequence[str]) -> None:
    """Raise CommandNotFoundError, with a hint, or CommandNotRunnableError if the program cannot be started."""
    program = command[0]
    if shutil.which(program) is None:
        if "/" in program and os.path.exists(program):
            raise CommandNotRunnableError(f"{program}: {os.strerror(errno.EACCES)}")
        raise _not_found(program)


def _not_found(program: str) -> CommandNotFoundError:
    hint = ""
    if " " in program.strip():
        hint = ": give the job's command without quotes around it"
    elif "=" in program:
        hint = ": set variables before `koopmon run`"
    return CommandNotFoundError(f"{program}: command not found{hint}")


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
    must_end: Callable[[], bool] = lambda: False,
    received: set[signal.Signals] | None = None,
) -> int:
    """Run `command` to its end inside `signals_held` and return its exit status. The job gets the previous signal mask.

    The job inherits the standard streams. The status is the job's own, or 128 + n when signal n ended it. `watch` is
    called after each state change of a child process, and after the seconds that it returned. `must_end` is called
    after it: once it returns True, the job gets one SIGTERM, and so do the processes that it leaves behind. Signals
    to this process are added to `received`.

    Raises CommandNotFoundError and CommandNotRunnableError.
    """

    try:
        # Safe after fork because the launcher has one thread.
        job = subprocess.Popen(
            list(command), env=dict(environ), preexec_fn=partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        )
    except FileNotFoundError:
        raise _not_found(command[0]) from None
    except OSError as error:
        raise CommandNotRunnableError(f"{command[0]}: {error.strerror}") from None
    ended: dict[int, str] | None = None
    while (status := job.poll()) is None:
        seconds = watch()
        if ended is None and must_end():
            ended = descendants(job.pid)
            job.terminate()
        info = signal.sigwaitinfo(_WATCHED) if seconds is None else signal.sigtimedwait(_WATCHED, seconds)
        if info is None or (number := signal.Signals(info.si_signo)) is signal.SIGCHLD:
            continue
        if received is not None:
            received.add(number)
        if not _reached_the_job_already(number, info):
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, number)
    # A shell ends at once, and the program that it waited for goes on. A launcher of ranks ends them by itself.
    for pid, started in (ended or {}).items():
        if (process := _process(pid)) is not None and process[1] == started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
    return status if status >= 0 else 128 - status


def descendants(pid: int) -> dict[int, str]:
    """Return the processes below `pid`, each with its start time: a later process may have the same number."""
    everyone = {
        int(each.name): process
        for each in Path("/proc").iterdir()
        if each.name.isdecimal() and (process := _process(int(each.name))) is not None
    }
    found: dict[int, str] = {}
    parents = {pid}
    while parents:
        children = {child for child, (parent, _) in everyone.items() if parent in parents}
        found |= {child: everyone[child][1] for child in children}
        parents = children
    return found


def _process(pid: int) -> tuple[int, str] | None:
    """Return the parent and the start time of a process; None if it is gone."""
    try:
        # The name in parentheses may hold spaces: see proc_pid_stat(5).
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(words[1]), words[19]
    except (OSError, IndexError, ValueError):
        return None


def _reached_the_job_already(number: signal.Signals, info: signal.struct_siginfo) -> bool:
    # The terminal's keys signal the whole foreground group, so the job in the same group already has the signal. A
    # second SIGINT would interrupt torchrun's orderly shutdown.
    return number in _FROM_TERMINAL and info.si_code == _SENT_BY_KERNEL
