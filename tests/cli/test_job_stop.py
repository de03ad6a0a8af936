"""`koopmon run --allow-stop`: when a job must end, and that all of it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli import job_stop
from koopmon.cli.job_stop import GRACE_STEPS, JobStop
from koopmon.history.writer import HistoryWriter
from koopmon.wire.messages import Ack, AckOutcome, Applied, Command, CommandKind
from tests.factories import INCARNATION, RUN, heartbeat, hello


class Job:
    """A history with one launch of a run, and the launcher that looks into it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(job_stop, "POLL_SECONDS", 0.0)
        self.job_stop = JobStop(path, RUN)
        self.history = HistoryWriter.open(path)
        self.now = time.time() + 1.0
        self.history.record_hello(self.now, hello())

    def asked(
        self, step: int = 100, kind: CommandKind = "stop", outcome: AckOutcome | None = "applied", at: float = 0.0
    ) -> None:
        command = Command(run=RUN, incarnation=INCARNATION, id="0000000a", kind=kind, reason="ruined", expires_step=999)
        self.history.record_decision(
            at or self.now,
            RUN,
            INCARNATION,
            step,
            phase="acting",
            reason="ruined",
            risk=1.0,
            commands=[command],
            outcome="pending",
        )
        if outcome is not None:
            self.history.record_ack(
                self.now,
                Ack(
                    run=RUN,
                    incarnation=INCARNATION,
                    command_id=command.id,
                    outcome=outcome,
                    step=step,
                    applied=Applied(),
                ),
            )

    def due(self, step: int) -> bool:
        """Record one heartbeat at `step`, and look."""
        self.history.record_heartbeat(self.now, heartbeat(step))
        self.history.commit()
        return self.job_stop()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    made = Job(tmp_path / "h.sqlite3", monkeypatch)
    yield made
    made.history.close()


def test_a_job_that_goes_on_after_the_request_must_end(job: Job) -> None:
    assert not job.due(99)
    job.asked(step=100)
    assert not job.due(100 + GRACE_STEPS - 1)
    assert job.due(100 + GRACE_STEPS)
    assert job.job_stop.reason == "ruined"
    assert job.job_stop.due


@pytest.mark.parametrize("outcome", ["refused", "failed", "expired", None])
def test_a_request_that_was_not_applied_ends_nothing(job: Job, outcome: Any) -> None:
    job.asked(outcome=outcome)
    assert not job.due(100_000)


@pytest.mark.parametrize("kind", ["checkpoint"])
def test_another_command_ends_nothing(job: Job, kind: Any) -> None:
    job.asked(kind=kind)
    assert not job.due(100_000)


def test_a_request_to_an_earlier_job_of_this_name_ends_nothing(job: Job) -> None:
    job.asked(at=job.now - 100.0)
    assert not job.due(100_000)


def test_a_history_that_does_not_exist_yet_or_cannot_be_read_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_stop, "POLL_SECONDS", 0.0)
    look = JobStop(tmp_path / "none.sqlite3", RUN)
    assert not look()
    (tmp_path / "none.sqlite3").write_bytes(b"")
    assert not look()
    (tmp_path / "none.sqlite3").write_bytes(b"something else" * 100)
    assert not look()


LAUNCHER = """
import os, sys
from koopmon.cli.supervise import run_job, signals_held
with signals_held() as mask:
    print(run_job(sys.argv[1:], os.environ, mask, lambda: 0.05, lambda: os.path.exists("ready")), flush=True)
"""
JOB = """
import os, signal, sys, time
count = 0
def note(*_):
    global count
    count += 1
signal.signal(signal.SIGTERM, note)
open("ready", "w").close()
end = time.monotonic() + 60
while not count and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.5)
open("ended", "w").write(str(count))
sys.exit(5)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("job", "status"),
    [
        ((sys.executable, "-S", "job.py"), "5"),
        (("sh", "-c", f"{sys.executable} -S job.py; echo next"), "143"),
        (("sh", "-c", f"trap '' TERM; sh -c '{sys.executable} -S job.py'; exit 9"), "9"),
    ],
    ids=["program", "shell", "shell that ignores it"],
)
def test_the_job_and_what_it_leaves_behind_get_one_sigterm(tmp_path: Path, job: tuple[str, ...], status: str) -> None:
    ignored = status == "9"
    (tmp_path / "job.py").write_text(JOB.replace("+ 60", "+ 1") if ignored else JOB)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *job],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == f"{status}\n", done.stderr
    deadline = time.monotonic() + 30.0
    while not (tmp_path / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "ended").read_text() == ("0" if ignored else "1")
