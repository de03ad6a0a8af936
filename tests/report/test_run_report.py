"""Content of a report from a history; the real store wrote every history."""

from __future__ import annotations

import gzip
import json
import sqlite3
import zlib
from pathlib import Path

import pytest

from koopmon.errors import StoreError
from koopmon.history.reader import HistoryReader
from koopmon.report.glance import glance
from koopmon.report.run_report import build_report
from koopmon.views import spectra
from tests.report.recorder import NAN, Recorder, guarded

SCHEMA_1 = Path(__file__).parent.parent / "history" / "stores" / "schema-1.sqlite3.gz"


def test_a_guarded_run(recorder: Recorder) -> None:
    facts = guarded(recorder, profiled=True).facts()
    (action,) = facts.actions
    assert (action.outcome, action.step, action.direction) == ("applied", 42, "restrain")
    effect = action.effect
    assert effect is not None
    assert (effect.verdict, effect.num_before, effect.num_after) == ("helped", 8, 8)
    assert effect.why == "the risk fell, the loss held"
    assert (effect.risk_before, effect.loss_before) == (0.85, 3.0)
    assert [(each.first_step, each.last_step, each.peak) for each in facts.episodes] == [(40, 50, 0.85)]
    spectra = facts.profiles.spectra
    assert [(each.name, each.spectrum.step) for each in spectra] == [("calm", 8), ("alarm", 40), ("after", 200)]
    assert len(spectra[0].spectrum.eigenvalues) == 3
    assert {len(values) for values in facts.profiles.columns[0].values.values()} == {3}
    assert facts.state == "ended"
    (command,) = json.loads(json.dumps(facts.to_dict()))["decisions"][0]["commands"]
    assert (command["what"], command["delay_steps"]) == ("learning rate × 0.5", 2)
    assert command["effect"]["verdict"] == "helped"


def test_a_run_whose_states_were_not_finite(recorder: Recorder) -> None:
    recorder.hello()
    recorder.saw(1, 0.0, 3.0)
    recorder.saw(2, 0.1, 3.0)
    recorder.saw(3, 1.0, NAN, non_finite=True)
    facts = recorder.facts()
    assert glance(facts)["States or loss"] == "not finite from step 3 on"
    assert (facts.profiles.spectra, facts.profiles.columns) == ((), ())
    assert facts.agent.num_not_finite == 1
    assert facts.to_dict()["points"][2]["loss"] is None


def test_nobody_came(recorder: Recorder) -> None:
    recorder.store.record_state(recorder.began, recorder.run, recorder.incarnation, 1)
    facts = recorder.facts()
    assert (glance(facts)["State"], glance(facts)["Risk"]) == ("running", "not known, no snapshot was judged")
    assert facts.launches[0].hello is None


def test_a_restart_is_a_second_launch(recorder: Recorder) -> None:
    recorder.hello()
    for step in range(10):
        recorder.saw(step, 0.9, 3.0)
    recorder.did(9, 0.9, lr_scale=0.5)
    recorder.incarnation, recorder.scale = "fedcba98", 0.5
    recorder.hello(step=5)
    for step in range(5, 20):
        recorder.saw(step, 0.1, 3.0, profiled=step == 10)
    recorder.did(12, 0.1, lr_scale=0.6)
    facts = recorder.facts()
    assert [(each.first_step, each.last_step, each.num_snapshots) for each in facts.launches] == [
        (0, 9, 10),
        (5, 19, 15),
    ]
    assert [each.direction for each in facts.actions] == ["restrain", "release"], "the second launch began at 0.5"
    assert facts.actions[0].effect is not None
    assert facts.actions[0].effect.verdict == "cannot be told", "the other launch is no witness of this one"
    assert (glance(facts)["State"], glance(facts)["Launches"]) == ("running at step 19", "2")
    assert facts.episodes[0].last_step == 9, "what was high ended with its launch"


def test_the_loss_of_a_launch_from_the_first_step_does_not_follow_the_alarm(recorder: Recorder) -> None:
    recorder.hello()
    for step in range(30):
        recorder.saw(step, 0.9 if step >= 20 else 0.1, 3.0)
    recorder.incarnation = "fedcba98"
    recorder.hello()
    for step in range(30):
        recorder.saw(step, 0.1, 9.0 - 0.2 * step)
    course = recorder.facts().loss
    assert course is not None
    assert course.highest == pytest.approx(9.0 - 0.2 * 20), "of the second launch, the steps from the alarm on"


@pytest.mark.parametrize(("kept", "count"), [(1.0, 3), (0.5, 2)])
def test_back_offs_are_counted_from_the_scale_with_which_a_launch_begins(
    recorder: Recorder, kept: float, count: int
) -> None:
    recorder.hello()
    recorder.saw(1, 0.9)
    recorder.did(1, 0.9, lr_scale=0.5)
    recorder.incarnation, recorder.scale = "fedcba98", kept
    recorder.hello()
    recorder.saw(1, 0.1)
    if kept < 1.0:
        recorder.did(1, 0.1, lr_scale=0.75)
    recorder.did(2, 0.9, lr_scale=0.5)
    recorder.did(3, 0.9, lr_scale=0.25 if kept == 1.0 else 0.5)
    summary = recorder.facts().summary
    assert (summary.num_backoffs, summary.min_lr_scale) == (count, 0.25 if kept == 1.0 else 0.5)


def test_the_forecast_is_that_of_the_detector(recorder: Recorder) -> None:
    recorder.hello()
    recorder.saw(1, 0.1, components={"prior": 0.0, "growth": 0.0})
    recorder.saw(2, 0.1, components={"unsteadiness": 1.0})
    assert [point.forecast for point in recorder.facts().points] == [0.5, None]


def test_a_long_run_is_thinned_to_the_columns_of_a_page(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "MAX_COLUMNS", 3)
    recorder.hello()
    for step in range(7):
        recorder.saw(step, 0.1 * step, profiled=True)
    profiles = recorder.facts().profiles
    assert ([column.step for column in profiles.columns], profiles.num_snapshots) == ([2, 5, 6], 7)
    with HistoryReader.open(recorder.path) as history:
        radii = [
            row.profile.columns["spectral_radius"] for row in history.profiles(recorder.run) if row.profile is not None
        ]
    assert list(profiles.columns[0].values["spectral_radius"]) == pytest.approx(radii[2]), "the one of the highest risk"


def test_snapshots_without_every_rank_are_counted(recorder: Recorder) -> None:
    recorder.hello()
    recorder.saw(1, 0.1, profiled=True, num_shards=1)
    recorder.saw(2, 0.1, profiled=True)
    assert recorder.facts().agent.num_incomplete == 1


def test_a_store_of_an_older_schema(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite3"
    path.write_bytes(gzip.decompress(SCHEMA_1.read_bytes()))
    with HistoryReader.open(path) as history:
        for run in history.runs():
            facts = build_report(history, path, run)
            assert facts.points
            assert glance(facts)["State"]
            assert facts.to_dict()["points"]


def test_a_store_that_was_tampered_with_is_one_line(recorder: Recorder) -> None:
    recorder.hello()
    recorder.saw(1, 0.1, profiled=True)
    recorder.saw(2, 0.1, profiled=True)
    recorder.close()
    database = sqlite3.connect(recorder.path)
    database.execute("UPDATE profiles SET profile = ?", (zlib.compress(b'{"layers": [{"eigenvalues": ["x"]}]}'),))
    database.commit()
    database.close()
    with (
        HistoryReader.open(recorder.path) as history,
        pytest.raises(StoreError, match="profiles: a row cannot"),
    ):
        build_report(history, recorder.path, recorder.run)
