"""Inverses of batches for which a threaded batched factorisation hangs."""

from __future__ import annotations

import pytest
import torch

from koopmon.spectral._linalg import inverses


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("num", "size"), [(0, 4), (1, 4), (5, 32), (2, 768)])
def test_each_matrix_is_inverted(num: int, size: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generator = torch.Generator().manual_seed(0)
        matrices = torch.randn((num, size, size), dtype=dtype, generator=generator) / size**0.5 + 2 * torch.eye(size)
        found = inverses(matrices)
        assert found.shape == matrices.shape
        assert torch.allclose(found @ matrices, torch.eye(size, dtype=dtype).expand_as(matrices), atol=1e-8)
    finally:
        torch.set_num_threads(before)


def test_leading_dimensions_are_kept() -> None:
    matrices = torch.eye(3).expand(2, 4, 3, 3) * 2
    assert torch.equal(inverses(matrices), matrices / 4)


def test_one_matrix_alone_and_no_matrix() -> None:
    assert torch.equal(inverses(torch.eye(3) * 2), torch.eye(3) / 2)
    assert inverses(torch.zeros(0, 2, 3, 3)).shape == (0, 2, 3, 3)


def test_matrices_of_another_device_are_inverted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without storage stand for another device."""
    calls: list[tuple[int, ...]] = []
    invert = torch.linalg.inv_ex
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda each: calls.append(tuple(each.shape)) or invert(each))
    assert inverses(torch.empty(4, 3, 3, device="meta")).shape == (4, 3, 3)
    assert calls == [(4, 3, 3)]


def test_a_singular_matrix_is_no_error() -> None:
    assert inverses(torch.zeros(2, 3, 3)).shape == (2, 3, 3)
