"""Profiling: the right tokens of the right states from one forward pass without side effects."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import koopmon
from benchmarks.models import Decoder, associative_recall
from koopmon.profiling import capture_states
from koopmon.spectral import profile_transition
from koopmon.token_sampling import choose_rows
from tests.stacks import Block, D, L, Listed, Stacked, in_turn

torch.set_num_threads(1)

LISTED = Listed("blocks")


@pytest.fixture
def decoder() -> Decoder:
    return Decoder("pre", width=16, num_layers=3, num_heads=2, max_tokens=16, vocabulary=32)


def tokens(batch_size: int = 8) -> Tensor:
    return associative_recall(batch_size, seed=1, num_tokens=16, num_pairs=2, vocabulary=32)[0]


def test_profile_is_of_the_states_that_the_model_has(decoder: Decoder) -> None:
    """Compare with states from calling the blocks one after the other."""
    captured = capture_states(decoder, tokens(), num_samples=100, seed=5)
    rows = choose_rows(8 * 16, 100, seed=5)
    with torch.no_grad():
        h = decoder.token(tokens()) + decoder.position.weight[:16]
        states = [h]
        for block in decoder.blocks:
            states.append(block(states[-1]))
    assert captured.num_tokens == 128
    assert not captured.masked
    assert captured.discovery.verified
    assert len(captured.states) == 4
    for state, expected in zip(captured.states, states, strict=True):
        assert torch.equal(state, expected.flatten(0, 1)[rows])
    profile = koopmon.profile(decoder, tokens(), num_samples=100, seed=5)
    assert profile.num_layers == 3
    assert profile.num_samples == 100
    for layer, (x, y) in enumerate(zip(captured.states, captured.states[1:], strict=False)):
        expected_layer = profile_transition(x, y)
        assert profile.layers[layer].spectral_radius == pytest.approx(expected_layer.spectral_radius, rel=1e-9)
        assert profile.layers[layer].near_unit_mass == expected_layer.near_unit_mass


def test_equal_seeds_equal_profiles_and_rank_is_passed_on(decoder: Decoder) -> None:
    profiles = [koopmon.profile(decoder, tokens(), num_samples=64, svd_rank=4, seed=seed) for seed in (0, 0, 1)]
    assert profiles[0].to_dict() == profiles[1].to_dict()
    assert profiles[0].to_dict() != profiles[2].to_dict()
    assert profiles[0].svd_rank == 4


class Masked(nn.Module):
    """Blocks over embedded tokens; the state is extreme at padding."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(L))

    def forward(self, h: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return in_turn(self.blocks, h)


@pytest.mark.parametrize("manner", ["attention_mask", "labels", "positional"])
def test_padding_is_left_out(manner: str) -> None:
    h = torch.randn(4, 6, D)
    counts = torch.rand(4, 6) < 0.5
    h[~counts] = 1e6
    if manner == "labels":
        captured = capture_states(Masked(), h, labels=torch.where(counts, 1, -100), adapter=LISTED)
    elif manner == "attention_mask":
        captured = capture_states(Masked(), h, attention_mask=counts.long(), adapter=LISTED)
    else:
        captured = capture_states(Masked(), h, counts, adapter=LISTED)
    assert captured.masked
    assert captured.num_tokens == 24
    assert captured.states[0].shape == (int(counts.sum()), D)
    assert float(captured.states[0].abs().max()) < 100


def test_a_mask_of_another_shape_is_not_guessed_at() -> None:
    captured = capture_states(Masked(), torch.randn(4, 6, D), attention_mask=torch.ones(4, 7), adapter=LISTED)
    assert not captured.masked
    assert captured.states[0].shape == (24, D)


def test_no_trace_is_left(decoder: Decoder) -> None:
    decoder.blocks[1].eval()
    modes = [module.training for module in decoder.modules()]
    states = torch.get_rng_state(), random.getstate()
    koopmon.profile(decoder, tokens(), svd_rank=4)
    assert [module.training for module in decoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())


@pytest.mark.parametrize("num_tokens", [1, 2, 10])
def test_too_few_tokens_are_not_informative(decoder: Decoder, num_tokens: int) -> None:
    profile = koopmon.profile(decoder, tokens(1)[:, :num_tokens])
    assert not profile.informative
    assert f"too few samples: N = {num_tokens}" in profile.reason


def test_no_token_that_counts_is_not_informative() -> None:
    profile = koopmon.profile(Masked(), torch.randn(2, 3, D), attention_mask=torch.zeros(2, 3), adapter=LISTED)
    assert not profile.informative
    assert "too few samples: N = 0" in profile.reason


def test_identity_at_the_start_is_not_informative() -> None:
    model = Decoder("rezero", width=16, num_layers=3, num_heads=2, max_tokens=16, vocabulary=32)
    profile = koopmon.profile(model, tokens())
    assert not profile.informative
    assert profile.mean("near_unit_mass") == 1.0
    assert profile.risk is None
    assert "until layers move" in profile.reason


@pytest.mark.parametrize(
    ("poisoned", "where"), [(None, "enters blocks.0"), (0, "leaves blocks.0"), (2, "leaves blocks.2")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_states_are_named(decoder: Decoder, poisoned: int | None, where: str, value: float) -> None:
    module = decoder.token if poisoned is None else decoder.blocks[poisoned].feed_forward.sublayer.project
    with torch.no_grad():
        module.weight.fill_(value)
    with pytest.raises(ValueError, match=f"the state that {where} holds NaN or infinite values"):
        koopmon.profile(decoder, tokens())


def test_bad_num_samples_is_named(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="num_samples = 0: allowed are integers from 1"):
        koopmon.profile(decoder, tokens(), num_samples=0)


def test_states_of_unlike_types_are_made_alike() -> None:
    """Blocks may run in another precision than the stream before them."""

    def narrowing(blocks: nn.ModuleList, h: Tensor) -> Tensor:
        return in_turn(blocks, h)

    blocks: list[nn.Module] = [Block(lambda h: (h + h.roll(1, -1)).to(torch.bfloat16)), Block(lambda h: h * 0.5)]
    captured = capture_states(Stacked(narrowing, blocks), torch.randn(4, 5, D), adapter=LISTED)
    assert {state.dtype for state in captured.states} == {torch.float32}


def test_no_chain_is_a_discovery_error() -> None:
    def broken(blocks: nn.ModuleList, h: Tensor) -> Any:
        return blocks[0](blocks[1](h))

    with pytest.raises(koopmon.DiscoveryError, match=r"blocks: blocks\.1 was called out of turn"):
        koopmon.profile(Stacked(broken), torch.randn(4, 5, D), adapter=LISTED)
