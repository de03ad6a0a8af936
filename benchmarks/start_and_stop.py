"""Time that koopmon adds before and after a job: `python -m benchmarks.start_and_stop`.

A job that trains nothing runs alone and under `koopmon run`, in turn. It prints the time at its first and at its last
statement. The difference of the medians is what koopmon adds before the job and after it, by wall clock. The CPU time
of `koopmon --help` is compared with that of `python -c pass`, in turn. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance

RESULT = Path(__file__).parent / "results" / "start_and_stop.json"
PYTHON = sys.executable
KOOPMON = (PYTHON, "-m", "koopmon")
JOB = """
import sys, time
print(time.time(), flush=True)
time.sleep(float(sys.argv[1]))
print(time.time(), flush=True)
"""
GOALS = {"before_seconds": 0.3, "after_seconds": 0.5, "help_ratio": 4.0}
"""Upper bounds: seconds before and after a job, and the CPU time of `koopmon --help` over that of `python -c pass`."""


def job_times(prefix: Sequence[str], job_seconds: float, environ: dict[str, str]) -> dict[str, float]:
    """Run the job behind the words of `prefix`; return the seconds before and after it."""
    command = [*prefix, PYTHON, "-c", JOB, str(job_seconds)]
    began = time.time()
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    ended = time.time()
    first, last = map(float, done.stdout.split())
    return {"before": first - began, "after": ended - last}


def seconds_of(command: Sequence[str], environ: dict[str, str]) -> float:
    """Run a command; return its CPU seconds."""
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure(folder: Path, rounds: int, help_rounds: int, job_seconds: float) -> dict[str, Any]:
    """Measure both comparisons, each arm in turn: jobs in wall-clock seconds, starts in CPU seconds."""
    environ = {**os.environ, "XDG_STATE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    arms = {"alone": (), "guarded": (*KOOPMON, "run", "--")}
    jobs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, prefix in arms.items():
            jobs[name].append(job_times(prefix, job_seconds, environ))
    commands = {"help": (*KOOPMON, "--help"), "pass": (PYTHON, "-c", "pass")}
    starts: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(help_rounds):
        for name, command in commands.items():
            starts[name].append(seconds_of(command, environ))
    added = {
        f"{side}_seconds": statistics.median(each[side] for each in jobs["guarded"])
        - statistics.median(each[side] for each in jobs["alone"])
        for side in ("before", "after")
    }
    ratio = statistics.median(starts["help"]) / statistics.median(starts["pass"])
    return {"jobs": jobs, "starts": starts, "measured": {**added, "help_ratio": ratio}}


def missed(measured: dict[str, float]) -> list[str]:
    """Return the goals that are not met."""
    return [name for name, goal in GOALS.items() if not measured[name] <= goal]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_and_stop", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="jobs of each arm (default %(default)s)")
    parser.add_argument("--help-rounds", type=int, default=21, help="starts of each command (default %(default)s)")
    parser.add_argument("--job-seconds", type=float, default=15.0, help="length of a job (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("rounds", "help_rounds"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.rounds, options.help_rounds, options.job_seconds)
    load = [round(each, 1) for each in os.getloadavg()]
    settings = {"job_seconds": options.job_seconds, "load_average": load}
    result = {"provenance": provenance(0), "settings": settings, "goals": GOALS, **found}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table("", "measured", "goal", title="start and stop")
    for name, goal in GOALS.items():
        table.add_row(name, f"{found['measured'][name]:.3f}", f"{goal:g}")
    Console().print(table)
    return int(bool(missed(found["measured"])))


if __name__ == "__main__":
    raise SystemExit(main())
