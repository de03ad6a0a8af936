"""Campaigns continue after an interruption and recognise damaged results."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import campaign

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Square:
    number: int
    log: str

    @property
    def name(self) -> str:
        return f"square-{self.number}"


def square(case: Square) -> tuple[Mapping[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Record the call; raise for 13."""
    with Path(case.log).open("a") as log:
        log.write(f"{case.number}\n")
    if case.number == 13:
        raise ValueError("unlucky")
    return {"square": case.number**2}, {"upto": np.arange(case.number)}


@pytest.fixture
def cases(tmp_path: Path) -> list[Square]:
    return [Square(number, str(tmp_path / "log")) for number in (2, 3, 5)]


def go(cases: list[Square], folder: Path, text: io.StringIO | None = None) -> list[campaign.Kept[Square]]:
    console = Console(file=text or io.StringIO(), width=200)
    return campaign.run(cases, square, folder, workers=1, console=console)


@pytest.mark.process
def test_results_come_in_order_and_what_is_finished_is_not_done_again(cases: list[Square], tmp_path: Path) -> None:
    first = go(cases[:2], tmp_path / "work")
    again = go(list(reversed(cases)), tmp_path / "work")
    assert [kept.scalars["square"] for kept in again] == [25, 9, 4]
    assert again[2].series["upto"].tolist() == first[0].series["upto"].tolist() == [0, 1]
    assert sorted(Path(cases[0].log).read_text().split()) == ["2", "3", "5"]


@pytest.mark.process
def test_damaged_results_are_made_again_and_named(cases: list[Square], tmp_path: Path) -> None:
    go(cases, tmp_path / "work")
    files = sorted((tmp_path / "work").glob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:50])
    files[1].write_bytes(b"")
    text = io.StringIO()
    assert [kept.scalars["square"] for kept in go(cases, tmp_path / "work", text)] == [4, 9, 25]
    assert text.getvalue().count("is damaged") == 2
    assert files[0].name in text.getvalue()
    assert len(Path(cases[0].log).read_text().split()) == 5


@pytest.mark.process
def test_one_failure_is_named_and_the_others_are_kept(cases: list[Square], tmp_path: Path) -> None:
    unlucky = [Square(13, cases[0].log), *cases]
    with pytest.raises(RuntimeError, match="1 of 4 runs failed; the first: square-13: ValueError: unlucky"):
        go(unlucky, tmp_path / "work")
    assert len(list((tmp_path / "work").glob("*.npz"))) == 3


def test_no_workers_is_refused(cases: list[Square], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers = 0: must be at least 1"):
        campaign.run(cases, square, tmp_path, workers=0, console=Console(file=io.StringIO()))


def slow(case: Square) -> tuple[Mapping[str, Any], dict[str, np.ndarray[Any, Any]]]:
    time.sleep(0.3)
    return square(case)


@pytest.mark.process
def test_a_campaign_that_is_terminated_leaves_nothing_running_and_goes_on_later(tmp_path: Path) -> None:
    log, work = tmp_path / "log", tmp_path / "work"
    program = (
        "import sys; from pathlib import Path; from benchmarks import campaign; "
        "from tests.benchmarks.test_campaign import Square, slow; "
        "cases = [Square(n, sys.argv[1]) for n in range(200, 260)]; "
        "campaign.run(cases, slow, Path(sys.argv[2]), workers=1, console=campaign.console())"
    )
    command = [sys.executable, "-c", program, str(log), str(work)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60.0
    while not list(work.glob("*.npz")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    text, _ = process.communicate(timeout=60.0)
    assert process.returncode == 130
    said = re.search(r"(\d+) of 60 runs are kept; go on with --work", text)
    assert said
    assert 0 < int(said[1]) == len(list(work.glob("*.npz"))) < 60, "what was underway is finished"
    deadline = time.monotonic() + 10.0
    while _alive(process.pid):  # its resource tracker ends a moment later
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
