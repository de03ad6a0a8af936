"""Effect of peers that flood and are killed: `python -m benchmarks.flood_and_kill [--times 100]`.

One monitor and one training run through all cycles. In each cycle, eight agents flood both channels of the monitor and
are killed (SIGKILL); then the monitor must reply to a probe. In each cycle of the training, another program floods it
from the monitor's endpoint and is killed; then the training must continue. A C call blocks its interpreter for 50 ms in
each step. The peers' sockets have ZMTP heartbeats, because libzmq 4.3.5 aborts a process that has them in a full queue
(benchmarks/flooders.py). The exit status is 1 unless both survive every cycle and end normally.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import campaign
from benchmarks.flooders import ROOT, Flooders
from benchmarks.provenance import provenance
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.probe import probe

RESULT = Path(__file__).parent / "results" / "flood_and_kill.json"
FLOOD_SECONDS = (0.05, 0.25)
HELD_SECONDS = 0.05
ANSWER_SECONDS = 10.0
"""Longest time to a reply after a flood."""
START_SECONDS = 120.0
WARM_CYCLES = 10
"""Number of cycles before the first memory count."""


def train(endpoint: str, progress: str) -> None:
    """Source of the training: a tiny model that trains until SIGTERM."""
    import torch

    import koopmon
    from benchmarks.matrix.model import loss_of, plain, tokens_at

    torch.set_num_threads(1)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    hold = ctypes.PyDLL(None).usleep  # unlike CDLL, it holds the interpreter lock
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    agent = koopmon.attach(model, optimizer, endpoint=endpoint, run="held")
    step = 0
    while not stop:
        tokens = tokens_at(step, 0, 0)
        loss = loss_of(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        hold(int(HELD_SECONDS * 1e6))
        step += 1
        partial = Path(f"{progress}.partial")
        partial.write_text(str(step))
        partial.replace(progress)
    status = agent.status()
    agent.close()
    sys.exit(0 if status["enabled"] and not status["errors"] else 3)


class Budget:
    """Limits on the number of cycles and on the time."""

    def __init__(self, times: int, seconds: float) -> None:
        self.times = times
        self._until = time.monotonic() + seconds
        self.interrupted = False

    @property
    def spent(self) -> bool:
        return self.interrupted or time.monotonic() > self._until


class Side:
    """One process that runs through all cycles, and its results."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        self.cycles = self.survived = self.messages = 0
        self.slowest_seconds = 0.0
        self.start_bytes = self.end_bytes = 0
        self.why = ""

    def go_through(self, budget: Budget, cycle: Callable[[], tuple[int, float]]) -> None:
        """Run `cycle`, which floods once and returns the number of messages and the time of the reply."""
        try:
            while self.cycles < budget.times and not budget.spent and self.survived == self.cycles:
                self.cycles += 1
                messages, seconds = cycle()
                if self.process.poll() is not None:
                    break
                self.survived += 1
                self.messages += messages
                self.slowest_seconds = max(self.slowest_seconds, seconds)
                self.end_bytes = self._resident()
                if self.cycles <= WARM_CYCLES:
                    self.start_bytes = self.end_bytes
        except (OSError, RuntimeError, TimeoutError) as error:
            self.why = str(error)

    def _resident(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self) -> dict[str, Any]:
        """Stop the process by SIGTERM and return plain values."""
        self.process.terminate()
        try:
            status = self.process.wait(60.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        return {
            "cycles": self.cycles,
            "survived": self.survived,
            "status": status,
            "messages": self.messages,
            "slowest_seconds": round(self.slowest_seconds, 3),
            "growth_bytes": self.end_bytes - self.start_bytes,
            "why": self.why or ("" if status == 0 else self._log.read_text(errors="replace")[-500:]),
        }


def _await(path: Path, side: Side, words: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if side.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{words} did not come up")
        time.sleep(0.05)


def before_monitor(folder: Path, budget: Budget, chance: random.Random) -> dict[str, Any]:
    """Flood a monitor with agents."""
    ready = folder / "ready.json"
    places = ["--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--store", str(folder / "h.sqlite3")]
    command = [sys.executable, "-m", "koopmon", "monitor", *places, "--device", "cpu", "--ready-file", str(ready)]
    side = Side(command, folder / "monitor.log")
    with Flooders() as flooders:
        try:
            _await(ready, side, "the monitor", START_SECONDS)
            endpoint = json.loads(ready.read_text())["endpoint"]
        except RuntimeError as error:
            side.why = str(error)
            return side.end()

        def cycle() -> tuple[int, float]:
            sent = flooders.agents(endpoint, chance.uniform(*FLOOD_SECONDS))
            began = time.monotonic()
            if probe(endpoint, AuthPolicy(), timeout_seconds=ANSWER_SECONDS).reply is None:
                raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s, status {side.process.poll()}")
            return sent, time.monotonic() - began

        side.go_through(budget, cycle)
    return side.end()


def before_training(folder: Path, budget: Budget, chance: random.Random) -> dict[str, Any]:
    """Flood a training from the monitor's endpoint."""
    endpoint, progress = f"ipc://{folder}/m/control", folder / "step"
    code = "import sys; from benchmarks.flood_and_kill import train; train(*sys.argv[1:])"
    side = Side([sys.executable, "-c", code, endpoint, str(progress)], folder / "training.log")
    with Flooders() as flooders:
        try:
            _await(progress, side, "the training", START_SECONDS)
        except RuntimeError as error:
            side.why = str(error)
            return side.end()

        def cycle() -> tuple[int, float]:
            sent = flooders.monitor(endpoint, chance.uniform(*FLOOD_SECONDS))
            step, began = int(progress.read_text()), time.monotonic()
            while int(progress.read_text()) < step + 2:
                if side.process.poll() is not None or time.monotonic() > began + ANSWER_SECONDS:
                    raise TimeoutError(f"no step within {ANSWER_SECONDS:.0f} s, status {side.process.poll()}")
                time.sleep(0.005)
            return sent, time.monotonic() - began

        side.go_through(budget, cycle)
    return side.end()


SIDES = {"monitor": before_monitor, "training": before_training}


def good(told: dict[str, Any]) -> bool:
    """Return True if a side had at least one cycle, survived all and ended normally."""
    return bool(told["survived"] == told["cycles"] > 0 and told["status"] == 0 and told["messages"])


def run(budget: Budget, seed: int) -> dict[str, dict[str, Any]]:
    """Run both sides at once; return their results. Raises KeyboardInterrupt after both have ended."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="kf-") as name:

        def play(side: str) -> None:
            folder = Path(name, side[:1])
            folder.mkdir(mode=0o700)
            found[side] = SIDES[side](folder, budget, random.Random(f"{seed} {side}"))

        threads = [threading.Thread(target=play, args=(side,)) for side in SIDES]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            budget.interrupted = True
            for thread in threads:
                thread.join()
            raise
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flood_and_kill", description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="cycles on each side (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=600.0, help="at most so long (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the floods' lengths (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.times < 1:
        parser.error(f"--times {options.times}: must be at least 1")
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds}: must be above 0")
    began = time.monotonic()
    try:
        with campaign.terminated_as_interrupted():
            found = run(Budget(options.times, options.seconds), options.seed)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing is kept\n")
        return 130
    told = {"provenance": provenance(options.seed), "seconds": round(time.monotonic() - began, 1), "sides": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    table = Table("flooded", "cycles", "survived", "messages", "slowest answer or 2 steps", "growth, MB", "status")
    for name, row in found.items():
        cells = [row["cycles"], row["survived"], f"{row['messages']:,}", f"{row['slowest_seconds']:.2f} s"]
        table.add_row(name, *map(str, cells), f"{row['growth_bytes'] / 1e6:.1f}", str(row["status"]))
    console = campaign.console()
    console.print(table)
    for name, row in found.items():
        if row["why"]:
            console.print(f"[red]{name}: {row['why']}[/red]")
    return 0 if all(map(good, found.values())) else 1


if __name__ == "__main__":
    raise SystemExit(main())
