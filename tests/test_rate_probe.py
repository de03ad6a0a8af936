"""Rate probe: copies train, the user's model stays as it was, and wrong losses are refused with one line."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import Decoder
from koopmon import rate_probe
from koopmon.config import RiskConfig
from koopmon.errors import KoopmonError
from koopmon.profiling import capture_states
from koopmon.rate_probe import PeakRate, peak_rate

torch.set_num_threads(1)

WIDTH = 16
CRITICAL = RiskConfig().normalized_critical_rate / WIDTH


def decoder(norm: str = "pre") -> Decoder:
    return Decoder(norm, width=WIDTH, num_layers=2, num_heads=2, max_tokens=16, vocabulary=32)  # type: ignore[arg-type]


def batches() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randint(32, (4, 17), generator=generator)


def losses(draw: Callable[[], Tensor] | None = None) -> Callable[[nn.Module], Tensor]:
    following = draw or batches()

    def loss(model: nn.Module) -> Tensor:
        tokens = following()
        return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def estimate(model: nn.Module, loss: Any) -> PeakRate:
    tokens = batches()()[:, :-1]
    return peak_rate(model, loss, capture_states(model, tokens), 0.0, (tokens,), {})


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_probe, "STEPS", 6)
    monkeypatch.setattr(rate_probe, "HIGHEST", 0.01)


@pytest.mark.usefixtures("short")
def test_the_model_its_gradients_and_the_random_states_stay() -> None:
    model = decoder().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    found = estimate(model, losses())
    assert found.num_steps == 3 * 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]


@pytest.mark.usefixtures("short")
def test_without_an_alarm_the_highest_rate_is_a_lower_bound() -> None:
    found = estimate(decoder(), losses())
    assert found.alarm_rates == (None, None, None)
    assert (found.rate, found.high) == (None, None)
    assert found.low == pytest.approx(rate_probe.LOW * rate_probe.HIGHEST * CRITICAL)
    assert "above" in found.line()


def test_the_estimate_is_the_median_of_the_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    alarms = iter([(0.004, 20), (None, 100), (0.006, 30)])
    monkeypatch.setattr(rate_probe, "_alarm_rate", lambda *_: next(alarms))
    found = estimate(decoder(), losses())
    assert found.rate == 0.006
    assert (found.low, found.high) == (0.003, 0.012)
    assert found.alarm_rates == (0.004, None, 0.006)
    assert found.num_steps == 150
    assert "0.006, between 0.003 and 0.012" in found.line()


def test_a_rate_that_breaks_the_copy_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_probe, "HIGHEST", 1e6)
    found = estimate(decoder(), losses())
    assert found.rate is not None
    assert found.num_steps < 3 * rate_probe.STEPS


def test_without_a_loss_the_width_gives_a_wide_interval() -> None:
    found = estimate(decoder(), None)
    assert found.rate == pytest.approx(CRITICAL)
    assert found.low is not None
    assert found.high is not None
    assert found.low < CRITICAL / 2 < CRITICAL * 2 < found.high
    assert (found.num_steps, found.alarm_rates) == (0, ())


class Normalised(Decoder):
    """A Post-LN decoder that normalises its embeddings."""

    def forward(self, tokens: Tensor) -> Tensor:
        h = functional.layer_norm(self.token(tokens) + self.position.weight[: tokens.shape[1]], (WIDTH,))
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(h)
        return logits


def test_a_stream_that_is_normalised_from_its_start_has_no_estimate() -> None:
    model = Normalised("post", width=WIDTH, num_layers=2, num_heads=2, max_tokens=16, vocabulary=32)
    found = estimate(model, losses())
    assert (found.rate, found.low, found.high) == (None, None, None)
    assert "Post-LN" in found.line()


@pytest.mark.usefixtures("short")
def test_a_post_ln_model_with_plain_embeddings_is_probed() -> None:
    assert estimate(decoder("post"), losses()).num_steps > 0


OTHER = decoder()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda model: 1.0, "0-d tensor"),
        (lambda model: torch.ones(()), "with gradients"),
        (lambda model: model(batches()()[:, :-1]), "0-d tensor"),
        (lambda model: losses()(OTHER), "does not call its argument"),
        (lambda model: losses()(model) * float("nan"), "at the first step"),
    ],
)
def test_a_wrong_loss_is_one_line(loss: Callable[[nn.Module], Any], said: str) -> None:
    with pytest.raises(KoopmonError, match=said) as caught:
        estimate(decoder(), loss)
    assert "\n" not in str(caught.value)
    assert all(parameter.grad is None for parameter in OTHER.parameters()), "no gradient reaches another model"


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(KoopmonError, match="no parameters that train"):
        estimate(decoder().requires_grad_(False), losses())


@pytest.mark.usefixtures("short")
def test_frozen_parameters_stay_in_the_copy_too() -> None:
    model = decoder()
    model.token.requires_grad_(False)
    seen: list[Tensor] = []

    def loss(copied: nn.Module) -> Tensor:
        seen.append(copied.get_parameter("token.weight").detach().clone())
        return losses()(copied)

    estimate(model, loss)
    assert len(seen) == 3 * 6
    assert all(torch.equal(weight, model.token.weight) for weight in seen)
