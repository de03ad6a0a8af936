"""Reads a job's name and number of nodes from its command line and environment before it starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from koopmon.agent.autoload import LAUNCHERS
from koopmon.files import xdg_directory
from koopmon.run_names import file_name

_NODE_OPTIONS = ("--nnodes", "--num-machines", "--num-nodes")
_SLURM_NODE_OPTIONS = ("--nodes", "-N")
_OPTION = re.compile(r"(?P<name>--[\w-]+|-N)=?(?P<value>.*)")
_PYTHON = re.compile(r"python(\d+(\.\d+)?)?")
_NODE_VARIABLES = ("SLURM_NNODES", "SLURM_JOB_NUM_NODES", "PET_NNODES")
_RANK_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def spread(command: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """Return the setting that spreads the job over several nodes or commands, such as "--nnodes 2", or None."""
    if (where := _spread_by_slurm(command, environ)) is not None:
        return where
    launchers = (index for index, word in enumerate(command) if Path(word).name in LAUNCHERS)
    for option, value in _options(command[next(launchers, len(command)) :]):
        if option in _NODE_OPTIONS and _largest(value) > 1:
            return f"{option} {value}"
    for name in (*_NODE_VARIABLES, *_RANK_VARIABLES):
        if _largest(environ.get(name, "")) > 1:
            return f"{name}={environ[name]}"
    return None


def _spread_by_slurm(command: Sequence[str], environ: Mapping[str, str]) -> str | None:
    program = Path(command[0]).name
    if program == "sbatch":
        return "sbatch starts it elsewhere; or put koopmon run into the batch script"
    if program != "srun":
        return None
    for option, value in _options(command[1:]):
        if option in _SLURM_NODE_OPTIONS and _largest(value) > 1:
            return f"srun {option} {value}"
    return None if "SLURM_JOB_ID" in environ else "srun outside of an allocation starts it elsewhere"


def script_name(command: Sequence[str]) -> str:
    """Return the name of the first script or module in `command` that is not a launcher, else of its program."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "-m" and following and following not in LAUNCHERS:
            return following.rpartition(".")[2]
        if word.endswith(".py"):
            return Path(word).stem
    return Path(command[0]).name


def isolation(command: Sequence[str]) -> str:
    """Return the option of Python in `command` that keeps koopmon out, such as "-I"; empty without one.

    `-I` and `-E` ignore PYTHONPATH, and `-S` runs no sitecustomize.
    """
    programs = (index for index, word in enumerate(command) if _PYTHON.fullmatch(Path(word).name))
    words = iter(command[next(programs, len(command)) + 1 :])
    for word in words:
        if not re.fullmatch(r"-[A-Za-z]+", word) or word in ("-m", "-c"):
            return ""
        if word in ("-W", "-X"):
            next(words, "")
        elif not word.startswith(("-W", "-X")) and (
            flag := re.search("[IES]", word.partition("c")[0].partition("m")[0])
        ):
            return f"-{flag[0]}"
    return ""


def state_directory() -> Path:
    """Return the directory of files that outlive a job: `koopmon` under XDG_STATE_HOME."""
    return xdg_directory("XDG_STATE_HOME", "~/.local/state")


def run_store(name: str) -> Path:
    """Return the default history path of `koopmon run` for the run `name`."""
    return state_directory() / "runs" / f"{file_name(name)}.sqlite3"


def monitor_store() -> Path:
    """Return the default history path of `koopmon monitor`, which its runs share."""
    return state_directory() / "monitor.sqlite3"


def targets_directory() -> Path:
    """Return the default directory of target files for Prometheus."""
    return state_directory() / "targets"


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options before the script, each with its value: after `=`, or the next word."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word.endswith(".py") or word == "--":
            return
        if match := _OPTION.fullmatch(word):
            yield match["name"].replace("_", "-"), match["value"] or following


def _largest(text: str) -> int:
    """Return the largest whole number in "2", "1:4" or "4(x2)"; 0 without any."""
    return max((int(number) for number in re.findall(r"\d+", text)), default=0)
