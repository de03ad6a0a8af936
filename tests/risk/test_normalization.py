"""Normalisation strength between 0 and 1 from the update exponent."""

from __future__ import annotations

import pytest

from benchmarks.models import NORMS, Decoder, associative_recall
from koopmon import profile
from koopmon.risk.normalization import NORMALIZED, UNNORMALIZED, normalization_from_exponent


def test_strength_is_one_then_linear_then_zero() -> None:
    exponents = (-1.0, 0.0, NORMALIZED, (NORMALIZED + UNNORMALIZED) / 2, UNNORMALIZED, 1.0, 3.0)
    assert [normalization_from_exponent(k) for k in exponents] == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("initialisation", ["gpt2", "torch"])
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "rezero"])
def test_it_separates_residual_schemes_at_any_initialisation(norm: str, initialisation: str) -> None:
    model = Decoder(norm, width=64, num_layers=3, initialisation=initialisation)  # type: ignore[arg-type]
    tokens, _ = associative_recall(32, seed=0)
    found = profile(model, tokens, num_samples=512, svd_rank=16)
    assert found.update_exponent is not None
    assert normalization_from_exponent(found.update_exponent) == float(norm not in ("none", "deep"))
