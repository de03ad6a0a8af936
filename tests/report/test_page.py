"""The page stands alone, says everything without its pictures, and lets nobody write into it."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from koopmon import plots
from koopmon.report.markup import tag
from koopmon.report.page import page
from koopmon.report.pictures import DARK, draw
from tests.report.reading import Reading
from tests.report.recorder import NAN, Recorder, guarded

LOADING = ("src", "srcset", "href", "action", "data", "poster", "background", "xlink:href")


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    recorder = Recorder(tmp_path / "h.sqlite3")
    yield recorder
    recorder.close()


def check_alone(document: str) -> Reading:
    """The page, after it was seen to be whole and to need nothing from anywhere."""
    read = Reading(document)
    assert read.open == []
    assert "script" not in {name for name, _ in read.tags}
    loaded = [value for _, attributes in read.tags for key, value in attributes.items() if key in LOADING]
    assert all(value is not None and value.startswith("data:image/svg+xml;base64,") for value in loaded)
    assert not any(key.startswith("on") for _, attributes in read.tags for key in attributes)
    assert "url(" not in document
    assert "@import" not in document
    assert all(attributes.get("alt") for attributes in read.of("img"))
    levels = [level for level, _ in read.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return read


def test_a_guarded_run(recorder: Recorder, tmp_path: Path) -> None:
    facts = guarded(recorder, profiled=True).facts()
    pictures = draw(facts, tmp_path)
    read = check_alone(page(facts, pictures))
    assert [name for _, name in read.headings] == [
        "team/run-1",
        "At a glance",
        "Over time",
        "When the risk rose",
        "What was done, and whether it helped",
        "The spectra",
        "Layer by step",
        "Every decision",
        "Launches, sizes and versions",
        "What watching cost, and what was lost",
        "To look further",
    ]
    assert len(read.of("img")) == 3
    for words in (
        "the learning rate was halved at step 42",
        "learning rate × 0.5",
        "transformer, 3 layers, width 6",
        "koopmon 0.1, torch 2.13",
        f"koopmon replay team/run-1 --store {recorder.path} --policy lr",
    ):
        assert words in read.text
    for name in ("timeline", "spectra", "layers"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_follow_light_and_dark_and_load_nothing(recorder: Recorder, tmp_path: Path) -> None:
    pictures = draw(guarded(recorder, profiled=True).facts(), tmp_path)
    assert set(pictures) == {"timeline", "spectra", "layers"}
    for picture in pictures.values():
        for uri in (picture.wide, picture.narrow):
            text = base64.b64decode(uri.partition(",")[2]).decode()
            root = ElementTree.fromstring(text)
            style, _, drawn = text.partition("</style>")
            assert "prefers-color-scheme:dark" in style
            assert not any(light in drawn for light in DARK), "a colour that would stay as it is in the dark"
            assert "#000000" not in drawn
            links = [value for part in root.iter() for key, value in part.attrib.items() if key.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x07"


def check_harmless(recorder: Recorder, directory: Path) -> Reading:
    facts = recorder.facts()
    document = page(facts, draw(facts, directory), HOSTILE)
    read = check_alone(document)
    assert {name for name, _ in read.tags}.isdisjoint({"script", "b", "i", "u"})
    assert all((image["src"] or "").startswith("data:") for image in read.of("img"))
    assert "<script>alert(1)</script>" in read.text
    assert "\u202e" not in document
    assert "\x07" not in document
    return read


def test_what_a_peer_says_is_only_text(recorder: Recorder, tmp_path: Path) -> None:
    hostile = HOSTILE
    recorder.hello(hostname=hostile, adapter="<b>adapter</b>", koopmon_version="<i>", torch_version="<u>")
    for step in range(10):
        recorder.saw(step, 0.9, 3.0, profiled=step == 4)
    recorder.did(9, 0.9, "refused", lr_scale=0.5, detail=hostile, reason=hostile)
    recorder.ended(hostile)
    assert len(check_harmless(recorder, tmp_path).of("img")) == 3


def test_the_name_of_a_run_in_a_forged_store_is_only_text(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "h.sqlite3", run=f"a{HOSTILE}")
    recorder.saw(1, 0.9, 3.0, profiled=True)
    read = check_harmless(recorder, tmp_path)
    assert read.headings[0][1].startswith("a</title></style><script>alert(1)</script>")
    recorder.close()


@pytest.mark.parametrize("scene", ["nothing", "no hello", "not finite", "one snapshot", "restarted", "many decisions"])
def test_every_kind_of_run_has_a_page(recorder: Recorder, tmp_path: Path, scene: str) -> None:
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
    facts = recorder.facts()
    read = check_alone(page(facts, draw(facts, tmp_path)))
    says = {
        "nothing": "The ranks said hello, and no snapshot of theirs was judged.",
        "no hello": "No training process has said hello",
        "not finite": "No snapshot was profiled",
        "one snapshot": "It never did: no snapshot had a risk of 0.40 or more.",
        "restarted": "fedcba98",
        "many decisions": "50 more rows are in the data of --json.",
    }
    assert says[scene] in read.text


def test_without_matplotlib_there_are_tables(recorder: Recorder) -> None:
    facts = guarded(recorder, profiled=True).facts()
    read = check_alone(page(facts, {}, "pictures: drawing needs matplotlib: pip install 'koopmon[plots]'"))
    assert read.of("img") == []
    assert "pip install 'koopmon[plots]'" in read.text
    assert "at the calmest" in read.text
    assert "near-unit mass" in read.text


def test_the_same_facts_make_the_same_picture(recorder: Recorder, tmp_path: Path) -> None:
    facts = guarded(recorder, profiled=True).facts()
    assert draw(facts, tmp_path) == draw(facts, tmp_path)


def test_heatmaps_of_wide_spans_and_of_gaps_are_drawn(tmp_path: Path) -> None:
    rows = [[1.0, None, 5000.0], [None, None, None]]
    plots.png(plots.heatmaps([1, 2, 9], [("radius", rows)]), tmp_path / "h.png")
    plots.png(plots.heatmaps([4], [("mass", [[None]])], narrow=True), tmp_path / "g.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("h.png", "g.png"))


def test_an_attribute_is_escaped_and_only_markup_passes() -> None:
    assert tag("p", "<", tag("br"), ["&", None], title='"<') == '<p title="&quot;&lt;">&lt;<br>&amp;</p>'
