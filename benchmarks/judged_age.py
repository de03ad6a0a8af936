"""Age of the snapshots that an overloaded monitor judges: `python -m benchmarks.judged_age`.

A simulated rank sends snapshots of 48 layers to a monitor in its own process. First it sends them as fast as they are
taken, which gives the rate that the engine bears. Then it sends at multiples of that rate, whatever the monitor asks
for. The age of a snapshot is the time from its dispatch until its profile begins, in intervals of the sender: the
number of newer snapshots that exist by then. The exit status is 1 if the median age at twice the bearable rate exceeds
its goal.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks import campaign
from benchmarks.live_scenes import NUM_LAYERS, Agent, monitor, states, wait_until
from benchmarks.provenance import provenance

RESULT = Path(__file__).parent / "results" / "judged_age.json"
LOADS = (0.5, 1.0, 2.0, 4.0)
"""Rates of the snapshots over the bearable one."""
GOAL_LOAD, GOAL_AGE = 2.0, 1.0
SATURATED_SECONDS, MEASURED_SECONDS = 10.0, 20.0
SETTLE_SHARE = 0.2
"""Share of the snapshots of a run that do not count: the first ones."""


def judged(store: Path) -> list[tuple[int, float]]:
    """Return the step and the time at which its profile began of each judged snapshot, in Unix seconds."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as history:
        return list(history.execute("select step, time - seconds from profiles order by time"))


def send(folder: Path, interval: float, seconds: float) -> tuple[dict[int, float], list[tuple[int, float]]]:
    """Send a snapshot every `interval` seconds to a fresh monitor.

    Returns the time of the dispatch of each step, and what was judged.
    """
    store = folder / f"{interval:.4f}.sqlite3"
    held = [states(seed).bfloat16() for seed in range(4)]
    sent: dict[int, float] = {}
    with monitor(folder, store) as served:
        agent = Agent(served.endpoint, "run")
        agent.snapshot(0, held[0])
        wait_until(lambda: store.exists() and judged(store), 0.05)  # the engine has begun
        began = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            step = len(sent) + 1
            if now < (due := began + (step - 1) * interval):
                time.sleep(due - now)
            sent[step] = time.time()
            agent.snapshot(step, held[step % len(held)])
        time.sleep(1.0)
        agent.close()
    return sent, [(step, at) for step, at in judged(store) if step in sent]


def ages(sent: dict[int, float], taken: Sequence[tuple[int, float]], interval: float) -> dict[str, Any]:
    """Return the ages of the judged snapshots, in intervals, and how many were judged."""
    first = SETTLE_SHARE * max(sent)
    found = [(at - sent[step]) / interval for step, at in taken if step > first]
    return {
        "sent": len(sent),
        "judged": len(taken),
        "median": statistics.median(found),
        "p95": float(np.percentile(found, 95)),
        "largest": max(found),
    }


def measure(folder: Path, seconds: float) -> dict[str, Any]:
    """Return the bearable interval in seconds, and the ages by load."""
    _, taken = send(folder, 0.0, min(seconds, SATURATED_SECONDS))
    bearable = (taken[-1][1] - taken[0][1]) / (len(taken) - 1)
    loads = {}
    for load in LOADS:
        interval = bearable / load
        loads[f"{load:g}"] = ages(*send(folder, interval, seconds), interval)
    return {"bearable_interval_seconds": bearable, "loads": loads}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judged_age", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=MEASURED_SECONDS, help="time of each measurement")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    origin = provenance(0)
    with tempfile.TemporaryDirectory(prefix="koopmon-") as folder:
        told = measure(Path(folder), options.seconds)
    every = told["bearable_interval_seconds"]
    title = f"age of the snapshots judged; the engine bears one of {NUM_LAYERS} layers every {1e3 * every:.0f} ms"
    table = Table("load", "sent", "judged", "median age", "p95", "largest", title=title)
    for load, found in told["loads"].items():
        figures = (f"{found[name]:.2f}" for name in ("median", "p95", "largest"))
        table.add_row(f"x {load}", str(found["sent"]), str(found["judged"]), *figures)
    campaign.console().print(table)
    age = told["loads"][f"{GOAL_LOAD:g}"]["median"]
    goal = {"load": GOAL_LOAD, "median": age, "goal": GOAL_AGE, "met": age <= GOAL_AGE}
    document = {"provenance": origin, "load_average": os.getloadavg()[0], **told, "goal": goal}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(not goal["met"])


if __name__ == "__main__":
    raise SystemExit(main())
