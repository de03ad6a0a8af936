"""Published optimizers: an accepted one follows the scale, and any other is refused."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
from torch.optim import Optimizer

from tests.agent.control.test_scale_proof import Make, examined


def by_shape(make: Make) -> Make:
    """Muon and its variants are told which parameters are matrices."""
    return lambda weights: make(
        [
            {"params": [each for each in weights if each.dim() == 2], "use_muon": True},
            {"params": [each for each in weights if each.dim() < 2], "use_muon": False},
        ]
    )


def accepted_ones_follow(make: Make) -> str:
    """Return the refusal; check an accepted optimizer on fixed gradients."""
    errors: list[Exception] = []
    attempts: list[tuple[Make, dict[str, Any]]] = [(make, {}), (make, {"matrices_only": True}), (by_shape(make), {})]
    for attempt, options in attempts:
        try:
            # Some derive their rate from the weights, which differ.
            proof, ratios, same = examined(attempt, rel=0.2, **options)
            break
        except Exception as error:  # it needs a closure, a model or a process group: it cannot train here
            errors.append(error)
    else:
        pytest.skip(f"{type(errors[0]).__name__}: {errors[0]}")
    if not proof.refusal:
        assert same
        assert median(ratios[1:]) <= 0.3, ratios
        assert max(ratios) <= 1.5, ratios
    return proof.refusal


def names(module: str) -> list[str]:
    try:
        return sorted(pytest.importorskip(module).get_supported_optimizers())
    except pytest.skip.Exception:
        return ["not installed"]


@pytest.mark.parametrize("name", names("pytorch_optimizer"))
def test_published_optimizers_follow_or_are_refused(name: str) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    accepted_ones_follow(lambda weights: library.load_optimizer(name)(weights, lr=1e-3))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_optimizers_follow_or_are_refused(name: str) -> None:
    library = pytest.importorskip("schedulefree")

    def make(weights: Any) -> Optimizer:
        optimizer: Any = getattr(library, name)(weights, lr=1e-3)
        optimizer.train()
        return optimizer  # type: ignore[no-any-return]

    accepted_ones_follow(make)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({}, "has no learning rate"),
        ({"lr": 1e-3, "relative_step": False, "scale_parameter": False}, ""),
        ({"lr": 1e-3, "relative_step": False}, ""),
    ],
)
def test_adafactor_of_transformers_is_scaled_unless_it_chooses_its_rate(options: dict[str, Any], refusal: str) -> None:
    adafactor = pytest.importorskip("transformers").Adafactor
    found = accepted_ones_follow(lambda weights: adafactor(weights, **options))
    assert refusal in found
    assert bool(refusal) == bool(found)
