"""Koopman Spectral Shaping: the loss of docs/method.md, its two gradients, and refused input."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("scipy")

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from koopmon.spectral import kss_basis, kss_gradient, kss_loss

torch.set_num_threads(1)

TERMS: dict[str, dict[str, float]] = {
    "defaults": {},
    "unstable penalty alone": {"beta": 0.0, "tau_u": 0.7},
    "near-unit target alone": {"tau_u": 50.0, "tau_l": 0.5, "gamma": 0.3},
    "everything changed": {"temperature": 7.0, "tau_u": 0.8, "tau_l": 0.5, "gamma": 0.1, "beta": 3.0, "ridge": 0.05},
}
SIZE = 6


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(seed: int = 0) -> Tensor:
    return normal(40, SIZE, seed=seed) * torch.linspace(1.5, 0.5, SIZE, dtype=torch.float64) + 2.0


def random_transition() -> tuple[Tensor, Tensor]:
    x = samples()
    return x, x @ normal(SIZE, SIZE, seed=1) / SIZE**0.5 + 0.1 * normal(40, SIZE, seed=2)


def rotating_transition() -> tuple[Tensor, Tensor]:
    """Build three rotating planes: conjugate pairs with moduli around the thresholds."""
    x = samples(seed=3)
    blocks = [
        m * torch.tensor([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], dtype=torch.float64)
        for m, a in ((1.1, 0.5), (0.97, 1.3), (0.8, 2.2))
    ]
    return x, x @ torch.block_diag(*blocks).T + 0.02 * normal(40, SIZE, seed=4)


def residual_transition() -> tuple[Tensor, Tensor]:
    x = samples(seed=5)
    return x, x + 0.3 * torch.tanh(x @ normal(SIZE, SIZE, seed=6))


def repeating_transition() -> tuple[Tensor, Tensor]:
    """Build three planes with equal rotations, two of them to 1e-9: repeated and nearly repeated conjugate pairs."""
    x = samples(seed=9)
    blocks = [
        torch.tensor([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], dtype=torch.float64)
        for a in (0.7, 0.7, 0.7 + 1e-9)
    ]
    centred = x - x.mean(0)
    white = torch.linalg.qr(centred).Q * 40**0.5  # the whitened operator is then the intended normal one
    return white, white @ torch.block_diag(*blocks).T


TRANSITIONS = [random_transition, rotating_transition, residual_transition, repeating_transition]


def written_out(x_ND: Tensor, y_ND: Tensor, basis_DR: Tensor, **arguments: float) -> float:
    """Compute the formula of docs/method.md in numpy, with the eigenvalues of the ridged Gram regression."""
    defaults = {"temperature": 20.0, "tau_u": 1.05, "tau_l": 0.90, "gamma": 0.4, "beta": 1.0, "ridge": 1e-3}
    given = defaults | arguments
    x = (x_ND - x_ND.mean(0)).numpy() @ basis_DR.numpy()
    y = (y_ND - y_ND.mean(0)).numpy() @ basis_DR.numpy()
    gram = x.T @ x / (len(x) - 1)
    gram += given["ridge"] * np.trace(gram) / len(gram) * np.eye(len(gram))
    modulus = np.abs(np.linalg.eigvals((y.T @ x / (len(x) - 1)) @ np.linalg.inv(gram)))
    slope = given["temperature"]
    excess = modulus - given["tau_u"]
    unstable = (expit(slope * excess) * np.logaddexp(0, excess) ** 2).sum()
    soft_mass = (expit(slope * (modulus - given["tau_l"])) * expit(-slope * excess)).mean()
    return float(unstable + given["beta"] * (soft_mass - given["gamma"]) ** 2)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("svd_rank", [3, SIZE])
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_the_loss_is_the_written_formula(
    transition: Callable[[], tuple[Tensor, Tensor]], svd_rank: int, terms: dict[str, float]
) -> None:
    x, y = transition()
    basis = kss_basis(x, svd_rank)
    wanted = pytest.approx(written_out(x, y, basis, **terms), rel=1e-9)
    assert kss_loss(x, y, basis=basis, **terms).item() == wanted
    assert kss_loss(x, y, svd_rank=svd_rank, **terms).item() == wanted
    assert kss_gradient(x, y, basis, **terms).loss.item() == wanted


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_gradcheck_at_a_fixed_basis(transition: Callable[[], tuple[Tensor, Tensor]], terms: dict[str, float]) -> None:
    x, y = (state[:10].clone().requires_grad_() for state in transition())
    basis = kss_basis(x, 4)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return kss_loss(x, y, basis=basis, **terms)

    assert torch.autograd.gradcheck(loss, (x, y), atol=1e-6)


def autograd(x: Tensor, y: Tensor, basis: Tensor, **terms: Any) -> tuple[Tensor, Tensor]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    gradients = torch.autograd.grad(kss_loss(x, y, basis=basis, **terms), (x, y))
    return gradients[0], gradients[1]


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("svd_rank", [3, SIZE])
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_the_closed_form_equals_autograd(
    transition: Callable[[], tuple[Tensor, Tensor]], svd_rank: int, terms: dict[str, float]
) -> None:
    x, y = transition()
    basis = kss_basis(x, svd_rank)
    found = kss_gradient(x, y, basis, **terms)
    assert found.ok
    for closed, wanted in zip((found.grad_x, found.grad_y), autograd(x, y, basis, **terms), strict=True):
        scale = wanted.abs().max()
        assert scale > 0
        assert (closed - wanted).abs().max() < 1e-10 * scale


def test_the_rotating_transition_has_conjugate_pairs() -> None:
    """The comparison above needs conjugate pairs."""
    x, y = (state - state.mean(0) for state in rotating_transition())
    assert (torch.linalg.eigvals(torch.linalg.lstsq(x, y).solution).imag.abs() > 0.1).all()


def test_a_batch_equals_one_by_one() -> None:
    pairs = [transition() for transition in TRANSITIONS]
    x, y = (torch.stack(states) for states in zip(*pairs, strict=True))
    basis = kss_basis(x, 4)
    together = kss_gradient(x, y, basis)
    assert together.ok.all()
    for index, (x_ND, y_ND) in enumerate(pairs):
        grad_x, grad_y = autograd(x_ND, y_ND, basis[index])
        torch.testing.assert_close(together.grad_x[index], grad_x, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(together.grad_y[index], grad_y, rtol=1e-9, atol=1e-13)
        assert together.loss[index].item() == pytest.approx(kss_loss(x_ND, y_ND, basis=basis[index]).item(), rel=1e-10)


def test_a_step_against_the_gradient_lowers_the_loss() -> None:
    x, y = rotating_transition()
    basis = kss_basis(x, 4)
    found = kss_gradient(x, y, basis)
    step = 0.1 * found.loss / (found.grad_y.square().sum())
    assert kss_gradient(x, y - step * found.grad_y, basis).loss < 0.97 * found.loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_converted_and_restored(dtype: torch.dtype) -> None:
    x, y = (state.to(dtype) for state in residual_transition())
    basis = kss_basis(x, 4)
    assert basis.dtype == torch.float32
    found = kss_gradient(x, y, basis)
    assert found.ok
    assert found.grad_x.dtype == found.grad_y.dtype == dtype
    wanted = kss_gradient(x.double(), y.double(), basis.double())
    tolerance = 2.0 * torch.finfo(dtype).eps + 1e-4
    for closed, reference in ((found.grad_x, wanted.grad_x), (found.grad_y, wanted.grad_y)):
        assert (closed.double() - reference).abs().max() < tolerance * reference.abs().max()


def spoiled(state: Tensor, value: float) -> Tensor:
    state = state.clone()
    state[3, 1] = value
    return state


def defective() -> tuple[Tensor, Tensor]:
    """Build y = x J^T with one Jordan block, whose eigenvalues have no gradient."""
    x = normal(40, SIZE, seed=7)
    return x, x @ (torch.eye(SIZE) + torch.diag(torch.ones(SIZE - 1), 1)).double().T


def refused() -> dict[str, tuple[Tensor, Tensor]]:
    x, y = random_transition()
    nan, inf = float("nan"), float("inf")
    return {
        "NaN in x": (spoiled(x, nan), y),
        "NaN in y": (x, spoiled(y, nan)),
        "infinite x": (spoiled(x, inf), y),
        "infinite y": (x, spoiled(y, -inf)),
        "squares overflow": (1e200 * x, y),
        "zero": (torch.zeros_like(x), torch.zeros_like(y)),
        "constant x": (torch.full_like(x, 0.5), y),
        "defective": defective(),
    }


@pytest.mark.parametrize("name", refused())
def test_a_transition_without_a_gradient_gives_exact_zeros(name: str) -> None:
    x, y = refused()[name]
    ridge = {"ridge": 0.0} if name == "defective" else {}
    found = kss_gradient(x, y, kss_basis(x, SIZE), **ridge)
    assert not found.ok
    assert found.loss == 0.0
    assert torch.equal(found.grad_x, torch.zeros_like(x))
    assert torch.equal(found.grad_y, torch.zeros_like(y))


def test_a_refused_transition_leaves_the_others_unchanged() -> None:
    good = random_transition()
    pairs = [good, *refused().values(), good]
    x, y = (torch.stack(states) for states in zip(*pairs, strict=True))
    found = kss_gradient(x, y, kss_basis(x, SIZE), ridge=0.0)
    alone = kss_gradient(*good, kss_basis(good[0], SIZE), ridge=0.0)
    assert found.ok.tolist() == [True] + [False] * len(refused()) + [True]
    for index in (0, -1):
        torch.testing.assert_close(found.grad_x[index], alone.grad_x, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(found.grad_y[index], alone.grad_y, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "message"), [("NaN in x", "^x holds"), ("infinite y", "^y holds"), ("zero", "^x has")]
)
def test_the_loss_refuses_bad_states_with_their_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kss_loss(*refused()[name])


SURVIVAL = """
import torch
from koopmon.spectral import kss_basis, kss_gradient, kss_loss
torch.set_num_threads(1)
zeros = raised = 0
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for bad in (float("nan"), float("inf")):
        for width in (12, 300):
            for which in range(2):
                states = [torch.randn(320, width).to(dtype) for _ in range(2)]
                states[which][5] = bad
                found = kss_gradient(*states, kss_basis(states[0], 8))
                zeros += not (found.ok or found.loss or found.grad_x.any() or found.grad_y.any())
                try:
                    kss_loss(*states, svd_rank=8)
                except ValueError:
                    raised += 1
print(zeros, raised)
"""


@pytest.mark.process
def test_no_value_crashes_the_process() -> None:
    """NaN in an eigendecomposition ends the process without an exception, so the test uses another process."""
    done = subprocess.run([sys.executable, "-c", SURVIVAL], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["24", "24"]


@pytest.mark.parametrize("width", [8, 300])
def test_the_basis_is_orthonormal_and_the_global_random_state_untouched(width: int) -> None:
    """The width 300 uses the randomised path."""
    x = normal(320, width, seed=8)
    y = x + 0.2 * x.sin()
    before = torch.get_rng_state()
    basis = kss_basis(x, 6, seed=1)
    kss_gradient(x, y, basis)
    kss_loss(x, y, svd_rank=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(kss_basis(x, 6, seed=1), basis)
    assert not basis.requires_grad
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)


def skewed(condition: float) -> tuple[Tensor, Tensor]:
    """White x, and y = x A^T where the eigenvectors of A have that condition number."""
    # Two unit vectors at the angle t have singular values sqrt(1 +- cos t), so the ratio is cot(t / 2).
    angle = 2 * math.atan(1 / condition)
    vectors = torch.tensor([[1.0, math.cos(angle)], [0.0, math.sin(angle)]], dtype=torch.float64)
    operator = vectors @ torch.diag(torch.tensor([1.3, 0.6], dtype=torch.float64)) @ torch.linalg.inv(vectors)
    x = samples()[:, :2]
    white = torch.linalg.qr(x - x.mean(0)).Q
    return white, white @ operator.T


@pytest.mark.parametrize(("condition", "ok"), [(99.0, True), (101.0, False)])
def test_eigenvectors_of_a_condition_above_100_give_no_gradient(condition: float, ok: bool) -> None:
    found = kss_gradient(*skewed(condition), torch.eye(2, dtype=torch.float64), ridge=0.0)
    assert bool(found.ok) is ok
    assert bool(found.grad_y.any()) is ok


def test_an_eigendecomposition_that_does_not_converge_gives_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = random_transition()
    eig = torch.linalg.eig
    calls: list[bool] = []

    def stubborn(operator: Tensor) -> Any:
        calls.append(torch.equal(operator, torch.eye(operator.shape[-1], dtype=operator.dtype).expand_as(operator)))
        if not calls[-1]:
            raise RuntimeError("the algorithm did not converge")
        return eig(operator)

    monkeypatch.setattr(torch.linalg, "eig", stubborn)
    found = kss_gradient(torch.stack([x, x]), torch.stack([y, y]), kss_basis(x, 4).expand(2, -1, -1))
    assert calls == [False, True]
    assert found.ok.tolist() == [False, False]
    assert not found.loss.any()
    assert not found.grad_x.any()
    assert not found.grad_y.any()


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_the_basis_is_that_of_the_leading_directions_whatever_the_unit(scale: float, shift: float) -> None:
    """The largest magnitude may be that of a negative value, and the state may have one sign only."""
    x = samples() + shift
    basis = kss_basis(scale * x, 3)
    right = np.linalg.svd((x - x.mean(0)).numpy())[2][:3].T
    assert np.abs((basis.numpy() * right).sum(0)) == pytest.approx(1.0, abs=1e-9)
    assert basis.dtype == torch.float64


@pytest.mark.parametrize("width", [12, 300])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_basis_of_single_precision_has_its_precision(width: int, autocast: bool) -> None:
    """A bfloat16 product would leave three digits."""
    x = normal(320, width, seed=22) * 0.8 ** torch.arange(width, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        basis = kss_basis(x.float(), 3)
    assert basis.dtype == torch.float32
    right = np.linalg.svd((x - x.mean(0)).numpy())[2][:3].T
    assert np.abs((basis.double().numpy() * right).sum(0)) == pytest.approx(1.0, abs=1e-6)


def test_the_basis_counts_values_that_are_not_finite_as_zero() -> None:
    x = samples()
    spoiled, zeroed = x.clone(), x.clone()
    spoiled[3, 1], spoiled[4, 2], spoiled[5, 0] = float("nan"), float("inf"), float("-inf")
    zeroed[3, 1] = zeroed[4, 2] = zeroed[5, 0] = 0.0
    assert torch.equal(kss_basis(spoiled, 3), kss_basis(zeroed, 3))
    assert kss_basis(torch.zeros(8, 4), 3).shape == (4, 3)
    assert torch.isfinite(kss_basis(torch.zeros(8, 4), 3)).all()


def test_the_defaults_are_those_of_the_paper() -> None:
    """Rank 32, temperature 20, the band from 0.9 to 1.05, the mass 0.4; a ridge of a thousandth is ours."""
    x = normal(200, 40, seed=20)
    y = x @ normal(40, 40, seed=21) / 40**0.5
    assert kss_basis(x).shape == (40, 32)
    paper = {"temperature": 20.0, "tau_u": 1.05, "tau_l": 0.90, "gamma": 0.4, "beta": 1.0, "ridge": 1e-3}
    basis = kss_basis(x, 32)
    assert kss_loss(x, y) == kss_loss(x, y, svd_rank=32, **paper)
    assert kss_loss(x, y, basis=basis).item() == pytest.approx(written_out(x, y, basis, **paper), rel=1e-9)
    one, other = kss_gradient(x, y, basis), kss_gradient(x, y, basis, **paper)
    assert torch.equal(one.grad_x, other.grad_x)
    assert one.loss == other.loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loss_has_double_precision_for_double_states_alone(dtype: torch.dtype) -> None:
    x, y = (state.to(dtype) for state in random_transition())
    assert kss_loss(x, y, svd_rank=3).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert kss_gradient(x, y, kss_basis(x, 3)).loss.dtype == torch.float64


def test_the_loss_differentiates_its_arguments_and_not_the_basis() -> None:
    x, y = (state.clone().requires_grad_() for state in random_transition())
    basis = kss_basis(x.detach(), 3).requires_grad_()
    kss_loss(x, y, basis=basis).backward()
    assert basis.grad is None
    assert x.grad is not None
    assert y.grad is not None


def test_a_single_sample_has_no_operator() -> None:
    x, y = samples()[:1], samples(1)[:1]
    assert not kss_gradient(x, y, torch.eye(SIZE, dtype=torch.float64)).ok
    with pytest.raises(ValueError, match="no spread"):
        kss_loss(x, y)


def test_gradients_that_overflow_in_the_dtype_of_the_states_are_zeros() -> None:
    """In float16, whose largest number is 65,504, a state of 1e-4 with a large loss."""
    x, y = random_transition()
    small = (1e-4 * x).half()
    found = kss_gradient(small, (6e4 * y / y.abs().max()).half(), kss_basis(small, 3), beta=0.0, tau_u=0.1)
    assert not found.ok
    assert found.loss == 0.0
    assert not found.grad_x.any()
