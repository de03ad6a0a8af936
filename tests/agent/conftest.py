"""Common parts of the tests of the agent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.agent.scripted_monitor import ScriptedMonitor

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in ("KOOPMON_ENDPOINT", "KOOPMON_RUN", "KOOPMON_CONFIG", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KOOPMON_KEYS", "/no/keys/here")


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[ScriptedMonitor]:
    with ScriptedMonitor(tmp_path / "m") as scripted:
        yield scripted


@pytest.fixture
def agents() -> Iterator[Callable[..., Any]]:
    """`koopmon.attach` that closes its agents at the end of the test."""
    import koopmon

    made = []

    def attach(*args: Any, **kwargs: Any) -> Any:
        made.append(koopmon.attach(*args, **kwargs))
        return made[-1]

    yield attach
    for agent in made:
        agent.close()


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program text in another interpreter with warnings as errors; require exit status 0."""

    def run(text: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", text, *map(str, args)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


class Ranks:
    """Several ranks of one program without a launcher; `wait` requires that each ends normally."""

    def __init__(self, program: Path, args: tuple[object, ...], size: int, environment: dict[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(program), *map(str, args)],
                cwd=ROOT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "WORLD_SIZE": str(size),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    **environment,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def wait(self, timeout: float = 120.0) -> list[tuple[str, str]]:
        """Return (stdout, stderr) of each rank."""
        try:
            outputs = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            self.kill()
        for process, (_, errors) in zip(self.processes, outputs, strict=True):
            assert process.returncode == 0, errors
        return outputs

    def kill(self) -> None:
        """End running ranks and close every pipe."""
        for process in self.processes:
            process.kill()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            process.wait()


@pytest.fixture
def ranks() -> Iterator[Callable[..., Ranks]]:
    """Start `size` ranks of a program in tests/agent/programs."""
    started: list[Ranks] = []

    def start(program: str, *args: object, size: int = 2, **environment: str) -> Ranks:
        started.append(Ranks(ROOT / "tests" / "agent" / "programs" / program, args, size, environment))
        return started[-1]

    yield start
    for each in started:
        each.kill()
