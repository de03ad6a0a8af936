"""The wait for the job's own monitor: bounded, ended by any outcome, and only where a launcher has asked for it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from koopmon.agent.comms import monitor_start
from koopmon.agent.comms.monitor_start import VARIABLE, wait_for_monitor


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by one that only sleeping moves; returns the sleeps."""
    sleeps: list[float] = []
    monkeypatch.setattr(monitor_start.time, "monotonic", lambda: sum(sleeps))
    monkeypatch.setattr(monitor_start.time, "sleep", sleeps.append)
    return sleeps


@pytest.mark.parametrize("environ", [{}, {VARIABLE: ""}])
def test_without_a_monitor_of_its_own_nothing_waits(slept: list[float], environ: dict[str, str]) -> None:
    wait_for_monitor(environ)
    assert not slept


def test_a_monitor_that_serves_ends_the_wait(tmp_path: Path) -> None:
    file = tmp_path / "ready"
    timer = threading.Timer(0.2, file.touch)
    timer.start()
    wait_for_monitor({VARIABLE: str(file)})
    assert file.exists()
    timer.join()


def test_a_monitor_that_serves_already_costs_no_time(tmp_path: Path, slept: list[float]) -> None:
    (tmp_path / "ready").touch()
    wait_for_monitor({VARIABLE: str(tmp_path / "ready")})
    assert not slept


def test_a_launcher_that_is_gone_ends_the_wait(tmp_path: Path, slept: list[float]) -> None:
    wait_for_monitor({VARIABLE: str(tmp_path / "gone" / "ready")})
    assert not slept


def test_the_wait_is_bounded_and_told(tmp_path: Path, slept: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "koopmon.agent")
    wait_for_monitor({VARIABLE: str(tmp_path / "ready")})
    assert monitor_start.MAX_SECONDS <= sum(slept) < monitor_start.MAX_SECONDS + 1.0
    assert [record.getMessage() for record in caplog.records] == [
        "koopmon: the training waits for its monitor to start, at most 60 s",
        "koopmon: the training begins unguarded: no monitor has started in 60 s",
    ]


def test_an_interrupt_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(monitor_start.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        wait_for_monitor({VARIABLE: str(tmp_path / "ready")})
