"""Every number of a profile against dense numpy, the aggregates over depth, and bad samples."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("scipy")

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from koopmon.spectral import (
    FIELDS,
    LayerProfile,
    SpectralProfile,
    profile_in_batches,
    profile_states,
    profile_transition,
    update_exponent,
)
from koopmon.spectral import profile as profile_module
from koopmon.spectral.dmd import Operators, fit

torch.set_num_threads(1)

EPSILON = 1e-5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed_transition(num_samples: int = 400) -> tuple[Tensor, Tensor]:
    """Build x, y (N, 12) with modes of every band, half of each with strong noise."""
    moduli = torch.tensor([1.4, 1.2, 1.0, 1.02, 0.95, 0.92, 0.85, 0.86, 0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
    vectors = torch.eye(12, dtype=torch.float64) + 0.3 * normal(12, 12, seed=1)
    operator = vectors @ torch.diag(moduli) @ torch.linalg.inv(vectors)
    x = normal(num_samples, 12, seed=2) * torch.logspace(0, -1, 12, dtype=torch.float64) + 5.0
    drowned = torch.tensor([0.0, 1.0] * 6, dtype=torch.float64)
    noise = 0.2 * (normal(num_samples, 12, seed=3) * drowned) @ vectors.T
    return x, x @ operator.T + noise - 2.0


def dense(x_ND: Tensor, y_ND: Tensor, svd_rank: int | None, ridge: float) -> dict[str, Any]:
    """Compute the definitions of docs/method.md: symmetric whitening, least squares, left and right eigenvectors."""
    lengths, updates = (np.log(np.linalg.norm(rows, axis=1)) for rows in (x_ND.numpy(), (y_ND - x_ND).numpy()))
    variance = lengths.var() + 0.05 / (2 * x_ND.shape[1])
    exponent = np.cov(lengths, updates, bias=True)[0, 1] / variance
    x, y = x_ND.numpy() - x_ND.numpy().mean(0), y_ND.numpy() - y_ND.numpy().mean(0)
    if svd_rank is not None:
        basis = np.linalg.svd(x, full_matrices=False)[2][:svd_rank].T
        x, y = x @ basis, y @ basis
    covariance = x.T @ x / (len(x) - 1) + ridge * np.eye(x.shape[1])
    whitening = np.linalg.inv(scipy.linalg.sqrtm(covariance).real)
    x, y = x @ whitening, y @ whitening
    operator = np.linalg.lstsq(x, y, rcond=None)[0].T
    eigenvalues, left, right = scipy.linalg.eig(operator, left=True, right=True)
    modulus = np.abs(eigenvalues)
    near_unit = (modulus >= 0.90) & (modulus <= 1.05)
    residuals = np.array(
        [
            np.linalg.norm(u.conj() @ (y.T - value * x.T)) / (np.linalg.norm(u.conj() @ x.T) + EPSILON)
            for value, u in zip(eigenvalues, left.T, strict=True)
        ]
    )
    reliable = residuals <= 0.1
    return {
        "eigenvalues": eigenvalues,
        "near_unit_mass": near_unit.mean(),
        "expansive_mass": (modulus > 1.05).mean(),
        "contractive_mass": (modulus < 0.80).mean(),
        "spectral_radius": modulus.max(),
        "eigenvector_condition_number": np.linalg.cond(right / np.linalg.norm(right, axis=0)),
        "nonlinearity_ratio": np.linalg.norm(y - x @ operator.T) / (np.linalg.norm(y - x) + EPSILON),
        "update_ratio": np.linalg.norm(y - x) / np.linalg.norm(x),
        "update_exponent": exponent,
        "reliable_mode_ratio": reliable.mean(),
        "reliable_near_unit_mass": (near_unit & reliable).sum() / max(reliable.sum(), 1),
        "stream_rms": np.sqrt((y_ND.numpy() ** 2).mean()),
    }


@pytest.mark.parametrize("svd_rank", [None, 7])
@pytest.mark.parametrize("ridge", [1e-5, 0.05])
def test_every_field_equals_the_dense_computation(svd_rank: int | None, ridge: float) -> None:
    x, y = mixed_transition()
    profile = profile_transition(x, y, svd_rank=svd_rank, ridge=ridge, kreiss="never")
    wanted = dense(x, y, svd_rank, ridge)
    assert np.sort_complex(profile.eigenvalues.numpy()) == pytest.approx(np.sort_complex(wanted.pop("eigenvalues")))
    assert set(wanted) == set(FIELDS) - {"kreiss_constant"}
    for name, value in wanted.items():
        assert getattr(profile, name) == pytest.approx(value, rel=1e-8), name
    assert profile.kreiss_constant is None
    assert (profile.num_samples, profile.svd_rank) == (400, svd_rank)
    assert profile.informative
    assert not profile.reason


def test_the_transition_has_every_kind_of_mode() -> None:
    """Without each kind, the test above would compare zeros."""
    x, y = mixed_transition()
    profile = profile_transition(x, y)
    assert 0 < profile.near_unit_mass < 1
    assert 0 < profile.expansive_mass < 1
    assert 0 < profile.contractive_mass < 1
    assert profile.near_unit_mass + profile.expansive_mass + profile.contractive_mass < 1
    assert 0.3 < profile.reliable_mode_ratio < 0.7
    assert profile.reliable_near_unit_mass not in (0.0, profile.near_unit_mass)
    assert profile.kreiss_constant is not None
    ridged = profile_transition(x, y, ridge=0.05)
    assert ridged.eigenvector_condition_number != pytest.approx(profile.eigenvector_condition_number, rel=1e-3)


def test_complex_modes_are_compared_too() -> None:
    x = normal(200, 9, seed=4) * torch.logspace(0, -1, 9, dtype=torch.float64)
    y = x @ normal(9, 9, seed=5) / 3 + 0.05 * normal(200, 9, seed=6)
    profile = profile_transition(x, y, kreiss="never")
    assert (profile.eigenvalues.imag != 0).any()
    wanted = dense(x, y, None, 1e-5)
    for name in set(FIELDS) - {"kreiss_constant"}:
        assert getattr(profile, name) == pytest.approx(wanted[name], rel=1e-8), name


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_profiles_do_not_depend_on_units_if_the_ridge_has_them_too(factor: float) -> None:
    x, y = mixed_transition()
    plain = profile_transition(x, y, ridge=1e-3, kreiss="never")
    scaled = profile_transition(factor * x, factor * y, ridge=1e-3 * factor**2, kreiss="never")
    assert plain.stream_rms is not None
    assert scaled.stream_rms == pytest.approx(factor * plain.stream_rms)
    for name in set(FIELDS) - {"kreiss_constant", "stream_rms"}:
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name), rel=1e-6), name


def stack(num_layers: int) -> SpectralProfile:
    """Build a profile in which every field differs between layers."""
    template = profile_transition(*mixed_transition())
    layers = [
        replace(template, **{name: float(np.sin(3 * index + place)) for place, name in enumerate(FIELDS)})
        for index in range(num_layers)
    ]
    return SpectralProfile(layers=tuple(layers))


@pytest.mark.parametrize("name", FIELDS)
def test_aggregates_over_layers(name: str) -> None:
    profile = stack(6)
    values = np.array([getattr(layer, name) for layer in profile.layers])
    assert profile.mean(name) == pytest.approx(values.mean())
    assert profile.max(name) == values.max()
    assert profile.min(name) == values.min()
    assert profile.std(name) == pytest.approx(values.std())
    assert tuple(profile.thirds(name)) == pytest.approx(tuple(values.reshape(3, 2).mean(1)))


def test_thirds_of_a_depth_that_three_does_not_divide() -> None:
    profile = stack(7)
    values = [layer.spectral_radius for layer in profile.layers]
    wanted = np.mean(values[:2]), np.mean(values[2:5]), np.mean(values[5:])
    assert tuple(profile.thirds("spectral_radius")) == pytest.approx(wanted)
    one = stack(1)
    assert set(one.thirds("spectral_radius")) == {one.layers[0].spectral_radius}


def test_a_missing_kreiss_constant_stays_missing() -> None:
    profile = profile_states([normal(40, 4, seed=seed) for seed in range(4)], kreiss="never")
    assert profile.mean("kreiss_constant") is profile.max("kreiss_constant") is profile.std("kreiss_constant") is None
    assert tuple(profile.thirds("kreiss_constant")) == (None, None, None)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"'radius'.*spectral_radius"):
        stack(2).mean("radius")


def test_risk_is_the_mean_near_unit_mass_of_the_informative_layers() -> None:
    layers = stack(4).layers
    still = replace(layers[0], informative=False, reason="constant input")
    profile = SpectralProfile(layers=(still, *layers[1:]))
    assert profile.informative
    assert profile.risk == pytest.approx(np.mean([layer.near_unit_mass for layer in layers[1:]]))
    assert profile.reason == "1 of 4 layers: constant input"
    assert SpectralProfile(layers=(still, still, *layers[2:3])).risk is None


@pytest.mark.parametrize("svd_rank", [None, 5])
def test_a_profile_survives_json(svd_rank: int | None) -> None:
    x, y = mixed_transition()
    profile = profile_states([x, y, torch.ones_like(x), x], svd_rank=svd_rank)
    text = json.dumps(profile.to_dict(), allow_nan=False)
    back = SpectralProfile.from_dict(json.loads(text))
    assert back.to_dict() == profile.to_dict()
    assert back.risk == profile.risk
    for layer, other in zip(profile.layers, back.layers, strict=True):
        assert torch.equal(layer.eigenvalues, other.eigenvalues)
        assert layer.eigenvalues.dtype == other.eigenvalues.dtype
        assert (layer.num_samples, layer.svd_rank, layer.reason) == (other.num_samples, other.svd_rank, other.reason)


def assert_finite(layer: LayerProfile) -> None:
    for name in FIELDS:
        value = getattr(layer, name)
        assert value is None or np.isfinite(value), name
    assert torch.isfinite(torch.view_as_real(layer.eigenvalues)).all()


@pytest.mark.parametrize("svd_rank", [None, 4])
@pytest.mark.parametrize("value", [0.0, 1 / 3, 1e4])
def test_constant_input_is_not_informative(svd_rank: int | None, value: float) -> None:
    x = torch.full((50, 8), value)
    layer = profile_transition(x, normal(50, 8, seed=7).float(), svd_rank=svd_rank)
    assert_finite(layer)
    assert not layer.informative
    assert layer.reason == "constant input"


def test_rank_deficient_input_is_not_informative() -> None:
    x = normal(100, 8, seed=8) @ normal(8, 16, seed=9)
    layer = profile_transition(x, x @ normal(16, 16, seed=10))
    assert_finite(layer)
    assert not layer.informative
    assert layer.reason == "rank-deficient input: 8 of 16 directions present"
    assert len(layer.eigenvalues) == 8


def test_the_direction_that_a_layer_norm_removes_is_only_a_caution() -> None:
    x = torch.nn.functional.layer_norm(normal(200, 32, seed=11), (32,))
    layer = profile_transition(x, x + 0.5 * torch.tanh(x @ normal(32, 32, seed=12)))
    assert_finite(layer)
    assert layer.informative
    assert layer.reason == "31 of 32 directions present"
    assert len(layer.eigenvalues) == 31


@pytest.mark.parametrize(
    ("num_samples", "svd_rank", "informative", "reason"),
    [
        (15, None, False, "too few samples: N = 15, full rank needs N >= D = 16"),
        (16, None, True, "15 of 16 directions present; few samples: N = 16, comfortably 20"),
        (17, None, True, "few samples: N = 17, comfortably 20"),
        (20, None, True, ""),
        (8, 8, False, "too few samples: N = 8, svd_rank 8 needs N > 8"),
        (9, 8, True, "few samples: N = 9, comfortably 10"),
        (10, 8, True, ""),
        (1, None, False, "too few samples: N = 1"),
        (0, 8, False, "too few samples: N = 0"),
    ],
)
def test_too_few_samples(num_samples: int, svd_rank: int | None, informative: bool, reason: str) -> None:
    x, y = normal(num_samples, 16, seed=13), normal(num_samples, 16, seed=14)
    layer = profile_transition(x, y, svd_rank=svd_rank)
    assert_finite(layer)
    assert layer.informative == informative
    assert layer.reason.startswith(reason)
    assert bool(layer.reason) == bool(reason)


@pytest.mark.parametrize("svd_rank", [None, 6])
def test_an_identity_layer_is_uninformative_until_it_moves(svd_rank: int | None) -> None:
    x, y = mixed_transition()
    still = profile_transition(x, x + 1.0, svd_rank=svd_rank)
    assert still.update_ratio == pytest.approx(0.0, abs=1e-12)
    assert still.near_unit_mass == 1.0
    assert not still.informative
    assert "until layers move" in still.reason
    assert SpectralProfile(layers=(still,)).risk is None
    assert profile_transition(x, x + 0.05 * (y - x), svd_rank=svd_rank).informative


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("svd_rank", [None, 6])
def test_half_precision_is_converted(dtype: torch.dtype, svd_rank: int | None) -> None:
    x, y = (state.to(dtype) for state in mixed_transition())
    half = profile_transition(x, y, svd_rank=svd_rank)
    single = profile_transition(x.float(), y.float(), svd_rank=svd_rank)
    assert half.to_dict() == single.to_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert profile_transition(x, y, svd_rank=svd_rank).to_dict() == single.to_dict()


@pytest.mark.parametrize("svd_rank", [None, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_non_finite_input_is_named(svd_rank: int | None, bad: float, dtype: torch.dtype) -> None:
    states = [normal(40, 6, seed=seed).to(dtype) for seed in range(4)]
    for index in range(4):
        spoiled = [state.clone() for state in states]
        spoiled[index][7, 2] = bad
        with pytest.raises(ValueError, match=rf"^states\[{index}\] holds NaN or infinite"):
            profile_states(spoiled, svd_rank=svd_rank)
    for name, (x, y) in {"x": (spoiled[3], states[0]), "y": (states[0], spoiled[3])}.items():
        with pytest.raises(ValueError, match=f"^{name} holds NaN or infinite"):
            profile_transition(x, y, svd_rank=svd_rank)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"svd_rank": 0}, "svd_rank = 0"),
        ({"ridge": -1.0}, "ridge = -1.0"),
        ({"ridge": float("nan")}, "ridge = nan"),
        ({"kreiss": "sometimes"}, "kreiss = 'sometimes'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_transition(*mixed_transition(), **arguments)


def test_pairs_are_the_transitions_of_their_own() -> None:
    x, y = mixed_transition()
    z, w = y.flip(1), x
    profile = profile_states([x, y, z, w], paired=True)
    for layer, (start, end) in zip(profile.layers, ((x, y), (z, w)), strict=True):
        alone = profile_transition(start, end)
        assert torch.equal(layer.eigenvalues, alone.eigenvalues)
        assert layer.update_ratio == alone.update_ratio
    with pytest.raises(ValueError, match="3 given, pairs need an even number"):
        profile_states([x, y, z], paired=True)


def test_states_of_different_shapes_are_refused_with_their_name() -> None:
    x = normal(20, 4, seed=15)
    with pytest.raises(ValueError, match=r"^states\[1\] has shape .*20, 5"):
        profile_states([x, normal(20, 5, seed=16)])
    with pytest.raises(ValueError, match=r"y has dtype torch\.int64"):
        profile_transition(x, x.long())
    with pytest.raises(ValueError, match="at least 2"):
        profile_states([x])


SURVIVAL = """
import torch
from koopmon.spectral import profile_transition
torch.set_num_threads(1)
refused = finite = 0
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for bad in (float("nan"), float("inf"), torch.finfo(dtype).max, torch.finfo(dtype).tiny):
        for svd_rank in (None, 8):
            for spoiled in range(2):
                for everywhere in (False, True):
                    states = [torch.randn(64, 24).to(dtype) for _ in range(2)]
                    states[spoiled][slice(None) if everywhere else slice(3, 5)] = bad
                    if everywhere:
                        states[spoiled][::2] *= -1
                    try:
                        layer = profile_transition(*states, svd_rank=svd_rank)
                    except ValueError:
                        refused += 1
                    else:
                        finite += all(map(lambda value: abs(value) < float("inf"), layer.to_dict()["eigenvalues"][0]))
print(refused, finite)
"""


@pytest.mark.process
def test_no_value_crashes_the_process() -> None:
    """NaN in an eigendecomposition ends the process without an exception, so the test uses another process."""
    done = subprocess.run([sys.executable, "-c", SURVIVAL], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["48", "48"]


def test_means_of_a_stack_of_one_and_two_layers() -> None:
    one, two = stack(1), stack(2)
    (alone,) = (layer.update_ratio for layer in one.layers)
    assert tuple(one.thirds("update_ratio")) == (alone, alone, alone)
    first, second = (layer.update_ratio for layer in two.layers)
    assert tuple(two.thirds("update_ratio")) == pytest.approx((first, (first + second) / 2, second))
    assert one.std("update_ratio") == 0.0


def test_deviations_of_values_whose_squares_overflow() -> None:
    layers = stack(4).layers
    values = (1e300, -1e300, 1e300, -1e300)
    profile = SpectralProfile(layers=tuple(replace(a, update_ratio=v) for a, v in zip(layers, values, strict=True)))
    assert profile.std("update_ratio") == pytest.approx(1e300)
    largest = (sys.float_info.max, -sys.float_info.max) * 2
    profile = SpectralProfile(layers=tuple(replace(a, update_ratio=v) for a, v in zip(layers, largest, strict=True)))
    assert profile.std("update_ratio") == pytest.approx(sys.float_info.max)
    assert np.isfinite(profile.std("update_ratio"))


@pytest.mark.parametrize("values", [(-2.0, 2.0), (-0.5, 0.5, 0.0), (1e300, 3e300), (-3e300, 1e300, 1e300)])
def test_deviations_are_from_the_mean(values: tuple[float, ...]) -> None:
    """A mean of 0 is a mean, and squares that overflow keep theirs."""
    layers = stack(len(values)).layers
    profile = SpectralProfile(layers=tuple(replace(a, update_ratio=v) for a, v in zip(layers, values, strict=True)))
    unit = max(map(abs, values))
    assert profile.std("update_ratio") / unit == pytest.approx(np.std(np.array(values) / unit))


def test_some_layers_without_a_kreiss_constant_leave_the_others() -> None:
    layers = stack(3).layers
    profile = SpectralProfile(layers=(replace(layers[0], kreiss_constant=None), *layers[1:]))
    values = [layer.kreiss_constant for layer in layers[1:]]
    assert profile.mean("kreiss_constant") == pytest.approx(np.mean(values))
    assert profile.max("kreiss_constant") == max(values)
    assert profile.min("kreiss_constant") == min(values)


def with_informative(*flags: bool) -> SpectralProfile:
    return SpectralProfile(
        layers=tuple(
            replace(layer, informative=flag, reason="" if flag else "constant input", update_exponent=float(index))
            for index, (layer, flag) in enumerate(zip(stack(len(flags)).layers, flags, strict=True))
        )
    )


def test_half_of_the_layers_make_a_profile_informative() -> None:
    assert with_informative(True, False).informative
    assert with_informative(True, False, True, False).informative
    assert not with_informative(True, False, False).informative
    assert with_informative(False, True, True, False).update_exponent == 1.0, "the first informative one and a median"
    blind = with_informative(True, False, False)
    assert (blind.risk, blind.update_exponent) == (None, None)
    assert blind.reason == "2 of 3 layers: constant input"


def test_a_stack_has_the_samples_and_the_rank_of_its_layers() -> None:
    states = [normal(40, 6, seed=seed) for seed in range(4)]
    profile = profile_states(states, svd_rank=3)
    assert (profile.num_layers, profile.num_samples, profile.svd_rank) == (3, 40, 3)
    assert profile_states(states).svd_rank is None


def test_every_layer_is_in_its_place_whatever_its_rank() -> None:
    """Layers of another rank are fitted apart."""
    full = [normal(60, 8, seed=seed) for seed in range(5)]
    deficient = full[2] @ normal(8, 8, seed=9)[:, :4] @ normal(4, 8, seed=10)
    states = [full[0], full[1], deficient, full[3], full[4]]
    profile = profile_states(states, kreiss="never")
    assert [len(layer.eigenvalues) for layer in profile.layers] == [8, 8, 4, 8]
    for layer, (x, y) in zip(profile.layers, pairwise(states), strict=True):
        alone = profile_transition(x, y, kreiss="never")
        assert layer.eigenvalues.numpy() == pytest.approx(alone.eigenvalues.numpy(), rel=1e-9)
        assert layer.update_exponent == pytest.approx(alone.update_exponent)


def test_memory_bounds_the_layers_that_are_fitted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(x: Tensor, *rest: Tensor) -> Any:
        sizes.append(len(x))
        return fit(x, *rest)

    monkeypatch.setattr("koopmon.spectral.profile.fit", counted)
    states = [normal(60, 8, seed=seed) for seed in range(8)]
    profile_states(states, kreiss="never")
    assert sizes == [7]
    sizes.clear()
    monkeypatch.setattr("koopmon.spectral.profile._BATCH_ELEMENTS", 3 * 60 * 8)
    profile_states(states, kreiss="never")
    assert sizes == [3, 3, 1]


def test_two_layers_of_the_width_4096_are_a_batch_of_the_monitor() -> None:
    layer = torch.zeros(512, 4096)
    profiling = profile_in_batches([layer] * 6, svd_rank=2, kreiss="never")
    assert sum(1 for _ in profiling) == 2, "pauses between batches of 2, 2 and 1 layers"


def test_a_rank_of_the_whole_width_is_full_rank() -> None:
    x, y = normal(50, 20, seed=19).float(), normal(50, 20, seed=20).float()
    double = profile_transition(x.double(), y.double()).eigenvalues
    for svd_rank in (20, 30):
        assert torch.equal(profile_transition(x, y, svd_rank=svd_rank).eigenvalues, double)
    assert profile_transition(x, y, svd_rank=19).eigenvalues.shape == (19,)


@pytest.mark.parametrize("svd_rank", [None, 4, 32])
@pytest.mark.parametrize("width", [40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_layers_is_dense_numpy_layer_by_layer(svd_rank: int | None, width: int, dtype: torch.dtype) -> None:
    """The spectrum decays, so that float32 products find the directions."""
    turn = torch.linalg.qr(normal(width, width, seed=50)).Q
    states = [(normal(300, width, seed=51) * 0.8 ** torch.arange(width).clamp_max(45)) @ turn]
    for each in range(3):
        states.append(states[-1] + 0.3 * torch.tanh(states[-1] @ normal(width, width, seed=52 + each) / width**0.5))
    rounded = [state.to(dtype) for state in states]
    for given in (rounded, torch.stack(rounded)):
        profile = profile_states(given, svd_rank=svd_rank, kreiss="never")
        for layer, (x, y) in zip(profile.layers, pairwise(rounded), strict=True):
            wanted = dense(x.double(), y.double(), svd_rank, 1e-5)
            for name in ("update_ratio", "nonlinearity_ratio", "update_exponent", "spectral_radius"):
                assert getattr(layer, name) == pytest.approx(wanted[name], rel=1e-3, abs=1e-4), name


def test_exponents_of_extreme_states_do_not_overflow() -> None:
    x = normal(60, 6, seed=60).float()
    plain = profile_transition(x, x * (1.0 + x.norm(dim=1, keepdim=True)))
    large = profile_transition(1e25 * x, 1e25 * x * (1.0 + x.norm(dim=1, keepdim=True)))
    assert large.update_exponent == pytest.approx(plain.update_exponent, rel=1e-5)
    y = 1e25 * x * x.norm(dim=1, keepdim=True)
    wanted = update_exponent(x.double(), y.double()).item()
    assert profile_transition(x, y).update_exponent == pytest.approx(wanted, rel=1e-5), "one of the two is extreme"


@pytest.mark.parametrize(("name", "default", "other"), [("seed", 0, 1), ("ridge", 1e-5, 2e-5)])
def test_the_seed_is_0_and_the_ridge_that_of_the_paper_by_default(name: str, default: float, other: float) -> None:
    x = normal(300, 280, seed=1)
    y = x.sin()
    for profile in (profile_transition, lambda *states, **options: profile_states(states, **options).layers[0]):
        found, given, changed = (
            profile(x, y, svd_rank=4, kreiss="never", **options).eigenvalues
            for options in ({}, {name: default}, {name: other})
        )
        assert torch.equal(found, given)
        assert not torch.equal(found, changed)


@pytest.mark.parametrize("num_directions", [256, 257])
def test_a_kreiss_constant_is_computed_up_to_256_directions(
    num_directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(operator: Tensor, eigen: object) -> Tensor:
        asked.append(operator.shape[-1])
        return torch.ones(len(operator), dtype=torch.float64)

    monkeypatch.setattr("koopmon.spectral.profile.kreiss_constant", counted)
    x = normal(320, num_directions, seed=1)
    y = x + 0.3 * normal(320, num_directions, seed=2)
    profile_transition(x, y)
    assert asked == [256] * (num_directions == 256)
    profile_transition(x, y, kreiss="never")
    asked.clear()
    profile_transition(x, y, kreiss="always")
    assert asked == [num_directions]


@pytest.mark.parametrize(("present", "informative"), [(8, False), (9, True), (10, True)])
def test_nine_tenths_of_the_directions_are_enough(present: int, informative: bool) -> None:
    x = normal(200, 10, seed=3)
    x[:, present:] = 0.0
    layer = profile_transition(x, x @ normal(10, 10, seed=4))
    assert layer.informative == informative
    missing = f"{present} of 10 directions present"
    assert layer.reason == {8: f"rank-deficient input: {missing}", 9: missing, 10: ""}[present]
    assert len(layer.eigenvalues) == present


@pytest.mark.parametrize(("ratio", "informative"), [(0.0099, False), (0.0101, True)])
def test_a_layer_is_informative_from_an_update_ratio_of_a_hundredth_on(ratio: float, informative: bool) -> None:
    x = normal(400, 6, seed=5)
    x = x - x.mean(0)
    layer = profile_transition(x, (1.0 + ratio) * x)
    assert layer.update_ratio == pytest.approx(ratio, rel=1e-9)
    assert layer.informative is informative


def test_a_direction_is_present_from_a_millionth_of_the_largest_on() -> None:
    for share, found in ((0.9e-6, 5), (1.2e-6, 6)):
        x = torch.linalg.qr(normal(100, 6, seed=6) - normal(100, 6, seed=6).mean(0)).Q
        x = torch.linalg.qr(x - x.mean(0)).Q * torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, share], dtype=torch.float64)
        assert len(profile_transition(x, 2.0 * x, kreiss="never").eigenvalues) == found


def test_a_layer_without_modes_has_these_numbers() -> None:
    layer = profile_transition(torch.ones(50, 8), torch.zeros(50, 8), svd_rank=4)
    numbers = layer.to_dict()
    assert numbers.pop("eigenvalues") == []
    assert numbers.pop("eigenvector_condition_number") == 1.0
    assert numbers.pop("kreiss_constant") is None
    assert (numbers.pop("num_samples"), numbers.pop("svd_rank")) == (50, 4)
    assert (numbers.pop("informative"), numbers.pop("reason")) == (False, "constant input")
    assert list(numbers.values()) == pytest.approx([0.0] * len(numbers), abs=1e-12)


def test_values_that_overflow_are_not_informative_and_finite() -> None:
    x = normal(60, 6, seed=7)
    layer = profile_transition(1e-200 * x, 1e200 * x, kreiss="never")
    assert_finite(layer)
    assert not layer.informative
    assert layer.reason == "values overflow"


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([torch.zeros(4, 3)], "1 given, at least 2"),
        ([torch.zeros(4, 3), torch.zeros(4, 2)], r"states\[1\] has shape"),
        ([torch.zeros(4, 3), torch.zeros(5, 3)], r"states\[1\] has shape"),
        ([torch.zeros(4), torch.zeros(4)], r"states\[0\] has shape"),
        ([torch.zeros(4, 0), torch.zeros(4, 0)], r"states\[0\] has shape"),
        ([torch.zeros(4, 3, dtype=torch.int64)] * 2, r"states\[0\] has dtype"),
    ],
)
def test_states_that_are_none_are_named(states: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_states(states)


def test_a_width_of_one_and_a_rank_of_one_are_allowed() -> None:
    x = normal(40, 1, seed=8)
    assert profile_transition(x, 0.5 * x).spectral_radius == pytest.approx(0.5)
    wide = normal(40, 5, seed=8)
    assert len(profile_transition(wide, 0.5 * wide, svd_rank=1).eigenvalues) == 1
    assert profile_transition(wide, 0.5 * wide, ridge=0.0).spectral_radius == pytest.approx(0.5)


def measured(monkeypatch: pytest.MonkeyPatch, eigenvalues: list[complex], residuals: list[float]) -> LayerProfile:
    """A layer whose fit had exactly these eigenvalues and residuals."""

    def exact(x: Tensor, y: Tensor, *rest: Tensor) -> Operators:
        values = torch.tensor([eigenvalues], dtype=torch.complex128)
        return replace(fit(x, y, *rest), eigenvalues=values, residuals=torch.tensor([residuals], dtype=torch.float64))

    monkeypatch.setattr("koopmon.spectral.profile.fit", exact)
    x = normal(60, len(eigenvalues), seed=9)
    return profile_transition(x, x + normal(60, len(eigenvalues), seed=10), kreiss="never")


def test_both_ends_of_the_near_unit_band_belong_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expansive is above 1.05, contractive below 0.8, and 0.1 is a residual of a reliable mode."""
    layer = measured(monkeypatch, [1.0500001, 1.05, 1.0, -0.9, 0.8999999, 0.8, 0.7999999j, 0.0], [0.1] * 8)
    assert (layer.near_unit_mass, layer.expansive_mass, layer.contractive_mass) == (3 / 8, 1 / 8, 2 / 8)
    assert (layer.spectral_radius, layer.reliable_mode_ratio) == (1.0500001, 1.0)
    assert layer.reliable_near_unit_mass == 3 / 8


@pytest.mark.parametrize(
    ("residuals", "ratio", "mass"),
    [
        ([0.1, 0.2, 0.2, 0.2], 0.25, 1.0),
        ([0.2, 0.2, 0.2, 0.1000001], 0.0, 0.0),
        ([0.1, 0.2, 0.0, 0.2], 0.5, 0.5),
        ([0.1, 0.1, 0.1, 0.1], 1.0, 0.5),
    ],
)
def test_the_near_unit_share_of_the_reliable_modes(
    residuals: list[float], ratio: float, mass: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = measured(monkeypatch, [1.0, 1.0, 0.5, 0.5], residuals)
    assert (layer.reliable_mode_ratio, layer.reliable_near_unit_mass) == (ratio, mass)


def test_products_of_large_states_are_exact_whatever_the_mode_of_the_caller() -> None:
    """A bfloat16 product would leave three digits."""
    x = normal(400, 300, seed=11) * torch.logspace(0, -2, 300, dtype=torch.float64)
    y = 0.5 * x + 0.2 * x.sin()
    wanted = profile_transition(x, y, svd_rank=6, kreiss="never").eigenvalues.numpy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = profile_transition(x.float(), y.float(), svd_rank=6, kreiss="never").eigenvalues.numpy()
    assert np.sort_complex(found) == pytest.approx(np.sort_complex(wanted), rel=5e-4)


def test_batches_give_the_same_profile_and_leave_the_modes_of_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.cumsum(torch.randn((9, 40, 6), generator=torch.Generator().manual_seed(3)), dim=0)
    whole = profile_states(states, svd_rank=4, kreiss="never")
    monkeypatch.setattr(profile_module, "_BATCH_ELEMENTS", 1)
    profiling, pauses = profile_in_batches(states, svd_rank=4, kreiss="never"), 0
    while True:
        try:
            next(profiling)
        except StopIteration as end:
            split = end.value
            break
        pauses += 1
        assert torch.is_grad_enabled()
    assert pauses == 7, "one between two of the eight layers"
    for one, other in zip(whole.layers, split.layers, strict=True):
        assert torch.allclose(one.eigenvalues, other.eigenvalues)
        assert one.update_exponent == other.update_exponent


@pytest.mark.parametrize("size", [1, 2])
def test_batches_of_pairs_give_the_profile_of_each_pair(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn((10, 40, 6), generator=torch.Generator().manual_seed(5))
    pairs = zip(states[::2], states[1::2], strict=True)
    alone = [profile_transition(x, y, svd_rank=4, kreiss="never") for x, y in pairs]
    monkeypatch.setattr(profile_module, "_BATCH_ELEMENTS", size * 40 * 6)
    found = profile_states(states, svd_rank=4, kreiss="never", paired=True).layers
    assert [each.update_ratio for each in found] == pytest.approx([each.update_ratio for each in alone])
    assert [each.stream_rms for each in found] == pytest.approx([each.stream_rms for each in alone])


def test_one_batch_is_the_profile_itself() -> None:
    """The defaults of both are the same."""
    states = torch.cumsum(torch.randn((4, 40, 6), generator=torch.Generator().manual_seed(4)), dim=0)
    profiling = profile_in_batches(states, svd_rank=3)
    with pytest.raises(StopIteration) as end:
        next(profiling)
    for one, other in zip(profile_states(states, svd_rank=3).layers, end.value.value.layers, strict=True):
        assert torch.equal(one.eigenvalues, other.eigenvalues)
