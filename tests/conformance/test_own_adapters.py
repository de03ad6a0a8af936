"""Every registered adapter meets every requirement, with every example model for it."""

from __future__ import annotations

import warnings

import pytest
import torch

from koopmon.conformance import Check, checks
from koopmon.plugins import adapters, example_models

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the import of the library raises it, not our calls
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", SyntaxWarning)
    for library in ("transformers", "mambapy.mamba", "kan"):
        pytest.importorskip(library)

EXAMPLES = [example for example in example_models() if example.adapter in adapters()]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_every_adapter_offers_a_model() -> None:
    assert {example.adapter for example in example_models()} == set(adapters())
    assert {example.name for example in EXAMPLES} >= {
        "torch-encoder",
        "llama",
        "mixtral",
        "olmoe",
        "mamba2",
        "mambapy",
        "kan-transformer",
    }


@pytest.mark.parametrize(
    "check",
    [check for example in EXAMPLES for check in checks(example.adapter, example)],
    ids=lambda check: f"{check.bench.example.name}-{check}",
)
def test_every_promise_is_kept(check: Check) -> None:
    assert check()
