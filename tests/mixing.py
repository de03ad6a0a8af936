"""Models that change the state between their blocks, and stacks that look alike and are none.

Each model keeps in `states` what a snapshot must hold: the input and the output of every block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.agent.models import VOCABULARY, Block, D

L = 6
Run = Callable[["Mixing", Tensor], Tensor]


class Mixing(nn.Module):
    """Tokens to one number; `run` calls the blocks. `extra` are modules beside them."""

    def __init__(
        self, run: Run, extra: Callable[[], nn.Module] = nn.Identity, block: Callable[..., Any] = Block
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.blocks = nn.ModuleList(block(D) for _ in range(L))
        self.extra = extra()
        self.scales = nn.Parameter(torch.linspace(0.5, 1.5, 2 * L))
        self.run, self.states = run, []
        self.skipped: set[int] = set()
        """Layers that the next forwards leave out, as LayerDrop does."""

    def forward(self, tokens: Tensor) -> Tensor:
        self.states: list[Tensor] = []
        return self.run(self, self.embedding(tokens) * 1.0).square().mean()

    def call(self, layer: int, h: Tensor, how: Callable[..., Any] = lambda block, h: block(h)) -> Tensor:
        if layer in self.skipped:
            return h
        self.states.append(h.detach().clone())
        h = how(self.blocks[layer], h)
        self.states.append(h.detach().clone())
        return h


def embedding_again(model: Mixing, h: Tensor) -> Tensor:
    """nanochat: h = a h + b h_0 before each block."""
    first = h
    for layer in range(L):
        h = model.call(layer, model.scales[layer] * h + 0.1 * model.scales[L + layer] * first)
    return h


def checkpointed(reentrant: bool) -> Run:
    def run(model: Mixing, h: Tensor) -> Tensor:
        first = h
        for layer in range(L):
            mixed = model.scales[layer] * h + 0.1 * first
            h = model.call(layer, mixed, lambda block, h: checkpoint(block, h, use_reentrant=reentrant))
        return h

    return run


def value_skips(model: Mixing, h: Tensor) -> Tensor:
    """modded-nanogpt: the second half adds the outputs of the first half in reverse order."""
    kept: list[Tensor] = []
    for layer in range(L):
        if layer >= L // 2:
            h = h + model.scales[layer] * kept.pop()
        h = model.call(layer, h)
        if layer < L // 2:
            kept.append(h)
    return h


def joined_skips(model: Mixing, h: Tensor) -> Tensor:
    """U-ViT: a linear layer joins the skip connection and the state between blocks."""
    kept: list[Tensor] = []
    for layer in range(L):
        if layer >= L // 2:
            h = model.extra(torch.cat([h, kept.pop()], -1))
        h = model.call(layer, h)
        if layer < L // 2:
            kept.append(h)
    return h


def over_residuals(model: Mixing, h: Tensor) -> Tensor:
    """Attention over the outputs of all earlier blocks."""
    history = [h]
    for layer in range(L):
        stacked = torch.stack(history)
        weights = (stacked @ model.extra.weight[0]).softmax(0)
        history.append(model.call(layer, (weights[..., None] * stacked).sum(0)))
    return torch.stack(history).mean(0)


def hyper_connections(model: Mixing, h: Tensor) -> Tensor:
    """Four streams: a block takes a mix of them, and its output is spread over them."""
    streams = h.expand(4, *h.shape)
    for layer in range(L):
        out = model.call(layer, (model.extra.weight[0, :4].softmax(0)[:, None, None, None] * streams).sum(0))
        mixed = torch.einsum("ij,jbtd->ibtd", torch.eye(4) + 0.1 * model.extra.weight[:4, :4], streams)
        streams = mixed + model.extra.weight[1, :4][:, None, None, None] * out
    return streams.sum(0)


def normalised_between(model: Mixing, h: Tensor) -> Tensor:
    for layer in range(L):
        h = nn.functional.layer_norm(model.call(layer, h), (D,))
    return h


def scaled_in_place(model: Mixing, h: Tensor) -> Tensor:
    for layer in range(L):
        h = model.call(layer, h).mul_(0.9)
    return h


def two_lists_in_turn(model: Mixing, h: Tensor) -> Tensor:
    """Between the blocks a layer of another list adds to the state."""
    for layer, other in enumerate(model.extra):
        h = model.call(layer, h)
        h = h + torch.tanh(other(h))
    return h


MODELS: dict[str, tuple[Run, Callable[[], nn.Module]]] = {
    "embedding again": (embedding_again, nn.Identity),
    "embedding again, checkpointed": (checkpointed(False), nn.Identity),
    "embedding again, checkpointed, reentrant": (checkpointed(True), nn.Identity),
    "value skips": (value_skips, nn.Identity),
    "joined skips": (joined_skips, lambda: nn.Linear(2 * D, D)),
    "over residuals": (over_residuals, lambda: nn.Linear(D, D)),
    "hyper-connections": (hyper_connections, lambda: nn.Linear(D, D)),
    "normalised between": (normalised_between, nn.Identity),
    "scaled in place": (scaled_in_place, nn.Identity),
    "two lists in turn": (two_lists_in_turn, lambda: nn.ModuleList(nn.Linear(D, D) for _ in range(L))),
}


class Branch(nn.Module):
    """f(h) without a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        return self.f(h)


def added_outside(model: Mixing, h: Tensor) -> Tensor:
    for layer in range(L):
        h = h + 0.5 * model.call(layer, h)
    return h


def normalised_inputs(model: Mixing, h: Tensor) -> Tensor:
    for layer in range(L):
        h = h + model.call(layer, nn.functional.layer_norm(h, (D,)))
    return h


def branch_and_other_list(model: Mixing, h: Tensor) -> Tensor:
    """XLM: attention in one list, feed-forward layers in another, normalised between."""
    for layer, other in enumerate(model.extra):
        h = nn.functional.layer_norm(h + model.call(layer, h), (D,))
        h = nn.functional.layer_norm(h + torch.tanh(other(h)), (D,))
    return h


ENTRIES: dict[str, tuple[Run, Callable[[], nn.Module]]] = {
    "added outside": (added_outside, nn.Identity),
    "normalised inputs": (normalised_inputs, nn.Identity),
    "two lists of sublayers": (branch_and_other_list, lambda: nn.ModuleList(nn.Linear(D, D) for _ in range(L))),
    "hyper-connections of branches": (hyper_connections, lambda: nn.Linear(D, D)),
    "branches over residuals": (over_residuals, lambda: nn.Linear(D, D)),
}
"""Models whose blocks are branches without a residual of their own: a snapshot holds the inputs."""


def side_by_side(model: Mixing, h: Tensor) -> Tensor:
    return torch.stack([model.call(layer, h) for layer in range(L)]).mean(0)


def side_by_side_with_noise(model: Mixing, h: Tensor) -> Tensor:
    return torch.stack([model.call(layer, nn.functional.dropout(h, 0.1)) for layer in range(L)]).mean(0)


def plain_layers(model: Mixing, h: Tensor) -> Tensor:
    """No residual at all."""
    for layer in range(L):
        h = nn.functional.layer_norm(model.call(layer, h), (D,))
    return h


def two_towers(model: Mixing, h: Tensor) -> Tensor:
    left, right = h, h.flip(1).tanh()
    for layer in range(0, L, 2):
        left, right = 0.9 * model.call(layer, left), 0.9 * model.call(layer + 1, right)
    return left * right


def backwards(model: Mixing, h: Tensor) -> Tensor:
    for layer in reversed(range(L)):
        h = 0.9 * model.call(layer, h)
    return h


def halved(model: Mixing, h: Tensor) -> Tensor:
    for layer in range(L):
        h = model.call(layer, h if layer != L // 2 else h[:, ::2])
    return h


def detached(model: Mixing, h: Tensor) -> Tensor:
    """Nothing shows that the later blocks take the state of the earlier ones."""
    for layer in range(L):
        h = 0.9 * model.call(layer, h.detach())
    return h


NO_STACKS: dict[str, tuple[Run, Callable[..., Any], str]] = {
    "side by side": (side_by_side, Block, "the output of blocks.0 is not the input of blocks.1"),
    "side by side with noise": (side_by_side_with_noise, Block, "the output of blocks.0 is not the input of blocks.1"),
    "plain layers": (plain_layers, Branch, "do not carry their input forward"),
    "two towers": (two_towers, Block, "the output of blocks.0 is not the input of blocks.1"),
    "backwards": (backwards, Block, "blocks.5 was called out of turn"),
    "halved": (halved, Block, "blocks.3 takes shape"),
    "detached": (detached, Block, "the output of blocks.0 is not the input of blocks.1"),
}
