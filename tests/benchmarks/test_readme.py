"""Figures in the pages equal the results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.readme import WRITERS


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_no_page_is_stale(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme.SECTION.search(text)
    assert readme.rendered(text) == text, "run python -m benchmarks.readme"


@pytest.mark.parametrize("name", WRITERS)
def test_every_result_has_its_place_and_a_changed_figure_is_noticed(name: str, tmp_path: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in readme.PAGES)
    assert f"<!-- results: {name} -->" in text
    results = tmp_path / "results"
    shutil.copytree(readme.RESULTS, results)
    told = json.loads((results / f"{name}.json").read_text())
    (results / f"{name}.json").write_text(json.dumps(_doubled(told)))
    assert readme.rendered(text, results) != text


def _doubled(value: object) -> object:
    """Double every fraction."""
    if isinstance(value, dict):
        return {key: _doubled(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_doubled(each) for each in value]
    return 2 * value if isinstance(value, float) else value


def test_unknown_and_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="results: nonsense: allowed are unchanged_script"):
        readme.rendered("<!-- results: nonsense -->\n<!-- end of results -->")
    with pytest.raises(ValueError, match=r"norm_table\.json is missing; run python -m benchmarks\.norm_table"):
        readme.rendered("<!-- results: norm_table -->\n<!-- end of results -->", tmp_path)
