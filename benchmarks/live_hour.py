"""One simulated hour of many runs: the monitor's service, store and pages, with simulated clocks.

Sockets and the arithmetic of the engine are left out, because an hour of them takes an hour. The profiles are real and
were computed before.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, cast

import httpx
from prometheus_client import CollectorRegistry

from benchmarks.live_scenes import NUM_LAYERS, hello, profiles
from koopmon.config import from_mapping
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.engine import Engine, Result
from koopmon.monitor.failures import Failures
from koopmon.monitor.http import live_state as boards
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.http.server import WebServer
from koopmon.monitor.rejection_log import RejectionLog
from koopmon.monitor.service import Outputs, Service
from koopmon.telemetry.metrics import Metrics
from koopmon.wire.messages import Applied, Heartbeat, TrainingStep

HOUR_SECONDS = 3600.0
HEARTBEAT_SECONDS, SNAPSHOT_SECONDS, SCRAPE_SECONDS, COUNT_SECONDS = 10.0, 60.0, 60.0, 300.0
NUM_PROFILES = 8


class _Snapshot:
    """Result of the engine for a snapshot, without the states."""

    num_shards, masked, num_samples = 1, False, 128

    def __init__(self, run: str, step: int) -> None:
        self.run, self.incarnation, self.step = run, "aaaaaaaa", step
        self.training = TrainingStep(step=step, learning_rate=1e-3, loss=2.0 + 0.1 * (step % 7), grad_norm=1.0)
        self.observables: dict[str, list[float | None]] = {}


class _Engine:
    """Engine without work."""

    queue_length = 0

    def submit(self, *_: Any, **__: Any) -> list[str]:
        raise AssertionError("no shard is sent")


def simulate(num_runs: int) -> dict[str, Any]:
    """Measure resident bytes and series during the hour, after everything bounded is full."""
    found, clock = profiles(NUM_PROFILES), [0.0]
    config = from_mapping({"policy": {"dry_run": True}})
    registry = CollectorRegistry()
    metrics = Metrics(registry, {"version": "0"})
    live_state = LiveState(clock=lambda: clock[0], wall=lambda: 1.7e9 + clock[0])
    counts: dict[str, list[float]] = {"seconds": [], "rss_bytes": [], "series": []}
    with tempfile.TemporaryDirectory(prefix="koopmon-") as folder:
        store = HistoryWriter.open(Path(folder) / "history.sqlite3", config.store, clock=lambda: clock[0])
        web = WebServer("127.0.0.1:0", registry, {}, live_state=live_state)
        service = Service(
            config=config,
            failures=Failures(metrics, lambda: clock[0]),
            outputs=Outputs(history=store, metrics=metrics, live_state=live_state),
            engine=cast(Engine, _Engine()),
            rejection_log=RejectionLog(metrics, lambda: clock[0]),
            send=lambda peer, message: True,
            data_endpoint="ipc:///nowhere",
            clock=lambda: clock[0],
            wall=lambda: 1.7e9 + clock[0],
        )
        runs = [f"run-{number:02d}" for number in range(num_runs)]
        for run in runs:
            service.on_control(run.encode(), hello(run))
        # Each request has a new connection, because the server ends long ones.
        once = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=f"http://{web.address}", timeout=60.0, limits=once) as client:
            step = 0

            def snapshots() -> None:
                nonlocal step
                step += 1
                for number, run in enumerate(runs):
                    profile = found[(step + number) % NUM_PROFILES]
                    service.on_result(Result(cast(Any, _Snapshot(run, step)), profile, 0.1))

            _fill(live_state, runs, snapshots)
            while clock[0] <= HOUR_SECONDS:
                at = clock[0]
                for run in runs:
                    beat = Heartbeat(
                        run=run,
                        incarnation="aaaaaaaa",
                        process_rank=0,
                        training=TrainingStep(step=step),
                        applied=Applied(),
                        sent=step,
                    )
                    service.on_control(run.encode(), beat)
                if at % SNAPSHOT_SECONDS == 0:
                    snapshots()
                    client.get(f"/runs/{runs[step % num_runs]}").raise_for_status()
                    client.get("/").raise_for_status()
                if at % SCRAPE_SECONDS == 0 or at % COUNT_SECONDS == 0:
                    text = client.get("/metrics").text
                if at % COUNT_SECONDS == 0:
                    counts["seconds"].append(at)
                    counts["rss_bytes"].append(_resident())
                    counts["series"].append(sum(not line.startswith("#") for line in text.splitlines()))
                service.tick()
                clock[0] += HEARTBEAT_SECONDS
        web.close()
        store.close()
    return {"num_runs": num_runs, "num_layers": NUM_LAYERS, "snapshots": step * num_runs, **counts}


def _fill(live_state: LiveState, runs: list[str], snapshots: Any) -> None:
    """Fill the records of a run up to their bounds, so that the measurement starts there."""
    snapshots()
    for run in runs:
        view = live_state.view(run)
        assert view is not None
        point, column = view.points[0], view.columns[0]
        copies = [type(point)(**{name: getattr(point, name) for name in point.__slots__} | {"step": -back})
                  for back in range(boards.MAX_POINTS, 0, -1)]  # fmt: skip
        columns = [type(column)(-back, {name: each[:] for name, each in column.values.items()})
                   for back in range(boards.MAX_COLUMNS, 0, -1)]  # fmt: skip
        live_state.backfill(view, points=copies, columns=columns)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
