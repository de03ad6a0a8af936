"""Target files: whole at any time, removed at the end, and removed by the next monitor after a crash."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from koopmon.monitor.target_file import TargetDirectory, announced

HOLD = """
import sys
from pathlib import Path
from koopmon.monitor.target_file import TargetDirectory, announced
with announced(TargetDirectory(Path(sys.argv[1]), "job"), "127.0.0.1:1", "http"):
    print("ready", flush=True)
    sys.stdin.read()
"""


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def test_the_file_has_address_and_labels_and_goes_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "a" / "targets"
    old = os.umask(0o077)
    try:
        with announced(TargetDirectory(place, "train-1a2b"), "node7:9464", "https"):
            (file,) = files(place)
            host = socket.gethostname()
            assert json.loads(file.read_text()) == [
                {
                    "targets": ["node7:9464"],
                    "labels": {
                        "job": "koopmon",
                        "__scheme__": "https",
                        "__meta_koopmon_host": host,
                        "__meta_koopmon_run": "train-1a2b",
                        "ephemeral": "true",
                    },
                }
            ]
            assert file.name == f"koopmon-{host}-{os.getpid()}.json"
            assert [oct(path.stat().st_mode)[-3:] for path in (place, file)] == ["755", "644"]
    finally:
        os.umask(old)
    assert files(place) == []


def test_the_file_goes_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), announced(TargetDirectory(tmp_path), "127.0.0.1:1", "http"):
        raise RuntimeError("the monitor failed")
    assert files(tmp_path) == []


def test_files_of_killed_monitors_and_no_others_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / "koopmon-node-1.json"
    alive = tmp_path / "koopmon-node-2.json"
    others = [tmp_path / "node.json", tmp_path / "koopmon.yml", tmp_path / ".koopmon-node-3.json"]
    for path in (stale, alive, *others):
        path.write_text("[]")
    (tmp_path / "koopmon-link.json").symlink_to(others[0])
    (tmp_path / "koopmon-directory.json").mkdir()
    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with announced(TargetDirectory(tmp_path), "127.0.0.1:1", "http"):
            assert not stale.exists()
            assert alive.exists()
            assert all(path.exists() for path in others)
            assert (tmp_path / "koopmon-link.json").is_symlink(), "links are not followed"


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_a_file_that_the_next_one_removes(tmp_path: Path, number: signal.Signals) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (file,) = files(tmp_path)
        with announced(TargetDirectory(tmp_path), "127.0.0.1:2", "http"):
            assert file in files(tmp_path), "its monitor lives"
            assert len(files(tmp_path)) == 2
        process.send_signal(number)
        process.wait(60)
    assert files(tmp_path) == [file]
    with announced(TargetDirectory(tmp_path), "127.0.0.1:2", "http"):
        assert file not in files(tmp_path)


@pytest.mark.parametrize(("wanted", "level"), [(True, logging.WARNING), (False, logging.INFO)])
def test_a_directory_that_cannot_be_written_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wanted: bool, level: int
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "targets"
    with announced(TargetDirectory(place, wanted=wanted), "127.0.0.1:1", "http"):
        pass
    (record,) = caplog.records
    assert record.levelno == level
    assert record.getMessage() == f"{place}: no file there announces this monitor to Prometheus: Not a directory"
