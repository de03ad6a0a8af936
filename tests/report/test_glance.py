"""Facts at the top of a report: events, times and actions, without unsupported claims."""

from __future__ import annotations

import sqlite3

import pytest

from koopmon.report.glance import glance
from tests.report.recorder import Recorder, guarded


def test_a_guarded_run_at_a_glance(recorder: Recorder) -> None:
    assert glance(guarded(recorder).facts()) == {
        "State": "ended, last seen at step 200",
        "Risk": "0.40 or more from step 40; highest 0.85 at step 40",
        "Loss": "3 at the first high risk, then at most 4.5, 2.8 at the end (first and last: medians)",
        "LR scale": "down to 0.5 by 1 back-off, first at step 42",
        "Effect": "1 helped",
        "Snapshots": "101",
        "Time span": "20 s",
        "Share of step time": "1% on average, 1% at most; a start has a credit above the budget",
    }


def test_a_run_that_was_left_alone(recorder: Recorder) -> None:
    recorder.hello()
    for step in range(10):
        recorder.saw(step, 0.01 * step, 3.0)
    recorder.ended()
    told = glance(recorder.facts())
    assert told["Risk"] == "below 0.40 in all snapshots, highest 0.09 at step 9"
    assert told["Actions"] == "none was applied"
    assert told["Loss"] == "3 at first, 3 at the end"
    assert told["State"] == "ended, last seen at step 9"
    assert "Effect" not in told


def test_kss_a_stop_and_verdicts_are_counted(recorder: Recorder) -> None:
    recorder.hello()
    for step in range(10):
        recorder.saw(step, 0.9, 3.0)
    recorder.did(7, 0.9, lr_scale=0.5, after=0)
    recorder.did(8, 0.9, lr_scale=0.25, after=0)
    recorder.did(9, 0.9, alpha=0.15, after=0)
    for step in range(10, 20):
        recorder.saw(step, 0.1, 3.0)
    recorder.did(19, 0.1, lr_scale=0.3, after=0)
    told = glance(recorder.facts())
    assert told["LR scale"] == "down to 0.25 by 2 back-offs, first at step 7", "a return does not count"
    assert told["KSS"] == "raised once, to alpha 0.15, first at step 9"
    assert told["Effect"] == "2 cannot be told, 1 helped"
    assert told["Risk"] == "0.40 or more from step 0; highest 0.90 at step 0"


def test_ceilings_at_a_glance(recorder: Recorder) -> None:
    recorder.hello()
    for step in range(20):
        recorder.saw(step, 0.9 if step < 10 else 0.1, 3.0)
    recorder.did(5, 0.9, ceilings={0: 0.5}, after=2)
    assert glance(recorder.facts())["Ceilings"] == "on what layers write, once, first at step 7"
    recorder.did(15, 0.1, ceilings={}, after=1)
    assert glance(recorder.facts())["Ceilings"] == "on what layers write, once, first at step 7, released at step 16"
    recorder.did(18, 0.9, ceilings={0: 0.5}, after=1)
    assert glance(recorder.facts())["Ceilings"] == "on what layers write, 2 times, first at step 7"


@pytest.mark.parametrize(
    ("hello", "outcome", "detail", "name", "says"),
    [
        ({}, None, "", "Not sent", "1 command, because this job was only watched"),
        ({"acts": False}, "refused", "watch-only", "Not applied", "1 command; the first: refused (watch-only)"),
        ({}, "expired", "no answer", "Not applied", "1 command; the first: expired (no answer)"),
    ],
)
def test_what_was_not_applied_is_not_claimed(
    recorder: Recorder, hello: dict[str, bool], outcome: str | None, detail: str, name: str, says: str
) -> None:
    recorder.hello(**hello)
    for step in range(10):
        recorder.saw(step, 0.9)
    recorder.did(9, 0.9, outcome, lr_scale=0.5, detail=detail)  # type: ignore[arg-type]
    facts = recorder.facts()
    told = glance(facts)
    assert (told[name], told["Actions"], told["Loss"]) == (says, "none was applied", "not known")
    assert told["Risk"].endswith("still high at the end")
    assert facts.actions[0].effect is None


def test_what_fell_silent_and_what_was_left_behind(recorder: Recorder) -> None:
    recorder.hello()
    recorder.saw(4, 0.1)
    assert recorder.facts().state == "running"
    recorder.store.record_state(recorder.began, recorder.run, recorder.incarnation, 2)
    assert glance(recorder.facts())["State"] == "vanished without a goodbye, last seen at step 4"
    recorder.began -= 1000.0
    recorder.store.record_state(recorder.began, recorder.run, recorder.incarnation, 1)
    database = sqlite3.connect(recorder.path)
    recorder.store.commit()
    database.execute("UPDATE observations SET time = time - 1000")
    database.commit()
    database.close()
    assert glance(recorder.facts())["State"] == "no message for a while, last at step 4; its end is not recorded"
