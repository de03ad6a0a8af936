"""Dashboards and pages of the package equal the output of their generators."""

from __future__ import annotations

from pathlib import Path

import pytest

from manual import write
from manual.dashboards import layout
from tests.docs.pages import ROOT

GRAFANA = ROOT / "koopmon" / "grafana"
WANTED = write.package_data()


@pytest.mark.parametrize("name", WANTED)
def test_a_file_of_the_package_is_what_its_generator_makes(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == WANTED[name], "run python -m manual.write"


def test_the_package_has_no_other_such_file() -> None:
    found = {path for kind in ("dashboards", "pages") for path in (GRAFANA / kind).iterdir()}
    assert found == {ROOT / name for name in WANTED}


def test_the_command_writes_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "ROOT", tmp_path)
    assert write.main() == 0
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written >= {*WANTED, "docs/alerts.md", "docs/metrics.md", write.EXPORT, write.RULES, write.MANIFEST}
    for name in written:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_a_row_and_its_panels_have_their_place() -> None:
    """A panel that does not fit beside the others is below the tallest of them."""
    panel = {"title": "x"}
    sizes = [(panel, 8, 9), (panel, 16, 4), (panel, 12, 3)]
    board = layout.dashboard("uid", "title", "text", {"One": sizes, "Two": sizes[:1]}, variables=(), links={})
    places = [tuple(each["gridPos"].values()) for each in board["panels"]]
    assert places == [(0, 0, 24, 1), (0, 1, 8, 9), (8, 1, 16, 4), (0, 10, 12, 3), (0, 13, 24, 1), (0, 14, 8, 9)]
    assert [each["id"] for each in board["panels"]] == [1, 2, 3, 4, 5, 6]
