"""Lines of rank 0 for the person who started the job."""

from __future__ import annotations

import gc
import logging
import math
import secrets
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import koopmon
from koopmon.agent import notices as notices_module
from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.notices import MAX_REFUSALS, Notices
from koopmon.agent.stats import AgentStats
from koopmon.block_finder import class_name
from koopmon.wire.messages import Applied
from tests.agent.models import build, train_step
from tests.agent.scripted_monitor import ScriptedMonitor

ATTACHED: dict[str, Any] = {"stack": "blocks", "num_layers": 3, "width": 16, "num_ranks": 1, "acts": True, "reason": ""}


def optimizers(*kinds: Any) -> list[Any]:
    return [kind([nn.Parameter(torch.zeros(1))], lr=0.1) for kind in kinds]


def made(rank: int = 0, stats: AgentStats | None = None) -> Notices:
    found = Notices(stats or AgentStats())
    found.meet(rank)
    return found


@pytest.mark.parametrize(
    ("kinds", "fields", "line"),
    [
        ((AdamW,), {}, "3 blocks of width 16 in blocks; 1 rank; AdamW; commands are applied"),
        (
            (SGD, AdamW),
            {"num_ranks": 8},
            "3 blocks of width 16 in blocks; 8 ranks; SGD and AdamW; commands are applied",
        ),
        ((SGD, SGD), {"stack": ""}, "3 blocks of width 16; 1 rank; 2 x SGD; commands are applied"),
        (
            (SGD,),
            {"acts": False, "reason": "tensor parallel is untested"},
            "3 blocks of width 16 in blocks; 1 rank; SGD; only watched: tensor parallel is untested",
        ),
        ((SGD,), {"acts": False}, "3 blocks of width 16 in blocks; 1 rank; SGD; only watched"),
    ],
)
def test_an_attachment_is_one_line(
    kinds: Any, fields: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    notices = made()
    for _ in range(2):
        notices.attached("run-1", nn.Linear(1, 1), optimizers(*kinds), **{**ATTACHED, **fields})
    assert capsys.readouterr().err == f"koopmon: run run-1: attached to Linear: {line}\n"


def result(**fields: Any) -> CommandResult:
    values = {
        "outcome": "applied",
        "step": 7,
        "kind": "set_lr_scale",
        "reason": "risk 0.86: learning rate x 0.5; unsteadiness 1.31 of the update ratio",
    }
    return CommandResult("c0f0c0f0", **{**values, **fields})


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "step 7: risk 0.86: learning rate x 0.5"),
        ({"detail": "lr_scale capped at 0.6"}, "step 7: risk 0.86: learning rate x 0.5 (lr_scale capped at 0.6)"),
        ({"reason": ""}, "step 7: set_lr_scale"),
        (
            {"reason": "risk 0.9: learning rate x 0.5; block 0 takes over the stream: radius 110; unsteadiness 2"},
            "step 7: risk 0.9: learning rate x 0.5; block 0 takes over the stream: radius 110",
        ),
        ({"reason": "calm\x1b[31m\nkoopmon: forged"}, None),
        ({"kind": "stop", "reason": "stop: ruined"}, "step 7: stop: ruined"),
        ({"kind": "set_cadence"}, ""),
        ({"kind": "rewind"}, ""),
        ({"outcome": "refused"}, ""),
        ({"outcome": "refused", "detail": "SGD does not follow"}, "step 7: a command is refused: SGD does not follow"),
        ({"outcome": "duplicate"}, ""),
    ],
)
def test_each_change_is_one_line(fields: dict[str, Any], line: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    made().changed(result(**fields))
    said = capsys.readouterr().err
    if line is None:
        assert said.count("\n") == 1
        assert "\x1b" not in said
    else:
        assert said == (f"koopmon: {line}\n" if line else "")


def closing(capsys: pytest.CaptureFixture[str], notices: Notices, *, seen: bool = True, **applied: Any) -> str:
    if seen:
        notices.attached("run-1", nn.Linear(1, 1), optimizers(SGD), **ATTACHED)
    capsys.readouterr()
    for _ in range(2):
        notices.closed(Applied(**applied), "")
    return capsys.readouterr().err


def test_each_reason_of_a_refusal_is_one_line_and_few_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    notices = made()
    for number in range(2 * MAX_REFUSALS):
        for _ in range(2):
            notices.changed(result(outcome="refused", detail=f"reason {number}"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"koopmon: step 7: a command is refused: reason {number}" for number in range(MAX_REFUSALS)]


def test_the_end_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    stats = AgentStats()
    stats.step, stats.sent = 200, 146
    words = ("146 snapshots in 200 steps", "finite", "nothing was done to the training", "`koopmon report run-1`\n")
    assert closing(capsys, made(stats=stats)) == "koopmon: run run-1: " + "; ".join(words)


def test_the_end_has_the_changes(capsys: pytest.CaptureFixture[str]) -> None:
    notices = made()
    for _ in range(2):
        notices.changed(result())
    line = closing(capsys, notices, lr_scale=0.25, max_rate=0.003, rate_shares={1: 1.0})
    assert "2 changes of the training, learning rate x 0.25 at the end, at most 0.003, " in line
    assert "parameter groups with a bound on their rate: 1;" in line


@pytest.mark.parametrize("broken", ["loss", "states"])
def test_the_end_of_a_training_that_is_not_finite_says_so(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    stats = AgentStats()
    stats.step = stats.sent = 1
    if broken == "loss":
        stats.measured["loss"].put(math.nan)
    else:
        stats.finite = False
    assert "1 snapshot in 1 step; NOT FINITE at the end;" in closing(capsys, made(stats=stats))


def test_the_end_of_a_training_that_is_finite_again_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    stats = AgentStats()
    stats.step = stats.sent = 9
    stats.drop("not_finite")
    assert "; finite; nothing was done" in closing(capsys, made(stats=stats))


def test_the_end_has_what_an_earlier_launch_left_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    line = closing(capsys, made(), lr_scale=0.25)
    assert "no changes of the training, learning rate x 0.25 at the end;" in line


def test_the_end_of_a_training_that_was_not_seen_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert closing(capsys, made(), seen=False).startswith("koopmon: nothing was seen of the training in 0 steps: ")
    notices = made()
    notices.closed(Applied(), "the model is compiled")
    assert capsys.readouterr().err == "koopmon: nothing was seen of the training in 0 steps: the model is compiled\n"


@pytest.mark.parametrize(("selected", "lines"), [("", 3), ("all", 3), ("changes", 2), ("none", 0)])
def test_the_variable_selects_the_lines(
    selected: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(notices_module.VARIABLE, selected)
    notices = made()
    notices.attached("run-1", nn.Linear(1, 1), optimizers(SGD), **ATTACHED)
    notices.changed(result())
    notices.closed(Applied(), "")
    assert capsys.readouterr().err.count("\n") == lines


def test_other_ranks_and_forked_children_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = made()
    child.attached("run-1", nn.Linear(1, 1), optimizers(SGD), **ATTACHED)
    capsys.readouterr()
    other = made(rank=1)
    other.attached("run-1", nn.Linear(1, 1), optimizers(SGD), **ATTACHED)
    other.closed(Applied(), "")
    unknown = Notices(AgentStats())
    unknown.closed(Applied(), "")
    monkeypatch.setattr(notices_module.os, "getpid", lambda: 1)
    child.closed(Applied(), "")
    assert capsys.readouterr().err == ""


def test_the_name_is_that_of_the_users_model() -> None:
    assert class_name(build()) == "Model"
    assert class_name(torch.compile(build(), backend="eager")) == "Model"

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = build()

    assert class_name(Wrapper()) == "Model"


def test_a_real_training_tells_its_attachment_its_changes_and_its_end(
    monitor: ScriptedMonitor, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.01)
    agent = koopmon.attach(
        model, optimizer, endpoint=monitor.endpoint, run="told", config={"cadence": {"dense_every": 1}}
    )
    monitor.wait(lambda: agent.status()["connected"])
    monitor.wait(lambda: train_step(model, optimizer, 0) and monitor.shards)
    monitor.command("set_lr_scale", "told", id=(first := secrets.token_hex(8)), lr_scale=0.5)
    monitor.wait(lambda: train_step(model, optimizer, 0) and monitor.acked(first))
    monitor.command("set_lr_scale", "told", id=(second := secrets.token_hex(8)), lr_scale=1.0)
    monitor.wait(lambda: train_step(model, optimizer, 0) and monitor.acked(second))
    agent.close()
    first_line, *changes, last = capsys.readouterr().err.splitlines()
    assert first_line == (
        "koopmon: run told: attached to Model: 3 blocks of width 16 in blocks; 1 rank; AdamW; commands are applied"
    )
    assert len(changes) == 2
    assert last.startswith("koopmon: run told: ")
    assert "2 changes of the training, learning rate x 1 at the end; `koopmon report told`" in last


def test_a_training_that_nobody_closes_tells_its_end(
    monitor: ScriptedMonitor, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.01)
    koopmon.attach(model, optimizer, endpoint=monitor.endpoint, run="told")
    for step in range(3):
        train_step(model, optimizer, step)
    del model, optimizer
    gc.collect()
    assert "in 3 steps" in capsys.readouterr().err


def test_an_application_that_logs_at_info_gets_them_in_its_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="koopmon.agent"):
        made().changed(result())
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "koopmon: step 7: risk 0.86: learning rate x 0.5")
    ]
    assert capsys.readouterr().err == ""
