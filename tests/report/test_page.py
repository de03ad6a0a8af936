"""The page is self-contained, its tables have the data of its charts, and it escapes untrusted text."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from koopmon.history.plain_profile import PlainProfile
from koopmon.report.page import page
from koopmon.spectral import profile_states
from tests.reading import Reading
from tests.report.browser import check_in_browser
from tests.report.recorder import NAN, Recorder, guarded, states

LOADING = ("src", "srcset", "href", "action", "data", "poster", "background", "xlink:href")


def check_alone(document: str) -> Reading:
    """Return the page after a check that it is complete and self-contained."""
    read = Reading(document)
    assert "script" not in {name for name, _ in read.tags}
    loaded = [value for _, attributes in read.tags for key, value in attributes.items() if key in LOADING]
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in loaded)
    assert not any(key.startswith("on") for _, attributes in read.tags for key in attributes)
    assert "url(" not in document
    assert "@import" not in document
    assert all(attributes.get("alt") for attributes in read.of("img"))
    labels = ("aria-label", "aria-hidden", "x", "preserveaspectratio")
    assert all(any(each.get(name) for name in labels) for each in read.of("svg"))
    levels = [level for level, _ in read.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return read


def test_a_guarded_run(recorder: Recorder) -> None:
    read = check_alone(page(guarded(recorder, profiled=True).facts()))
    assert [name for level, name in read.headings if level < 3] == [
        "team/run-1",
        "At a glance",
        "Over time",
        "Periods of high risk",
        "Actions and their effect",
        "Spectra",
        "Layers over steps",
        "Decisions",
        "Launches",
        "Overhead and lost snapshots",
        "Further analysis",
    ]
    assert len([each for each in read.of("img") if each["class"] == "heat"]) == 4
    assert len([each for each in read.of("svg") if each.get("class") == "circle"]) == 3
    assert len([each for each in read.of("svg") if each.get("class") == "chart"]) == 4
    for words in (
        "down to 0.5 by 1 back-off, first at step 42",
        "learning rate × 0.5",
        "transformer, 3 layers, width 6",
        "koopmon 0.1, torch 2.13",
        "lowest risk",
        "near-unit mass",
        f"koopmon replay team/run-1 --store {recorder.path} --policy lr",
    ):
        assert words in read.text


def test_each_cell_has_the_title_of_its_column(recorder: Recorder) -> None:
    read = check_alone(page(guarded(recorder, profiled=True).facts()))
    cells = [each for kind in ("td", "th") for each in read.of(kind) if each.get("scope") != "col"]
    assert {each["data-label"] for each in cells} >= {
        "snapshot",
        "reason at the start",
        "verdict",
        "tokens",
        "versions",
    }
    assert all(each["role"] in ("cell", "rowheader") for each in cells)


@pytest.mark.process
@pytest.mark.needs("chromium")
@pytest.mark.timeout(180)
def test_in_a_browser_it_is_accessible_and_fits_its_window(recorder: Recorder, tmp_path: Path) -> None:
    check_in_browser(tmp_path, page(guarded(recorder, profiled=True).facts()))


def test_a_restart_and_kss_are_drawn(recorder: Recorder) -> None:
    recorder.hello()
    for step in range(10):
        recorder.saw(step, 0.9, 3.0)
    recorder.did(9, 0.9, alpha=0.15)
    recorder.incarnation = "fedcba98"
    recorder.hello(step=5)
    for step in range(5, 20):
        recorder.saw(step, 0.1, 3.0 if step < 19 else NAN)
    read = check_alone(page(recorder.facts()))
    kinds = [each["class"] for each in read.of("polyline")]
    assert [kind for kind in kinds if kind and "risk" in kind] == ["line risk earlier", "line risk"]
    assert "line kss" in kinds
    assert [each["class"] for each in read.of("g") if "broken" in (each.get("class") or "")] == ["broken"]


def test_a_launch_whose_number_of_layers_changed_has_a_page(recorder: Recorder) -> None:
    recorder.hello()
    recorder.saw(1, 0.1, profiled=True)
    short = PlainProfile.of(profile_states(states()[:3]))
    times = {"num_shards": 2, "masked": False, "seconds": 0.1, "observables": {}}
    recorder.store.record_profile(recorder.began, recorder.run, recorder.incarnation, 2, profile=short, **times)
    read = check_alone(page(recorder.facts()))
    assert "Near-unit mass of 3 layers in 2 snapshots" in (read.of("img")[0]["alt"] or "")


HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x07"


def check_harmless(recorder: Recorder) -> Reading:
    document = page(recorder.facts())
    read = check_alone(document)
    assert {name for name, _ in read.tags}.isdisjoint({"script", "b", "i", "u"})
    assert all((image["src"] or "").startswith("data:") for image in read.of("img"))
    assert "<script>alert(1)</script>" in read.text
    assert "\u202e" not in document
    assert "\x07" not in document
    return read


def test_what_a_peer_says_is_only_text(recorder: Recorder) -> None:
    hostile = HOSTILE
    recorder.hello(hostname=hostile, adapter="<b>adapter</b>", koopmon_version="<i>", torch_version="<u>")
    for step in range(10):
        recorder.saw(step, 0.9, 3.0, profiled=step == 4)
    recorder.did(9, 0.9, "refused", lr_scale=0.5, detail=hostile, reason=hostile)
    recorder.ended(hostile)
    check_harmless(recorder)


@pytest.mark.parametrize("scene", ["nothing", "no hello", "not finite", "one snapshot", "restarted", "many decisions"])
def test_every_kind_of_run_has_a_page(recorder: Recorder, scene: str) -> None:
    if scene == "no hello":
        recorder.store.record_state(recorder.began, recorder.run, recorder.incarnation, 1)
    else:
        recorder.hello()
    if scene == "not finite":
        recorder.saw(1, 0.0, 3.0)
        recorder.saw(2, 1.0, NAN, non_finite=True)
    if scene in ("one snapshot", "restarted"):
        recorder.saw(1, 0.0, profiled=True)
    if scene == "restarted":
        recorder.incarnation = "fedcba98"
        recorder.hello(step=1)
        recorder.saw(1, 0.0, profiled=True)
        recorder.saw(2, 0.9, profiled=True)
    if scene == "many decisions":
        for step in range(350):
            recorder.saw(step, 0.9)
            recorder.did(step, 0.9, dense=True)
    read = check_alone(page(recorder.facts()))
    says = {
        "nothing": "The ranks connected, but no snapshot was judged.",
        "no hello": "No training process of this run connected",
        "not finite": "No snapshot was profiled",
        "one snapshot": "None: no snapshot had a risk of 0.40 or more.",
        "restarted": "Launch 2.",
        "many decisions": "50 more rows are in the data of --json.",
    }
    assert says[scene] in read.text
