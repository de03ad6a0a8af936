"""Markers: `needs` and missing packages skip or fail, and a test that starts a process must have the mark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

NEEDS = """
import pytest

@pytest.mark.needs({tool!r})
def test_it():
    pass
"""
STARTS = """
import multiprocessing
import subprocess
import pytest

def nothing():
    pass

@pytest.fixture(scope="module")
def started():
    subprocess.run(["true"], check=True)

def test_that_uses_a_fixture_which_starts_one(started): pass
def test_that_uses_the_same_fixture_later(started): pass
def test_that_starts_a_program(): subprocess.run(["true"], check=True)
def test_that_starts_a_missing_program():
    with pytest.raises(FileNotFoundError):
        subprocess.run(["no-such-program"], check=True)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_that_starts_python(method):
    process = multiprocessing.get_context(method).Process(target=nothing)
    process.start()
    process.join()
"""
STARTS_NONE = """
import os
import threading

def test_it():
    thread = threading.Thread(target=os.getpid)
    thread.start()
    thread.join()
"""
PACKAGE = """
import pytest
pytest.importorskip("no_such_package")
def test_it(): pass
"""
PACKAGE_IN_A_TEST = """
import pytest
def test_it():
    pytest.importorskip("no_such_package")
"""
INI = "[pytest]\nmarkers =\n    needs(tool)\n    process\n    distributed\n    slow\n"


def run(directory: Path, text: str, *, require_all: str = "0") -> str:
    """Return the output of pytest for a file of tests with our conftest."""
    (directory / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (directory / "test_it.py").write_text(text)
    (directory / "pytest.ini").write_text(INI)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(directory)],
        env={**os.environ, "REQUIRE_ALL": require_all},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("tool", "require_all", "outcome"),
    [
        ("no-such-tool", "", "1 skipped"),
        ("no-such-tool", "1", "1 error"),
        ("sh", "1", "1 passed"),
    ],
)
def test_needs_marker(tmp_path: Path, tool: str, require_all: str, outcome: str) -> None:
    said = run(tmp_path, NEEDS.format(tool=tool), require_all=require_all)
    assert outcome in said
    assert ("needs no-such-tool" in said) == (tool == "no-such-tool")


@pytest.mark.parametrize(
    ("text", "require_all", "outcome"),
    [
        (PACKAGE, "0", "1 skipped"),
        (PACKAGE, "1", "1 error"),
        (PACKAGE_IN_A_TEST, "0", "1 skipped"),
        (PACKAGE_IN_A_TEST, "1", "1 failed"),
    ],
)
def test_a_missing_package(tmp_path: Path, text: str, require_all: str, outcome: str) -> None:
    said = run(tmp_path, text, require_all=require_all)
    assert outcome in said
    assert "could not import 'no_such_package'" in said


def test_a_process_without_the_marker_is_an_error(tmp_path: Path) -> None:
    said = run(tmp_path, STARTS)
    assert "6 passed, 6 errors" in said
    assert "starts a process (subprocess.Popen true in the fixture started): mark it `@pytest.mark.process`" in said


@pytest.mark.parametrize("marker", ["process", "distributed"])
def test_a_process_with_a_marker_is_fine(tmp_path: Path, marker: str) -> None:
    assert "6 passed in" in run(tmp_path, f"{STARTS}\npytestmark = pytest.mark.{marker}\n")


def test_threads_are_no_processes(tmp_path: Path) -> None:
    assert "1 passed in" in run(tmp_path, STARTS_NONE)
