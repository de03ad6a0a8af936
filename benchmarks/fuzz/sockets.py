"""Target sockets: a real monitor with attackers at all of its ports, and one valid agent that must be served."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fuzz.strangers import MISCONDUCT, Ports
from koopmon.wire.codec import decode_for_agent, encode
from koopmon.wire.headers import WireLimits
from koopmon.wire.messages import Applied, Heartbeat, HeartbeatReply, Hello, Shard, TrainingStep, Welcome
from koopmon.wire.sockets import ControlClient, DataSender, Poller
from koopmon.wire.transport import WireContext
from tests.factories import hello

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
CONFIG = """
[monitor]
max_message_bytes = 1_048_576
max_pending_bytes = 16_777_216
max_layers = 64
max_http_connections = 64
"""
READY_SECONDS = 180.0
PATIENCE_SECONDS = 60.0
WARM_SHARE, WARM_SECONDS = 0.2, 60.0
NAME: dict[str, Any] = {"run": "honest", "incarnation": "cccccccc"}


class HonestAgent:
    """One valid rank. `served` counts the replies to its heartbeats."""

    def __init__(self, endpoint: str) -> None:
        self._context = WireContext()
        self._control = ControlClient(self._context, endpoint)
        self._poller = Poller(self._control)
        self._data: DataSender | None = None
        self._connections = 0
        self._step = 0
        self.served = 0

    def turn(self) -> None:
        """Send a heartbeat and a snapshot; raises TimeoutError without a reply."""
        if self._control.connections != self._connections or self._data is None:
            self._connections = self._control.connections
            welcome = self._ask(hello(**NAME, num_layers=3, width=12, acts=False, step=self._step), Welcome)
            self._data = self._data or DataSender(self._context, welcome.data_endpoint)
        self._step += 1
        training = TrainingStep(step=self._step, loss=2.0)
        self._ask(Heartbeat(**NAME, process_rank=0, training=training, applied=Applied()), HeartbeatReply)
        self.served += 1
        states = torch.cumsum(torch.randn((4, 96, 12)), dim=0).bfloat16()
        shard = Shard(
            **NAME,
            process_rank=0,
            num_senders=1,
            training=training,
            first_point=0,
            num_points=4,
            num_samples=96,
            width=12,
            dtype="bfloat16",
        )
        self._data.send(encode(shard, states))

    def close(self) -> None:
        self._context.close()

    def _ask(self, message: Hello | Heartbeat, kind: type[Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_SECONDS
        sent = False
        while time.monotonic() < deadline:
            sent = sent or self._control.send(encode(message))
            while (frames := self._control.recv()) is not None:
                if isinstance(answer := decode_for_agent(frames, limits=WireLimits()), kind):
                    return answer
            self._poller.wait(0.2)
        raise TimeoutError(f"no {kind.__name__} within {PATIENCE_SECONDS:.0f} s")


def campaign(seconds: float, seed: int) -> dict[str, Any]:
    """Attack for the given time; return the results as plain values."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="koopmon-fuzz-") as name:
        folder = Path(name)
        process, told = _start(folder)
        ports = Ports(_address(told["endpoint"]), _address(told["data_endpoint"]), _address(told["http"]), chance)
        agent = HonestAgent(told["endpoint"])
        began, acts, crashes, why = time.monotonic(), Counter[str](), 0, ""
        warm: int | None = None
        peak = 0
        try:
            while (now := time.monotonic()) < began + seconds:
                for _ in range(20):
                    act = chance.choice(MISCONDUCT)
                    acts[act.__name__] += 1
                    try:
                        act(ports)
                    except ConnectionError:
                        acts["cut while speaking"] += 1
                agent.turn()
                resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE_BYTES
                if now >= began + min(WARM_SHARE * seconds, WARM_SECONDS):
                    warm = warm or resident
                    peak = max(peak, resident)
            ports.release()
            rejected = _rejected(told["http"])
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE_BYTES
        except (OSError, TimeoutError) as error:
            crashes, why, rejected, resident = 1, repr(error), {}, warm or 0
        finally:
            ports.release()
            agent.close()
            status = _end(process)
        count = sum(acts.values())
        taken = time.monotonic() - began
        if status or crashes:
            print(why, (folder / "log").read_text(errors="replace")[-4000:], file=sys.stderr)
        return {
            "executions": count,
            "seconds": round(taken, 1),
            "executions_per_second": round(count / taken, 1),
            "corpus": len(MISCONDUCT),
            "new_corpus_entries": 0,
            "growth_bytes": resident - (warm or resident),
            "peak_growth_bytes": max(0, peak - (warm or peak)),
            "crashes": crashes or int(status != 0),
            "outcomes": dict(acts.most_common()),
            "rejected": rejected,
            "served_heartbeats": agent.served,
            "log_bytes": (folder / "log").stat().st_size,
        }


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    config, told = folder / "config.toml", folder / "ready.json"
    config.write_text(CONFIG)
    places = ["--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--store", str(folder / "history.sqlite3")]
    command = [sys.executable, "-m", "koopmon", "monitor", *places, "--device", "cpu", "--ready-file", str(told)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--config", str(config)], stdout=log, stderr=log)
    deadline = time.monotonic() + READY_SECONDS
    while not told.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the monitor did not come up: {(folder / 'log').read_text()}")
        time.sleep(0.1)
    found: dict[str, Any] = json.loads(told.read_text())
    return process, found


def _end(process: subprocess.Popen[bytes]) -> int:
    """Return its exit status; it must exit on request."""
    process.terminate()
    try:
        return process.wait(90.0)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait() or 1


def _rejected(http: str) -> dict[str, int]:
    """Return the monitor's number of rejected messages, by reason."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=30.0) as page:
        text = page.read().decode()
    return {
        sample.labels["reason"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        if family.name == "koopmon_messages_rejected"
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def _address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)
