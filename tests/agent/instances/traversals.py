"""K6: blocks that are skipped, repeated, shared, or called in groups."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.agent.instances.battery import (
    B,
    Battery,
    Block,
    D,
    Net,
    T,
    V,
    Watch,
    sgd,
    through,
    tokens,
    train,
    update,
)

battery = Battery()
case = battery.case


@case(least=2)
def list_that_drops_while_it_iterates(watch: Watch) -> Iterator[Tensor]:
    class DropList(nn.ModuleList):
        def __iter__(self) -> Any:
            draws = torch.empty(len(self)).uniform_()
            for index, module in enumerate(super().__iter__()):
                if not self.training or draws[index] > 0.2:
                    yield module

    model = Net()
    model.blocks = DropList(Block() for _ in range(4))
    yield from train(watch, model, 14)


@case()
def stochastic_depth_per_sample(watch: Watch) -> Iterator[Tensor]:
    class Dropping(Block):
        def forward(self, x: Tensor) -> Tensor:
            keep = torch.bernoulli(torch.full((len(x), 1, 1), 0.7))
            return x + self.update(x) * keep / 0.7

    yield from train(watch, Net(kind=Dropping))


@case()
def update_of_a_subset_of_samples(watch: Watch) -> Iterator[Tensor]:
    class Subset(Block):
        def forward(self, x: Tensor) -> Tensor:
            chosen = torch.randperm(len(x))[:2]
            return torch.index_add(x, 0, chosen, self.update(x[chosen]), alpha=2.0)

    yield from train(watch, Net(kind=Subset))


@case(layers=6, least=2)
def early_exit(watch: Watch) -> Iterator[Tensor]:
    draw = random.Random(0)

    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        return through(list(stack)[: draw.randint(3, 6)], x)

    yield from train(watch, Net(run, 6), 14)


@case(layers=4)
def exit_of_every_depth(watch: Watch) -> Iterator[Tensor]:
    """Each depth has a loss of its own, as in deep supervision."""

    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        out = 0.0
        for block in stack:
            x = block(x)
            out = out + x
        return out

    yield from train(watch, Net(run))


@case(None, told="not attached")
def universal_transformer(watch: Watch) -> Iterator[Tensor]:
    class Universal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.block, self.head = nn.Embedding(V, D), Block(), nn.Linear(D, V)
            self.time = nn.Parameter(0.1 * torch.randn(5, D))

        def forward(self, x: Tensor) -> Tensor:
            h = self.embedding(x)
            for time in self.time:
                h = self.block(h + time)
            return self.head(h)

    yield from train(watch, Universal())


@case(layers=5)
def adaptive_number_of_loops(watch: Watch) -> Iterator[Tensor]:
    draw = random.Random(0)

    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        for _ in range(draw.randint(2, 6)):
            x = stack[0](x)
        return x

    yield from train(watch, Net(run, 1), 10)


@case(layers=6)
def groups_of_shared_blocks(watch: Watch) -> Iterator[Tensor]:
    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        for index in range(6):
            x = stack[index // 3](x)
        return x

    yield from train(watch, Net(run, 2))


@case(layers=5)
def cycle_of_shared_blocks(watch: Watch) -> Iterator[Tensor]:
    """1 2 3 4 4 3 2 1: cycle (rev)."""

    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        return through(reversed(stack), through(stack, x))

    yield from train(watch, Net(run))


@case(layers=4)
def triplet(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        a, p, n = (model(each).mean(1) for each in (tokens(step), tokens(step).flip(1), tokens(step + 1)))
        yield update(nn.functional.triplet_margin_loss(a, p, n), optimizer)


@case()
def mixture_of_depths(watch: Watch) -> Iterator[Tensor]:
    """Each block runs on the tokens that a router chooses; the others go by it."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.block = nn.Linear(D, 1), Block()

        def forward(self, x: Tensor) -> Tensor:
            weight, index = self.router(x).topk(3, dim=1)
            index = index.expand(-1, -1, D)
            chosen = x.gather(1, index)
            return x.scatter_add(1, index, (self.block(chosen) - chosen) * weight.sigmoid())

    yield from train(watch, Net(kind=Routed))


@case()
def mixture_of_depths_outside(watch: Watch) -> Iterator[Tensor]:
    """The model itself gathers tokens and scatters the results."""

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.routers = nn.ModuleList(nn.Linear(D, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.embedding(x)
            for block, router in zip(self.blocks, self.routers, strict=True):
                weight, index = router(h).topk(3, dim=1)
                index = index.expand(-1, -1, D)
                h = h.scatter_add(1, index, block(h.gather(1, index)) * weight)
            return self.head(h)

    yield from train(watch, Model())


@case(layers=4)
def checkpoint_of_groups(watch: Watch) -> Iterator[Tensor]:
    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        for first in (0, 2):
            x = checkpoint(through, stack[first : first + 2], x, use_reentrant=False)
        return x

    yield from train(watch, Net(run))


@case(layers=6)
def checkpoint_of_a_sequence(watch: Watch) -> Iterator[Tensor]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.blocks, self.head = (
                nn.Embedding(V, D),
                nn.Sequential(*(Block() for _ in range(6))),
                nn.Linear(D, V),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint_sequential(self.blocks, 3, self.embedding(x), use_reentrant=True)
            return self.head(h)

    yield from train(watch, Model())


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Any, *parameters: Tensor) -> Tensor:
        ctx.stack = stack
        with torch.no_grad():
            a, b = x.chunk(2, -1)
            for f, g in stack:
                a = a + f(b)
                b = b + g(a)
        ctx.save_for_backward(a, b)
        return torch.cat([a, b], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        da, db = grad.chunk(2, -1)
        grads = []
        for f, g in reversed(ctx.stack):
            with torch.enable_grad():
                a = a.detach().requires_grad_()
                ga = g(a)
            d = torch.autograd.grad(ga, [a, *g.parameters()], db)
            b, da = b - ga.detach(), da + d[0]
            grads = list(d[1:]) + grads
            with torch.enable_grad():
                b = b.detach().requires_grad_()
                fb = f(b)
            d = torch.autograd.grad(fb, [b, *f.parameters()], da)
            a, db = a.detach() - fb.detach(), db + d[0]
            grads = list(d[1:]) + grads
        return (torch.cat([da, db], -1), None, *grads)


@case(None, told="no snapshots|missed")
def reversible(watch: Watch) -> Iterator[Tensor]:
    """Blocks f and g of two half streams, recomputed in the backward pass by a function of its own."""

    class Half(Block):
        def __init__(self) -> None:
            super().__init__(D // 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.update(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V)
            self.blocks = nn.ModuleList(nn.ModuleList([Half(), Half()]) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            parameters = [p for f, g in self.blocks for m in (f, g) for p in m.parameters()]
            return self.head(Reverse.apply(self.embedding(x), list(self.blocks), *parameters))

    yield from train(watch, Model(), 12)


@case(layers=3)
def blocks_over_time(watch: Watch) -> Iterator[Tensor]:
    """A recurrent loop: the stack runs once per position, on the state of the position before."""

    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        h, outs = x[:, 0], []
        for t in range(T):
            h = through(stack, h + x[:, t])
            outs.append(h)
        return torch.stack(outs, 1)

    yield from train(watch, Net(run, 3))


@case(told="missed")
def order_that_changes(watch: Watch) -> Iterator[Tensor]:
    draw = random.Random(1)

    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        order = list(stack)
        draw.shuffle(order)
        return through(order, x)

    yield from train(watch, Net(run), 30)


@case(layers=6, least=2)
def stack_that_grows(watch: Watch) -> Iterator[Tensor]:
    """Progressive layers: two blocks at first, all six at the end."""
    count = [0]

    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        count[0] += 1
        return through(list(stack)[: min(6, 2 + count[0] // 3)], x)

    yield from train(watch, Net(run, 6), 24)


@case(None, told="no snapshots")
def parallel_branches(watch: Watch) -> Iterator[Tensor]:
    """Pairs of blocks read the same input."""

    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        for first in (0, 2):
            x = stack[first](x) + stack[first + 1](x) - x
        return x

    yield from train(watch, Net(run))


@case(layers=4)
def several_resolutions(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        batch = tokens(step)
        loss = sum(model(batch[:, :size]).square().mean() for size in (3, 6, 2))
        yield update(loss, optimizer)


@case("encoder.layers", 3)
def torch_encoder_with_padding(watch: Watch) -> Iterator[Tensor]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(D, 2, 24, batch_first=True, norm_first=True)
            self.embedding, self.encoder, self.head = (
                nn.Embedding(V, D),
                nn.TransformerEncoder(layer, 3, enable_nested_tensor=False),
                nn.Linear(D, V),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.embedding(x), src_key_padding_mask=torch.arange(T).expand(B, T) > 4))

    yield from train(watch, Model())


@case(layers=4)
def saved_tensors_on_another_place(watch: Watch) -> Iterator[Tensor]:
    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return through(stack, x)

    yield from train(watch, Net(run))


@case(layers=8, least=3)
def drop_of_half_of_the_model(watch: Watch) -> Iterator[Tensor]:
    """LayerDrop of one half with a common draw, as for pruning on demand."""
    draw = random.Random(3)

    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        odd = draw.random() < 0.5
        return through([block for index, block in enumerate(stack) if not (odd and index % 2)], x)

    yield from train(watch, Net(run, 8), 14)


@case(layers=4)
def gradient_accumulation_of_lengths(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        optimizer.zero_grad()
        for size in (2, 6, 4):
            loss = model(tokens(step)[:, :size]).square().mean()
            loss.backward()
        optimizer.step()
        yield loss
