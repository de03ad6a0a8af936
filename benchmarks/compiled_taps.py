"""Cost of the taps in a compiled graph: `python -m benchmarks.compiled_taps [--backend inductor|aot_eager]`.

Two equal trainings run in one process, both compiled as a whole: one with koopmon attached, one without. Short blocks
of their steps alternate (with, without, without, with, ...). No monitor answers, so no step is a snapshot: the
difference is the cost of the operations that the taps leave in the graph, and of koopmon's optimizer hooks. The cadence
is the default one after its dense warm-up. CPU seconds of the process are beside wall-clock ones. The exit status is 1
if their ratio exceeds its goal, if the losses are not equal to the last bit, or if the numbers of graphs differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

import koopmon
from benchmarks.agent_overhead import interval
from benchmarks.models import Decoder
from benchmarks.provenance import provenance

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 256
GOAL = 1.005
"""Upper bound of the ratio of CPU seconds."""


class Training:
    """One compiled training; `watched` attaches koopmon before the first forward."""

    def __init__(self, args: argparse.Namespace, watched: bool) -> None:
        self.model: nn.Module = Decoder(
            "pre",
            width=args.d,
            num_layers=args.layers,
            num_heads=args.d // 64,
            max_tokens=args.context,
            vocabulary=VOCABULARY,
            seed=args.seed,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.agent: Any = None
        if watched:
            self.agent = koopmon.attach(
                self.model,
                self.optimizer,
                endpoint="tcp://127.0.0.1:9",
                run="compiled-taps",
                config={"cadence": {"warmup_steps": 1}},
            )
        self.called: Any = torch.compile(self.model, backend=args.backend, fullgraph=True)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.shape = (args.batch, args.context)
        self.losses: list[float] = []

    def step(self) -> tuple[float, float]:
        """Take one step; return its wall-clock and CPU seconds."""
        tokens = torch.randint(VOCABULARY, self.shape, generator=self.generator)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = functional.cross_entropy(self.called(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        return time.perf_counter() - wall, time.process_time() - cpu


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the ratios of step times with and without the taps."""
    torch.set_num_threads(args.threads)
    graphs = torch._dynamo.utils.counters["stats"]
    trainings, counts = {}, {}
    # The watched one first: a compiler that knows the class takes hooks that came later for absent.
    for watched in (True, False):
        before = graphs["unique_graphs"]
        trainings[watched] = Training(args, watched)
        for _ in range(args.warmup):
            trainings[watched].step()
        counts[watched] = graphs["unique_graphs"] - before
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for block in range(args.blocks):
        for watched in (True, False) if block % 2 == 0 else (False, True):
            rows = np.array([trainings[watched].step() for _ in range(args.steps)])
            times[watched].append(tuple(np.median(rows, axis=0)))
    agent = trainings[True].agent
    runtime = agent._runtime
    in_graph, status = runtime.taps.stacks.chain.in_graph, agent.status()
    agent.close()
    on, off = np.array(times[True]), np.array(times[False])
    return {
        "equal_losses": trainings[True].losses == trainings[False].losses,
        "graphs": {"with": counts[True], "without": counts[False]},
        "in_graph": in_graph,
        "sent": status["sent"],
        "wall": interval(on[:, 0], off[:, 0], args.seed),
        "cpu": interval(on[:, 1], off[:, 1], args.seed),
        "step_seconds_without": float(off[:, 0].mean()),
    }


def report(result: dict[str, Any]) -> None:
    table = Table("clock", "ratio", "95% interval", "median", "goal", title="compiled training, with taps against none")
    for clock in ("wall", "cpu"):
        found = result[clock]
        bounds = f"{found['low']:.4f} to {found['high']:.4f}"
        table.add_row(clock, f"{found['ratio']:.4f}", bounds, f"{found['median']:.4f}", f"{GOAL:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"equal losses: {result['equal_losses']}; graphs: {result['graphs']}; taps in the graph: {result['in_graph']}"
    )


def missed(result: dict[str, Any]) -> list[str]:
    """Return one line for each goal that `result` misses."""
    ratio, graphs = result["cpu"]["ratio"], result["graphs"]
    found = [f"x{ratio:.4f}, the goal is x{GOAL:.3f}"] if ratio > GOAL else []
    found += [] if result["equal_losses"] else ["the losses differ"]
    found += [] if graphs["with"] == graphs["without"] else [f"{graphs['with']} graphs instead of {graphs['without']}"]
    return found + ([] if result["in_graph"] else ["the graph has no taps"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of the taps in a compiled graph.")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=16, help="blocks of steps of each training")
    parser.add_argument("--steps", type=int, default=3, help="steps of a block; its time is their median")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "compiled_taps.json")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    found = measure(args)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "seed")}
    result = {"provenance": provenance(args.seed), "settings": settings, "goal": GOAL, **found}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    report(result)
    failures = missed(result)
    for line in failures:
        Console(stderr=True).print(f"goal missed: {line}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
