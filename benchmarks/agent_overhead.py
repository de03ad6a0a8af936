"""Overhead of the agent in a training: `python -m benchmarks.agent_overhead [--model small|tiny] [--device cpu|cuda]`.

Two equal trainings run in each process: koopmon is attached to one, and never to the other. Short blocks of their steps
alternate (watched, bare, bare, watched, ...), so that disturbances of the machine affect both. The bare one has no
hooks, but shares the interpreter with the agent's sending thread. On the CPU, two gloo ranks train the small model
under DistributedDataParallel; on a GPU, and with the tiny model, one process trains. A real monitor computes spectra
beside them, at nice 19 or (`--monitor idle`) in the idle class of the scheduler, which is close to a monitor on another
host. It sends no commands. Each stage has processes of its own, at the default cadence: `start` comes after the dense
warm-up, while the credit of the first snapshots lasts; `long` begins without that credit, as a long run goes on. The
copies for a rewind have a bound of their own, a tenth of a percent of the step time; `--no-copies` leaves them out.

The results are from rank 0, with 95% bootstrap intervals over pairs of blocks:

- mean step: time of the watched blocks, snapshots included, over the time of the bare ones;
- plain step: time of a watched step without a snapshot over the mean step of the neighbouring bare block;
- snapshot step: the same of a step with a snapshot.

CPU seconds of the training process, including its sending thread, are beside the wall-clock ones. On a machine with
other users they are more accurate. The goals hold for them. Where the memory of the two trainings lies favours one of
them by up to a few thousandths, so that the steps are spread over several launches, and every second one makes the bare
training first. The exit status is 1 if a ratio exceeds its goal.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import koopmon
from benchmarks.models import Decoder
from benchmarks.provenance import provenance

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 256
STAGES = ("start", "long")
GOALS = {
    "start": {"plain_step": 1.005, "snapshot_step": 1.04},
    "long": {"mean_step": 1.005, "plain_step": 1.005, "snapshot_step": 1.04},
}
"""Upper bounds of the ratios of CPU seconds, by the stage."""
SHAPES = {
    "small": {"d": 256, "layers": 6, "ranks": 2, "batch": 4, "context": 64},
    "tiny": {"d": 64, "layers": 2, "ranks": 1, "batch": 8, "context": 32},
    "cuda": {"d": 1024, "layers": 12, "ranks": 1, "batch": 8, "context": 512},
}
WARMUP_STEPS = 220
"""Steps of each training before the first that counts: the dense cadence of the default configuration has 200."""
RESAMPLES = 4000
STATUS = ("sent", "dropped", "overhead_ratio", "control_ready")
Floats = NDArray[np.float64]


class Training:
    """One training of a rank. `endpoint` attaches koopmon; None leaves it bare."""

    def __init__(self, args: argparse.Namespace, rank: int, endpoint: str | None) -> None:
        self.device = torch.device(args.device)
        self.model: nn.Module = Decoder(
            "pre",
            width=args.d,
            num_layers=args.layers,
            num_heads=args.d // 64,
            max_tokens=args.context,
            vocabulary=VOCABULARY,
            seed=args.seed,
        ).to(self.device)
        if args.ranks > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.generator = torch.Generator().manual_seed(args.seed + rank)
        self.shape = (args.batch, args.context)
        self.agent: Any = None
        if endpoint is not None:
            config: dict[str, Any] = {"cadence": {"initial_credit_seconds": 0.0}} if args.stage == "long" else {}
            config |= {} if args.copies else {"limits": {"max_rewinds": 0}}
            self.agent = koopmon.attach(
                self.model, self.optimizer, endpoint=endpoint, run="agent-overhead", config=config
            )

    @property
    def snapshot_is_due(self) -> bool:
        return self.agent is not None and self.agent._runtime.taps.due

    def step(self) -> tuple[float, float]:
        """Take one step; return its wall-clock and CPU seconds."""
        tokens = torch.randint(VOCABULARY, self.shape, generator=self.generator).to(self.device)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = functional.cross_entropy(self.model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - wall, time.process_time() - cpu


def leave_out(agent: Any, seconds: float) -> None:
    """Keep the time of bare steps out of the watched training's step time, a share of which is the agent's budget."""
    agent._runtime.stats._last_edge_seconds += seconds


def rank_main(args: argparse.Namespace) -> None:
    """Train on one rank. Rank 0 writes one row per step: watched, snapshot, wall and CPU seconds."""
    distributed = args.ranks > 1
    torch.set_num_threads(1 if distributed else torch.get_num_threads())
    if distributed:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if distributed else 0
    order = (False, True) if args.bare_first else (True, False)
    trainings = {watched: Training(args, rank, args.endpoint if watched else None) for watched in order}
    agent = trainings[True].agent

    def block_of(watched: bool, num_steps: int) -> list[tuple[bool, bool, float, float]]:
        started = time.perf_counter()
        training = trainings[watched]
        rows = [(watched, training.snapshot_is_due, *training.step()) for _ in range(num_steps)]
        if not watched:
            leave_out(agent, time.perf_counter() - started)
        return rows

    for _ in range(args.warmup):  # by now the chain is verified, the monitor is connected, and the ranks agree
        block_of(True, 1)
        block_of(False, 1)
    rows = []
    for block in range(args.steps // args.launches // args.block):
        rows += block_of(block % 4 in (0, 3), args.block)
    status = agent.status()
    agent.close()
    if rank == 0:
        Path(args.rows).write_text(json.dumps({"rows": rows, "status": status}))
    if distributed:
        dist.destroy_process_group()


def interval(values: Floats, weights: Floats, seed: int) -> dict[str, float]:
    """Return the ratio of sums with its 95% bootstrap interval over pairs, and the median of the pairs' ratios."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(values), size=(RESAMPLES, len(values)))
    resampled = values[picks].sum(1) / weights[picks].sum(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {
        "ratio": float(values.sum() / weights.sum()),
        "low": float(low),
        "high": float(high),
        "median": float(np.median(values / weights)),
        "pairs": len(values),
    }


def analyse(rows: Sequence[tuple[bool, bool, float, float]], block: int, column: int, seed: int) -> dict[str, Any]:
    """Return both ratios of one clock: column 2 wall, column 3 CPU."""
    blocks = [rows[start : start + block] for start in range(0, len(rows) - block + 1, block)]
    pairs = [(a, b) if a[0][0] else (b, a) for a, b in zip(blocks[::2], blocks[1::2], strict=False)]
    with_hooks = np.array([sum(row[column] for row in on) for on, _ in pairs])
    without = np.array([sum(row[column] for row in off) for _, off in pairs])
    beside = {
        taken: [(row[column], np.mean([r[column] for r in off])) for on, off in pairs for row in on if row[1] is taken]
        for taken in (False, True)
    }
    plain, snapshots = (np.array(beside[taken]).T for taken in (False, True))
    return {
        "mean_step": interval(with_hooks, without, seed),
        "plain_step": interval(plain[0], plain[1], seed),
        "snapshot_step": interval(snapshots[0], snapshots[1], seed),
        "step_seconds_without": float(without.mean() / block),
    }


def start_monitor(directory: Path, priority: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a real monitor of low priority that sends no commands; return its endpoint when it is ready."""
    endpoint, ready = f"ipc://{directory}/control/socket", directory / "ready.json"
    options = ["--bind", endpoint, "--http", "127.0.0.1:0", "--store", str(directory / "store.sqlite3")]
    options += ["--device", "cpu", "--policy", "observe", "--dry-run", "--ready-file", str(ready)]
    monitor = subprocess.Popen([sys.executable, "-m", "koopmon", "monitor", *options])
    deadline = time.monotonic() + 120.0
    while not ready.exists():
        if monitor.poll() is not None or time.monotonic() > deadline:
            monitor.kill()
            raise SystemExit("the monitor did not start")
        time.sleep(0.1)
    for thread in Path(f"/proc/{monitor.pid}/task").iterdir():
        if priority == "idle":
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)
    return monitor, endpoint


def run_ranks(args: argparse.Namespace, stage: str, options: Sequence[str], directory: Path) -> dict[str, Any]:
    """Train and return the rows of rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rows = directory / "rows.json"
    command = [sys.executable, "-m", "benchmarks.agent_overhead", *sys.argv[1:]]
    command += ["--stage", stage, "--as-rank", "--rows", str(rows), *options]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(args.ranks)}
    if args.device == "cpu":
        shared["OMP_NUM_THREADS"] = "1"
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(args.ranks)
    ]
    statuses = [rank.wait() for rank in ranks]
    if any(statuses):
        raise SystemExit(f"the ranks ended with {statuses}")
    found: dict[str, Any] = json.loads(rows.read_text())
    return found


def launched(args: argparse.Namespace, stage: str, *, bare_first: bool) -> dict[str, Any]:
    """Train once beside a monitor of its own, and return what rank 0 found."""
    with tempfile.TemporaryDirectory(prefix="koopmon-") as temporary:
        directory = Path(temporary)
        monitor, endpoint = start_monitor(directory, args.monitor)
        try:
            return run_ranks(args, stage, ["--endpoint", endpoint, *["--bare-first"] * bare_first], directory)
        finally:
            monitor.terminate()
            monitor.wait(60.0)


def report(result: dict[str, Any]) -> None:
    table = Table("stage", "", "clock", "ratio", "95% interval", "median", "goal", title="koopmon's agent against none")
    for stage, told in result["stages"].items():
        for name in ("mean_step", "plain_step", "snapshot_step"):
            goal = result["goals"][stage].get(name)
            for clock in ("wall", "cpu"):
                found = told[clock][name]
                bounds = f"{found['low']:.4f} to {found['high']:.4f}"
                bound = f"{goal:.3f}" if goal is not None and clock == "cpu" else ""
                ratio, median = f"{found['ratio']:.4f}", f"{found['median']:.4f}"
                table.add_row(stage, name.replace("_", " "), clock, ratio, bounds, median, bound)
    Console().print(table)


def missed(result: dict[str, Any]) -> list[str]:
    """Return one line for each ratio of CPU seconds above its goal."""
    return [
        f"{stage}: {name.replace('_', ' ')} x{told['cpu'][name]['ratio']:.4f}, the goal is x{goal:.3f}"
        for stage, told in result["stages"].items()
        for name, goal in result["goals"][stage].items()
        if told["cpu"][name]["ratio"] > goal
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Overhead of the agent in a training.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["small", "tiny"], default="small", help="of the CPU")
    for name in SHAPES["small"]:
        defaults = ", ".join(f"{shape[name]} ({kind})" for kind, shape in SHAPES.items())
        parser.add_argument(f"--{name}", type=int, help=f"default {defaults}")
    parser.add_argument("--stage", choices=[*STAGES, "both"], default="both")
    parser.add_argument("--steps", type=int, default=4000, help="steps measured of each stage, of both trainings")
    parser.add_argument("--launches", type=int, default=4, help="processes of each rank that share these steps")
    parser.add_argument("--block", type=int, default=10, help="steps between switches")
    parser.add_argument("--warmup", type=int, default=WARMUP_STEPS, help="steps of each training before them")
    parser.add_argument("--monitor", choices=["nice", "idle"], default="nice", help="nice 19, or the idle class")
    parser.add_argument("--no-copies", dest="copies", action="store_false", help="take no copies for a rewind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="default benchmarks/results/agent_overhead.json; _tiny, _cuda, _idle, ..."
    )
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bare-first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = "cuda" if args.device == "cuda" else args.model
    for name, default in SHAPES[args.shape].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def main() -> int:
    args = arguments()
    if args.as_rank:
        rank_main(args)
        return 0
    stages = STAGES if args.stage == "both" else (args.stage,)
    measured = {}
    for stage in stages:
        rows, statuses = [], []
        for launch in range(args.launches):
            found = launched(args, stage, bare_first=bool(launch % 2))
            rows += found["rows"]
            statuses.append({name: found["status"][name] for name in STATUS})
        clocks = {clock: analyse(rows, args.block, at, args.seed) for clock, at in (("wall", 2), ("cpu", 3))}
        measured[stage] = {**clocks, "agents": statuses}
    names = ["device", "d", "layers", "ranks", "batch", "context", "steps", "launches", "block", "warmup"]
    names += ["monitor", "copies"]
    result = {
        "provenance": provenance(args.seed),
        "settings": {name: getattr(args, name) for name in names},
        "against": "one of an equal model that was never attached",
        "goals": {stage: GOALS[stage] for stage in stages},
        "stages": measured,
    }
    suffix = ("" if args.shape == "small" else f"_{args.shape}") + ("" if args.monitor == "nice" else "_idle")
    suffix += "" if args.copies else "_no_copies"
    out = args.out or RESULTS / f"agent_overhead{suffix}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    report(result)
    failures = missed(result)
    for line in failures:
        Console(stderr=True).print(f"goal missed: {line}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
