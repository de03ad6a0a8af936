"""What the tests of deploy/ share: the real option parser, and koopmon's verbs as processes."""

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

from koopmon.cli import app

HOUSE = Path(__file__).parents[2]
DEPLOY = HOUSE / "deploy"
KOOPMON = (sys.executable, "-m", "koopmon")
WAIT_SECONDS = 90.0

Starter = Callable[..., subprocess.Popen[bytes]]


def wait_until(condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`; fails when it does not come."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """What the real parser makes of `koopmon VERB OPTIONS...`; it raises for an option that the verb does not have."""
    program, verb, *options = words
    assert Path(program).name == "koopmon", words
    group: Any = typer.main.get_command(app)
    parameters: dict[str, Any] = group.commands[verb].make_context(verb, list(options)).params
    return parameters


def beside_python(tool: str) -> str:
    """A checker that pip installs: beside this Python, else on the path."""
    found = shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        wanting = f"needs {tool}, which comes with koopmon[dev]"
        pytest.fail(wanting) if os.environ.get("REQUIRE_ALL") == "1" else pytest.skip(wanting)
    return found


def environment(**changes: str) -> dict[str, str]:
    """This environment with nothing of koopmon's or Slurm's in it, one thread, and this tree's koopmon."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KOOPMON_", "SLURM_"))}
    kept.pop("WORLD_SIZE", None)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HOUSE}:{HOUSE / 'plugins'}", **changes}


def koopmon(*words: str, **changes: str) -> str:
    """Run a verb to its end; gives its standard output."""
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
    """What a monitor's ready file says, once it is there."""
    wait_until(lambda: file.exists() or process.poll() is not None)
    assert process.poll() is None, process.args
    told: dict[str, Any] = json.loads(file.read_text())
    return told


@contextmanager
def begun() -> Iterator[Starter]:
    """A function that starts processes, which are ended, the last one first, when this is left."""
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
    """Starts processes that end with the test."""
    with begun() as begin:
        yield begin
