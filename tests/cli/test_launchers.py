"""`koopmon run` before plain Python, and before Slurm's srun inside a batch script.

tests/recipes has accelerate; tests/test_demo.py has torchrun. A script on the path replaces Slurm's programs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from koopmon.history.reader import HistoryReader

PLAIN = Path(__file__).parent / "programs" / "plain.py"
SHORT = {"TMPDIR": "/tmp"}
"""Directory with a short path. A loader's worker passes tensors through a socket there."""
SRUN = """#!{python} -S
import os, subprocess, sys
size = int(sys.argv[sys.argv.index("--ntasks") + 1])
words = sys.argv[sys.argv.index("--ntasks") + 2:]
tasks = [
    subprocess.Popen(words, env=dict(os.environ, SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS=str(size)))
    for rank in range(size)
]
sys.exit(max(task.wait() for task in tasks))
"""


def watched(directory: Path, store: Path) -> tuple[int, set[int], int]:
    """Return incarnations, connected ranks and profiles of the one run in a store."""
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["exit_status"] == 0
    with HistoryReader.open(store) as history:
        (run,) = history.runs()
        assert run == summary["run"]
        ranks = {row.process_rank for row in history.heartbeats(run)}
        return len(history.incarnations(run)), ranks, len(list(history.profiles(run)))


@pytest.mark.process
@pytest.mark.slow
def test_a_plain_script_is_watched_and_its_children_are_not(koopmon: Any) -> None:
    alone = koopmon.python(str(PLAIN), **SHORT)
    store = koopmon.directory / "store.sqlite3"
    guard = ("run", "--summary", "summary.json", "--store", str(store), "--policy", "observe", "--")
    done = koopmon(*guard, sys.executable, str(PLAIN), **SHORT)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == alone.stdout, "bit-identical"
    incarnations, ranks, profiles = watched(koopmon.directory, store)
    assert (incarnations, ranks) == (1, {0}), "neither the loader's worker nor the child was taken for the training"
    assert profiles >= 3


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("late", ["", "1"])
def test_the_tasks_of_a_batch_script_are_one_run(koopmon: Any, late: str) -> None:
    directory = koopmon.directory
    srun = directory / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    store = directory / "store.sqlite3"
    words = ["run", "--summary", "summary.json", "--store", str(store), "--policy", "observe", "--"]
    words += ["srun", "--ntasks", "2", sys.executable, str(PLAIN), f"file://{directory}/meeting"]
    batch = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2"}
    done = koopmon(*words, PATH=f"{srun.parent}:{koopmon.environ['PATH']}", LATE=late, **batch, **SHORT)
    assert done.returncode == 0, done.stderr.decode()
    digests = re.findall(rb"[0-9a-f]{64}", done.stdout)  # two processes write: their newlines may come last
    assert len(digests) == 2
    assert digests[0] == digests[1]
    incarnations, ranks, profiles = watched(directory, store)
    assert (incarnations, ranks) == (1, {0, 1})
    assert profiles >= 3


@pytest.mark.process
@pytest.mark.parametrize(
    ("environ", "words", "said"),
    [
        (
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"},
            ["srun", "--ntasks", "4", "train"],
            "SLURM_JOB_NUM_NODES=2",
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, ["torchrun", "train.py"], "SLURM_NNODES=2"),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}, ["srun", "-N", "2", "python", "train.py"], "srun -N 2"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"}, ["python", "train.py"], "SLURM_STEP_NUM_TASKS=2"),
        ({}, ["srun", "--ntasks", "2", "python", "train.py"], "outside of an allocation"),
        ({}, ["sbatch", "job.sh"], "sbatch starts it elsewhere"),
    ],
)
def test_what_one_monitor_of_its_own_cannot_reach_is_refused(
    koopmon: Any, one_line: Any, environ: dict[str, str], words: list[str], said: str
) -> None:
    one_line(koopmon("run", "--", *words, **environ), said, "--monitor")
