"""Common parts of the tests of deploy/: the real option parser, and koopmon verbs as processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer.main

from koopmon.cli.app import make_app

HOUSE = Path(__file__).parents[2]
DEPLOY = HOUSE / "deploy"
KOOPMON = (sys.executable, "-m", "koopmon")
WAIT_SECONDS = 90.0

Starter = Callable[..., subprocess.Popen[bytes]]


def wait_until(condition: Callable[[], Any]) -> Any:
    """Return the first true value of `condition`; fail after the time limit."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition stayed false"
        time.sleep(0.05)
    return value


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """Parse `koopmon VERB OPTIONS...` with the real parser, which raises for an unknown option."""
    program, verb, *options = words
    assert Path(program).name == "koopmon", words
    group: Any = typer.main.get_command(make_app())
    parameters: dict[str, Any] = group.commands[verb].make_context(verb, list(options)).params
    return parameters


def beside_python(tool: str) -> str:
    """Find a checker that pip installs: beside this Python, else on the path."""
    found = shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        wanting = f"needs {tool}, which comes with koopmon[dev]"
        pytest.fail(wanting) if os.environ.get("REQUIRE_ALL") == "1" else pytest.skip(wanting)
    return found


def environment(**changes: str) -> dict[str, str]:
    """Return this environment without variables of koopmon or Slurm, with one thread and this checkout's koopmon."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KOOPMON_", "SLURM_"))}
    kept.pop("WORLD_SIZE", None)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HOUSE}:{HOUSE / 'plugins'}", **changes}


def koopmon(*words: str, **changes: str) -> str:
    """Run a verb to its end; return its standard output."""
    done = subprocess.run(
        [*KOOPMON, *words],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ready(process: subprocess.Popen[bytes], file: Path) -> dict[str, Any]:
    """Return the content of a monitor's ready file once it exists."""
    wait_until(lambda: file.exists() or process.poll() is not None)
    assert process.poll() is None, process.args
    told: dict[str, Any] = json.loads(file.read_text())
    return told


@contextmanager
def begun() -> Iterator[Starter]:
    """Yield a function that starts processes. They are stopped at the end, the last one first."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(words: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(list(words), env=env, **options))
        return started[-1]

    try:
        yield begin
    finally:
        for process in reversed(started):
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def start() -> Iterator[Starter]:
    """Start processes that end with the test."""
    with begun() as begin:
        yield begin
