"""Settings of a training that left in order count for the next launch if its job failed, or was told to end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli.ended_settings import run_with_settings

NAMES = ["team,one.settings", "team,one.Critic.settings"]


def run(directory: Path, status: int, *signals: signal.Signals, ended: str = "team,one") -> list[str]:
    """Run a job that sets the settings of two models aside; return the files after it."""

    def job(received: set[signal.Signals]) -> int:
        for name in (f"{ended}.ended", f"{ended}.Critic.ended", "team,one2.ended"):
            (directory / name).write_text(name)
        received.update(signals)
        return status

    assert run_with_settings(str(directory), "team/one", job) == status
    return sorted(each.name for each in directory.glob("*.settings"))


@pytest.mark.parametrize("status", [1, 3, 130, 143])
def test_a_job_that_failed_hands_over_its_settings(tmp_path: Path, status: int) -> None:
    assert run(tmp_path, status) == sorted(NAMES)
    assert (tmp_path / NAMES[0]).read_text() == "team,one.ended"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_job_that_left_in_order_at_a_signal_hands_over_its_settings(tmp_path: Path, number: signal.Signals) -> None:
    assert run(tmp_path, 0, signal.SIGWINCH, number) == sorted(NAMES)


@pytest.mark.parametrize("signals", [(), (signal.SIGWINCH, signal.SIGCONT, signal.SIGUSR1)])
def test_a_job_that_ended_hands_over_nothing(tmp_path: Path, signals: tuple[signal.Signals, ...]) -> None:
    assert run(tmp_path, 0, *signals) == []


@pytest.mark.parametrize(
    ("status", "parent", "left"),
    [(0, "own", False), (0, "other", True), (9, "own", True), (0, None, True)],
)
def test_a_training_that_leaves_by_exit_of_the_system_has_ended(
    tmp_path: Path, status: int, parent: str | None, left: bool
) -> None:
    """Only if the job's process is the training's own: the status of a pipeline is that of its last program."""
    kept = tmp_path / "mine.settings"
    kept.write_text(
        json.dumps({"run": "mine", "writer": None if parent is None else [2, 3, os.getpid() if parent == "own" else 1]})
    )
    assert run_with_settings(str(tmp_path), "mine", lambda _: status) == status
    assert kept.exists() is left


def test_settings_of_other_runs_stay_where_they_are(tmp_path: Path) -> None:
    assert run(tmp_path, 1, ended="other") == []


def test_without_a_directory_only_the_status_counts() -> None:
    assert run_with_settings(None, "one", lambda _: 3) == 3


@pytest.mark.process
@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_under_koopmon_run(koopmon: Any, status: int, number: signal.Signals) -> None:
    """A preempted job writes a checkpoint and exits with 0. SIGUSR1 alone may only ask for a checkpoint."""
    script = 'touch "$KOOPMON_KEPT_SETTINGS/mine.ended"; trap "exit $1" $2; echo ready; while :; do sleep 0.1; done'
    job = ("sh", "-c", script, "sh", str(status), number.name[3:])
    process = koopmon.start("run", "--run", "mine", "--monitor", koopmon.endpoint, "--", *job)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == status
    kept = koopmon.directory / "state" / "koopmon" / "runs" / "mine.settings"
    assert kept.exists() == (status != 0 or number is signal.SIGTERM)


def test_the_claims_of_the_jobs_trainings_are_removed(tmp_path: Path) -> None:
    for name in ("team,one.trainings", "team,one.Critic.trainings", "team,one2.trainings"):
        (tmp_path / name).touch()
    run(tmp_path, 1)
    assert [each.name for each in tmp_path.glob("*.trainings")] == ["team,one2.trainings"]


@pytest.mark.parametrize("kind", ["fifo", "nested", "endless"])
def test_settings_that_are_none_of_ours_do_not_hold_up_the_end(tmp_path: Path, kind: str) -> None:
    kept = tmp_path / "mine.settings"
    match kind:
        case "fifo":
            os.mkfifo(kept)
        case "nested":
            kept.write_text("[" * 4096)
        case "endless":
            kept.symlink_to("/dev/zero")
    assert run_with_settings(str(tmp_path), "mine", lambda _: 0) == 0
    assert os.path.lexists(kept)
