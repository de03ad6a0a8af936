"""The packed form of a profile: what it keeps, how large it is, and what it refuses."""

from __future__ import annotations

import math
import random
import tracemalloc
import zlib
from array import array
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from koopmon.history import plain_profile as form
from koopmon.history.plain_profile import FORMAT, QUANTITIES, STEPS, PlainProfile, pack, unpack
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.spectral.profiles import FIELDS
from tests.factories import noisy_profile, plain_profile


def profiled(num_layers: int = 3, **options: Any) -> SpectralProfile:
    generator = torch.Generator().manual_seed(0)
    states = torch.cumsum(torch.randn((num_layers + 1, 128, 64), generator=generator), dim=0)
    return profile_states(states, svd_rank=32, **options)


def again(profile: PlainProfile, **options: Any) -> PlainProfile:
    found, _ = unpack(pack(profile, None), non_finite=False, **options)
    assert found is not None
    return found


def test_the_quantities_are_the_numbers_of_a_layer() -> None:
    assert tuple(QUANTITIES) == FIELDS


@pytest.mark.parametrize("kreiss", ["always", "never"])
def test_a_profile_comes_back_rounded(kreiss: Any) -> None:
    told = profiled(kreiss=kreiss)
    found = again(PlainProfile.of(told))
    assert (found.num_samples, found.svd_rank, found.is_informative) == (128, 32, told.informative)
    assert (found.reason, found.reasons) == (told.reason, tuple(layer.reason for layer in told.layers))
    for name, column in found.columns.items():
        expected = [getattr(layer, name) for layer in told.layers]
        digits = 2**-24 if "mass" in name or name == "reliable_mode_ratio" else 2**-16
        assert column == (tuple(expected) if None in expected else pytest.approx(expected, rel=digits)), name
    for layer, flat in zip(told.layers, found.eigenvalues, strict=True):
        pairs = [complex(*pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
        assert pairs == pytest.approx(layer.eigenvalues.tolist(), abs=layer.spectral_radius / STEPS)
    whole = SpectralProfile.from_dict(found.to_dict())
    assert whole.risk == pytest.approx(told.risk)
    assert again(found) == found, "packed again, nothing more is lost"


def test_columns_are_read_without_the_eigenvalues() -> None:
    whole = PlainProfile.of(profiled())
    found = again(whole, eigenvalues=False)
    assert found.eigenvalues == ()
    assert found.columns == again(whole).columns


def test_a_deep_profile_takes_less_than_three_kilobytes() -> None:
    packed = pack(PlainProfile.of(profiled(48, kreiss="never")), None)
    assert packed is not None
    assert len(packed) < 3000


@pytest.mark.parametrize(
    "flat",
    [
        [],
        [0.5, 0.0],
        [0.5, 1e-9, 0.5, -1e-9],
        [0.5, 0.5, 0.5, -0.5, 0.25, 0.0],
        [0.5, 0.5],
        [0.5, -0.5],
        [0.5, 0.5, 0.25, -0.5],
        [0.5, -0.5, 0.5, 0.5],
        [-1.0, 0.0, 0.0, 0.0],
    ],
)
def test_eigenvalues_keep_their_number_and_order_also_without_conjugates(flat: list[float]) -> None:
    for layers in ([flat], [flat, [0.25, 0.0]], [[0.25, 0.0], flat], [flat, flat]):
        found = again(plain_profile(*(1.0 for _ in layers), eigenvalues=layers))
        for kept, told in zip(found.eigenvalues, layers, strict=True):
            assert list(kept) == pytest.approx(told, abs=1.0 / STEPS)


def test_a_pair_across_two_layers_is_two_eigenvalues() -> None:
    layers = [[0.5, 0.5], [0.5, -0.5]]
    found = again(plain_profile(1.0, 1.0, eigenvalues=layers))
    assert [list(flat) for flat in found.eigenvalues] == [pytest.approx(each, abs=1e-3) for each in layers]


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e300, 3.4028234e38])
def test_extreme_numbers_stay_finite(value: float) -> None:
    profile = plain_profile(0.0, eigenvalues=[[value, 0.0]])
    found = again(replace(profile, columns=profile.columns | {"spectral_radius": (value,), "update_ratio": (value,)}))
    assert found.columns["update_ratio"][0] == pytest.approx(min(value, 3.4028e38), rel=1e-4)
    assert all(map(math.isfinite, found.eigenvalues[0]))


def test_observables_are_kept_also_without_a_profile() -> None:
    seen = {"router_entropy": (0.5, None)}
    assert unpack(pack(None, seen), non_finite=True) == (None, {"router_entropy": [0.5, None]})
    assert pack(None, {}) is None
    assert unpack(None, non_finite=True) == (None, {})


def _packed(**fields: Any) -> bytes:
    """Pack the fields of a profile of two layers with one eigenvalue each, changed by `fields`."""
    numbers = array("f", [0.5] * 2 * len(QUANTITIES)).tobytes()
    known: dict[str, Any] = {"observables": {}, "counts": [1, 1], "num_samples": 8, "svd_rank": None}
    known |= {"informative": [True, True], "reasons": ["", ""], "is_informative": True, "reason": ""}
    known |= {"numbers": form._by_weight(numbers, 4), "halved": True, "eigenvalues": bytes(8)}
    return FORMAT + zlib.compress(msgspec.msgpack.encode(list((known | fields).values())))


def numbers_with(value: float) -> bytes:
    return form._by_weight(array("f", [value] + [0.5] * (2 * len(QUANTITIES) - 1)).tobytes(), 4)


def test_the_forged_profiles_differ_from_a_good_one_in_one_field() -> None:
    found, _ = unpack(_packed(), non_finite=False)
    assert found is not None
    assert found.num_layers == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"counts": []},
        {"counts": [1]},
        {"counts": [1, 2]},
        {"counts": [1, 0]},
        {"counts": [1, -1]},
        {"counts": [1, 1 << 40]},
        {"counts": [0] * 5000},
        {"counts": "two"},
        {"num_samples": -1},
        {"num_samples": 1 << 60},
        {"svd_rank": 1.5},
        {"informative": [True]},
        {"informative": [2, 3]},
        {"reasons": ["", "", ""]},
        {"reasons": ["x" * 5000, ""]},
        {"numbers": b""},
        {"numbers": bytes(7)},
        {"numbers": bytes(4 * 1000)},
        {"numbers": numbers_with(-0.5)},
        {"numbers": numbers_with(1.5)},
        {"numbers": numbers_with(math.inf)},
        {"eigenvalues": bytes(7)},
        {"eigenvalues": bytes(6)},
        {"eigenvalues": bytes(12)},
        {"eigenvalues": b"\xff\xff\xff\xff\x7f\x7f\x7f\x7f"},
        {"eigenvalues": bytes(4) + b"\x80\x80\x80\x80"},
        {"observables": {"a": ["x"]}},
        {"observables": 7},
        {"more": 1},
    ],
)
def test_a_forged_profile_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        unpack(_packed(**fields), non_finite=False)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", FORMAT, FORMAT + b"x", b"\x02" + _packed()[1:], _packed()[:-3], zlib.compress(b"[]"), b"x\x9c"]
    + [zlib.compress(text) for text in (b"{}", b'{"layers": [{}]}', b'{"layers": 7}', b"[" * 10_000)]
    + [FORMAT + zlib.compress(data) for data in (b"", b"\x90", b"\x91" * 10_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff")],
)
def test_bytes_that_are_no_profile_are_refused(data: bytes) -> None:
    with pytest.raises((zlib.error, ValueError, TypeError, msgspec.MsgspecError, RecursionError)):
        unpack(data, non_finite=False)


@pytest.mark.parametrize("first", [FORMAT, b""])
def test_a_profile_that_inflates_without_end_is_bounded(first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "MAX_PACKED_BYTES", 1 << 20)
    monkeypatch.setattr(form, "MAX_JSON_BYTES", 1 << 20)
    bomb = first + zlib.compress(bytes(256 << 20), 1)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="exceed 1048576 bytes"):
            unpack(bomb, non_finite=False)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_changed_bytes_are_refused_or_read_within_bounds() -> None:
    draw = random.Random(0)
    good = msgspec.msgpack.encode(msgspec.msgpack.decode(zlib.decompress((pack(noisy_profile(300), None) or b"")[1:])))
    outcomes = set()
    for _ in range(500):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            found, _ = unpack(FORMAT + zlib.compress(bytes(data), 1), non_finite=False)
        except (ValueError, TypeError, msgspec.MsgspecError):
            outcomes.add("refused")
            continue
        assert found is not None
        assert all(math.isfinite(each) for flat in found.eigenvalues for each in flat)
        outcomes.add("read")
    assert outcomes == {"refused", "read"}
