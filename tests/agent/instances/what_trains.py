"""K1: the stack that trains is watched."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.agent.instances.battery import (
    B,
    Battery,
    D,
    Net,
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

battery = Battery()
case = battery.case


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


@case(told="trains 2 of 4 blocks")
def low_rank_in_the_last_two(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    model.requires_grad_(False)
    for block in model.blocks[2:]:
        block.up = LowRank(block.up)
    yield from train(watch, model)


@case("student.blocks")
def average_teacher_inside(watch: Watch) -> Iterator[Tensor]:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = Net()
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
                target = self.teacher(x.flip(1))
            return self.student(x) + 0.1 * target

    yield from train(watch, Both())


@case(told="trains 2 of 4 blocks")
def frozen_lower_half(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    model.blocks[:2].requires_grad_(False)
    yield from train(watch, model)


@case("upper", 3)
def frozen_lower_list(watch: Watch) -> Iterator[Tensor]:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lower, self.upper, self.head = (
                nn.Embedding(V, D),
                blocks(5),
                blocks(3),
                nn.Linear(D, V),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(through(self.upper, through(self.lower, self.embedding(x))))

    model = Parts()
    model.lower.requires_grad_(False)
    model.embedding.requires_grad_(False)
    yield from train(watch, model)


@case("policy.blocks", 3)
def policy_and_reward(watch: Watch) -> Iterator[Tensor]:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.reward, self.embedding = Net(count=3), blocks(6), nn.Linear(V, D)
            self.reward.requires_grad_(False)
            self.embedding.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return through(self.reward, self.embedding(self.policy(x).softmax(-1)))

    model = Holder()
    optimizer = torch.optim.AdamW(model.policy.parameters(), lr=1e-3)
    watch(model, optimizer)
    for step in range(8):
        yield update(-model(tokens(step)).square().mean(), optimizer)


@case("denoiser", 3)
def frozen_autoencoder(watch: Watch) -> Iterator[Tensor]:
    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.denoiser = blocks(6), blocks(3)
            self.encoder.requires_grad_(False).eval()

        def forward(self, x: Tensor, noise: Tensor) -> Tensor:
            with torch.no_grad():
                z = through(self.encoder, x)
            return (through(self.denoiser, z + noise) - noise).square().mean()

    model = Latent()
    optimizer = sgd(model.denoiser)
    watch(model, optimizer)
    for step in range(8):
        yield update(model(vectors(step), vectors(step + 100)), optimizer)


@case("generator", 4)
def generator_and_discriminator(watch: Watch) -> Iterator[Tensor]:
    class Adversarial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.discriminator, self.score = blocks(4), blocks(3), nn.Linear(D, 1)

        def forward(self, z: Tensor, real: Tensor | None) -> Tensor:
            fake = through(self.generator, z)
            if real is None:
                return -self.score(through(self.discriminator, fake)).mean()
            return (
                self.score(through(self.discriminator, fake.detach())) - self.score(through(self.discriminator, real))
            ).mean()

    model = Adversarial()
    first, second = sgd(model.generator), sgd(model.discriminator, model.score)
    watch(model, first, second)
    for step in range(8):
        model.generator.requires_grad_(False), model.discriminator.requires_grad_(True)
        yield update(model(vectors(step), vectors(step + 50)), second)
        model.generator.requires_grad_(True), model.discriminator.requires_grad_(False)
        yield update(model(vectors(step), None), first)


@case("query.blocks")
def momentum_contrast(watch: Watch) -> Iterator[Tensor]:
    class Contrast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = Net()
            self.key = copy.deepcopy(self.query).requires_grad_(False)
            self.register_buffer("queue", torch.randn(V, 16))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                    k.data = k.data * 0.9 + q.data * 0.1
                key = self.key(x.flip(1)).mean(1)
                self.queue = torch.cat([self.queue[:, B:], key.T], 1)
            return (self.query(x).mean(1) @ self.queue).square().mean()

    model = Contrast()
    optimizer = sgd(model.query)
    watch(model, optimizer)
    for step in range(8):
        yield update(model(tokens(step)), optimizer)


@case("student.blocks")
def self_distillation_with_crops(watch: Watch) -> Iterator[Tensor]:
    class Crops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = Net().requires_grad_(False), Net()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = torch.cat([self.teacher(x), self.teacher(x.flip(1))]).softmax(-1).mean((0, 1))
            crops = [self.student(x[:, :4]), self.student(x[:, 2:]), self.student(x)]
            return sum(-(target * crop.log_softmax(-1)).sum(-1).mean() for crop in crops)

    model = Crops()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield update(model(tokens(step)), optimizer)


@case("adapters", 3)
def adapters_beside_frozen_blocks(watch: Watch) -> Iterator[Tensor]:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = Net().requires_grad_(False)
            self.adapters = nn.ModuleList(nn.Sequential(nn.Linear(D, 3), nn.GELU(), nn.Linear(3, D)) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.base.embedding(x)
            for block, adapter in zip(self.base.blocks, self.adapters, strict=True):
                h = block(h)
                h = h + adapter(h)
            return self.base.head(h)

    yield from train(watch, Adapted())


@case(told="trains 0 of 4 blocks")
def prompt_tuning(watch: Watch) -> Iterator[Tensor]:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = Net().requires_grad_(False)
            self.embedding, self.blocks, self.head = base.embedding, base.blocks, base.head
            self.prompt = nn.Parameter(torch.randn(2, D))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.prompt.expand(B, -1, -1), self.embedding(x)], 1)
            return self.head(through(self.blocks, h)[:, 2:])

    yield from train(watch, Prompted())


@case(told="trains 0 of 4 blocks")
def linear_probe(watch: Watch) -> Iterator[Tensor]:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.blocks = Net().requires_grad_(False), blocks().requires_grad_(False)
            self.embedding, self.head = self.base.embedding, nn.Linear(D, V)
            del self.base

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = through(self.blocks, self.embedding(x))
            return self.head(h)

    yield from train(watch, Probe())


@case()
def progressive_freezing(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        if step in (3, 5):
            model.blocks[step // 2 - 1].requires_grad_(False)
        yield update(loss_of(model, step), optimizer)


@case("language.blocks", told="trains 0 of 4 blocks")
def projector_between_frozen_towers(watch: Watch) -> Iterator[Tensor]:
    class Multi(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision, self.projector, self.language = (
                blocks(6).requires_grad_(False),
                nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)),
                Net().requires_grad_(False),
            )

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                image = through(self.vision, vectors(0, B, 3, D))
            h = torch.cat([self.projector(image), self.language.embedding(x)], 1)
            return self.language.head(through(self.language.blocks, h))[:, 3:]

    yield from train(watch, Multi())


@case()
def biases_alone(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    yield from train(watch, model)


@case("online.blocks", 3)
def target_network_of_a_value(watch: Watch) -> Iterator[Tensor]:
    """Double Q learning: the target is copied every few steps, and its parameters keep requires_grad."""

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = Net(count=3), Net(count=3)

    model = Values()
    optimizer = torch.optim.Adam(model.online.parameters(), lr=1e-3)
    watch(model, optimizer)
    for step in range(8):
        if step % 4 == 0:
            model.target.load_state_dict(model.online.state_dict())
        with torch.no_grad():
            best = model.online(tokens(step + 1)).argmax(-1, keepdim=True)
            value = model.target(tokens(step + 1)).gather(-1, best)
        yield update((model.online(tokens(step)).amax(-1, keepdim=True) - value).square().mean(), optimizer)
