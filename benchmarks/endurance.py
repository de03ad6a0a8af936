"""Memory of a long training with koopmon: `python -m benchmarks.endurance [--steps 10000]`.

One process trains a tiny model with a snapshot at every step, KSS and a back-off in force, and a monitor that replies.
Ten times after the first quarter of the steps, it counts resident bytes, live tensors and live Python objects. The exit
status is 1 if a count has grown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import koopmon
from benchmarks import campaign
from benchmarks.matrix.model import loss_of, plain, tokens_at
from benchmarks.provenance import provenance
from koopmon.wire.messages import KssSettings
from tests.agent.scripted_monitor import ScriptedMonitor

RESULT = Path(__file__).parent / "results" / "endurance.json"
MAX_GROWTH_BYTES = 8 << 20
NUM_COUNTS = 10


def endure(steps: int, monitor: ScriptedMonitor) -> dict[str, Any]:
    """Train `steps` optimizer steps under `monitor`; return the counts along the way, and the numbers of snapshots."""
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {"cadence": {"dense_every": 1, "warmup_steps": 1_000_000, "budget_ratio": 0.5}}
    counts: dict[str, list[int]] = {"step": [], "rss_bytes": [], "tensors": [], "objects": []}
    agent = koopmon.attach(model, optimizer, endpoint=monitor.endpoint, run="endurance", config=config)
    deadline = time.monotonic() + 30.0
    while not agent.status()["connected"] and time.monotonic() < deadline:
        time.sleep(0.01)
    monitor.command("set_kss", kss=KssSettings(alpha=0.1, svd_rank=4, num_samples=16))
    monitor.command("set_lr_scale", lr_scale=0.5)
    first, began = steps // 4, time.monotonic()
    due = {first + index * (steps - 1 - first) // (NUM_COUNTS - 1) for index in range(NUM_COUNTS)}
    for step in range(steps):
        tokens = tokens_at(step, 0, 0)
        loss = loss_of(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        agent.log(loss=loss)
        if step % 20 == 0:  # the agent does not own the records of the monitor
            monitor.shards.clear()
            monitor.heard.clear()
        if step in due:
            _count(step, counts, monitor)
    status = agent.status()
    agent.close()
    applied = status["applied"]
    return {
        **counts,
        "in_force": [applied["kss"]["alpha"], applied["lr_scale"]],
        "sent": status["sent"],
        "dropped": sum(status["dropped"].values()),
        "errors": status["errors"],
        "seconds": time.monotonic() - began,
    }


def _count(step: int, counts: dict[str, list[int]], monitor: ScriptedMonitor) -> None:
    time.sleep(0.2)  # wait for snapshots in transit
    monitor.shards.clear()
    monitor.heard.clear()
    gc.collect()
    objects = gc.get_objects()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tensors = sum(issubclass(type(each), torch.Tensor) for each in objects)
    for name, value in zip(counts, (step, resident, tensors, len(objects)), strict=True):
        counts[name].append(value)


def grown(found: dict[str, Any]) -> bool:
    """Return True if the last count exceeds the first."""
    resident, tensors = found["rss_bytes"], found["tensors"]
    return bool(resident[-1] - resident[0] > MAX_GROWTH_BYTES or tensors[-1] > tensors[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 4 * NUM_COUNTS:
        parser.error(f"--steps {options.steps}: at least {4 * NUM_COUNTS}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="koopmon-") as folder, ScriptedMonitor(Path(folder) / "m") as monitor:
        found = endure(options.steps, monitor)
    table = Table(*(name for name in ("step", "rss_bytes", "tensors", "objects")), title="endurance")
    for row in zip(found["step"], found["rss_bytes"], found["tensors"], found["objects"], strict=True):
        table.add_row(*map(str, row))
    campaign.console().print(table)
    told = {"provenance": provenance(0), "steps": options.steps, "grown": grown(found), **found}
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(grown(found) or found["errors"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
