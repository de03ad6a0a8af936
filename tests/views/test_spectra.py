"""Columns and spectra of profiles, and the kept part of a long run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from koopmon.history.plain_profile import PlainProfile
from koopmon.history.rows import ProfileRow
from koopmon.spectral import profile_states
from koopmon.views import spectra
from koopmon.views.spectra import (
    QUANTITIES,
    Column,
    Profiles,
    Spectrum,
    layers_to_dict,
    mean_over_layers,
    read_profiles,
)
from tests.factories import plain_profile


def row(step: int, *values: float, incarnation: str = "aaaaaaaa", num_shards: int = 1, **fields: Any) -> ProfileRow:
    found = plain_profile(*values) if values else None
    known = {"id": 0, "time": 0.0, "masked": False, "seconds": 0.5, "non_finite": not values}
    known |= {"observables": {}, "profile": found}
    return ProfileRow(incarnation=incarnation, step=step, num_shards=num_shards, **{**known, **fields})


def read(rows: list[ProfileRow], *args: Any) -> Profiles:
    """Read the profiles of rows whose ids are their places in the list."""
    rows = [replace(each, id=index) for index, each in enumerate(rows)]
    return read_profiles(rows, lambda ids: [rows[index] for index in ids], *args)


def risks(*pairs: tuple[int, float]) -> dict[tuple[str, int], float]:
    return {("aaaaaaaa", step): risk for step, risk in pairs}


def test_a_column_and_a_spectrum_are_those_of_the_profile() -> None:
    generator = torch.Generator().manual_seed(0)
    found = profile_states(torch.cumsum(torch.randn((4, 64, 6), generator=generator), dim=0))
    plain = PlainProfile.of(found)
    column, spectrum = Column.of(5, plain), Spectrum.of(5, plain)
    for name in QUANTITIES:
        assert list(column.values[name]) == pytest.approx([getattr(each, name) for each in found.layers])
    assert spectrum.labels == ("0", "1", "2")
    for index, each in enumerate(found.layers):
        assert [complex(*pair) for pair in spectrum.pairs(index)] == pytest.approx(each.eigenvalues.tolist())
    assert (spectrum.num_samples, spectrum.informative) == (64, found.informative)
    assert max(spectrum.moduli()) == pytest.approx(found.max("spectral_radius"))


def test_many_layers_share_rows_only_where_asked() -> None:
    deep = plain_profile(*(0.01 * index for index in range(100)))
    shared, whole = Column.of(1, deep), Column.of(1, deep, share=False)
    assert (len(shared.values["near_unit_mass"]), len(whole.values["near_unit_mass"])) == (50, 100)
    assert shared.values["near_unit_mass"][1] == pytest.approx(0.025), "mean of two layers"
    assert shared.values["spectral_radius"][1] == pytest.approx(0.03), "the larger one"
    assert Spectrum.of(1, deep).labels[1] == "2-3"
    assert Spectrum.of(1, deep).pairs(1) == [pytest.approx((0.02, 0.0))]
    assert len(Spectrum.of(1, deep, share=False).labels) == 100


def test_the_calmest_the_alarm_and_the_last_are_chosen() -> None:
    rows = [row(step, 0.1 * step) for step in range(8)]
    found = read(
        rows, risks((0, 0.0), (1, 0.3), (2, 0.1), (3, 0.2), (4, 0.9), (5, 0.05), (7, 0.2)), ("aaaaaaaa", 4), {}
    )
    chosen = [(each.name, each.spectrum.step, each.risk) for each in found.spectra]
    assert chosen == [("calm", 2, 0.1), ("alarm", 4, 0.9), ("after", 7, 0.2)], (
        "the first snapshot and later ones are out"
    )
    assert [column.step for column in found.columns] == list(range(8))
    assert found.mean_seconds == 0.5
    assert math.isnan(mean_over_layers(Column.of(1, plain_profile(math.nan)), "spectral_radius"))
    assert mean_over_layers(found.spectra[0].column, "near_unit_mass") == pytest.approx(0.2)


def test_the_alarm_itself_is_not_the_calmest() -> None:
    rows = [row(step, 0.1) for step in range(1, 4)]
    found = read(rows, risks((1, 0.9), (2, 0.8), (3, 0.5)), ("aaaaaaaa", 3), {})
    assert [(each.name, each.spectrum.step) for each in found.spectra] == [("calm", 2), ("alarm", 3)]


def test_without_an_alarm_the_last_launch_is_shown_and_no_snapshot_twice() -> None:
    rows = [row(0, 0.1), row(1, 0.2), row(0, 0.3, incarnation="bbbbbbbb"), row(1, 0.4, incarnation="bbbbbbbb")]
    found = read(rows, {("bbbbbbbb", 1): 0.1, ("aaaaaaaa", 1): 0.2}, None, {"bbbbbbbb": 2})
    assert [(each.name, each.incarnation) for each in found.spectra] == [("calm", "bbbbbbbb")]
    assert (found.incarnation, found.num_snapshots, found.num_incomplete) == ("bbbbbbbb", 2, 2)


def test_the_alarm_falls_back_to_the_nearest_profile() -> None:
    found = read([row(2, 0.1), row(6, 0.2), row(9, 0.3)], {}, ("aaaaaaaa", 7), {})
    assert [(each.name, each.spectrum.step) for each in found.spectra] == [("alarm", 6), ("after", 9)]
    late = read([row(8, 0.1), row(9, 0.3)], {}, ("aaaaaaaa", 7), {})
    assert [(each.name, each.spectrum.step) for each in late.spectra] == [("alarm", 8), ("after", 9)]


def test_nothing_profiled() -> None:
    found = read([row(1), row(2)], risks((1, 0.1)), None, {})
    assert (found.spectra, found.columns, found.incarnation) == ((), (), "")
    assert found.mean_seconds == 0.5
    assert read([], {}, None, {}).mean_seconds is None


def test_columns_beyond_the_most_are_those_of_the_highest_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "MAX_COLUMNS", 2)
    rows = [row(1, 0.2), row(2, 0.4), row(3, 0.8), row(4, 0.9)]
    found = read(rows, risks((1, 0.1), (2, 0.3), (4, 0.1)), None, {})
    assert [column.step for column in found.columns] == [2, 4]
    plain = layers_to_dict(found.columns)
    assert (plain["steps"], plain["expansive_mass"]) == ([2, 4], [[pytest.approx(0.4)], [pytest.approx(0.9)]])
    assert found.num_snapshots == 4
    even = read(rows, {}, None, {})
    assert [column.step for column in even.columns] == [1, 3], "the first of equal ones"


def test_only_the_selected_profiles_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "MAX_COLUMNS", 3)
    rows = [row(step, 0.1 * step, id=step) for step in range(30)]
    asked: list[int] = []

    def load(ids: Any) -> Any:
        asked.extend(ids)
        return [rows[each] for each in ids]

    found = read_profiles(rows, load, risks((3, 0.01), (12, 0.9)), ("aaaaaaaa", 12), {})
    assert asked == [3, 12, 20, 29]
    assert [each.name for each in found.spectra] == ["calm", "alarm", "after"]


def test_a_profile_that_was_deleted_meanwhile_is_left_out() -> None:
    heads = [row(step, 0.1, id=step) for step in range(3)]
    found = read_profiles(heads, lambda ids: [row(1, 0.1, id=1)], {}, None, {})
    assert [column.step for column in found.columns] == [1]
    assert found.spectra == ()
