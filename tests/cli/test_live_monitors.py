"""Announcements of running monitors: seen while their lock is held, ignored after a kill, never in the way of a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from koopmon.cli.live_monitors import STALE_SECONDS, announce, live_monitors

PAGE = "http://127.0.0.1:1/"
ANNOUNCE = """
import pathlib, sys, time
from koopmon.cli.live_monitors import announce
held = announce(sys.argv[1], "http://127.0.0.1:1/", pathlib.Path("h.sqlite3"))
print("on", flush=True)
time.sleep(60)
"""


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "koopmon" / "live"


def test_a_monitor_is_listed_until_it_ends(live: Path, tmp_path: Path) -> None:
    assert live_monitors() == []
    announcement = announce("team/one", PAGE, tmp_path / "h.sqlite3")
    assert announcement is not None
    (found,) = live_monitors()
    assert (found.run, found.page, found.store, found.pid) == (
        "team/one",
        PAGE,
        str(tmp_path / "h.sqlite3"),
        os.getpid(),
    )
    announcement.close()
    announcement.close()
    assert live_monitors() == []
    assert list(live.iterdir()) == []


@pytest.mark.process
def test_a_launcher_that_was_killed_is_ignored_and_its_file_goes_later(live: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-P", "-c", ANNOUNCE, "gone"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        assert [each.run for each in live_monitors()] == ["gone"]
        process.send_signal(signal.SIGKILL)
    assert live_monitors() == []
    (left,) = live.iterdir()
    old = time.time() - 2 * STALE_SECONDS
    os.utime(left, (old, old))
    announcement = announce("next", PAGE, tmp_path / "h.sqlite3")
    assert announcement is not None
    assert [each.run for each in live_monitors()] == ["next"]
    assert not left.exists()
    announcement.close()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"run": "x"}', '{"run": 1, "page": "", "store": "", "pid": 1, "started": 1}', "\x00"]
)
def test_a_file_that_is_no_announcement_is_left_out(live: Path, tmp_path: Path, text: str) -> None:
    announcement = announce("mine", PAGE, tmp_path / "h.sqlite3")
    assert announcement is not None
    (path,) = live.iterdir()
    path.write_text(text)
    assert live_monitors() == []
    announcement.close()


def test_a_pipe_among_the_announcements_is_left_out(live: Path, tmp_path: Path) -> None:
    announcement = announce("mine", PAGE, tmp_path / "h.sqlite3")
    assert announcement is not None
    os.mkfifo(live / "a.json")
    (live / "b.json").mkdir()
    assert [each.run for each in live_monitors()] == ["mine"]
    announcement.close()


def test_a_directory_that_cannot_be_written_does_not_stop_a_job(live: Path, tmp_path: Path) -> None:
    live.parent.mkdir()
    live.write_text("a file in the way")
    assert announce("mine", PAGE, tmp_path / "h.sqlite3") is None
    assert live_monitors() == []
