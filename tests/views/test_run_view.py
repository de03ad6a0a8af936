"""Records of the pages: equal from a live event and from its row in the history."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from koopmon.config import RiskConfig
from koopmon.history.reader import HistoryReader
from koopmon.history.writer import HistoryWriter
from koopmon.policy import Action
from koopmon.risk.online_detector import Observation, OnlineRisk, RiskState, assess
from koopmon.views.run_view import (
    SCALARS,
    CommandView,
    DecisionView,
    TimelinePoint,
    command_words,
    training_commands,
)
from koopmon.wire.messages import KssSettings, TrainingStep
from tests.factories import INCARNATION, RUN, command, observation, point, record_observation

TRAINING = {"learning_rate": 0.01, "loss": 2.0, "grad_norm": 1.5, "lr_scale": 0.5, "kss_alpha": 0.1}


def assessed(step: int, **fields: object) -> tuple[Observation, OnlineRisk]:
    known = {"update_ratios": (0.1, 0.2), "expansive_mass": 0.1, "width": 8}
    seen = observation(step, **{**TRAINING, **known, **fields})
    return seen, assess(RiskState(), seen, RiskConfig())[1]


@pytest.mark.parametrize("fields", [{}, {"informative": False, "reason": "few tokens"}, {"non_finite": True}])
def test_a_row_and_a_live_assessment_make_the_same_point(tmp_path: Path, fields: dict[str, object]) -> None:
    seen, risk = assessed(7, **fields)
    live = TimelinePoint.of_assessment(INCARNATION, 5.0, seen, risk)
    path = tmp_path / "h.sqlite3"
    store = HistoryWriter.open(path)
    record_observation(
        store,
        5.0,
        7,
        **TRAINING,
        non_finite=seen.non_finite,
        observation=seen,
        risk=risk.value,
        reason=risk.reason,
        components=risk.components,
    )
    store.close()
    with HistoryReader.open(path) as history:
        (row,) = history.observations(RUN)
    recorded = TimelinePoint.of_row(row)
    assert replace(recorded, forecast=None) == replace(live, forecast=None)
    assert recorded.forecast == (None if live.forecast is None else pytest.approx(live.forecast))
    assert live.forecast == (None if "reason" in fields else 1.0 if "non_finite" in fields else risk.forecast)


def test_a_point_as_json_is_flat_and_has_every_scalar() -> None:
    plain = point(3, loss=math.inf, grad_norm=2.0).to_dict()
    assert {"step", "time", "risk", "forecast", "incarnation", "reason", "informative", "non_finite"} <= set(plain)
    assert {scalar.name for scalar in SCALARS} <= set(plain)
    assert (plain["step"], plain["grad_norm"], "training" in plain) == (3, 2.0, False)


def test_every_scalar_of_a_step_is_shown() -> None:
    assert {scalar.name for scalar in SCALARS} == set(TrainingStep.__struct_fields__) - {"step"}


def test_a_loss_that_is_not_finite_breaks_a_point_and_is_not_drawn() -> None:
    (loss,) = (scalar for scalar in SCALARS if scalar.name == "loss")
    assert point(1, loss=math.nan).broken
    assert point(1, non_finite=True).broken
    assert not point(1, loss=2.0).broken
    assert not point(1).broken
    assert (loss.of(point(1, loss=math.nan)), loss.of(point(1)), loss.of(point(1, loss=2.0))) == (None, None, 2.0)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Action(kind="set_lr_scale", reason="", lr_scale=0.25), "learning rate × 0.25"),
        (Action(kind="set_kss", reason="", kss=KssSettings(alpha=0.15)), "KSS alpha 0.15"),
        (Action(kind="set_kss", reason="", kss=KssSettings()), "KSS off"),
        (Action(kind="set_cadence", reason="", cadence_steps=1), "a snapshot every step"),
        (
            Action(kind="set_cadence", reason="", cadence_steps=5, cadence_until_step=9),
            "a snapshot every 5 steps until step 9",
        ),
        (Action(kind="stop", reason=""), "request to stop"),
        (Action(kind="checkpoint", reason=""), "request for a checkpoint"),
    ],
)
def test_words_of_a_command(action: Action, words: str) -> None:
    assert command_words(action) == words


def test_commands_that_change_training_stand_at_their_ack_or_their_decision() -> None:
    views = [
        CommandView(command=command(1), outcome="applied", step=5),
        CommandView(command=command(2), outcome="dry_run"),
        CommandView(command=command(3, kind="set_cadence", cadence_steps=1), outcome="applied", step=6),
    ]
    decision = DecisionView(
        incarnation=INCARNATION, step=4, time=0.0, phase="acting", reason="", risk=0.9, commands=tuple(views)
    )
    assert [(each.command.id, step) for each, step in training_commands([decision])] == [
        ("00000001", 5),
        ("00000002", 4),
    ]
    assert [each.applied_step for each in views] == [5, None, 6]
    assert [each["outcome"] for each in decision.to_dict()["commands"]] == ["applied", "dry_run", "applied"]
