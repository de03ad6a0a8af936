"""Launchers announce rank and size in variables of their own; of a line for the job, one rank writes a warning."""

from __future__ import annotations

import logging

import pytest

from koopmon.agent.launcher import announced_ranks, log_for_job

NAMES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"RANK": "3"}, (3, 1)),
        ({"WORLD_SIZE": "8"}, (0, 1)),
        ({"RANK": "-1", "WORLD_SIZE": "8"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "many"}, (1, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6"}, (5, 6)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, (1, 4)),
    ],
)
def test_ranks_as_announced(
    variables: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert announced_ranks() == expected


def test_one_rank_warns_for_the_job(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "koopmon.agent")
    log_for_job("first", 0)
    log_for_job("second", 1)
    monkeypatch.setenv("RANK", "2")
    log_for_job("third")
    assert [(record.message, record.levelno) for record in caplog.records] == [
        ("koopmon: first", logging.WARNING),
        ("koopmon: second", logging.DEBUG),
        ("koopmon: third", logging.DEBUG),
    ]
