"""Facts that separate bad runs from good ones, and the figures of a recorded run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from koopmon.history.reader import HistoryReader
from koopmon.views.comparison import ComparedRun, compared_run, shared_facts
from tests.report.recorder import NAN, Recorder, guarded


def run(bad: bool, **facts: Any) -> ComparedRun:
    known: dict[str, Any] = dict.fromkeys(
        ("last_step", "first_loss", "last_loss", "max_risk", "max_risk_step", "peak_learning_rate")
    )
    return ComparedRun(
        run="r",
        state="ended",
        problem="x" if bad else None,
        num_launches=1,
        num_snapshots=1,
        min_lr_scale=1.0,
        actions=(),
        facts=facts,
        **known,
    )


@pytest.mark.parametrize(
    ("bad", "good", "relation"),
    [
        (["a", "a"], ["b", "c"], "equal"),
        (["a", "a"], ["a", "b"], None),
        (["a", "b"], ["c"], None),
        ([True], [False, False], "equal"),
        ([2.0, 3.0], [0.5, 1.0], "above"),
        ([0.1, 0.2], [0.3], "below"),
        ([0.1, 0.3], [0.2], None),
        ([2.0, 2.0], [1.0, 3.0], "equal"),
        ([2.0, 2.5], [2.5], None),
        (["1", True], [2.0], None),
    ],
)
def test_a_fact_is_shared_by_the_bad_runs_alone(bad: list[Any], good: list[Any], relation: str | None) -> None:
    runs = [run(True, it=value) for value in bad] + [run(False, it=value) for value in good]
    assert [fact.relation for fact in shared_facts(runs)] == ([] if relation is None else [relation])


def test_a_fact_that_one_run_lacks_is_left_out() -> None:
    assert shared_facts([run(True, it=2.0), run(False)]) == []
    assert shared_facts([run(True), run(False, it=2.0)]) == []


@pytest.mark.parametrize("bad", [True, False])
def test_runs_of_one_kind_have_nothing_to_compare_with(bad: bool) -> None:
    assert shared_facts([run(bad, it=1.0), run(bad, it=1.0)]) == []


@pytest.mark.parametrize(
    ("bad", "good", "words"),
    [
        ("a", "b", "it: a (good runs: b)"),
        (True, False, "it: yes (good runs: no)"),
        (0.2, 0.1, "it: 0.2 (good runs: 0.1)"),
    ],
)
def test_a_fact_in_words(bad: Any, good: Any, words: str) -> None:
    (fact,) = shared_facts([run(True, it=bad), run(False, it=good)])
    assert fact.words == words


def test_a_range_in_words() -> None:
    bad, good = [run(True, it=0.3), run(True, it=0.4)], [run(False, it=0.1), run(False, it=0.2)]
    assert shared_facts(bad + good)[0].words == "it: 0.3 or more (good runs: 0.2 or less)"
    swapped = [run(True, it=0.1), run(True, it=0.2), run(False, it=0.3)]
    assert shared_facts(swapped)[0].words == "it: 0.2 or less (good runs: 0.3 or more)"


def compared(recorder: Recorder, act_risk: float = 0.4) -> ComparedRun:
    recorder.close()
    with HistoryReader.open(recorder.path) as history:
        return compared_run(history, recorder.path, recorder.run, act_risk, time.time())


def test_the_figures_of_a_guarded_run(tmp_path: Path) -> None:
    found = compared(guarded(Recorder(tmp_path / "h.sqlite3")))
    assert found.problem == "risk 0.40 or more from step 40 on"
    assert (found.last_step, found.num_snapshots, found.first_loss, found.last_loss) == (200, 101, 3.0, 2.8)
    assert (found.max_risk, found.max_risk_step, found.min_lr_scale) == (0.85, 40, 0.5)
    assert len(found.actions) == 1
    assert found.facts["width"] == 6.0
    assert found.facts["peak learning rate"] == 0.01
    assert found.facts["loss at the start"] == 3.0
    assert found.facts["koopmon may act"] is True


def test_the_configuration_decides_what_is_bad(tmp_path: Path) -> None:
    assert compared(guarded(Recorder(tmp_path / "h.sqlite3")), act_risk=0.9).problem is None


def test_a_loss_that_is_not_finite_is_bad_at_any_risk(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "h.sqlite3")
    recorder.hello()
    recorder.saw(1, 0.0, 3.0)
    recorder.saw(2, 0.0, NAN)
    found = compared(recorder)
    assert found.problem == "states or loss not finite from step 2 on"
    assert found.last_loss == 3.0


def test_a_run_without_snapshots_is_good_and_has_no_figures(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "h.sqlite3")
    recorder.hello()
    found = compared(recorder)
    assert (found.problem, found.max_risk, found.first_loss, found.min_lr_scale) == (None, None, None, 1.0)
    assert "peak learning rate" not in found.facts
