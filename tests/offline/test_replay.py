"""Replay of a recording: under its own policy, and under another one."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from koopmon.config import Config, from_mapping
from koopmon.errors import StoreError
from koopmon.history.reader import HistoryReader
from koopmon.history.writer import HistoryWriter
from koopmon.numbers import to_single
from koopmon.offline.replay import Replayed, replay
from koopmon.policy import PolicyState, decide
from koopmon.risk.online_detector import Observation, RiskState, assess, observe
from koopmon.spectral import profile_states
from koopmon.wire.messages import TrainingStep
from tests.factories import hello, observation, record_observation

RUN, INCARNATION = "run-1", "0123abcd"
NUM_STEPS = 60
Recorder = Callable[..., Path]


def seen_at(step: int, scale: float) -> Observation:
    """Run with jumps from step 30 on, which are smaller at a lower rate."""
    ratio = 0.5 + (math.exp(2.5 * scale) if step >= 30 and step % 3 == 0 else 0.0)
    return observation(
        step,
        spectral_radii=(30.0 if step >= 30 else 1.5, 1.5),
        update_ratios=to_single((0.5, ratio)),
        near_unit_mass=0.95,
        max_spectral_radius=1.2,
        loss=3.0,
        lr_scale=scale,
    )


@pytest.fixture
def recorded(tmp_path: Path) -> Recorder:
    """Create a store of a run that `config` guarded, with each command in force at the next step."""

    def record(config: Config, *, incarnations: tuple[str, ...] = (INCARNATION,), **thresholds: float) -> Path:
        path = tmp_path / "run.sqlite3"
        store = HistoryWriter.open(path)
        for incarnation in incarnations:
            store.record_hello(0.0, hello(RUN, incarnation, thresholds=thresholds))
            history, state = RiskState(), PolicyState()
            for step in range(NUM_STEPS):
                seen = seen_at(step, state.lr_scale)
                history, risk = assess(history, seen, config.risk)
                state = decide(float(step), state, seen, risk, config.policy, config.kss).state
                record_observation(
                    store,
                    float(step),
                    step,
                    RUN,
                    incarnation,
                    loss=3.0,
                    lr_scale=seen.training.lr_scale,
                    observation=seen,
                    risk=risk.value,
                    reason=risk.reason,
                    components=risk.components,
                )
        store.close()
        return path

    return record


def again(path: Path, config: Config) -> list[Replayed]:
    with HistoryReader.open(path) as history:
        return list(replay(history, RUN, config))


def policy(name: str, **fields: float) -> Config:
    return from_mapping({"policy": {"name": name, **fields}})


def test_under_its_own_policy_a_run_is_decided_as_it_was(recorded: Recorder) -> None:
    rows = again(recorded(policy("lr")), policy("lr"))
    assert [row.step for row in rows] == list(range(NUM_STEPS))
    assert [row.risk for row in rows] == [row.recorded_risk for row in rows]
    assert any(row.actions for row in rows)
    assert min(row.lr_scale for row in rows) < 1.0


def test_measured_profiles_are_assessed_again_bit_for_bit(tmp_path: Path) -> None:
    path, history, generator = tmp_path / "run.sqlite3", RiskState(), torch.Generator().manual_seed(0)
    store = HistoryWriter.open(path)
    store.record_hello(0.0, hello(RUN, INCARNATION))
    for step in range(12):
        profile = profile_states(torch.randn((4, 80, 5), generator=generator).cumsum(0), kreiss="never")
        seen = observe(profile, TrainingStep(step=step, loss=2.0 + 0.1 * (step % 3)), width=5, update_exponent=0.1)
        history, risk = assess(history, seen, Config().risk)
        values = {"observation": seen, "risk": risk.value, "reason": risk.reason, "components": risk.components}
        record_observation(store, float(step), step, RUN, INCARNATION, loss=seen.training.loss, **values)
    store.close()
    rows = again(path, policy("observe"))
    assert [row.risk for row in rows] == [row.recorded_risk for row in rows]
    assert len({row.risk for row in rows}) > 5


def test_a_history_whose_observations_repeat_the_scalars_is_replayed_alike(recorded: Recorder) -> None:
    """Written before koopmon held them in one object."""
    path = recorded(policy("lr"))
    expected = again(path, policy("lr"))
    scalars = "json_object('loss', loss, 'lr_scale', lr_scale, 'step', step, 'non_finite', json('false'))"
    with sqlite3.connect(path) as database:
        database.execute(f"UPDATE observations SET observation = json_patch(observation, {scalars})")
    database.close()
    assert again(path, policy("lr")) == expected


def test_another_policy_does_otherwise(recorded: Recorder) -> None:
    path = recorded(policy("lr"))
    assert not any(row.actions for row in again(path, policy("observe")))
    published = from_mapping({"policy": {"name": "kss+lr"}, "kss": {"method": "published"}})
    others = {"set_ceilings": policy("kss"), "set_lr_scale set_kss": published}
    for kinds, other in others.items():
        assert {action.kind for row in again(path, other) for action in row.actions} == set(kinds.split())
    sure = policy("lr", confirm_snapshots=2, severe_risk=1.0, act_risk=0.05, release_risk=0.04)
    hasty, patient = (next(row.step for row in again(path, each) if row.actions) for each in (policy("lr"), sure))
    assert hasty < patient


def test_each_incarnation_starts_afresh(recorded: Recorder) -> None:
    rows = again(recorded(policy("lr"), incarnations=("aaaaaaaa", "bbbbbbbb")), policy("lr"))
    halves = rows[:NUM_STEPS], rows[NUM_STEPS:]
    assert {row.incarnation for row in halves[1]} == {"bbbbbbbb"}
    assert [row.lr_scale for row in halves[0]] == [row.lr_scale for row in halves[1]]


def test_an_adapters_hints_apply_where_the_configuration_is_silent(recorded: Recorder) -> None:
    path = recorded(policy("lr"), peak_scale=100.0, speed_scale=100.0, restlessness_scale=100.0)
    assert not any(row.actions for row in again(path, policy("lr")))
    own = from_mapping({"policy": {"name": "lr"}, "risk": {"peak_scale": 0.2, "speed_scale": 0.2}})
    assert any(row.actions for row in again(path, own))


def test_what_cannot_be_replayed_is_named(recorded: Recorder, tmp_path: Path) -> None:
    path = recorded(policy("lr"))
    with HistoryReader.open(path) as history, pytest.raises(StoreError, match="'run-2': the store has run-1"):
        list(replay(history, "run-2", Config()))
    store = HistoryWriter.open(tmp_path / "empty.sqlite3")
    store.record_hello(0.0, hello(RUN, INCARNATION))
    store.close()
    with pytest.raises(StoreError, match="no snapshot was recorded"):
        again(tmp_path / "empty.sqlite3", Config())
    cut = tmp_path / "cut.sqlite3"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(StoreError, match=r"cut\.sqlite3"):
        again(cut, Config())


def test_a_row_that_another_version_wrote_is_named_by_its_step(tmp_path: Path) -> None:
    path = tmp_path / "strange.sqlite3"
    store = HistoryWriter.open(path)
    store.record_hello(0.0, hello(RUN, INCARNATION))
    record_observation(store, 0.0, 7, RUN, INCARNATION, observation={"informative": "perhaps"})
    store.close()
    with pytest.raises(StoreError, match="step 7 cannot be assessed again"):
        again(path, Config())


def test_forged_rows_that_cannot_be_assessed_are_one_line(recorded: Recorder) -> None:
    """An informative snapshot without layers; found by fuzzing."""
    path = recorded(policy("lr"))
    with sqlite3.connect(path) as database:
        database.execute("UPDATE observations SET update_ratios = NULL")
    database.close()
    with pytest.raises(StoreError, match="cannot be assessed again") as caught:
        again(path, policy("lr"))
    assert str(caught.value).isprintable()
