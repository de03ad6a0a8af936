"""A job under `koopmon run` that is killed and restarted: the rate in force at the kill is in force at once."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "programs" / "restarts.py"
POLICY = """
[policy]
act_risk = 1e-8
release_risk = 1e-9
cooldown_steps = 20
normalized_landing_rate = 0.01
rewind_warmup_steps = 30
max_actions_per_hour = 4
"""
"""A policy that acts on the first snapshots, so that the test does not depend on a model that diverges."""

ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it, restarts by torchrun in torch 2.13 hang over gloo, with and without koopmon (docs/failures.md)."""


class Job:
    """One script under `koopmon run`, which is started and killed several times."""

    def __init__(self, koopmon: Any, *, ranks: int, norm: bool, restarts: int = 0) -> None:
        self.koopmon = koopmon
        self.directory: Path = koopmon.directory
        self.ranks = ranks
        (self.directory / "k.toml").write_text(POLICY)
        script = [str(PROGRAM), str(self.directory), "norm" if norm else "plain", "0.03"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        launcher += ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        self.words = [sys.executable, *(launcher if ranks > 1 else []), *script]
        self.process: Any = None
        self.start()

    def start(self) -> None:
        options = ("--run", "mine", "--config", "k.toml", "--store", "s.sqlite3")
        self.process = self.koopmon.start("run", *options, "--", *self.words, TMPDIR="/tmp", **ELASTIC)

    def rows(self, rank: int = 0) -> list[dict[str, Any]]:
        file = self.directory / f"rank{rank}.jsonl"
        lines = file.read_text().split("\n") if file.exists() else []
        return [json.loads(line) for line in lines[:-1]]

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        return [row for row in self.rows(rank) if "used" in row]

    def launches(self, rank: int = 0) -> list[list[dict[str, Any]]]:
        return [list(steps) for _, steps in groupby(self.steps(rank), key=lambda step: step["pid"])]

    def killed_inside(self) -> set[int]:
        """Return the processes that were killed between the begin of an update and the line with its rate."""
        last = {row["pid"]: row for row in self.rows()}
        return {pid for pid, row in last.items() if "begins" in row}

    def wait(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition stayed false"
            assert self.process.poll() is None, self.process.stderr.read().decode()[-4000:]
            time.sleep(0.02)

    def wait_for_action(self, launch: int) -> None:
        def acted() -> bool:
            found = self.launches()
            return len(found) > launch and scale(found[launch][-1]) < 0.99

        self.wait(acted)

    def wait_for_steps(self, count: int) -> None:
        before = len(self.steps())
        self.wait(lambda: len(self.steps()) >= before + count)

    def kill_ranks(self) -> None:
        for rank in range(self.ranks):
            os.kill(self.steps(rank)[-1]["pid"], signal.SIGKILL)

    def finish(self) -> str:
        (self.directory / "stop").write_text("")
        _, said = self.process.communicate(timeout=120)
        (self.directory / "stop").unlink()
        return str(said.decode())


def scale(step: dict[str, Any]) -> float:
    return float(step["used"]) / float(step["scheduled"])


def check(job: Job, num_launches: int) -> None:
    """No launch begins above the one before, and all ranks use the same rate at every step."""
    launches = job.launches()
    assert len(launches) == num_launches
    inside = job.killed_inside()
    for before, after in pairwise(launches):
        if before[-1]["pid"] not in inside:
            # A schedule that rises under a cap has a higher peak in its next step, and so a smaller scale.
            risen = min(1.0, before[-1]["scheduled"] / after[0]["scheduled"])
            assert risen - 1e-9 <= scale(after[0]) / scale(before[-1]) <= 1.0 + 1e-9
    for rank in range(1, job.ranks):
        for mine, theirs in zip(launches, job.launches(rank), strict=True):
            pairs = list(zip(mine, theirs, strict=False))
            assert len(pairs) > 0
            assert all(one["used"] == other["used"] for one, other in pairs)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "norm"), [(1, True), (1, False), pytest.param(2, True, marks=pytest.mark.distributed)]
)
def test_the_rate_at_the_kill_is_in_force_at_the_first_step_of_every_launch(
    koopmon: Any, ranks: int, norm: bool
) -> None:
    seed = int(os.environ.get("RESTART_SEED", "0"))
    kills, draw = int(os.environ.get("RESTARTS", "3")), random.Random(seed)
    job = Job(koopmon, ranks=ranks, norm=norm)
    job.wait_for_action(0)
    for _ in range(kills):
        job.wait_for_steps(draw.randint(1, 25))
        everything = draw.random() < 0.5
        if everything:
            job.process.kill()  # the launcher first: its monitor ends with it
        job.kill_ranks()
        _, said = job.process.communicate(timeout=120)
        assert job.process.returncode != 0, said
        launches = len(job.launches())
        job.start()
        job.wait(lambda: len(job.launches()) > launches)  # noqa: B023 - called in this turn of the loop only
    job.wait_for_steps(5)
    said = job.finish()
    check(job, kills + 1)
    assert "in force again, as when the launch before was killed" in said
    first = len(job.steps())
    job.start()
    job.wait(lambda: len(job.steps()) > first)
    assert scale(job.steps()[first]) == 1.0, "a training that ended leaves nothing"
    job.finish()


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.distributed
def test_the_rate_at_the_kill_is_in_force_after_an_elastic_restart(koopmon: Any) -> None:
    job = Job(koopmon, ranks=2, norm=True, restarts=3)
    job.wait_for_action(0)
    for count in range(2):
        job.wait_for_steps(10)
        os.kill(job.steps(count % 2)[-1]["pid"], signal.SIGKILL)  # torchrun ends the other rank
        job.wait(lambda: len(job.launches()) > count + 1)  # noqa: B023 - called in this turn of the loop only
    job.wait_for_steps(5)
    job.finish()
    check(job, 3)
