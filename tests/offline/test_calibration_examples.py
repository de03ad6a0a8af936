"""Selection of launches as examples, and the reasons against the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon.history.plain_profile import PlainProfile
from koopmon.history.reader import HistoryReader
from koopmon.history.writer import HistoryWriter
from koopmon.offline.calibration_examples import (
    MAX_FIRST_STEP,
    MAX_GRADIENT_NORM,
    MAX_LOSS,
    RunExample,
    calibration_examples,
)
from koopmon.spectral import profile_states
from tests.factories import hello, record_observation

FIRST, SECOND = "aaaaaaaa", "bbbbbbbb"


def profile(scale: float = 1.0) -> PlainProfile:
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn((3, 64, 8), generator=generator)
    updates[1:] *= scale
    return PlainProfile.of(profile_states(torch.cumsum(updates, dim=0), svd_rank=4, kreiss="never"))


OLD = replace(profile(), columns=profile().columns | {"update_exponent": (None, None)})
"""As an early version recorded it, before that number was known."""


def record(
    store: HistoryWriter, launch: str = FIRST, *, said: Any = None, found: Any = None, step: int = 0, **scalars: Any
) -> None:
    """One launch with three snapshots; `scalars` are those of the second one."""
    store.record_hello(0.0, hello("job", launch, **{"rate_sized_steps": True, "update_exponent": 0.4, **(said or {})}))
    columns = {"num_shards": 1, "masked": False, "seconds": 0.0}
    store.record_profile(0.0, "job", launch, step, profile=profile() if found is None else found, **columns)
    store.record_profile(0.0, "job", launch, step + 1, profile=profile(), **columns)
    for number in range(3):
        logged = {"learning_rate": 0.01 * (number + 1), "loss": 2.0, "grad_norm": 1.0}
        more = scalars if number == 1 else {}
        record_observation(store, 0.0, step + number, "job", launch, **{**logged, **more})


def examples(path: Path, *launches: dict[str, Any]) -> list[RunExample]:
    store = HistoryWriter.open(path)
    for launch in launches:
        record(store, **launch)
    store.close()
    with HistoryReader.open(path) as history:
        return list(calibration_examples(history))


def test_each_launch_is_an_example_of_its_own_rows(tmp_path: Path) -> None:
    first, second = examples(
        tmp_path / "store", {}, {"launch": SECOND, "loss": 2 * MAX_LOSS, "said": {"width": 16, "update_exponent": 0.1}}
    )
    assert first.example is not None
    assert second.example is not None
    assert (first.adapter, first.why) == ("transformer", "")
    assert (first.example.learning_rate, first.example.width, first.example.num_layers) == (0.03, 8, 2)
    assert (second.example.width, second.example.update_exponent) == (16, 0.1)
    assert (first.example.diverged, second.example.diverged) == (False, True)


@pytest.mark.parametrize(
    ("scalars", "diverged"),
    [
        ({"loss": MAX_LOSS}, False),
        ({"loss": MAX_LOSS + 1}, True),
        ({"loss": float("nan")}, True),
        ({"loss": None, "grad_norm": None}, False),
        ({"grad_norm": MAX_GRADIENT_NORM}, False),
        ({"grad_norm": float("inf")}, True),
        ({"loss": -float("inf")}, True),
        ({"non_finite": True}, True),
    ],
)
def test_a_run_that_leaves_the_bounds_has_diverged(scalars: dict[str, Any], diverged: bool, tmp_path: Path) -> None:
    (found,) = examples(tmp_path / "store", scalars)
    assert found.example is not None
    assert found.example.diverged is diverged


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize(
    ("values", "diverged"),
    [
        ((9000.0, 9000.0, 8000.0), False),
        ((None, 9000.0, 8000.0), False),
        ((9000.0, 9001.0, 1.0), True),
        ((float("inf"), 1.0, 1.0), True),
        ((float("nan"), 1.0, 1.0), True),
        ((-9000.0, 1.0, 1.0), False),
        ((None, None, None), False),
    ],
)
def test_a_sum_that_begins_above_the_bound_is_its_own_bound(
    name: str, values: tuple[float | None, ...], diverged: bool, tmp_path: Path
) -> None:
    store = HistoryWriter.open(tmp_path / "store")
    store.record_hello(0.0, hello("job", FIRST, rate_sized_steps=True, update_exponent=0.4))
    store.record_profile(0.0, "job", FIRST, 0, profile=profile(), num_shards=1, masked=False, seconds=0.0)
    for step, value in enumerate(values):
        record_observation(store, 0.0, step, "job", FIRST, **{"learning_rate": 0.01, name: value})
    store.close()
    with HistoryReader.open(tmp_path / "store") as history:
        (found,) = calibration_examples(history)
    assert found.example is not None
    assert found.example.diverged is diverged


@pytest.mark.parametrize(
    ("launch", "why"),
    [
        ({"step": MAX_FIRST_STEP + 1}, "no profile of its first 10 steps"),
        ({"found": OLD}, "its first profile cannot be read"),
        ({"found": profile(0.0)}, "its first profile is not informative"),
        ({"said": {"update_exponent": None}}, "its blocks do not change the state"),
        ({"said": {"rate_sized_steps": False}}, "the learning rate does not give the step length of its optimizer"),
        ({"lr_scale": 0.5}, "koopmon acted on it"),
        ({"kss_alpha": 0.1}, "koopmon acted on it"),
    ],
)
def test_the_reason_against_a_launch(launch: dict[str, Any], why: str, tmp_path: Path) -> None:
    (found,) = examples(tmp_path / "store", launch)
    assert found.example is None
    assert why in found.why
    assert found.adapter == (None if "first 10" in why or "cannot be read" in why else "transformer")


def test_the_last_step_of_the_initialisation_counts(tmp_path: Path) -> None:
    (found,) = examples(tmp_path / "store", {"step": MAX_FIRST_STEP})
    assert found.example is not None


def test_an_unknown_rate_is_no_example(tmp_path: Path) -> None:
    store = HistoryWriter.open(tmp_path / "store")
    store.record_hello(0.0, hello("job", FIRST, rate_sized_steps=True, update_exponent=0.4))
    store.record_profile(0.0, "job", FIRST, 0, profile=profile(), num_shards=1, masked=False, seconds=0.0)
    record_observation(store, 0.0, 1, "job", FIRST, loss=2.0)
    store.close()
    with HistoryReader.open(tmp_path / "store") as history:
        (found,) = calibration_examples(history)
    assert (found.example, found.why) == (None, "its learning rate is unknown")
