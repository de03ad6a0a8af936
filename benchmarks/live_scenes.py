"""Test bed of the live page: recorded runs, a monitor in its own process, simulated agents, a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koopmon.config import Config
from koopmon.history.plain_profile import PlainProfile
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.run_controller import RunController
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.wire.codec import decode_for_agent, encode
from koopmon.wire.headers import WireLimits
from koopmon.wire.messages import Applied, Hello, Shard, TrainingStep, Welcome
from koopmon.wire.sockets import ControlClient, DataSender
from koopmon.wire.transport import WireContext
from tests import factories

INCARNATION = "aaaaaaaa"
NUM_LAYERS, WIDTH, NUM_SAMPLES, SVD_RANK = 48, 64, 128, 32
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
WAIT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Served:
    """Addresses of a monitor; `url` is that of its pages."""

    endpoint: str
    url: str
    pid: int


def states(seed: int, scale: float = 0.3) -> Tensor:
    """Draw a residual stream of NUM_LAYERS transitions, (L + 1, N, D)."""
    generator = torch.Generator().manual_seed(seed)
    updates = torch.randn((NUM_LAYERS + 1, NUM_SAMPLES, WIDTH), generator=generator)
    updates[1:] *= scale
    return torch.cumsum(updates, dim=0)


def profiles(count: int) -> list[SpectralProfile]:
    return [profile_states(states(seed), svd_rank=SVD_RANK, kreiss="never") for seed in range(count)]


def hello(run: str) -> Hello:
    return factories.hello(run, INCARNATION, world_size=8, num_layers=NUM_LAYERS, width=WIDTH, hostname="node-1")


def record(path: Path, num_runs: int, num_snapshots: int, found: list[SpectralProfile]) -> None:
    """Write a history of runs like a monitor: profiles, observations and decisions."""
    store = HistoryWriter.open(path)
    for number in range(num_runs):
        said, at = hello(f"recorded-{number:02d}"), time.time() - num_snapshots
        store.record_hello(at, said)
        guard, where = RunController(Config(), said, Applied()), (said.run, said.incarnation)
        for step in range(1, num_snapshots + 1):
            profile = found[step % len(found)]
            training = TrainingStep(step=step, learning_rate=1e-3, loss=2.0, grad_norm=1.0)
            verdict = guard.assess(float(step), training, profile, step=step)
            store.record_profile(
                at + step, *where, step, num_shards=1, masked=False, seconds=0.1, profile=PlainProfile.of(profile)
            )
            store.record_observation(
                *(at + step, *where, training),
                non_finite=False,
                observation=verdict.observation,
                risk=verdict.risk.value,
                reason=verdict.risk.reason,
                components=verdict.risk.components,
            )
            if verdict.decision is not None and verdict.remarkable:
                told = {"phase": verdict.decision.phase, "reason": verdict.decision.reason}
                commands = verdict.commands
                risk = verdict.risk.value
                store.record_decision(at + step, *where, step, **told, risk=risk, commands=commands, outcome="pending")
        store.commit()
    store.close()


class Agent:
    """Simulated rank that sends the given snapshots and refuses commands."""

    def __init__(self, endpoint: str, run: str) -> None:
        self._context = WireContext()
        self._control = ControlClient(self._context, endpoint)
        self._run = run
        wait_until(lambda: self._control.send(encode(hello(run))), 0.01)
        frames = wait_until(self._control.recv, 0.005)
        welcome = decode_for_agent(frames, limits=WireLimits())
        if not isinstance(welcome, Welcome):
            raise TypeError(f"not welcomed: {welcome}")
        self._data = DataSender(self._context, welcome.data_endpoint, queue_length=64)

    def snapshot(self, step: int, held: Tensor) -> None:
        """Send the states (L + 1, N, D) of one step."""
        shard = Shard(
            run=self._run,
            incarnation=INCARNATION,
            process_rank=0,
            num_senders=1,
            training=TrainingStep(step=step, learning_rate=1e-3, loss=2.0),
            first_point=0,
            num_points=held.shape[0],
            num_samples=held.shape[1],
            width=held.shape[2],
            dtype="bfloat16",
        )
        frames = encode(shard, held)
        wait_until(lambda: self._data.send(frames) is None, 0.005)

    def heartbeat(self, step: int) -> None:
        beat = factories.heartbeat(step, self._run, INCARNATION)
        wait_until(lambda: self._control.send(encode(beat)), 0.01)
        while self._control.recv() is not None:
            pass

    def close(self) -> None:
        self._context.close()


@contextmanager
def monitor(folder: Path, store: Path, config: str = "") -> Iterator[Served]:
    """Start `koopmon monitor` on free ports; return when it is ready, and stop it by SIGTERM at the end."""
    ready, settings = folder / "ready.json", folder / "koopmon.toml"
    ready.unlink(missing_ok=True)
    settings.write_text(config, encoding="utf-8")
    places = {"--bind": "tcp://127.0.0.1:0", "--http": "127.0.0.1:0", "--device": "cpu", "--store": str(store)}
    places |= {"--ready-file": str(ready), "--config": str(settings)}
    words = [word for pair in places.items() for word in pair]
    with (folder / "monitor.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "koopmon", "monitor", *words], stdout=log, stderr=log)
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, 0.002)
        told = json.loads(ready.read_text(encoding="utf-8"))
        yield Served(told["endpoint"], f"{told['scheme']}://{told['http']}", process.pid)
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a headless browser of this machine."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        try:
            yield browser
        finally:
            browser.close()


def wait_until(condition: Callable[[], Any], pause_seconds: float = 0.05) -> Any:
    """Return the first true value of `condition`. Raises TimeoutError after the time limit."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition is still false after {WAIT_SECONDS:.0f} s")
        time.sleep(pause_seconds)
    return found
