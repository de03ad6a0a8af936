"""History store: committed records stay, unknown files are refused, and a failing disk does not stop the monitor."""

from __future__ import annotations

import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon.errors import StoreError
from koopmon.history.plain_profile import PlainProfile
from koopmon.history.reader import HistoryReader
from koopmon.history.rows import DecisionRow, LoggedRow
from koopmon.history.schema import SCHEMA_VERSION
from koopmon.history.writer import HistoryWriter
from koopmon.numbers import to_single
from koopmon.risk.band import BandReading
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.wire.messages import Applied, Heartbeat, TrainingStep
from tests.factories import ack, command, heartbeat, hello, noisy_profile, observation, record_observation

RUN, FIRST, SECOND = "job", "aaaaaaaa", "bbbbbbbb"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "history.sqlite3"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[HistoryWriter]:
    store = HistoryWriter.open(path, clock=clock)
    yield store
    store.close()


@pytest.fixture
def history(store: HistoryWriter, path: Path) -> Iterator[HistoryReader]:
    with HistoryReader.open(path) as history:
        yield history


def decide(store: HistoryWriter, number: int = 0, *, outcome: Any = "pending", step: int = 10) -> None:
    store.record_decision(
        100.0,
        RUN,
        FIRST,
        step,
        phase="backed_off",
        reason="because",
        risk=0.9,
        commands=[command(number)],
        outcome=outcome,
    )


def observe(store: HistoryWriter, step: int = 10, **fields: Any) -> None:
    seen = {"loss": 2.5, "learning_rate": 0.1, "observation": {"step": step}}
    judged = {"risk": 0.25, "reason": "calm", "components": {"v": 0.5}}
    record_observation(store, 99.0, step, RUN, FIRST, **{**seen, **judged, **fields})


def test_what_is_recorded_is_read_back(store: HistoryWriter, history: HistoryReader) -> None:
    store.record_hello(1.0, hello())
    decide(store)
    store.record_ack(101.0, ack(detail="done", applied=Applied(lr_scale=0.5)))
    observe(store)
    store.record_heartbeat(
        2.0,
        Heartbeat(
            run=RUN,
            incarnation=FIRST,
            process_rank=0,
            training=TrainingStep(step=3, loss=math.inf),
            applied=Applied(),
            step_seconds=0.1,
        ),
        {"kl": BandReading(3, 0.5, 0.1, 0.9), "entropy": BandReading(2, math.nan)},
    )
    store.record_state(120.0, RUN, FIRST, 0, end_reason="finished")
    assert list(history.observations(RUN)) == [], "not committed yet"
    store.commit()
    assert history.runs() == [RUN]
    (incarnation,) = history.incarnations(RUN)
    assert (incarnation.started, incarnation.ended, incarnation.end_reason) == (1.0, 120.0, "finished")
    assert incarnation.hello == hello()
    assert incarnation.applied == Applied(lr_scale=0.5)
    (decision,) = history.decisions(RUN)
    assert (decision.step, decision.phase, decision.reason, decision.risk) == (10, "backed_off", "because", 0.9)
    (sent,) = decision.commands
    assert (sent.command, sent.outcome, sent.acked_step, sent.detail) == (command(), "applied", 12, "done")
    (observation,) = history.observations(RUN)
    assert (observation.training, observation.risk) == (TrainingStep(step=10, loss=2.5, learning_rate=0.1), 0.25)
    assert (observation.observation, observation.components) == ({"step": 10}, {"v": 0.5})
    (beat,) = history.heartbeats(RUN)
    assert (beat.training, beat.step_seconds) == (TrainingStep(step=3, loss=math.inf), 0.1)
    assert beat.logged == {
        "kl": LoggedRow(step=3, value=0.5, low=0.1, high=0.9),
        "entropy": LoggedRow(step=2, value=None, low=None, high=None),
    }
    assert list(history.decisions("nobody")) == []


def test_nan_is_not_unknown(store: HistoryWriter, history: HistoryReader) -> None:
    observe(store, loss=math.nan, grad_norm=-math.inf, learning_rate=None, non_finite=True)
    store.commit()
    (observation,) = history.observations(RUN)
    training = observation.training
    assert training.loss is not None
    assert math.isnan(training.loss)
    assert (training.grad_norm, training.learning_rate, observation.non_finite) == (-math.inf, None, True)


def test_a_store_of_before_a_scalar_is_read_without_it_and_gets_its_column(store: HistoryWriter, path: Path) -> None:
    observe(store, grad_norm=1.0)
    store.close()
    with sqlite3.connect(path) as database:
        for table in ("observations", "heartbeats"):
            database.execute(f"ALTER TABLE {table} DROP COLUMN grad_norm")
        database.execute("ALTER TABLE heartbeats DROP COLUMN logged")
    database.close()
    with HistoryReader.open(path) as history:
        assert [row.training.grad_norm for row in history.observations(RUN)] == [None]
    later = HistoryWriter.open(path)
    observe(later, 11, grad_norm=3.0)
    later.record_heartbeat(2.0, heartbeat(11, RUN, FIRST, grad_norm=4.0))
    later.close()
    with HistoryReader.open(path) as history:
        assert [row.training.grad_norm for row in history.observations(RUN)] == [None, 3.0]
        assert [(row.training.grad_norm, row.logged) for row in history.heartbeats(RUN)] == [(4.0, {})]


def test_profiles_survive(store: HistoryWriter, history: HistoryReader) -> None:
    states = torch.cumsum(torch.randn((4, 40, 6)), dim=0)
    full = profile_states(states, svd_rank=4)
    seen = {"router_entropy": (0.5, None)}
    for step, profile in ((2, PlainProfile.of(full)), (4, None)):
        store.record_profile(
            5.0, RUN, FIRST, step, num_shards=1, masked=True, seconds=0.01, profile=profile, observables=seen
        )
    store.commit()
    first, second = history.profiles(RUN)
    assert first.observables == second.observables == {"router_entropy": [0.5, None]}
    assert (first.step, first.masked, first.num_shards, second.profile) == (2, True, 1, None)
    assert first.profile is not None
    again = SpectralProfile.from_dict(first.profile.to_dict())
    assert again.layers[2].eigenvalues.tolist() == pytest.approx(full.layers[2].eigenvalues.tolist(), abs=2e-3)
    assert again.layers[0].kreiss_constant == pytest.approx(full.layers[0].kreiss_constant, rel=2e-5)


def test_observations_keep_every_digit_of_the_numbers_of_layers(store: HistoryWriter, history: HistoryReader) -> None:
    ratios, radii = to_single((1 / 3, 1e-300, 1e300)), to_single((1.1, 1e30, 0.0))
    observe(store, observation=observation(10, update_ratios=ratios, spectral_radii=radii, width=8))
    store.commit()
    (row,) = history.observations(RUN)
    assert row.observation["update_ratios"] == list(ratios)
    assert row.observation["spectral_radii"] == list(radii)
    assert row.observation["width"] == 8


WRITER = """
import sys
from koopmon.history.writer import HistoryWriter
from koopmon.wire.messages import Command, TrainingStep

store = HistoryWriter.open(sys.argv[1])
run, incarnation = "job", "aaaaaaaa"
number = 0
while True:
    store.record_observation(1.0, run, incarnation, TrainingStep(step=number), non_finite=False,
                             observation={}, risk=0.5, reason="", components={})
    command = Command(run=run, incarnation=incarnation, id=f"{number:08x}", kind="stop", reason="", expires_step=1)
    store.record_decision(1.0, run, incarnation, number, phase="alert", reason="because", risk=0.5, commands=[command],
                          outcome="pending")
    print(number, flush=True)
    number += 1
"""


@pytest.mark.process
def test_kill_9_of_the_writer_loses_no_committed_decision(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(50)]
        writer.send_signal(signal.SIGKILL)
        told += [int(line) for line in writer.stdout.read().splitlines()]
    with HistoryReader.open(path) as history:
        decisions: list[DecisionRow] = list(history.decisions(RUN))
        steps = [row.step for row in history.observations(RUN)]
    ids = [decision.commands[0].command.id for decision in decisions]
    assert ids[: len(told)] == [f"{number:08x}" for number in told]
    assert steps[: len(told)] == told, "an observation is committed with the decision that it led to"
    store = HistoryWriter.open(path)
    assert store.recording
    store.close()


def test_a_store_has_one_writer(store: HistoryWriter, path: Path) -> None:
    with pytest.raises(StoreError, match=f"in use by another monitor \\(pid {os.getpid()}\\)") as caught:
        HistoryWriter.open(path)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    store.served_at("http://127.0.0.1:9464/")
    with pytest.raises(StoreError, match=f"pid {os.getpid()}\\), its page is http://127.0.0.1:9464/: choose"):
        HistoryWriter.open(path)


def test_the_lock_goes_with_the_writer(store: HistoryWriter, path: Path) -> None:
    store.close()
    HistoryWriter.open(path).close()
    HistoryWriter.open(path).close()


def test_unknown_schema_is_refused(path: Path, store: HistoryWriter) -> None:
    store.close()
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()
    for open_it in (HistoryWriter.open, HistoryReader.open):
        with pytest.raises(
            StoreError, match=f"schema {SCHEMA_VERSION + 1}, this version of koopmon supports 1 to {SCHEMA_VERSION}"
        ) as caught:
            open_it(path)
        assert "\n" not in str(caught.value)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.sqlite3"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE precious (value)")
    database.close()
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and long enough to be seen as none " * 50)
    for path in (foreign, text):
        before = path.read_bytes()
        for open_it in (HistoryWriter.open, HistoryReader.open):
            with pytest.raises(StoreError, match=path.name):
                open_it(path)
        assert path.read_bytes() == before
    with pytest.raises(StoreError, match="no such file"):
        HistoryReader.open(tmp_path / "missing.sqlite3")
    with pytest.raises(StoreError, match="choose another"):
        HistoryWriter.open(foreign / "below" / "a" / "file.sqlite3")


def test_a_full_disk_pauses_recording_and_says_so_once(
    store: HistoryWriter, history: HistoryReader, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    decide(store, 0)
    # Like a full disk, this makes SQLite fail with SQLITE_FULL.
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    big = noisy_profile(200_000)
    with caplog.at_level(logging.INFO):
        for step in range(3):
            store.record_profile(1.0, RUN, FIRST, step, num_shards=1, masked=False, seconds=0.0, profile=big)
            store.commit()
    assert not store.recording
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "monitoring goes on" in caplog.text
    decide(store, 1)
    assert len(list(history.decisions(RUN))) == 1
    store._database.execute(f"PRAGMA max_page_count = {1 << 30}")
    decide(store, 2)
    assert not store.recording, "not tried again at once"
    clock.now += 31.0
    decide(store, 3)
    assert store.recording
    ids = [decision.commands[0].command.id for decision in history.decisions(RUN)]
    assert ids == [f"{number:08x}" for number in range(4)], "decisions wait in memory, in their order"
    assert store.take_lost() == 3, "the profiles"
    assert "recording again" in caplog.text


def test_a_store_that_became_read_only_pauses(store: HistoryWriter) -> None:
    store._database.execute("PRAGMA query_only = ON")
    decide(store)
    observe(store)
    store.commit()
    assert not store.recording
    store._database.execute("PRAGMA query_only = OFF")


def test_outcomes_are_settled_once(store: HistoryWriter, history: HistoryReader) -> None:
    for number in range(4):
        decide(store, number)
    decide(store, 4, outcome="dry_run")
    store.record_ack(1.0, ack(0))
    store.record_ack(2.0, ack(0, outcome="duplicate"))
    store.record_outcome(f"{1:08x}", "unanswered")
    store.record_ack(3.0, ack(1, outcome="expired"))
    store.abandon_pending("another")
    store.record_ack(4.0, ack(2, outcome="duplicate"))
    store.record_ack(4.0, ack(2, outcome="refused"))
    store.abandon_pending(RUN)
    outcomes = [decision.commands[0].outcome for decision in history.decisions(RUN)]
    assert outcomes == ["applied", "expired", "refused", "unanswered", "dry_run"]
