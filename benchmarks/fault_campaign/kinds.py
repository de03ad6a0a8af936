"""Faults around a real monitor: one function for each kind, which returns at the end of the fault.

Each function takes the stage and returns a short description.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import torch

from benchmarks.fault_campaign.checks import MADE_UP
from benchmarks.fault_campaign.machine import wait
from benchmarks.fault_campaign.stages import Watched
from benchmarks.flooders import Flooders
from benchmarks.fuzz.composition import STRANGE, WHOLE, legal_hello, made
from koopmon.wire.codec import decode_for_agent, encode
from koopmon.wire.headers import WireLimits
from koopmon.wire.messages import Ack, Command, Goodbye, Heartbeat, Shard, Welcome
from koopmon.wire.sockets import ControlClient, DataSender, Poller
from koopmon.wire.transport import WireContext


def monitor_killed(stage: Watched) -> str:
    """SIGKILL; another monitor opens the store later."""
    stage.monitor.kill()
    seconds = stage.pause(0.0, 3.0)
    stage.monitor.start(stage.bind)
    stage.monitor.prepare(stage.bind)
    return f"away for {seconds:.1f} s"


def monitor_stopped(stage: Watched) -> str:
    """SIGSTOP, SIGCONT."""
    os.kill(stage.monitor.pid, signal.SIGSTOP)
    try:
        seconds = stage.pause(0.2, 6.0)
    finally:
        os.kill(stage.monitor.pid, signal.SIGCONT)
    return f"stopped for {seconds:.1f} s"


def agents_flood(stage: Watched) -> str:
    """Other agents flood the monitor on both channels and are killed."""
    with Flooders() as flooders:
        seconds = stage.rng.uniform(0.1, 2.0)
        sent = flooders.agents(stage.bind, seconds)
    return f"{sent} messages in {seconds:.1f} s"


def monitor_floods(stage: Watched) -> str:
    """SIGKILL; another program floods the jobs from the endpoint and is killed; another monitor opens the store."""
    stage.monitor.kill()
    with Flooders() as flooders:
        sent = flooders.monitor(stage.bind, stage.rng.uniform(0.1, 2.0))
    stage.monitor.start(stage.bind)
    stage.monitor.prepare(stage.bind)
    return f"{sent} messages"


def monitor_moved(stage: Watched) -> str:
    """Restart with another data port; half of the times first with another control port, which no agent uses."""
    stage.monitor.terminate()
    words = "another data port"
    if stage.rng.random() < 0.5:
        stage.monitor.start("tcp://127.0.0.1:0")
        seconds = stage.pause(0.5, 2.0)
        stage.monitor.terminate()
        words = f"another control port for {seconds:.1f} s, then another data port"
    stage.monitor.start(stage.bind)
    stage.monitor.prepare(stage.bind)
    return words


def partition(stage: Watched) -> str:
    """Cut the link in both directions."""
    assert stage.link is not None
    stage.link.cut(down=True)
    try:
        seconds = stage.pause(16.0, 20.0) if stage.rng.random() < 0.1 else stage.pause(0.3, 6.0)
    finally:
        stage.link.cut(down=False)
    return f"cut for {seconds:.1f} s"


def slow_link(stage: Watched) -> str:
    """Limit the rate of the link."""
    assert stage.link is not None
    kilobits = stage.rng.choice([32, 64, 128, 256])
    stage.link.slow(kilobits)
    try:
        seconds = stage.pause(1.0, 4.0)
    finally:
        stage.link.slow(None)
    return f"{kilobits} kbit/s for {seconds:.1f} s"


def disk_full(stage: Watched) -> str:
    """Fill the file system of the store."""
    filler = stage.place / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    seconds = stage.pause(0.5, 4.0)
    filler.unlink()
    return f"full for {seconds:.1f} s"


def disk_read_only(stage: Watched) -> str:
    """Make the kernel refuse every write of the monitor to a file, by a limit of 0 on file sizes, set from outside."""
    _, most = resource.prlimit(stage.monitor.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(stage.monitor.pid, resource.RLIMIT_FSIZE, (0, most))
    try:
        seconds = stage.pause(0.5, 4.0)
    finally:
        resource.prlimit(stage.monitor.pid, resource.RLIMIT_FSIZE, (most, most))
    return f"no write for {seconds:.1f} s"


def store_corrupted(stage: Watched) -> str:
    """Write garbage into the store, under a running monitor or between two; then move the file away, as an operator
    would.
    """
    store = stage.monitor.store
    live = stage.rng.random() < 0.5
    if not live:
        stage.monitor.kill()
    where = _spoil(stage, store)
    if live:
        stage.pause(0.5, 2.0)
        words = f"{where} under a running monitor, which {'goes on' if stage.monitor.alive else 'ends'}"
        stage.monitor.kill()
    else:
        served = stage.monitor.start(stage.bind, serve=False)
        stage.monitor.prepare(stage.bind)
        stage.pause(0.2, 1.0)
        stage.monitor.kill()
        words = f"{where} between two monitors, the next one {'serves' if served else 'says so and ends'}"
    aside = stage.place / f"spoiled-{time.monotonic_ns()}"
    aside.mkdir()
    for path in list(stage.place.glob(f"{store.name}*")):
        shutil.move(path, aside)
    stage.monitor.said.clear()  # the decisions until here were in the file that is gone
    stage.monitor.start(stage.bind)
    stage.monitor.prepare(stage.bind)
    return words


def _spoil(stage: Watched, store: Path) -> str:
    how = stage.rng.choice(["header", "pages", "truncated", "log"])
    path = store.with_name(f"{store.name}-wal") if how == "log" else store
    if not path.exists():
        path, how = store, "pages"
    size = path.stat().st_size
    with path.open("r+b") as file:
        if how == "truncated":
            file.truncate(size // 2)
        for _ in range({"header": 1, "truncated": 0}.get(how, 16)):
            file.seek(0 if how == "header" else stage.rng.randrange(max(1, size - 4096)))
            file.write(stage.rng.randbytes(512))
    return how


def clock_jump(stage: Watched) -> str:
    """Let the wall clock of the monitor and of all ranks jump, until the next jump."""
    assert stage.clock is not None
    seconds = stage.rng.choice([-1, 1]) * stage.rng.choice([10.0, 3600.0, 86400.0, 31536000.0])
    partial = stage.clock.with_suffix(".partial")
    partial.write_text(str(seconds))
    partial.replace(stage.clock)
    return f"to {seconds:+.0f} s"


def rank_hung(stage: Watched) -> str:
    """SIGSTOP to one rank, SIGCONT; the other rank waits for it."""
    job = stage.jobs[0]
    rank = stage.rng.randrange(job.world)
    pid = job.pid(rank)
    os.kill(pid, signal.SIGSTOP)
    try:
        seconds = stage.pause(0.2, 4.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    return f"rank {rank} for {seconds:.1f} s"


def rank_killed(stage: Watched) -> str:
    """SIGKILL to one rank; torchrun restarts both from the checkpoint."""
    job = stage.jobs[0]
    stage.await_command(job.run)
    before = job.stretches()
    rank = stage.rng.randrange(job.world)
    os.kill(job.pid(rank), signal.SIGKILL)
    wait(lambda: job.stretches() != before and job.last() is not None, f"a restart of {job.run}")
    return f"rank {rank}"


def resumed(stage: Watched) -> str:
    """Kill the whole job and restart it from its checkpoint, with one rank or with two."""
    job = stage.jobs[0]
    stage.await_command(job.run)
    before = job.stretches()
    job.kill()
    old, job.world = job.world, stage.rng.choice([1, 2])
    job.launch()
    wait(lambda: job.stretches() != before and job.last() is not None, f"a restart of {job.run}")
    return f"{old} ranks, then {job.world}"


def extreme_numbers(stage: Watched) -> str:
    """An agent of another run sends legal messages with extreme numbers."""
    choose = stage.rng.choice
    name = {"run": f"{MADE_UP}{stage.rng.randrange(1 << 30)}", "incarnation": "e" * 8, "process_rank": 0}
    said = 0
    with WireContext() as context:
        control = ControlClient(context, stage.bind)
        poller, data = Poller(control), None
        wait(lambda: control.send(encode(legal_hello(**name, world_size=3, num_senders=3))), "the monitor", 30.0)
        until = time.monotonic() + stage.rng.uniform(1.0, 3.0)
        while time.monotonic() < until:
            while (frames := control.recv()) is not None:
                message = decode_for_agent(frames, limits=WireLimits())
                if isinstance(message, Welcome) and data is None:
                    data = DataSender(context, message.data_endpoint)
                if isinstance(message, Command):
                    about = {"run": name["run"], "incarnation": name["incarnation"], "command_id": message.id}
                    said += control.send(encode(made(Ack, choose, **about)))
            said += control.send(encode(made(Heartbeat, choose, **name, dropped={"not_finite": choose(WHOLE)})))
            if data is not None:
                paired = choose((False, True))
                shape = {"num_points": 3 + paired, "num_samples": 16, "width": 4, "dtype": "float32", "first_point": 0}
                place = {"process_rank": choose((0, 1, 2)), "num_senders": 3, "last_stage": True, "paired": paired}
                header = made(
                    Shard, choose, **{**name, **shape, **place}, observables={"a": [choose((0.0, 1e308))] * 2}
                )
                states = torch.randn((3 + paired, 16, 4)) * choose((1.0, 1e30, *STRANGE))
                said += data.send(encode(header, states)) is None
            poller.wait(0.02)
        control.send(encode(made(Goodbye, choose, **name)))
    return f"{said} messages"


def poisoned(stage: Watched) -> str:
    """NaN or infinity in the activations of one step, on all ranks."""
    value = stage.rng.choice(["nan", "inf"])
    lines = [(job, job.last()) for job in stage.jobs]
    steps = {job: line.step + 40 for job, line in lines if line is not None}
    for job, step in steps.items():
        job.order(do="poison", step=step, value=value)
    for job, step in steps.items():
        wait(lambda job=job, step=step: (now := job.last()) and now.step > step, f"step {step}")  # type: ignore[misc]
    return value
