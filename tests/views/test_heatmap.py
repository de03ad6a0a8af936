"""The heatmap: a PNG of the values, its scale and its description."""

from __future__ import annotations

import base64
import math
import re
from array import array
from pathlib import Path
from typing import Any

import pytest

from koopmon.views.heatmap import ANCHORS, heatmap, scale_of
from koopmon.views.spectra import QUANTITIES, Column


def column(step: int, *values: float) -> Column:
    return Column(step, {name: array("f", values) for name in QUANTITIES})


def pixels(found: str, directory: Path) -> Any:
    image = pytest.importorskip("matplotlib.image")
    url = re.search(r'src="data:image/png;base64,([^"]*)" alt=', found)
    assert url is not None
    (directory / "heat.png").write_bytes(base64.b64decode(url[1]))
    return (image.imread(directory / "heat.png") * 255).round()


def test_a_picture_is_a_png_of_the_values_with_the_last_layer_on_top(tmp_path: Path) -> None:
    seen = pixels(heatmap([column(1, 0.0, 0.5, 1.0), column(2, 1.0, math.nan, 7.0)], "near_unit_mass"), tmp_path)
    assert seen.shape == (3, 2, 4)
    low, middle, high = ([*ANCHORS[index], 255] for index in (0, 4, -1))
    assert seen[:, 0].tolist() == [high, middle, low]
    assert seen[0, 1].tolist() == high, "beyond the scale"
    assert seen[1, 1, 3] == 0, "what is not known is transparent"
    assert seen[2, 1].tolist() == high


def test_columns_of_several_depths_make_one_picture(tmp_path: Path) -> None:
    seen = pixels(heatmap([column(1, 0.0), column(2, 0.0, 1.0)], "expansive_mass"), tmp_path)
    assert seen.shape == (2, 2, 4)
    assert seen[0, 0, 3] == 0


def test_masses_go_to_one_and_radii_to_the_largest_within_bounds() -> None:
    assert scale_of([column(1, 9.0)], "near_unit_mass") == (0.0, 1.0)
    assert scale_of([column(1, 0.5), column(2, 2.0)], "spectral_radius") == (0.0, 2.0)
    assert scale_of([column(1, 0.5)], "spectral_radius") == (0.0, 1.2)
    assert scale_of([column(1, 90.0, math.nan, math.inf)], "spectral_radius") == (0.0, 3.0)
    assert "3 or more" in heatmap([column(1, 90.0)], "spectral_radius")
    assert "or more" not in heatmap([column(1, 0.5)], "spectral_radius")


def test_it_is_described_in_words() -> None:
    found = heatmap([column(3, 0.25), column(9, 0.5, 1.0)], "near_unit_mass", ("0-1", "2-3"), num_snapshots=10)
    assert (
        'alt="Near-unit mass of 2 layers in 2 snapshots, step 3 to 9. At the last one: mean 0.75, highest 1."' in found
    )
    assert "layer 2-3" in found
    assert "2 of 10 snapshots: the highest risks" in found
    assert "mean –, highest –" in heatmap([column(1, math.nan)], "near_unit_mass")
