"""The GradScaler of an optimizer is found on the call stack, or among the live ones that unscaled its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

from koopmon.agent.control.kss.grad_scaler import ScalerFinder, calling_scaler, unscaling_scaler


class Asking(SGD):
    """Asks inside its step."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(2))
        super().__init__([self.weight], lr=0.1)
        self.found: list[GradScaler | None] = []

    def step(self, closure: Any = None) -> Any:
        self.found.append(calling_scaler())


class Own(GradScaler):
    """A scaler whose step calls nothing of torch's."""

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step()


def nested(depth: int, call: Callable[[], Any]) -> Any:
    return call() if depth == 0 else nested(depth - 1, call)


@pytest.mark.parametrize("kind", [GradScaler, Own])
def test_a_scaler_whose_step_is_under_way_is_found(kind: type[GradScaler]) -> None:
    optimizer, scaler = Asking(), kind("cpu")
    scaler.scale(optimizer.weight.sum()).backward()
    scaler.step(optimizer)
    assert optimizer.found == [scaler]


def test_without_a_scaler_or_with_one_that_is_off_none_is_found() -> None:
    optimizer = Asking()
    optimizer.step()
    Own("cpu", enabled=False).step(optimizer)
    assert optimizer.found == [None, None]


def test_a_scaler_is_found_within_32_frames() -> None:
    class Deep(GradScaler):
        def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            return nested(optimizer, calling_scaler)

    scaler = Deep("cpu")
    assert scaler.step(30) is scaler, "the 32nd frame"
    assert scaler.step(31) is None


def test_a_live_scaler_that_unscaled_the_gradients_is_found() -> None:
    optimizer, other, scaler = Asking(), Asking(), GradScaler("cpu")
    assert unscaling_scaler(optimizer) is None
    scaler.scale(optimizer.weight.sum()).backward()
    scaler.unscale_(optimizer)
    assert unscaling_scaler(optimizer) is scaler
    assert unscaling_scaler(other) is None


def test_all_live_objects_are_searched_once_and_only_without_a_calling_one(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[Any] = []
    calling: list[Any] = [GradScaler("cpu")]
    module = "koopmon.agent.control.kss.grad_scaler"
    monkeypatch.setattr(f"{module}.calling_scaler", lambda: calling[0] if calling else None)
    monkeypatch.setattr(f"{module}.unscaling_scaler", lambda optimizer: searches.append(optimizer))
    optimizer: Any = object()
    finder = ScalerFinder()
    assert finder.known() is None
    assert finder.find(optimizer) is calling[0]
    assert searches == []
    found = calling.pop()
    assert finder.find(optimizer, scan=False) is found
    assert searches == []
    for _ in range(3):
        assert finder.find(optimizer) is found, "a step without a scaler on its stack keeps it"
    assert searches == [optimizer]
