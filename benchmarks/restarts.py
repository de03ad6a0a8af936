"""Kills and restarts of guarded scripts: `python -m benchmarks.restarts [--kills N]`.

It runs tests/cli/programs/restarts.py, which goes on from its checkpoint and logs the rate that moves the weights. The
script is killed (SIGKILL) at random steps after the first alarm, in three ways: the whole job of one rank under
`koopmon run`, the whole job of two ranks under torchrun, and one of two ranks, which torchrun restarts
(`--max-restarts`) inside one job. The policy only lowers the rate. So no update after a restart may have a larger
factor on its scheduled rate than the last update before the kill, and all ranks must have equal rates.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "cli" / "programs" / "restarts.py"
RESULT = Path(__file__).parent / "results" / "restarts.json"
WAYS = {"job of one rank": (1, False), "job of two ranks": (2, False), "elastic restart": (2, True)}
"""Number of ranks, and True if torchrun restarts them inside one job."""
POLICY = """
[policy]
name = "lr"
act_risk = 1e-8
release_risk = 1e-9
cooldown_steps = 40
max_actions_per_hour = 60
[limits]
max_actions_per_hour = 60
"""
MOST_STEPS = 30
"""Most steps of a launch before its kill, after the first step."""
PATIENCE_SECONDS = 300.0
TOLERANCE = 1e-9
COLUMNS = {
    "restarts": "restarts",
    "updates": "updates after one",
    "above": "above the rate at the kill",
    "ranks_differ": "ranks differ",
    "last_factor": "last factor",
}


class Job:
    """A script under `koopmon run` in `directory`."""

    def __init__(self, directory: Path, ranks: int, restarts: int) -> None:
        (directory / "k.toml").write_text(POLICY)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        torchrun += ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        guard = ["-m", "koopmon", "run", "--run", "mine", "--config", "k.toml", "--store", "s.sqlite3", "--"]
        script = [str(SCRIPT), str(directory), "norm", "0.03"]
        self._command = [sys.executable, *guard, sys.executable, *(torchrun if ranks > 1 else []), *script]
        self._directory, self.ranks = directory, ranks
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # docs/failures.md: without the second variable, restarts by torchrun hang over gloo.
        ours = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        paths = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
        with (self._directory / "output").open("ab") as output:
            self.process = subprocess.Popen(
                self._command,
                cwd=self._directory,
                env={**os.environ, **ours, "PYTHONPATH": paths},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def launches(self, rank: int = 0) -> list[list[dict[str, Any]]]:
        """Return the updates of each launch that has taken one."""
        file = self._directory / f"rank{rank}.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        steps = [row for row in map(json.loads, lines) if "used" in row]
        return [list(rows) for _, rows in groupby(steps, key=lambda row: row["pid"])]

    def wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > end or (self.process is not None and self.process.poll() is not None):
                raise RuntimeError((self._directory / "output").read_text()[-3000:])
            time.sleep(0.05)

    def wait_for_steps(self, launch: int, count: int) -> None:
        def done(rank: int) -> bool:
            found = self.launches(rank)
            return len(found) > launch and len(found[launch]) >= count

        self.wait(lambda: all(map(done, range(self.ranks))))

    def kill(self, *, everything: bool, rank: int) -> None:
        """Kill the whole job, or one rank."""
        ranks = range(self.ranks) if everything else [rank]
        if everything and self.process is not None:
            self.process.kill()  # the launcher first: its monitor ends with it
        for each in ranks:
            os.kill(self.launches(each)[-1][-1]["pid"], signal.SIGKILL)
        if everything and self.process is not None:
            self.process.wait()

    def finish(self) -> None:
        (self._directory / "stop").write_text("")
        if self.process is not None:
            self.process.wait(PATIENCE_SECONDS)


def factor(step: dict[str, Any]) -> float:
    return float(step["used"]) / float(step["scheduled"])


def play(ranks: int, elastic: bool, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill and restart one script `kills` times; return the counts of its updates."""
    with tempfile.TemporaryDirectory(prefix="kr-") as folder:
        job = Job(Path(folder), ranks, kills if elastic else 0)
        job.start()
        try:
            job.wait(lambda: any(factor(step) < 0.99 for launch in job.launches() for step in launch))
            for count in range(kills):
                job.wait_for_steps(count, len(job.launches()[count]) + draw.randint(1, MOST_STEPS))
                job.kill(everything=not elastic, rank=draw.randrange(ranks))
                if not elastic:
                    job.start()
                job.wait_for_steps(count + 1, 1)
            job.wait_for_steps(kills, 10)
            job.finish()
        finally:
            if job.process is not None and job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
        return judge([job.launches(rank) for rank in range(ranks)])


def judge(logs: Sequence[Sequence[Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """Compare the updates of the launches of each rank."""
    first = logs[0]
    above, largest, compared = 0, 0.0, 0
    for before, after in pairwise(first):
        bound = factor(before[-1])
        ratios = [factor(step) / bound for step in after]
        compared += len(ratios)
        above += sum(ratio > 1.0 + TOLERANCE for ratio in ratios)
        largest = max(largest, *ratios)
    differ = 0
    for other in logs[1:]:
        for mine, theirs in zip(first, other, strict=True):
            differ += sum(one["used"] != two["used"] for one, two in zip(mine, theirs, strict=False))
    return {
        "restarts": len(first) - 1,
        "updates": compared,
        "above": above,
        "largest_ratio": largest,
        "ranks_differ": differ,
        "last_factor": factor(first[-1][-1]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restarts", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    rows = {way: play(*WAYS[way], args.kills, random.Random(f"{args.seed} {way}")) for way in args.ways}
    result = {"provenance": provenance(args.seed), "kills": args.kills, "ways": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("way", *COLUMNS.values())
    for way, row in rows.items():
        table.add_row(way, *(f"{row[name]:g}" for name in COLUMNS))
    Console().print(table)
    good = all(row["restarts"] == args.kills and not row["above"] and not row["ranks_differ"] for row in rows.values())
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
