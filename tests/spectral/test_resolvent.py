"""Resolvent norms against singular values, point by point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from koopmon.spectral.resolvent import Resolvent


def made(size: int, num: int = 2, *, dtype: torch.dtype = torch.complex128, seed: int = 0) -> tuple[Tensor, Resolvent]:
    generator = torch.Generator().manual_seed(seed)
    operators = torch.randn(num, size, size, generator=generator, dtype=torch.float64) / size**0.5
    values, vectors = torch.linalg.eig(operators)
    return operators, Resolvent(values, vectors.to(dtype), torch.linalg.inv(vectors).to(dtype))


def points(num: int = 7, radius: float = 1.6) -> Tensor:
    angles = torch.linspace(0.0, 3.0, num, dtype=torch.float64)
    return torch.polar(torch.full_like(angles, radius), angles).expand(2, -1)


def exact(operators: Tensor, at: Tensor) -> np.ndarray:
    identity = np.eye(operators.shape[-1])
    return np.array(
        [
            [1.0 / np.linalg.svd(z * identity - operator, compute_uv=False)[-1] for z in row]
            for operator, row in zip(operators.numpy(), at.numpy(), strict=True)
        ]
    )


@pytest.mark.parametrize("size", [1, 2])
def test_two_steps_span_two_dimensions_so_the_norm_is_exact(size: int) -> None:
    operators, resolvent = made(size)
    at = points()
    norms, _ = resolvent.norm(at, resolvent.probe(at))
    assert norms.numpy() == pytest.approx(exact(operators, at), rel=1e-9)


@pytest.mark.parametrize("size", [3, 8, 20])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_a_norm_is_a_lower_bound_that_repetition_brings_to_the_norm(size: int, dtype: torch.dtype) -> None:
    operators, resolvent = made(size, dtype=dtype)
    at = points()
    wanted = exact(operators, at)
    rounding = 1e-9 if dtype == torch.complex128 else 1e-4
    vectors = resolvent.probe(at)
    before = np.zeros_like(wanted)
    for _ in range(40):
        norms, vectors = resolvent.norm(at, vectors)
        assert norms.dtype == torch.float64
        assert (norms.numpy() <= wanted * (1 + rounding)).all()
        assert (norms.numpy() >= before * (1 - rounding)).all()
        before = norms.numpy()
    assert before == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_vectors_are_of_unit_length_and_reach_the_norm(size: int) -> None:
    operators, resolvent = made(size)
    at = points()
    start = resolvent.probe(at)
    assert torch.linalg.vector_norm(start, dim=1).numpy() == pytest.approx(1.0)
    norms, reached = resolvent.norm(at, start)
    assert torch.linalg.vector_norm(reached, dim=1).numpy() == pytest.approx(1.0)
    identity = torch.eye(size, dtype=torch.complex128)
    for layer in range(2):
        for index, z in enumerate(at[layer]):
            image = torch.linalg.solve(z * identity - operators[layer], reached[layer, :, index])
            assert torch.linalg.vector_norm(image).item() == pytest.approx(norms[layer, index].item(), rel=1e-8)


def test_a_start_is_closer_to_the_leading_direction_than_chance() -> None:
    operators, resolvent = made(12)
    at = points(radius=1.1)
    norms, _ = resolvent.norm(at, resolvent.probe(at))
    assert (norms.numpy() > 0.7 * exact(operators, at)).all()


def test_a_start_in_a_singular_direction_stays_there() -> None:
    """The second direction is then rounding noise, and must not be taken for one."""
    operators, resolvent = made(6)
    at = points()
    identity = np.eye(6)
    start = torch.stack(
        [
            torch.stack(
                [torch.tensor(np.linalg.svd(np.linalg.inv(z * identity - operator))[2][0].conj()) for z in row.numpy()],
                dim=1,
            )
            for operator, row in zip(operators.numpy(), at, strict=True)
        ]
    )
    norms, reached = resolvent.norm(at, start)
    assert norms.numpy() == pytest.approx(exact(operators, at), rel=1e-9)
    assert (reached.conj() * start).sum(1).abs().numpy() == pytest.approx(1.0, abs=1e-7)


def test_a_resolvent_of_zero_operators_is_one_over_the_point() -> None:
    identity = torch.eye(3, dtype=torch.complex128).expand(2, -1, -1)
    resolvent = Resolvent(torch.zeros(2, 3, dtype=torch.complex128), identity, identity)
    at = points(radius=4.0)
    norms, reached = resolvent.norm(at, resolvent.probe(at))
    assert norms.numpy() == pytest.approx(0.25)
    assert torch.linalg.vector_norm(reached, dim=1).numpy() == pytest.approx(1.0)


def test_probes_are_the_same_each_time() -> None:
    _, resolvent = made(5)
    before = torch.get_rng_state()
    assert torch.equal(resolvent.probe(points()), resolvent.probe(points()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [2, 7])
def test_probes_are_images_of_one_vector_under_the_adjoint_resolvents(size: int) -> None:
    """(zI - A)* takes each probe back to that vector, up to its length."""
    operators, resolvent = made(size)
    at = points()
    probes = resolvent.probe(at)
    identity = torch.eye(size, dtype=torch.complex128)
    back = torch.stack(
        [
            (z * identity - operators[layer]).mH @ probes[layer, :, index]
            for layer in range(2)
            for index, z in enumerate(at[layer])
        ]
    )
    back = back / torch.linalg.vector_norm(back, dim=1, keepdim=True)
    assert (back.conj() @ back.mT).abs().numpy() == pytest.approx(1.0, abs=1e-9)


def test_where_squares_of_the_resolvent_vanish_the_vectors_stay() -> None:
    _, resolvent = made(4)
    start = resolvent.probe(points())
    norms, reached = resolvent.norm(points(radius=1e200), start)
    assert not norms.any()
    torch.testing.assert_close(reached, start)
