"""Every number of a profile against dense numpy, the aggregates over depth, and bad samples."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("scipy")

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from koopmon.spectral import FIELDS, LayerProfile, SpectralProfile, profile_states, profile_transition

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
    for name in set(FIELDS) - {"kreiss_constant"}:
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
        (17, None, True, "few samples: N = 17, comfortably 20"),
        (20, None, True, ""),
        (8, 8, False, "too few samples: N = 8, svd_rank 8 needs N > 8"),
        (9, 8, True, "few samples: N = 9, comfortably 10"),
        (10, 8, True, ""),
        (1, None, False, "too few samples: N = 1"),
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
