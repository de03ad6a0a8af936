"""Operations without cost: no wait for the device, no memory, no thread, no worker, no torch."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import DataLoader, Dataset

from benchmarks.endurance import endure
from koopmon.agent.autoload import DIRECTORY
from koopmon.agent.control.kss import injection
from koopmon.agent.stats import AsyncScalar
from koopmon.wire.messages import KssSettings
from tests.agent.models import batch, build, checkpointed, loss_of, train_step
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.stacks import NoSynchronisation

Attach = Callable[..., Any]
WAITS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
"""Methods that make the host wait for tensors on a GPU."""


class WaitedError(AssertionError):
    """Raised when a tensor's value is read."""


@contextmanager
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every read of a tensor's value in this thread raise. Inside a hook, the circuit breaker then trips."""
    here = threading.get_ident()
    solve = injection.kss_gradient_op

    def solver(*args: Any) -> Any:
        # Decompositions check their own success and therefore wait inside the library.
        with _disable_current_modes():
            return solve(*args)

    with monkeypatch.context() as patches, NoSynchronisation():
        patches.setattr(injection, "kss_gradient_op", solver)
        # A scalar on the host is read at once; one on a device is copied and read after it has arrived.
        patches.setattr(AsyncScalar, "put", lambda box, value: None)
        for name in WAITS:
            original = getattr(torch.Tensor, name)

            def asked(tensor: Any, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
                if threading.get_ident() == here:
                    raise WaitedError(name)
                return original(tensor, *args, **kwargs)

            patches.setattr(torch.Tensor, name, asked)
        yield


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kss", [False, True])
@pytest.mark.parametrize("run", [None, checkpointed])
def test_no_hook_ever_waits_for_the_device(
    run: Any, kss: bool, masked: bool, monitor: ScriptedMonitor, agents: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(run=run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # torch's own Adam reads its step counter
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 2}})
    monitor.wait(lambda: agent.status()["connected"])
    train_step(model, optimizer, 0)  # the first forward verifies the chain, and may wait
    if kss:
        command = monitor.command("set_kss", kss=KssSettings(alpha=0.5, svd_rank=4, num_samples=16))
        monitor.wait(lambda: train_step(model, optimizer, 1) and monitor.acked(command))
    monitor.command("set_lr_scale", lr_scale=0.5, ramp_steps=4)
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[:, 5:] = 0
    sent = agent.status()["sent"]
    for step in range(8):
        tokens = batch(step)
        with nobody_waits(monkeypatch):
            loss = loss_of(model, tokens, attention_mask=mask) if masked else loss_of(model, tokens)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            agent.log(grad_norm=1.0)
        time.sleep(0.02)
    status = agent.status()
    assert (status["enabled"], status["errors"], status["reason"]) == (True, 0, "")
    monitor.wait(lambda: agent.status()["sent"] > sent, 5.0)


def test_a_hook_that_would_wait_is_caught(
    monitor: ScriptedMonitor, agents: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    train_step(model, optimizer, 0)
    original = type(agent._runtime.adapter).block_output

    def waiting(adapter: Any, module: nn.Module, output: Any) -> Any:
        state = original(adapter, module, output)
        assert state is not None
        assert float(state.sum()) < 1e30
        return state

    monkeypatch.setattr(type(agent._runtime.adapter), "block_output", waiting)
    with nobody_waits(monkeypatch):
        loss_of(model, batch(1)).backward()
    assert "WaitedError" in agent.status()["reason"]


@pytest.mark.slow
def test_memory_and_buffers_do_not_grow(monitor: ScriptedMonitor) -> None:
    """A slice; `python -m benchmarks.endurance` has the whole length."""
    found = endure(600, monitor)
    assert found["in_force"] == [0.1, 0.5]
    assert found["sent"] > 100
    assert found["errors"] == 0
    assert found["tensors"][-1] <= found["tensors"][0]
    assert found["objects"][-1] <= 1.01 * found["objects"][0]
    assert found["rss_bytes"][-1] - found["rss_bytes"][0] < 8 << 20


THREADS = """
import os, sys, time, torch, koopmon
from tests.agent.models import build, train_step
torch.set_num_threads(1)
model = build()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
train_step(model, optimizer, 0)
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    agent = koopmon.attach(model, optimizer, endpoint=sys.argv[1], config={"cadence": {"dense_every": 1}})
    while not agent.status()["connected"]:
        time.sleep(0.01)
    during = len(os.listdir("/proc/self/task"))
    for step in range(5):
        train_step(model, optimizer, step)
    agent.close()
    deadline = time.monotonic() + 10.0
    while (after := len(os.listdir("/proc/self/task"))) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    print(before < during, after - before)
"""


@pytest.mark.process
def test_no_thread_is_left_after_close_not_even_the_sockets_own(
    python: Callable[..., subprocess.CompletedProcess[str]], monitor: ScriptedMonitor
) -> None:
    assert python(THREADS, monitor.endpoint).stdout.split() == ["True", "0"] * 3


class Workers(Dataset[tuple[int, int, bool]]):
    """Each item has the state of its worker: koopmon's threads, and whether it imported the agent."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[int, int, bool]:
        ours = sum(thread.name.startswith("koopmon") for thread in threading.enumerate())
        return index, ours, threading.current_thread() is threading.main_thread()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_see_nothing_of_it(method: str, monitor: ScriptedMonitor, agents: Attach) -> None:
    def items() -> list[list[Any]]:
        torch.manual_seed(5)
        loader = DataLoader(Workers(), batch_size=3, num_workers=2, shuffle=True, multiprocessing_context=method)
        return [[part.tolist() for part in each] for each in loader]

    without = items()
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    train_step(model, optimizer, 0)
    assert items() == without
    assert {ours for _, threads, _ in without for ours in threads} == {0}
    assert agent.enabled


SPAWNED = """
import multiprocessing, sys, torch
from torch.utils.data import DataLoader
from tests.agent.models import build, train_step

class Modules(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return int("koopmon.agent.attach" in sys.modules)

if __name__ == "__main__":
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    print("koopmon.agent.attach" in sys.modules)
    for method in ("spawn", "fork"):
        loader = DataLoader(Modules(), num_workers=1, multiprocessing_context=method)
        print(method, [int(each) for each in loader])
    train_step(model, optimizer, 0)
"""


@pytest.mark.process
def test_a_spawned_worker_of_a_guarded_job_does_not_even_load_the_agent(
    tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]], monitor: ScriptedMonitor
) -> None:
    script = tmp_path / "job.py"
    script.write_text(SPAWNED)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=root,
        env={"PYTHONPATH": f"{DIRECTORY}:{root}", "KOOPMON_ENDPOINT": monitor.endpoint, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True", "spawn [0, 0, 0, 0]", "fork [1, 1, 1, 1]"]


@pytest.mark.process
def test_the_launcher_never_imports_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "koopmon", "run", "--store", str(tmp_path / "s"), "--", "true"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "koopmon.cli.supervise" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "numpy")}
