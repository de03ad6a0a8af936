"""Common parts of the tests of callbacks: a monitor in another process, and ranks under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli.embedded import EmbeddedMonitor
from koopmon.history.reader import HistoryReader
from koopmon.wire.messages import Heartbeat
from tests.agent.scripted_monitor import ScriptedMonitor

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
MINE = ("KOOPMON_", "SLURM_", "WANDB_")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """Return the caller's environment without variables of monitors and ranks."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(MINE) and key not in LAUNCHED}
    paths = [str(ROOT), str(ROOT / "plugins")]
    return {**environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def ended_well(words: tuple[str, ...], *, timeout: float = 240.0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with `words` to its end, and require exit status 0."""
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return done


def trained(program: str, out: Path, phases: list[dict[str, Any]], **more: str) -> list[list[dict[str, Any]]]:
    """Results of each phase on each of two ranks."""
    ended_well((*TORCHRUN, str(PROGRAMS / program), str(out), json.dumps(phases)), **more)
    ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    return [list(phase) for phase in zip(*ranks, strict=True)]


@pytest.fixture
def monitors(tmp_path: Path) -> Iterator[Callable[..., EmbeddedMonitor]]:
    """Start monitors with a policy; they end with the test."""
    started: list[EmbeddedMonitor] = []

    def start(policy: str) -> EmbeddedMonitor:
        store = tmp_path / f"{policy}.sqlite3"
        options = ["--http", "127.0.0.1:0", "--policy", policy]
        monitor = EmbeddedMonitor("job", store, environment(), set(), options)
        started.append(monitor)
        deadline = time.monotonic() + 60.0
        while not monitor.ready():
            assert time.monotonic() < deadline, monitor.log.read_text()
            time.sleep(0.05)
        return monitor

    yield start
    for monitor in started:
        monitor.close()


def asked(program: str, tmp_path: Path, phase: dict[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """Train under a monitor that asks for two checkpoints and then for a stop.

    Returns the results of both ranks, and the number of steps done at each of these checkpoints and at the stop.
    """
    steps: list[int] = []
    with ScriptedMonitor(tmp_path / "m") as monitor:

        def ask(kind: str) -> None:
            while True:
                monitor.wait(lambda: any(beat.step > 3 for beat in monitor.of(Heartbeat)), 120.0)
                ack = monitor.ack(monitor.command(kind, "asked"))
                if ack.outcome == "applied":
                    steps.append(ack.step + 1)
                    return
                assert ack.outcome == "failed", ack  # the ranks have not met yet
                time.sleep(0.1)

        with ThreadPoolExecutor(1) as pool:
            phases = [{**phase, "steps": 3000, "endpoint": monitor.endpoint, "run": "asked"}]
            training = pool.submit(trained, program, tmp_path / "out", phases)
            for kind in ("checkpoint", "checkpoint", "stop"):
                ask(kind)
            return training.result()[0], steps


def history(monitor: EmbeddedMonitor, run: str) -> tuple[int, list[str]]:
    """Return the number of recorded profiles of a run, and the outcome of each command in words."""
    with HistoryReader.open(monitor.store) as known:
        profiles = len(list(known.profiles(run)))
        rows = [row for decision in known.decisions(run) for row in decision.commands]
    return profiles, [f"{row.command.kind} {row.outcome}" for row in rows]
