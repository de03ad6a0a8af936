"""The page of a comparison: charts of all runs on one axis, and texts of peers as text only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from koopmon.config import PolicyConfig
from koopmon.report.comparison_page import comparison_page
from koopmon.views.comparison import SharedFact
from koopmon.views.run_summary import RecordedRun
from tests.factories import point
from tests.reading import Reading
from tests.report.browser import check_in_browser

HOSTILE = "</title></style><script>alert(1)</script>"


def recorded(name: str, first: int, last: int) -> RecordedRun:
    points = [point(step, loss=2.0) for step in (first, last)]
    return RecordedRun(name=name, launches=[], points=points, beats=[], decisions=[])


def made(*runs: RecordedRun, shared: list[SharedFact] | None = None) -> str:
    rows = {"verdict": ["good"] * len(runs), "actions": [f"one\n{HOSTILE}"] * len(runs)}
    return comparison_page(rows, shared or [], "no known fact", runs, PolicyConfig())


def test_all_runs_have_one_axis_of_steps() -> None:
    document = made(recorded("short", 1, 50), recorded("long", 1, 100))
    assert set(re.findall(r">step (\d+)</text>", document)) == {"1", "50", "100"}
    assert document.count(">step 100</text>") == 4, "risk and loss of each run; no rate is known"
    lines = re.findall(r'<polyline points="([^"]*)" class="line risk', document)
    assert [line.split()[-1].split(",")[0] for line in lines] == ["494.9", "1000.0"]


def test_a_run_without_snapshots_has_its_place() -> None:
    empty = RecordedRun(name="empty", launches=[], points=[], beats=[], decisions=[])
    read = Reading(made(empty, recorded("other", 1, 2)))
    assert [text for level, text in read.headings if level == 3] == ["empty", "other"]
    assert "no known fact" in read.text


def test_texts_of_peers_are_only_text() -> None:
    fact = SharedFact(fact=f"host{HOSTILE}", relation="equal", bad=("a",), good=("b",))
    read = Reading(made(recorded(HOSTILE, 1, 2), recorded("b", 1, 2), shared=[fact]))
    assert "script" not in {name for name, _ in read.tags}
    assert f"host{HOSTILE}: a (good runs: b)" in read.text


@pytest.mark.process
@pytest.mark.needs("chromium")
@pytest.mark.timeout(180)
def test_in_a_browser_it_is_accessible_and_fits_its_window(tmp_path: Path) -> None:
    check_in_browser(tmp_path, made(recorded("short", 1, 50), recorded("long", 1, 100)))
