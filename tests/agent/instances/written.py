"""Further forms of models and loops that people write: K1, K5, K6, K7 and K11."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.agent.instances.battery import B, Battery, Block, D, Net, T, V, Watch, loss_of, sgd, train, update, vectors

battery = Battery()
case = battery.case


class Rows(nn.Module):
    """Rows of parts that the model calls in turn; `kinds` makes the parts of one row."""

    def __init__(self, *kinds):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.layers = nn.ModuleList(nn.ModuleList(kind() for kind in kinds) for _ in range(4))

    def forward(self, batch):
        x = self.embedding(batch)
        for mix, feed, norm in self.layers:
            x = norm(x + mix(x))
            x = x + feed(x)
        return self.head(x)


class OverTokens(nn.Module):
    """Mixes the tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.net = nn.LayerNorm(D), nn.Sequential(nn.Linear(T, 8), nn.GELU(), nn.Linear(8, T))

    def forward(self, x):
        return self.net(self.norm(x).transpose(1, 2)).transpose(1, 2)


def over_channels():
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


@case("layers")
def rows_of_mixer_parts_with_a_norm_between(watch: Watch) -> Iterator[Tensor]:
    yield from train(watch, Rows(OverTokens, over_channels, lambda: nn.LayerNorm(D)))


def x_transformer(watch: Watch, **options) -> Iterator[Tensor]:
    x = pytest.importorskip("x_transformers")
    layers = x.Decoder(dim=D, depth=4, heads=2, attn_dim_head=6, **options)
    yield from train(watch, x.TransformerWrapper(num_tokens=V, max_seq_len=T, attn_layers=layers))


@case("attn_layers.layers")
def x_transformer_whose_joints_have_no_weights(watch: Watch) -> Iterator[Tensor]:
    yield from x_transformer(watch)


@case("attn_layers.layers")
def x_transformer_with_macaron_and_sandwich_norms(watch: Watch) -> Iterator[Tensor]:
    yield from x_transformer(watch, macaron=True, sandwich_norm=True)


@case("attn_layers.layers", told="trains 1 of 4 blocks")
def x_transformer_of_which_one_block_trains(watch: Watch) -> Iterator[Tensor]:
    x = pytest.importorskip("x_transformers")
    layers = x.Decoder(dim=D, depth=4, heads=2, attn_dim_head=6)
    model = x.TransformerWrapper(num_tokens=V, max_seq_len=T, attn_layers=layers)
    model.requires_grad_(False)
    layers.layers[-1].requires_grad_(True)
    yield from train(watch, model)


@case(None, told="torch.jit.script, which takes no hooks")
def blocks_that_are_scripted_one_by_one(watch: Watch) -> Iterator[Tensor]:
    yield from train(watch, Net(kind=lambda: torch.jit.script(Scripted())))


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).relu()


@case()
def blocks_that_are_traced_one_by_one(watch: Watch) -> Iterator[Tensor]:
    yield from train(watch, Net(kind=lambda: torch.jit.trace(Block(), torch.randn(B, T, D))))


def in_segments(watch: Watch, segments: int, reentrant: bool) -> Iterator[Tensor]:
    """The loop calls the parts of a sequence, the first of which takes a state without gradients from the input."""
    model = nn.Sequential(nn.Linear(3, D), *(Block() for _ in range(4)), nn.Linear(D, 2))
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        batch = vectors(step, B, T, 3).requires_grad_()
        loss = checkpoint_sequential(model, segments, batch, use_reentrant=reentrant).square().mean()
        yield update(loss, optimizer)


@case("")
def checkpoint_of_segments_across_the_input(watch: Watch) -> Iterator[Tensor]:
    yield from in_segments(watch, 3, True)


@case("")
def checkpoint_of_two_segments(watch: Watch) -> Iterator[Tensor]:
    yield from in_segments(watch, 2, True)


@case("")
def checkpoint_of_segments_without_reentry(watch: Watch) -> Iterator[Tensor]:
    yield from in_segments(watch, 3, False)


def in_thread(function, *args):
    done = []
    thread = threading.Thread(target=lambda: done.append(function(*args)))
    thread.start()
    thread.join()
    return done[0]


@case()
def forwards_in_new_threads(watch: Watch) -> Iterator[Tensor]:
    """Autograd numbers the nodes of each thread: one node more changes the order of additions, of three or more."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield update(sum(in_thread(loss_of, model, 3 * step + part) for part in range(3)) / 3, optimizer)


@case()
def a_step_for_each_batch_of_tokens_in_a_thread(watch: Watch) -> Iterator[Tensor]:
    """The whole step runs in a thread of its own, as under a server of jobs."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield in_thread(lambda at: update(loss_of(model, at), optimizer), step)


@case()
def checkpoints_in_a_checkpoint(watch: Watch) -> Iterator[Tensor]:
    def pair(first, second, x):
        return checkpoint(second, first(x), use_reentrant=True)

    def pairs(stack, x):
        for first, second in zip(stack[::2], stack[1::2], strict=True):
            x = checkpoint(pair, first, second, x, use_reentrant=True)
        return x

    yield from train(watch, Net(pairs))
