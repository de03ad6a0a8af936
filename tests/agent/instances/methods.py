"""Methods of training in small: K1, K5, K6, K7, K11 and K14."""

from __future__ import annotations

import asyncio
import collections
import copy
import os
import pickle
import random
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tests.agent.instances.battery import (
    B,
    Battery,
    Block,
    D,
    Net,
    T,
    V,
    Watch,
    blocks,
    loss_of,
    sgd,
    through,
    tokens,
    train,
    update,
    vectors,
)
from tests.agent.instances.states import Stream
from tests.agent.instances.states import train as train_stream
from tests.agent.instances.surgery import around
from tests.agent.instances.users_objects import amid, number

battery, forks = Battery(), Battery()
"""`forks` has the cases that start processes."""
case = battery.case


def adam(parameters, lr=1e-3):
    return torch.optim.Adam([each for each in parameters if each.requires_grad], lr=lr)


def fit(watch, model, loss, steps=8, optimizer=None) -> Iterator[Tensor]:
    """Train `model` on `loss(model, step)`."""
    optimizer = optimizer or sgd(model)
    watch(model, optimizer)
    for step in range(steps):
        yield update(loss(model, step), optimizer)


def square(model, step):
    return model(vectors(step)).square().mean()


# What trains.


@case(layers=6, told="trains 2 of 6 blocks")
def middle_third(watch: Watch) -> Iterator[Tensor]:
    model = Net(count=6).requires_grad_(False)
    model.blocks[2:4].requires_grad_(True)
    model.head.requires_grad_(True)
    yield from train(watch, model)


@case()
def prefixes_in_each_frozen_block(watch: Watch) -> Iterator[Tensor]:
    """Prefix tuning: learned keys and values of each block."""

    class Prefixed(Block):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.prefix = nn.Parameter(torch.randn(2, D))

        def forward(self, x):
            return super().forward(torch.cat([self.prefix.expand(len(x), -1, -1), x], 1))[:, 2:]

    yield from train(watch, Net(kind=Prefixed))


@case()
def low_rank_by_parametrization(watch: Watch) -> Iterator[Tensor]:
    """DoRA: weight = magnitude * (frozen + b a) / norm."""

    class Dora(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(2, weight.size(1))), nn.Parameter(torch.zeros(weight.size(0), 2))
            self.magnitude = nn.Parameter(weight.detach().norm(dim=1, keepdim=True))

        def forward(self, weight):
            new = weight + self.b @ self.a
            return self.magnitude * new / new.norm(dim=1, keepdim=True)

    model = Net().requires_grad_(False)
    for block in model.blocks:
        for linear in (block.up, block.down):
            parametrize.register_parametrization(linear, "weight", Dora(linear.weight))
    yield from train(watch, model)


@case(told="trains 1 of 4 blocks", lines=2)
def another_block_in_each_period(watch: Watch) -> Iterator[Tensor]:
    """LISA: the embedding, the head and one random block train, under a new optimizer in each period."""
    model, draw = Net(), random.Random(0)
    for period in range(6):
        model.blocks.requires_grad_(False)
        model.blocks[draw.randrange(4)].requires_grad_(True)
        optimizer = adam(model.parameters())
        if period == 0:
            watch(model, optimizer)
        for step in range(4):
            yield update(loss_of(model, 4 * period + step), optimizer)


@case("side")
def ladder_beside_a_backbone_without_gradients(watch: Watch) -> Iterator[Tensor]:
    class Ladder(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.side = blocks(6).requires_grad_(False), blocks(4, lambda: Block(8))
            self.down = nn.ModuleList(nn.Linear(D, 8) for _ in range(4))
            self.head = nn.Linear(8, 1)

        def forward(self, x):
            states = []
            with torch.no_grad():
                for block in self.backbone:
                    x = block(x)
                    states.append(x)
            h = self.down[0](states[0])
            for block, down, state in zip(self.side, self.down, states[1:5], strict=True):
                h = block(0.5 * h + 0.5 * down(state))
            return self.head(h)

    yield from fit(watch, Ladder(), square)


@case("predictor", 5)
@case("context", 3)
def joint_embedding_with_a_predictor(watch: Watch) -> Iterator[Tensor]:
    class Jepa(nn.Module):
        def __init__(self):
            super().__init__()
            self.context, self.predictor = blocks(3), blocks(5)
            self.target = copy.deepcopy(self.context).requires_grad_(False)
            self.mask = nn.Parameter(torch.randn(D))

        def forward(self, x):
            with torch.no_grad():
                goal = nn.functional.layer_norm(through(self.target, x), (D,))[:, T // 2 :]
            seen = through(self.context, x[:, : T // 2])
            queries = self.mask.expand(len(x), T - T // 2, -1)
            guess = through(self.predictor, torch.cat([seen, queries], 1))[:, T // 2 :]
            return nn.functional.smooth_l1_loss(guess, goal)

    model = Jepa()
    optimizer = adam(model.parameters())
    watch(model, optimizer)
    for step in range(8):
        yield update(model(vectors(step)), optimizer)
        with torch.no_grad():
            torch._foreach_lerp_(list(model.target.parameters()), list(model.context.parameters()), 0.01)


@case("decoder", 2)
@case("encoder", 4)
def masked_autoencoder(watch: Watch) -> Iterator[Tensor]:
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder, self.mask = blocks(4), blocks(2, lambda: Block(8)), nn.Parameter(torch.zeros(8))
            self.into, self.out = nn.Linear(D, 8), nn.Linear(8, D)

        def forward(self, x):
            kept = torch.randperm(T)[: T // 2]
            seen = self.into(through(self.encoder, x[:, kept]))
            full = self.mask.expand(len(x), T, -1).clone()
            full[:, kept] = seen
            return (self.out(through(self.decoder, full)) - x).square().mean()

    yield from fit(watch, Masked(), lambda model, step: model(vectors(step)))


@case("qformer")
def queries_into_a_frozen_tower(watch: Watch) -> Iterator[Tensor]:
    class Cross(Block):
        def forward(self, queries, image):
            weights = (queries @ image.transpose(1, 2)).softmax(-1)
            return super().forward(queries + weights @ image)

    class Bootstrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.qformer = blocks(6).requires_grad_(False).eval(), blocks(4, Cross)
            self.queries, self.language = nn.Parameter(torch.randn(3, D)), blocks(8).requires_grad_(False)

        def train(self, mode=True):
            super().train(mode)
            self.vision.eval()
            return self

        def forward(self, x):
            with torch.no_grad():
                image = through(self.vision, x)
            q = self.queries.expand(len(x), -1, -1)
            for block in self.qformer:
                q = block(q, image)
            return through(self.language, q)

    yield from fit(watch, Bootstrapped(), square)


@case("autoencoder")
def weight_of_the_adversary_by_gradients_of_the_last_layer(watch: Watch) -> Iterator[Tensor]:
    """VQGAN: two gradients of the last layer within the step, and a critic that begins late."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.autoencoder, self.last, self.critic = blocks(4), nn.Linear(D, D), blocks(2)
            self.score = nn.Linear(D, 1)

    model = Both()
    first = torch.optim.Adam([*model.autoencoder.parameters(), *model.last.parameters()], 1e-3, betas=(0.5, 0.9))
    second = torch.optim.Adam([*model.critic.parameters(), *model.score.parameters()], 1e-3, betas=(0.5, 0.9))
    watch(model, first, second)
    for step in range(8):
        x = vectors(step)
        fake = model.last(through(model.autoencoder, x))
        rebuilt, fooled = (fake - x).abs().mean(), -model.score(through(model.critic, fake)).mean()
        (a,) = torch.autograd.grad(rebuilt, model.last.weight, retain_graph=True)
        (b,) = torch.autograd.grad(fooled, model.last.weight, retain_graph=True)
        weight = (a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4).detach()
        yield update(rebuilt + (weight * fooled if step > 3 else 0.0), first)
        real, made = model.score(through(model.critic, x)), model.score(through(model.critic, fake.detach()))
        yield update(torch.relu(1 - real).mean() + torch.relu(1 + made).mean(), second)


@case(told="trains 0 of 4 blocks")
def one_word_of_a_frozen_model(watch: Watch) -> Iterator[Tensor]:
    """Textual inversion: the other rows of the embedding are written back after each step."""
    model = Net().requires_grad_(False)
    model.embedding.weight.requires_grad_(True)
    kept = model.embedding.weight.detach().clone()
    optimizer = torch.optim.AdamW([model.embedding.weight], lr=5e-3)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        with torch.no_grad():
            model.embedding.weight[1:] = kept[1:]


@case("net.blocks", told="trains 0 of 4 blocks")
def weights_made_by_a_hypernetwork(watch: Watch) -> Iterator[Tensor]:
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.net.requires_grad_(False)
            self.code, self.maps = nn.Parameter(torch.randn(3)), nn.ModuleDict()
            for name, each in self.net.named_parameters():
                self.maps[name.replace(".", "_")] = nn.Linear(3, each.numel())

        def forward(self, x):
            made = {
                name: each + 0.01 * self.maps[name.replace(".", "_")](self.code).view_as(each)
                for name, each in self.net.named_parameters()
            }
            return torch.func.functional_call(self.net, made, (x,))

    yield from train(watch, Hyper())


# How the blocks are called.


@case("layer*")
def attributes_in_place_of_a_list(watch: Watch) -> Iterator[Tensor]:
    class Attributes(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(V, D)
            for index in range(1, 5):
                setattr(self, f"layer{index}", Block())
            self.head = nn.Linear(D, V)

        def forward(self, x):
            x = self.embedding(x)
            for index in range(1, 5):
                x = getattr(self, f"layer{index}")(x)
            return self.head(x)

    yield from train(watch, Attributes())


@case(None, told="no snapshots|missed|loop|one block")
def fixed_point_of_one_block(watch: Watch) -> Iterator[Tensor]:
    """An equilibrium model: iterations without gradients, one with, and a hook that solves the backward pass."""

    def run(stack, x):
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(6):
                z = torch.tanh(stack[0](z) + x)
        z = torch.tanh(stack[0](z) + x)
        if z.requires_grad:
            z.register_hook(lambda grad: grad * 1.5)
        return z

    yield from train(watch, Net(run, count=1), 12)


@case(None, told="blocks.1 takes shape .* if another list of blocks is one")
def tokens_are_merged_between_blocks(watch: Watch) -> Iterator[Tensor]:
    """Each block has fewer tokens than the one before."""

    def run(stack, x):
        for block in stack:
            x = block(x)
            x = torch.cat([x[:, :1].lerp(x[:, 1:2], 0.5), x[:, 2:]], 1)
        return x.mean(1, keepdim=True).expand(-1, T, -1)

    yield from train(watch, Net(run))


@case(None, told="blocks.0 returns shape")
def tokens_are_dropped_inside_the_blocks(watch: Watch) -> Iterator[Tensor]:
    class Pruned(Block):
        def forward(self, x):
            x = super().forward(x)
            return x[:, x.norm(dim=-1).mean(0).topk(max(2, x.size(1) - 1)).indices.sort().values]

    def run(stack, x):
        return through(stack, x).mean(1, keepdim=True).expand(-1, T, -1)

    yield from train(watch, Net(run, kind=Pruned))


@case()
def memories_of_the_last_segment(watch: Watch) -> Iterator[Tensor]:
    """Transformer-XL: each block gets its own detached state of the step before."""

    class Recurrent(Block):
        def forward(self, x, memory=None):
            both = x if memory is None else torch.cat([memory, x], 1)
            return super().forward(both)[:, -x.size(1) :]

    class Model(Net):
        memories = None

        def forward(self, batch):
            x, kept = self.embedding(batch), []
            for index, block in enumerate(self.blocks):
                kept.append(x.detach())
                x = block(x, None if self.memories is None else self.memories[index])
            self.memories = kept
            return self.head(x)

    yield from train(watch, Model(kind=Recurrent))


@case()
def blocks_take_all_micro_batches_in_turn(watch: Watch) -> Iterator[Tensor]:
    """Breadth first: one block after the other, each on all micro-batches."""

    def run(stack, x):
        parts = list(x.chunk(2))
        for block in stack:
            parts = [block(part) for part in parts]
        return torch.cat(parts)

    yield from train(watch, Net(run))


@case(layers=5)
def there_and_back(watch: Watch) -> Iterator[Tensor]:
    def run(stack, x):
        return through(reversed(stack), through(stack, x))

    yield from train(watch, Net(run))


@case()
def successors_replace_predecessors_at_random(watch: Watch) -> Iterator[Tensor]:
    """BERT of Theseus: each successor or the two frozen blocks that it compresses."""

    class Theseus(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V)
            self.old, self.blocks, self.draw = blocks(8).requires_grad_(False), blocks(4), random.Random(0)

        def forward(self, x):
            x = self.embedding(x)
            for index, block in enumerate(self.blocks):
                x = block(x) if self.draw.random() < 0.6 else through(self.old[2 * index : 2 * index + 2], x)
            return self.head(x)

    yield from train(watch, Theseus(), 16)


class Recomputed(torch.autograd.Function):
    """A checkpoint written by hand, as those that move the states to the host."""

    @staticmethod
    def forward(ctx, block, x):
        with torch.no_grad():
            out = block(x)
        ctx.save_for_backward(x)
        ctx.block = block
        return out

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            out = ctx.block(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


@case()
def recomputation_by_a_function_of_the_user(watch: Watch) -> Iterator[Tensor]:
    def run(stack, x):
        for block in stack:
            x = Recomputed.apply(block, x)
        return x

    yield from train(watch, Net(run))


@case()
def recomputation_of_groups_by_a_function_of_the_user(watch: Watch) -> Iterator[Tensor]:
    def run(stack, x):
        for index in (0, 2):
            x = Recomputed.apply(nn.Sequential(*stack[index : index + 2]), x)
        return x

    yield from train(watch, Net(run))


@case()
def a_loop_of_coroutines(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)

    async def loss_later(step):
        await asyncio.sleep(0)
        return loss_of(model, step)

    async def one(step):
        parts = await asyncio.gather(loss_later(2 * step), loss_later(2 * step + 1))
        return update(sum(parts), optimizer)

    for step in range(8):
        yield asyncio.run(one(step))


@case()
def gradients_of_tasks_are_projected_by_hand(watch: Watch) -> Iterator[Tensor]:
    """PCGrad: torch.autograd.grad for each task, and gradients that are assigned."""
    model = Net()
    optimizer = adam(model.parameters())
    watch(model, optimizer)
    weights = list(model.parameters())
    for step in range(8):
        losses = [loss_of(model, 2 * step), loss_of(model, 2 * step + 1).square()]
        first, second = (torch.cat([g.flatten() for g in torch.autograd.grad(each, weights)]) for each in losses)
        dot = first @ second
        both = first + second - (dot.clamp(max=0) / second.square().sum()) * second
        for each, grad in zip(weights, both.split([w.numel() for w in weights]), strict=True):
            each.grad = grad.view_as(each)
        optimizer.step()
        yield sum(losses)


@case()
def backward_into_given_inputs(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        torch.autograd.backward([loss, loss * 0.5], inputs=list(model.parameters()))
        optimizer.step()
        yield loss


@case()
def anomalies_are_detected(watch: Watch) -> Iterator[Tensor]:
    with torch.autograd.set_detect_anomaly(True):
        yield from train(watch, Net())


@case()
def deterministic_algorithms(watch: Watch) -> Iterator[Tensor]:
    torch.use_deterministic_algorithms(True)
    try:
        yield from train(watch, Net())
    finally:
        torch.use_deterministic_algorithms(False)


@case()
def default_type_and_device(watch: Watch) -> Iterator[Tensor]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.device("cpu"):
            model = Net()
        optimizer = sgd(model)
        watch(model, optimizer)
        for step in range(8):
            with torch.device("cpu"):
                yield update(loss_of(model, step), optimizer)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@case()
def labels_by_the_model_itself(watch: Watch) -> Iterator[Tensor]:
    """FixMatch: pseudo labels without gradients and in training mode, inside the forward of the step."""

    class Semi(Net):
        def forward(self, x):
            with torch.no_grad():
                sure = super().forward(x.flip(1)).softmax(-1).amax(-1, keepdim=True)
            return super().forward(x) * (sure > 0.05)

    yield from train(watch, Semi())


# The states.


@case()
def packed_sequences_through_recurrent_blocks(watch: Watch) -> Iterator[Tensor]:
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.rnn = nn.LayerNorm(D), nn.GRU(D, D, batch_first=True)

        def forward(self, packed):
            out, _ = self.rnn(packed._replace(data=self.norm(packed.data)))
            return PackedSequence(packed.data + out.data, *packed[1:])

    def run(model, x):
        packed = pack_padded_sequence(x, torch.tensor([6, 5, 4, 2]), batch_first=True)
        for block in model.blocks:
            packed = block(packed)
        return packed.data

    yield from train_stream(watch, Stream(Recurrent, run))


@case()
def recurrent_blocks_with_states_of_their_own(watch: Watch) -> Iterator[Tensor]:
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.rnn = nn.LayerNorm(D), nn.LSTM(D, D, batch_first=True)

        def forward(self, x, state=None):
            out, state = self.rnn(self.norm(x), state)
            return x + out, state

    def run(model, x):
        for block in model.blocks:
            x, _ = block(x)
        return x

    yield from train_stream(watch, Stream(Recurrent, run))


@case()
def state_with_its_cache(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, x, cache):
            keys = x.unflatten(-1, (2, -1)).transpose(1, 2)
            return super().forward(x), (*cache, (keys.detach(), keys.detach()))

    def run(model, x):
        cache = ()
        for block in model.blocks:
            x, cache = block(x, cache)
        return x

    yield from train_stream(watch, Stream(Layer, run))


@case()
def points_features_and_offsets_in_a_list(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, pxo):
            p, x, o = pxo
            return [p, super().forward(x + 0.01 * p.norm(dim=-1, keepdim=True)), o]

    def run(model, x):
        pxo = [torch.randn(B * T, 3), x, torch.tensor([10, B * T], dtype=torch.int32)]
        for block in model.blocks:
            pxo = block(pxo)
        return pxo[1]

    yield from train_stream(watch, Stream(Layer, run), shape=(B * T, D))


@case()
def features_of_two_kinds_of_nodes(watch: Watch) -> Iterator[Tensor]:
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.user, self.item = Block(), Block()

        def forward(self, nodes, edges):
            user, item = nodes["user"], nodes["item"]
            return {
                "user": self.user(user + 0.1 * item[edges].mean(0, keepdim=True)),
                "item": self.item(item + 0.1 * user.mean(0, keepdim=True)),
            }

    def run(model, x):
        nodes = {"user": x[:9], "item": x[9:]}
        for block in model.blocks:
            nodes = block(nodes, torch.tensor([0, 3, 5]))
        return torch.cat([nodes["user"], nodes["item"]])

    yield from train_stream(watch, Stream(Layer, run), shape=(B * T, D))


@case()
def sparse_adjacency_first(watch: Watch) -> Iterator[Tensor]:
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, adjacency, x):
            return x + torch.relu(self.linear(torch.sparse.mm(adjacency, self.norm(x))))

    def run(model, x):
        count = len(x)
        index = torch.stack([torch.arange(count), torch.arange(count).roll(1)])
        adjacency = torch.sparse_coo_tensor(index, torch.ones(count), (count, count), check_invariants=True)
        for block in model.blocks:
            x = block(adjacency, x)
        return x

    yield from train_stream(watch, Stream(Layer, run), shape=(D, D))


@case()
def mapping_of_the_users_own(watch: Watch) -> Iterator[Tensor]:
    class Bag(collections.UserDict):
        pass

    class Layer(Block):
        def forward(self, bag):
            return Bag({**bag, "x": super().forward(bag["x"])})

    def run(model, x):
        bag = Bag(x=x, mask=torch.ones(B, T, 1))
        for block in model.blocks:
            bag = block(bag)
        return bag["x"]

    yield from train_stream(watch, Stream(Layer, run))


@case()
def heads_stay_split(watch: Watch) -> Iterator[Tensor]:
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x):
            return x + torch.relu(self.linear(self.norm(x) + x.mean((1, 2), keepdim=True)))

    def run(model, x):
        x = x.unflatten(-1, (2, 6)).transpose(1, 2)
        for block in model.blocks:
            x = block(x)
        return x

    yield from train_stream(watch, Stream(Layer, run))


@case(None, told="complex|no snapshots|missed|not attached")
def complex_states(watch: Watch) -> Iterator[Tensor]:
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.1 * torch.randn(D, D, dtype=torch.cfloat))

        def forward(self, z):
            z2 = z @ self.weight
            return z + torch.complex(torch.tanh(z2.real), torch.tanh(z2.imag))

    def run(model, x):
        z = torch.complex(x, x.roll(1, -1))
        for block in model.blocks:
            z = block(z)
        return z.abs()

    yield from train_stream(watch, Stream(Layer, run), 12)


@case()
def width_before_time_and_batch(watch: Watch) -> Iterator[Tensor]:
    """(D, T, B): linear maps over the first dimension."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

        def forward(self, x):
            h = self.up((x + x.mean(1, keepdim=True)).movedim(0, -1))
            return x + self.down(torch.relu(h)).movedim(-1, 0)

    def run(model, x):
        x = x.permute(2, 1, 0)
        for block in model.blocks:
            x = block(x)
        return x.permute(2, 1, 0)

    yield from train_stream(watch, Stream(Layer, run))


# Changes in mid-training.


@case()
def adapters_are_merged_and_begin_again(watch: Watch) -> Iterator[Tensor]:
    """ReLoRA: the factors go into the frozen weight, and their moments are zeroed in place."""

    class Low(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a, self.b = (
                nn.Parameter(torch.randn(2, base.in_features)),
                nn.Parameter(torch.zeros(base.out_features, 2)),
            )

        def forward(self, x):
            return self.base(x) + x @ self.a.T @ self.b.T

    model = Net()
    for block in model.blocks:
        block.up = Low(block.up)
    optimizer = adam(model.parameters())
    watch(model, optimizer)
    for step in range(12):
        if step % 4 == 3:
            with torch.no_grad():
                for block in model.blocks:
                    block.up.base.weight += block.up.b @ block.up.a
                    block.up.a.normal_()
                    block.up.b.zero_()
                    for each in (block.up.a, block.up.b):
                        for value in optimizer.state[each].values():
                            value.zero_()
        yield update(loss_of(model, step), optimizer)


@case()
def weights_are_pruned_in_mid_training(watch: Watch) -> Iterator[Tensor]:
    def change(model, optimizer):
        pairs = [(linear, "weight") for block in model.blocks for linear in (block.up, block.down)]
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.3)
        return sgd(model)

    yield from around(watch, Net(), change)


@case()
def rounds_of_a_lottery_ticket(watch: Watch) -> Iterator[Tensor]:
    """Masks, the first weights again, and a new optimizer in each round."""
    model = Net()
    first = copy.deepcopy(model.state_dict())
    masks = {name: torch.ones_like(each) for name, each in model.named_parameters()}
    for turn in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        if turn == 0:
            watch(model, optimizer)
        for step in range(6):
            yield update(loss_of(model, step), optimizer)
            with torch.no_grad():
                for name, each in model.named_parameters():
                    each.mul_(masks[name])
        for name, each in model.named_parameters():
            masks[name] = (each.detach().abs() > each.detach().abs().median() * 0.5 * (turn + 1)).float()
        model.load_state_dict(first)


@case()
def more_classes_and_the_old_model_as_teacher(watch: Watch) -> Iterator[Tensor]:
    """Learning without forgetting: a new head, and a frozen copy that is called in each step."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for task in range(3):
        old = copy.deepcopy(model).requires_grad_(False).eval() if task else None
        if task:
            head = nn.Linear(D, V + task)
            with torch.no_grad():
                head.weight[: V + task - 1] = model.head.weight
            model.head = head
            optimizer = sgd(model)
        for step in range(6):
            loss = nn.functional.cross_entropy(model(tokens(step)).flatten(0, 1), tokens(step).flatten())
            if old is not None:
                with torch.no_grad():
                    goal = old(tokens(step)).softmax(-1)
                loss = loss - (goal * model(tokens(step))[..., : goal.size(-1)].log_softmax(-1)).sum(-1).mean()
            yield update(loss, optimizer)


@case()
def vocabulary_grows(watch: Watch) -> Iterator[Tensor]:
    def change(model, optimizer):
        larger, head = nn.Embedding(V + 3, D), nn.Linear(D, V + 3)
        with torch.no_grad():
            larger.weight[:V], head.weight[:V] = model.embedding.weight, model.head.weight
        model.embedding, model.head = larger, head
        return sgd(model)

    yield from around(watch, Net(), change)


@case()
def list_becomes_a_sequence(watch: Watch) -> Iterator[Tensor]:
    def change(model, optimizer):
        model.blocks = nn.Sequential(*model.blocks)
        model.run = lambda stack, x: stack(x)

    yield from around(watch, Net(), change)


@case(told="trains 2 of 4 blocks")
def upper_and_lower_half_in_turn(watch: Watch) -> Iterator[Tensor]:
    """Frozen and freed in each epoch under one optimizer."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(16):
        if step % 4 == 0:
            model.blocks.requires_grad_(True)
            half = model.blocks[:2] if step % 8 == 0 else model.blocks[2:]
            half.requires_grad_(False)
        yield update(loss_of(model, step), optimizer)


@case()
def parametrizations_are_removed(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    for block in model.blocks:
        nn.utils.parametrizations.spectral_norm(block.up)

    def change(model, optimizer):
        for block in model.blocks:
            parametrize.remove_parametrizations(block.up, "weight")
        return sgd(model)

    yield from around(watch, model, change)


# The user's objects.


class Rebuilt(Block):
    """A block that is pickled as a call of its class."""

    def __reduce__(self):
        return _rebuild, (type(self), self.state_dict())


def _rebuild(kind, state):
    made = kind()
    made.load_state_dict(state)
    return made


@case()
def blocks_that_are_built_again(watch: Watch) -> Iterator[Tensor | float]:
    def act(model, optimizer):
        data = pickle.dumps(model)
        assert b"koopmon" not in data
        return number([pickle.loads(data)(tokens(1)), copy.deepcopy(model)(tokens(1))])

    yield from amid(watch, act, Net(kind=Rebuilt))


class Strict(Net):
    """Refuses attributes that its constructor did not make, and is false."""

    def __init__(self, **options):
        super().__init__(**options)
        self.is_complete = True

    def __setattr__(self, name, value):
        if getattr(self, "is_complete", False) and not hasattr(self, name):
            raise AttributeError(name)
        super().__setattr__(name, value)

    def __len__(self):
        return 0


@case()
def a_model_that_is_false_and_takes_no_attributes(watch: Watch) -> Iterator[Tensor]:
    yield from train(watch, Strict())


class Delegate(nn.Module):
    """Gives the attributes of what it holds, as wrappers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args):
        return self.module(*args)


@case("module.blocks")
def a_wrapper_that_gives_the_attributes_of_the_model(watch: Watch) -> Iterator[Tensor]:
    yield from train(watch, Delegate(Delegate(Net()).module))


@forks.case()
def a_child_process_validates(watch: Watch) -> Iterator[Tensor | float]:
    """A fork that runs the model with and without gradients, and ends at once."""

    def act(model, optimizer):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with torch.no_grad():
                    model(tokens(1))
                loss_of(model, 2).backward()
                optimizer.step()
                status = 0
            finally:
                os._exit(status)
        return float(os.waitpid(child, 0)[1])

    yield from amid(watch, act)


class Features(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(tokens(index))[0, :, :3].clone()


@forks.case()
def workers_that_call_the_model(watch: Watch) -> Iterator[Tensor | float]:
    """The data set holds the model, and worker processes call it."""
    calls = []

    def act(model, optimizer):
        calls.append(1)
        if len(calls) > 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return number(list(torch.utils.data.DataLoader(Features(model), 4, num_workers=1)))

    yield from amid(watch, act)
