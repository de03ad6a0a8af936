"""Overhead of the agent in a training: `python -m benchmarks.agent_overhead [--device cpu|cuda]`.

One training has koopmon attached throughout. Short blocks of steps with its hooks alternate with blocks without (on,
off, off, on, ...), so that disturbances of the machine affect both. On the CPU, two gloo ranks train under
DistributedDataParallel; on a GPU one process trains. A real monitor computes spectra beside them, at nice 19 or
(`--monitor idle`) in the idle class of the scheduler, which is close to a monitor on another host. It sends no
commands, so the cadence stays at one snapshot every `--every` steps with hooks.

The results are from rank 0, with 95% bootstrap intervals over pairs of blocks:

- mean step: time of the blocks with hooks, snapshots included, over the time of those without;
- snapshot step: time of a step with a snapshot over the mean of the steps without hooks in the neighbouring block.

CPU seconds of the training process, including its sending thread, are beside the wall-clock ones. On a machine with
other users they are more accurate.
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
from collections import OrderedDict
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
from torch.optim import Optimizer

import koopmon
from benchmarks.models import Decoder
from benchmarks.provenance import provenance

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 256
GOALS = {"cpu": {"mean_step": 1.01, "snapshot_step": 1.15}, "cuda": {"mean_step": 1.005, "snapshot_step": 1.15}}
"""Upper bounds of the ratios."""
RESAMPLES = 4000
Floats = NDArray[np.float64]


class Switch:
    """Removes all hooks from a model and its optimizer, and restores them."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        modules = [(module, name) for module in model.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]
        steps = [(optimizer, name) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")]
        owners: list[tuple[object, str]] = [*modules, *steps]
        self._hooks = [(owner, name, getattr(owner, name)) for owner, name in owners if getattr(owner, name)]

    def turn(self, on: bool) -> None:
        for owner, name, hooks in self._hooks:
            setattr(owner, name, hooks if on else OrderedDict())


def rank_main(args: argparse.Namespace) -> None:
    """Train on one rank. Rank 0 writes one row per step: on, snapshot, wall and CPU seconds."""
    device = torch.device(args.device)
    distributed = args.ranks > 1
    torch.set_num_threads(1 if distributed else torch.get_num_threads())
    if distributed:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if distributed else 0
    model: nn.Module = Decoder(
        "pre",
        width=args.d,
        num_layers=args.layers,
        num_heads=args.d // 64,
        max_tokens=args.context,
        vocabulary=VOCABULARY,
        seed=args.seed,
    ).to(device)
    if distributed:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    config = {"cadence": {"dense_every": args.every, "calm_every": args.every}}
    agent = koopmon.attach(model, optimizer, endpoint=args.endpoint, run="agent-overhead", config=config)
    generator = torch.Generator().manual_seed(args.seed + rank)

    def step() -> tuple[float, float]:
        tokens = torch.randint(VOCABULARY, (args.batch, args.context), generator=generator).to(device)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - wall, time.process_time() - cpu

    for _ in range(args.warmup):  # by now the chain is verified, the monitor is connected, and the ranks agree
        step()
    runtime: Any = agent._runtime
    switch = Switch(model, optimizer)
    rows: list[tuple[bool, bool, float, float]] = []
    for block in range(args.steps // args.block):
        on = block % 4 in (0, 3)
        switch.turn(on)
        for _ in range(args.block):
            snapshot = on and runtime.taps._capture.due is not None
            rows.append((on, snapshot, *step()))
    switch.turn(True)
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
    snapshots = [(row[column], np.mean([r[column] for r in off])) for on, off in pairs for row in on if row[1]]
    taken, beside = (np.array(each) for each in zip(*snapshots, strict=True))
    return {
        "mean_step": interval(with_hooks, without, seed),
        "snapshot_step": interval(taken, beside, seed),
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


def run_ranks(args: argparse.Namespace, endpoint: str, directory: Path) -> dict[str, Any]:
    """Train and return the rows of rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rows = directory / "rows.json"
    command = [sys.executable, "-m", "benchmarks.agent_overhead", *sys.argv[1:]]
    command += ["--as-rank", "--endpoint", endpoint, "--rows", str(rows)]
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


def report(result: dict[str, Any]) -> None:
    table = Table("", "clock", "ratio", "95% interval", "median", "goal", title="koopmon's agent against none")
    for name, goal in result["goals"].items():
        for clock in ("wall", "cpu"):
            found = result[clock][name]
            bounds = f"{found['low']:.4f} to {found['high']:.4f}"
            table.add_row(name, clock, f"{found['ratio']:.4f}", bounds, f"{found['median']:.4f}", f"{goal:.3f}")
    Console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Overhead of the agent in a training.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--d", type=int, help="width D; default 256 on the CPU, 1024 on a GPU")
    parser.add_argument("--layers", type=int, help="default 6 on the CPU, 12 on a GPU")
    parser.add_argument("--ranks", type=int, help="default 2 on the CPU, 1 on a GPU")
    parser.add_argument("--batch", type=int, help="sequences per rank; default 4 on the CPU, 8 on a GPU")
    parser.add_argument("--context", type=int, help="tokens per sequence; default 64 on the CPU, 512 on a GPU")
    parser.add_argument("--every", type=int, default=50, help="steps with hooks between snapshots")
    parser.add_argument("--steps", type=int, default=4000, help="steps measured, with hooks and without together")
    parser.add_argument("--block", type=int, default=10, help="steps between switches")
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--monitor", choices=["nice", "idle"], default="nice", help="nice 19, or the idle class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/agent_overhead.json; _cuda, _idle")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    args = parser.parse_args()
    defaults = {"d": (256, 1024), "layers": (6, 12), "ranks": (2, 1), "batch": (4, 8), "context": (64, 512)}
    for name, choices in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, choices[args.device == "cuda"])
    return args


def main() -> int:
    args = arguments()
    if args.as_rank:
        rank_main(args)
        return 0
    with tempfile.TemporaryDirectory(prefix="koopmon-") as temporary:
        directory = Path(temporary)
        monitor, endpoint = start_monitor(directory, args.monitor)
        try:
            found = run_ranks(args, endpoint, directory)
        finally:
            monitor.terminate()
            monitor.wait(60.0)
    names = ("device", "d", "layers", "ranks", "batch", "context", "every", "steps", "block", "warmup", "monitor")
    result = {
        "provenance": provenance(args.seed),
        "settings": {name: getattr(args, name) for name in names},
        "goals": GOALS[args.device],
        "wall": analyse(found["rows"], args.block, 2, args.seed),
        "cpu": analyse(found["rows"], args.block, 3, args.seed),
        "agent": {name: found["status"][name] for name in ("sent", "dropped", "overhead_ratio", "control_ready")},
    }
    suffix = ("" if args.device == "cpu" else f"_{args.device}") + ("" if args.monitor == "nice" else "_idle")
    out = args.out or RESULTS / f"agent_overhead{suffix}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
