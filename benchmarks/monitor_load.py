"""Load of the monitor by idle agents and by scrapes: `python -m benchmarks.monitor_load`.

A monitor in its own process serves simulated ranks: first none, then 1,000 ranks of one run, then 100 runs of one rank.
They send heartbeats as often as their welcome says. Then 100 runs of 48 layers send snapshots, and /metrics is read
with gzip. The benchmark measures the monitor's CPU time and the bytes. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import http.client
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zmq
from rich.table import Table

from benchmarks import campaign
from benchmarks.live_page import ACCEPT, cpu_seconds
from benchmarks.live_scenes import NUM_LAYERS, Agent, Served, monitor, states, wait_until
from benchmarks.provenance import provenance
from koopmon.wire.headers import decode_header, encode_header
from koopmon.wire.messages import Welcome
from tests import factories

RESULT = Path(__file__).parent / "results" / "monitor_load.json"
INCARNATION = "aaaaaaaa"
NUM_RANKS, NUM_RUNS, SCRAPES = 1000, 100, 20
SETTLE_SECONDS, MEASURED_SECONDS = 15.0, 40.0
MAX_RANKS_SHARE, MAX_RUNS_SHARE = 0.05, 0.05
MAX_SENT_BYTES, MAX_SCRAPE_CPU_SECONDS = 400_000, 0.15
LIMITS = f"max_runs = {NUM_RUNS}\nmax_peers = {NUM_RANKS}\nqueue_length = {NUM_RUNS}"
SETTINGS = f"[monitor]\n{LIMITS}\nvanished_after_seconds = 600\n"


@dataclass(slots=True)
class Peer:
    """One simulated rank with a connection of its own."""

    socket: Any
    heartbeat: bytes
    heartbeat_seconds: float = 0.0

    def await_welcome(self) -> None:
        welcome = decode_header(memoryview(self.socket.recv()))
        if not isinstance(welcome, Welcome):
            raise TypeError(f"not welcomed: {welcome}")
        self.heartbeat_seconds = welcome.heartbeat_seconds

    def beat(self) -> None:
        """Read the replies, and send a heartbeat."""
        while self.socket.poll(0):
            self.socket.recv()
        self.socket.send(self.heartbeat)


class Peers:
    """Idle ranks of some runs. Their heartbeats are spread evenly over time."""

    def __init__(self, endpoint: str, runs: Sequence[str], num_ranks: int) -> None:
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 4 * NUM_RANKS)
        peers = [self._connected(endpoint, run, rank, num_ranks) for run in runs for rank in range(num_ranks)]
        for peer in peers:
            peer.await_welcome()
        now = time.monotonic()
        self._due = [
            (now + peer.heartbeat_seconds * number / len(peers), number, peer) for number, peer in enumerate(peers)
        ]
        heapq.heapify(self._due)

    def _connected(self, endpoint: str, run: str, rank: int, num_ranks: int) -> Peer:
        name: dict[str, Any] = {"run": run, "incarnation": INCARNATION, "process_rank": rank}
        socket = self._context.socket(zmq.DEALER)
        socket.connect(endpoint)
        socket.send(encode_header(factories.hello(**name, world_size=num_ranks, num_senders=num_ranks)))
        return Peer(socket, encode_header(factories.heartbeat(1, **name, step_seconds=0.1)))

    def idle(self, seconds: float) -> int:
        """Send the heartbeats that are due for some time; return their number."""
        num_sent, until = 0, time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            due, number, peer = self._due[0] if self._due else (until, 0, None)
            if due > now:
                time.sleep(min(due, until) - now)
            elif peer is not None:
                peer.beat()
                num_sent += 1
                heapq.heapreplace(self._due, (due + peer.heartbeat_seconds, number, peer))
        return num_sent

    def close(self) -> None:
        self._context.destroy(linger=0)


def idle_share(served: Served, runs: Sequence[str], num_ranks: int, seconds: float) -> dict[str, float]:
    """Return the share of a core that the monitor uses for idle ranks, and their heartbeats per second."""
    peers = Peers(served.endpoint, runs, num_ranks)
    peers.idle(SETTLE_SECONDS)
    began, spent = time.monotonic(), cpu_seconds(served.pid)
    num_sent = peers.idle(seconds)
    took = time.monotonic() - began
    share, rate = (cpu_seconds(served.pid) - spent) / took, num_sent / took
    peers.close()
    return {"share": share, "heartbeats_per_second": rate}


def scrapes(served: Served) -> dict[str, Any]:
    """Measure CPU time and size of compressed scrapes of NUM_RUNS runs, one of which changes before each scrape."""
    agents = [Agent(served.endpoint, f"run-{number:02d}") for number in range(NUM_RUNS)]
    for number, agent in enumerate(agents):
        agent.snapshot(1, states(number).bfloat16())
        agent.heartbeat(1)

    def scrape() -> tuple[float, bytes]:
        spent = cpu_seconds(served.pid)
        connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60.0)
        connection.request("GET", "/metrics", headers={"Accept": ACCEPT, "Accept-Encoding": "gzip"})
        packed = connection.getresponse().read()
        connection.close()
        return cpu_seconds(served.pid) - spent, packed

    last = f'layer="{NUM_LAYERS - 1}"'.encode()
    wait_until(lambda: gzip.decompress(scrape()[1]).count(last) >= 10 * NUM_RUNS, 1.0)
    cpu, packed = [], b""
    for number in range(SCRAPES):
        agents[number % NUM_RUNS].snapshot(2, states(NUM_RUNS + number).bfloat16())
        time.sleep(1.0)
        seconds, packed = scrape()
        cpu.append(seconds)
    for agent in agents:
        agent.close()
    text = gzip.decompress(packed)
    series = sum(not line.startswith(b"#") for line in text.splitlines())
    if series < 10 * NUM_RUNS * NUM_LAYERS:
        raise RuntimeError(f"only {series} series: some runs have none of their layers")
    return {"cpu_seconds": cpu, "series": series, "bytes": len(text), "sent_bytes": len(packed)}


def measure(folder: Path, seconds: float) -> dict[str, Any]:
    told: dict[str, Any] = {}
    runs = [f"run-{number:02d}" for number in range(NUM_RUNS)]
    for name, names, num_ranks in (("nobody", [], 0), ("ranks", runs[:1], NUM_RANKS), ("runs", runs, 1)):
        with monitor(folder, folder / f"{name}.sqlite3", SETTINGS) as served:
            told[name] = idle_share(served, names, num_ranks, seconds)
    with monitor(folder, folder / "scrapes.sqlite3", SETTINGS) as served:
        told["metrics"] = scrapes(served)
    return told


def rows(told: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """Return each goal: what, the value, the largest allowed value, and the unit."""
    metrics = told["metrics"]
    return [
        (f"{NUM_RANKS:,} idle ranks of one run", 100 * told["ranks"]["share"], 100 * MAX_RANKS_SHARE, "% of a core"),
        (f"{NUM_RUNS} idle runs", 100 * told["runs"]["share"], 100 * MAX_RUNS_SHARE, "% of a core"),
        (
            f"/metrics, {NUM_RUNS} runs of {NUM_LAYERS} layers, gzip",
            metrics["sent_bytes"] / 1e6,
            MAX_SENT_BYTES / 1e6,
            "MB",
        ),
        (
            "its CPU time, median",
            1e3 * statistics.median(metrics["cpu_seconds"]),
            1e3 * MAX_SCRAPE_CPU_SECONDS,
            "ms",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor_load", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=MEASURED_SECONDS, help="time of each measurement of idle ranks"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    origin = provenance(0)
    with tempfile.TemporaryDirectory(prefix="koopmon-") as folder:
        told = measure(Path(folder), options.seconds)
    table = Table("what", "measured", "goal", title="load of the monitor")
    goals = []
    for what, value, most, unit in rows(told):
        table.add_row(what, f"{value:.3g} {unit}", f"{most:g} {unit}")
        goals.append({"what": what, "value": value, "goal": most, "unit": unit, "met": value <= most})
    campaign.console().print(table)
    document = {"provenance": origin, "load_average": os.getloadavg()[0], **told, "goals": goals}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(not all(goal["met"] for goal in goals))


if __name__ == "__main__":
    raise SystemExit(main())
