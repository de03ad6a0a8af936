"""Models and tasks of the project match their descriptions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import koopmon
from benchmarks.models import (
    NORMS,
    Decoder,
    Norm,
    associative_recall,
    associative_recall_loss,
    next_token_loss,
    synthetic_text,
)

torch.set_num_threads(1)

SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "max_tokens": 16, "vocabulary": 32}


@pytest.mark.parametrize("norm", NORMS)
def test_decoder_is_causal_seeded_and_found(norm: Norm) -> None:
    model = Decoder(norm, **SMALL)
    tokens = torch.randint(32, (3, 16))
    logits = model(tokens)
    assert logits.shape == (3, 16, 32)
    changed = tokens.clone()
    changed[:, 10:] = 31 - changed[:, 10:]
    assert torch.allclose(model(changed)[:, :10], logits[:, :10], atol=1e-6)
    assert not torch.allclose(model(changed)[:, 10:], logits[:, 10:])
    assert torch.equal(Decoder(norm, **SMALL)(tokens), logits)
    assert not torch.equal(Decoder(norm, **SMALL, seed=1)(tokens), logits)
    found = koopmon.discover(model, tokens)
    assert found.stack.name == "blocks"
    assert len(found.points) == 2


@pytest.mark.parametrize("norm", NORMS)
def test_initialisation_is_that_of_gpt_2(norm: Norm) -> None:
    for module in Decoder(norm).modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any()


@pytest.mark.parametrize("norm", NORMS)
def test_every_scheme_learns(norm: Norm) -> None:
    """Every parameter except positions beyond the batch takes part, and a few steps lower the loss on one batch."""
    model = Decoder(norm, **SMALL)
    tokens, labels = associative_recall(16, seed=0, num_tokens=16, num_pairs=2, vocabulary=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = associative_recall_loss(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.25
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="norm = 'layer': allowed are pre, post, none, rms, sub, deep, rezero"):
        Decoder("layer")  # type: ignore[arg-type]


def test_associative_recall_can_be_answered_from_its_pairs() -> None:
    tokens, labels = associative_recall(200, seed=3)
    assert tokens.shape == (200, 64)
    assert int(tokens.max()) < 256
    assert (tokens[:, :8] > 0).all()
    assert (tokens[:, 8:-1] == 0).all()
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        keys, values = row[0:8:2], row[1:8:2]
        assert len(set(keys)) == 4
        assert values[keys.index(row[-1])] == label
    assert all(torch.equal(*pair) for pair in zip(associative_recall(200, seed=3), (tokens, labels), strict=True))
    assert not torch.equal(associative_recall(200, seed=4)[0], tokens)
    with pytest.raises(ValueError, match="num_tokens = 8: 4 pairs and a query need at least 9"):
        associative_recall(1, seed=0, num_tokens=8)


def test_synthetic_text_has_its_segments() -> None:
    tokens = synthetic_text(20, seed=0)
    assert tokens.shape == (20, 256)
    assert int(tokens.min()) >= 10
    assert int(tokens.max()) < 10_000
    assert torch.equal(synthetic_text(20, seed=0), tokens)
    assert not torch.equal(synthetic_text(20, seed=1), tokens)
    steps = tokens[:, 1:] - tokens[:, :-1]
    assert 0.2 < (steps == 1).double().mean() < 0.5, "runs of consecutive ids are about a third of the text"
    repeated = torch.stack([(tokens[:, lag:] == tokens[:, :-lag]).double().mean() for lag in range(2, 6)])
    assert repeated.sum() > 0.1, "patterns repeat at a distance of their length"


def test_losses_are_those_of_a_uniform_guess_where_logits_are_equal() -> None:
    tokens, labels = associative_recall(4, seed=0)
    logits = torch.zeros(4, 64, 256)
    uniform = torch.tensor(256.0).log()
    assert torch.allclose(associative_recall_loss(logits, labels), uniform)
    assert torch.allclose(next_token_loss(logits, tokens), uniform)
    sure = nn.functional.one_hot(tokens.roll(-1, 1), 256) * 100.0
    assert next_token_loss(sure, tokens).item() == pytest.approx(0.0, abs=1e-6)
