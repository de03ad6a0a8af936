"""`pytest` works in an install of `.[test]`, and skips tests of other packages with their names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plain_install import absent, brought

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.process, pytest.mark.slow]


def plain(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.plain_install", "-q", "-p", "no:cacheprovider", *words]
    without = {
        name: value for name, value in os.environ.items() if name != "REQUIRE_ALL"
    }  # the test itself is about skipping
    return subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True, timeout=280, check=False)


def test_every_test_is_collected_or_skipped() -> None:
    """Packages of an extra must be imported late, or after `pytest.importorskip`."""
    done = plain("--collect-only")
    assert done.returncode == 0, done.stdout[-6000:]
    assert "error" not in done.stdout.splitlines()[-1]
    assert "could not import 'scipy'" in done.stdout


def test_what_needs_no_extra_runs() -> None:
    done = plain("tests/risk", "tests/policy/test_decide.py", "tests/spectral", "tests/config/test_reading.py", "-rs")
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def test_a_plain_install_has_no_more_than_it_says() -> None:
    assert {"torch", "pytest", "hypothesis", "pyzmq", "typer"} <= brought()
    assert {"scipy", "httpx", "matplotlib", "transformers", "zensical"} <= absent()
    assert not absent() & {"torch", "numpy", "yaml", "zmq", "_pytest", "xdist"}
