"""Trainings at the same time under one name: the first has it, the others a number behind it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from koopmon.agent import run_claims
from koopmon.agent.run_claims import claim

HOLD = """
import sys
from koopmon.agent.run_claims import claim
print(claim(sys.argv[1], sys.argv[2]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, str], tuple[subprocess.Popen[str], str]]]:
    """Return a function that starts a process with a claim; it returns the process and the name."""
    started: list[subprocess.Popen[str]] = []
    monkeypatch.setattr(run_claims, "_files", {})

    def start(directory: Path, run: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", HOLD, str(directory), run]
        started.append(subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True))
        assert started[-1].stdout is not None
        return started[-1], started[-1].stdout.readline().strip()

    yield start
    for each in started:
        each.kill()
        each.communicate()
    for file in run_claims._files.values():
        os.close(file)


@pytest.mark.process
def test_each_process_has_a_name_until_it_ends(
    tmp_path: Path,
    other: Callable[[Path, str], tuple[subprocess.Popen[str], str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    first, name = other(tmp_path, "team/job")
    assert name == "team/job"
    assert claim(str(tmp_path), "team/job") == "team/job.2"
    assert claim(str(tmp_path), "team/job") == "team/job.2", "a process has one name"
    assert caplog.messages[0] == (
        "koopmon: another training of run team/job goes on beside this one, which is run team/job.2"
    )
    assert other(tmp_path, "team/job")[1] == "team/job.3"
    assert other(tmp_path, "team/job2")[1] == "team/job2"
    first.kill()
    first.wait()
    assert other(tmp_path, "team/job")[1] == "team/job", "as a launch that follows a killed one"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["team,job.trainings", "team,job2.trainings"]


@pytest.mark.process
def test_a_forked_child_is_another_training(
    tmp_path: Path, other: Callable[[Path, str], tuple[subprocess.Popen[str], str]]
) -> None:
    assert claim(str(tmp_path), "job") == "job"
    child = os.fork()
    if child == 0:
        os._exit(0 if claim(str(tmp_path), "job") == "job.2" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert other(tmp_path, "job")[1] == "job.2", "the end of the child does not free the name"


@pytest.mark.parametrize("place", ["absent/directory", "file"])
def test_without_a_file_the_name_is_that_of_the_job(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    assert claim(str(tmp_path / place), "job") == "job"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "job.trainings").symlink_to(tmp_path / "target")
    assert claim(str(tmp_path), "job") == "job"
    assert not (tmp_path / "target").exists()
