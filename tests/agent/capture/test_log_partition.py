"""The log-partition of outputs of several forms."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koopmon.agent.capture.log_partition import NUM_TOKENS, log_partition, vocabularies

SIZES = frozenset({50})
Output = namedtuple("Output", "loss logits")


def logits(*shape: int, gradients: bool = True) -> Tensor:
    made = 5.0 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return made.requires_grad_(gradients)


def mean(tensor: Tensor) -> float:
    return tensor.detach().logsumexp(-1).mean().item()


FORMS: dict[str, Any] = {
    "tensor": lambda found: found,
    "tuple": lambda found: (found, None),
    "mapping": lambda found: {"loss": found.sum(), "logits": found},
    "named": lambda found: Output(found.sum(), found),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_few_tokens_all_count(form: str) -> None:
    given = logits(2, 8, 50)
    found = log_partition(FORMS[form](given), SIZES)
    assert found is not None
    assert found.item() == pytest.approx(mean(given), rel=1e-6)


def test_of_many_tokens_some_count() -> None:
    given = logits(8, 100, 50)
    found = log_partition(given, SIZES)
    assert found is not None
    every = given.flatten(0, 1)[:: 800 // NUM_TOKENS][:NUM_TOKENS]
    assert found.item() == pytest.approx(mean(every), rel=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    given = logits(1, 4, 50).detach().bfloat16().requires_grad_()
    found = log_partition(given, SIZES)
    assert found is not None
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    "output",
    [
        None,
        "text",
        (),
        {},
        {"logits": None},
        logits(2, 8, 32),  # a state, not of the width of a vocabulary
        logits(8, 50),  # the classes of a plain tensor look like channels
        logits(2, 8, 50, gradients=False),
        logits(2, 50, 8).transpose(1, 2),
        torch.ones(2, 8, 50, dtype=torch.long),
        logits(0, 8, 50),
    ],
    ids=str,
)
def test_other_outputs_have_none(output: Any) -> None:
    assert log_partition(output, SIZES) is None


def test_logits_of_classes_count_where_they_are_named() -> None:
    given = logits(4, 10)
    found = log_partition({"logits": given}, ())
    assert found is not None
    assert found.item() == pytest.approx(mean(given), rel=1e-6)


def test_vocabularies_are_those_of_the_embeddings() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(50, 4), "positions": nn.Embedding(16, 4), "head": nn.Linear(4, 7)})
    assert vocabularies(model) == {50, 16}
