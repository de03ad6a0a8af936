"""Cost of a step under ceilings (KSS by projection): `python -m benchmarks.ceilings_cost`.

Every layer of a training is held, and the ceilings bind. The CPU time of the thread that works on the weights is
compared with that of the whole step, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.optim import AdamW

from benchmarks.provenance import provenance
from benchmarks.proving_ground.models import build
from benchmarks.proving_ground.text import batch
from benchmarks.proving_ground.training import loss_of
from koopmon.agent.control import ceilings
from koopmon.agent.runtime import AgentRuntime
from koopmon.config import from_mapping
from koopmon.conformance.training import Notebook
from koopmon.plugins import select
from koopmon.wire.messages import Command

RESULT = Path(__file__).parent / "results" / "ceilings_cost.json"
GOAL = 1.005
SIZES = {64: 4, 256: 6}
"""Number of layers by width."""
TOKENS, SEQUENCES = 64, 16
FACTOR = 0.9
"""Factor of the ceilings on the norms of the start, so that they bind in most steps."""


class Training:
    """A training with an agent, without a monitor."""

    def __init__(self, width: int, num_layers: int) -> None:
        self.model: Any = build(
            "pre", width=width, num_layers=num_layers, max_tokens=TOKENS, seed=0, qk_norm=False, dtype=torch.float32
        )
        self.optimizer = AdamW(self.model.parameters(), lr=1e-3)
        self.runtime = AgentRuntime(
            self.model, self.optimizer, select(self.model), from_mapping({}), "ipc://x", "job", io_thread=Notebook
        )
        self.generator = torch.Generator().manual_seed(0)
        self.seconds: list[float] = []

    def step(self) -> None:
        tokens = batch(self.generator, SEQUENCES, TOKENS)
        started = time.thread_time()
        self.optimizer.zero_grad()
        loss_of(self.model, tokens).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.seconds.append(time.thread_time() - started)

    def hold(self, layers: int) -> None:
        """Put ceilings on the first `layers` layers. Raises RuntimeError if they are not acknowledged."""
        name: dict[str, Any] = {"run": "job", "incarnation": "0" * 8, "id": secrets.token_hex(8), "reason": "benchmark"}
        factors = dict.fromkeys(range(layers), FACTOR)
        self.runtime.lifecycle.submit(Command(**name, kind="set_ceilings", ceilings=factors, expires_step=1 << 40))
        for _ in range(10):
            self.step()
        if len(self.runtime.lifecycle.applied().held_layers) != layers:
            raise RuntimeError("the ceilings are not in force")


def measure(width: int, num_layers: int, steps: int) -> dict[str, Any]:
    """Return the median CPU time of a step, and that of the work on the weights in it."""
    training, added, hold = Training(width, num_layers), [], ceilings.hold

    def timed(weights: Any) -> None:
        started = time.thread_time()
        hold(weights)
        added.append(time.thread_time() - started)

    for _ in range(3):
        training.step()
    training.hold(num_layers)
    training.seconds.clear()
    ceilings.hold = timed
    try:
        for _ in range(steps):
            training.step()
    finally:
        ceilings.hold = hold
        training.runtime.close("")
    cost = statistics.median(added)
    alone = statistics.median(training.seconds) - cost
    return {
        "width": width,
        "layers": num_layers,
        "steps": steps,
        "step_ms": 1e3 * alone,
        "added_us": 1e6 * cost,
        "ratio": 1.0 + cost / alone,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceilings_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--widths", nargs="+", type=int, choices=list(SIZES), default=list(SIZES), metavar="WIDTH")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [measure(width, SIZES[width], args.steps) for width in args.widths]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"provenance": provenance(0), "goal": GOAL, "rows": rows}, indent=1) + "\n")
    table = Table("width", "held layers", "CPU time of a step (ms)", "added (us)", "ratio")
    for row in rows:
        cells = (f"{row['step_ms']:.2f}", f"{row['added_us']:.0f}", f"{row['ratio']:.4f}")
        table.add_row(str(row["width"]), str(row["layers"]), *cells)
    Console().print(table)
    return 0 if all(row["ratio"] <= GOAL for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
