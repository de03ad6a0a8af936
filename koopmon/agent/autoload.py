"""Zero-code attach: `koopmon run` attaches the optimizers of a training process to their model.

`_autoload/sitecustomize.py` calls `arm` when Python starts. A finder waits for `torch.optim.optimizer`, so that only
the script imports torch. `OptimizerWatch` then attaches what the script makes.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from koopmon.agent.optimizer_watch import ATTACHED_PID, TARGET, OptimizerWatch
from koopmon.run_names import stack_run_name

DIRECTORY = Path(__file__).parent / "_autoload"
"""The directory that `koopmon run` puts first on PYTHONPATH."""
LAUNCHERS = frozenset({"torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "deepspeed"})
"""Programs and modules that start ranks and do not train themselves."""
_log = logging.getLogger("koopmon.agent")


def python_path(environ: Mapping[str, str]) -> str:
    """Return the value of PYTHONPATH with which a child process attaches."""
    before = environ.get("PYTHONPATH", "")
    return f"{DIRECTORY}{os.pathsep}{before}" if before else str(DIRECTORY)


def should_attach(environ: Mapping[str, str], argv: Sequence[str], pid: int) -> bool:
    """Return True if a process may train under koopmon. `argv` is `sys.orig_argv`, the interpreter's own command line.

    Excluded processes: those without an endpoint, launchers of ranks, servers of multiprocessing, and torch's compile
    workers. Children of one of several attached ranks are excluded too: they have its rank in their environment.
    """
    if not environ.get("KOOPMON_ENDPOINT"):
        return False
    program = _program(argv[1:])
    attached, _, is_rank = environ.get(ATTACHED_PID, "").partition(" ")
    return not (
        (is_rank and attached != str(pid))
        or program in LAUNCHERS
        or os.path.basename(program) in LAUNCHERS
        or program.startswith(("from multiprocessing.forkserver", "from multiprocessing.resource_tracker"))
        or "compile_worker" in program
    )


def _program(words: Sequence[str]) -> str:
    """Return the program on the command line: a script's path, a module's name, or the code after -c; "" for none."""
    rest = iter(words)
    for word in rest:
        if word in ("-m", "-c"):
            return next(rest, "")
        if word in ("-W", "-X", "--check-hash-based-pycs"):
            next(rest, "")
        elif not word.startswith("-"):
            return word
    return ""


def arm() -> bool:
    """Wait for torch's optimizers. Returns False, and does nothing, in a process that must not be attached."""
    if not should_attach(os.environ, sys.orig_argv, os.getpid()):
        return False
    _name_child(os.environ, os.getpid())
    watch = OptimizerWatch()
    _log.addFilter(watch.is_news)
    os.register_at_fork(after_in_child=watch.on_fork)
    if TARGET in sys.modules:
        watch.wrap(sys.modules[TARGET])
    else:
        sys.meta_path.insert(0, watch)
    return True


def _name_child(environ: MutableMapping[str, str], pid: int) -> None:
    """Give the child of an attached process a run of its own: that of its parent goes on beside it."""
    run = environ.get("KOOPMON_RUN")
    if environ.get(ATTACHED_PID, str(pid)).partition(" ")[0] != str(pid):
        del environ[ATTACHED_PID]
        if run:
            environ["KOOPMON_RUN"] = stack_run_name(run, "child")
