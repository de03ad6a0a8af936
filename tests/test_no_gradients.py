"""The guard against gradients leaves the mode of the caller as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from koopmon.no_gradients import without_gradients


@without_gradients
def double(value: Tensor, *, fails: bool = False) -> Tensor:
    """Return twice the value."""
    if fails:
        raise ValueError("it fails")
    return value * 2.0


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_recorded_and_the_mode_returns(enabled: bool) -> None:
    value = torch.ones(2, requires_grad=True)
    with torch.set_grad_enabled(enabled):
        assert not double(value).requires_grad
        assert torch.is_grad_enabled() is enabled
        with pytest.raises(ValueError, match="it fails"):
            double(value, fails=True)
        assert torch.is_grad_enabled() is enabled
    assert (double.__name__, double.__doc__) == ("double", "Return twice the value.")


def test_inside_inference_mode() -> None:
    with torch.inference_mode():
        assert not torch.is_grad_enabled()
        assert double(torch.ones(2)).is_inference()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
