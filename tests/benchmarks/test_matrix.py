"""A slice of the support matrix under one torchrun, and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.matrix import __main__ as matrix
from benchmarks.matrix import page
from benchmarks.matrix.cells import SLICE, cells

EXPECTED = {"pp-gpipe": "refused", "pp-gpipe/whole": "refused"}
"""All other cells are proven."""


@pytest.mark.distributed
def test_the_slice_is_what_the_page_says(tmp_path: Path) -> None:
    arguments = ["--cells", "slice", "--work", str(tmp_path), "--out", str(tmp_path / "out.json")]
    assert matrix.main(arguments) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert {row["name"]: row["state"] for row in told["cells"]} == {
        name: EXPECTED.get(name, "proven") for name in SLICE
    }
    kss = {row["name"]: row.get("kss_refused", "") for row in told["cells"]}
    assert {name for name, why in kss.items() if why} == {"tp-sequence", "ddp/inner"}
    before = (tmp_path / "cells.jsonl").read_text()
    assert matrix.main(arguments) == 0, "what is finished is not tried again"
    assert (tmp_path / "cells.jsonl").read_text() == before


def test_cells_have_names_of_their_own_and_the_slice_is_among_them() -> None:
    names = [cell.name for cell in cells()]
    assert len(set(names)) == len(names)
    assert set(SLICE) <= set(names)
    assert {cell.parallel for cell in cells()} == set(page.LAYOUTS)


def test_a_line_that_was_cut_short_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_text('{"name": "ddp", "state": "proven"}\n{"name": "fsdp1", "sta')
    assert set(matrix._told(tmp_path / "cells.jsonl")) == {"ddp"}


def test_nothing_to_try_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["--only", "nonsense"])
    assert "no cell is left" in capsys.readouterr().err
