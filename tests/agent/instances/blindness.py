"""K7: one line gives the cause of blindness and a remedy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.agent.instances.battery import (
    Battery,
    Block,
    D,
    Net,
    V,
    Watch,
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


@case(None, told="torch.func")
def functional_calls_alone(watch: Watch) -> Iterator[Tensor]:
    """A loop in the style of JAX: gradients by torch.func, an optimizer that takes them."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(20):
        parameters = {name: each.detach() for name, each in model.named_parameters()}

        def loss(parameters: Any, step: int = step) -> Tensor:
            return torch.func.functional_call(model, parameters, (tokens(step),)).square().mean()

        grads, value = torch.func.grad_and_value(loss)(parameters)
        for name, each in model.named_parameters():
            each.grad = grads[name].detach()
        optimizer.step()
        yield value


@case(None, told="weights change")
def updates_by_hand(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(20):
        model.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        with torch.no_grad():
            for each in model.parameters():
                each -= 0.02 * each.grad
        yield loss


@case(None, told="weights change")
def updates_by_foreach(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    watch(model, sgd(model))
    for step in range(20):
        loss = loss_of(model, step)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), list(grads), alpha=-0.02)
        yield loss


@case(None, told="neither it nor one of its blocks is called")
def another_copy_trains(watch: Watch) -> Iterator[Tensor]:
    """The attached model is a copy of the one that trains, under the optimizer that steps."""
    model = Net()
    optimizer = sgd(model)
    watch(copy.deepcopy(model), optimizer)
    for step in range(20):
        yield update(loss_of(model, step), optimizer)


@case("blocks.*.norm", 3)
def forward_methods_of_blocks(watch: Watch) -> Iterator[Tensor]:
    def run(stack: nn.ModuleList, x: Tensor) -> Tensor:
        for block in stack:
            x = block.forward(x)
        return x

    yield from train(watch, Net(run), 20)


@case(None, told="no snapshots|not called|missed")
def weights_read_by_functions(watch: Watch) -> Iterator[Tensor]:
    def run(stack: Any, x: Tensor) -> Tensor:
        for block in stack:
            y = nn.functional.layer_norm(x, (D,), block.norm.weight, block.norm.bias)
            y = torch.relu(nn.functional.linear(y, block.up.weight, block.up.bias))
            x = x + nn.functional.linear(y, block.down.weight, block.down.bias)
        return x

    yield from train(watch, Net(run), 20)


@case(None, told="not attached|no snapshots|script")
def scripted_model(watch: Watch) -> Iterator[Tensor]:
    import warnings

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.blocks, self.head = (
                nn.Embedding(V, D),
                nn.Sequential(*(Block() for _ in range(3))),
                nn.Linear(D, V),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.embedding(x)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(Plain())
    yield from train(watch, model, 20)


@case(None, told="no snapshots|not attached")
def pyramid_of_widths(watch: Watch) -> Iterator[Tensor]:
    class Down(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(width, width), nn.Linear(width, width // 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.blocks, self.head = (
                nn.Embedding(V, 16),
                nn.ModuleList(Down(w) for w in (16, 8, 4)),
                nn.Linear(2, V),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(through(self.blocks, self.embedding(x)))

    yield from train(watch, Pyramid(), 12)


@case(None, told="no snapshots|not attached")
def plain_layers_without_a_stream(watch: Watch) -> Iterator[Tensor]:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.down(torch.relu(self.up(x))))

    yield from train(watch, Net(kind=Dense), 12)


@case(None, told="neither it nor one of its blocks is called")
def only_a_part_is_called(watch: Watch) -> Iterator[Tensor]:
    """The warm-up of a head, with the features computed once and stored."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    with torch.no_grad():
        features = through(model.blocks, model.embedding(tokens(0)))
    for _ in range(20):
        yield update(nn.functional.cross_entropy(model.head(features).flatten(0, 1), tokens(0).flatten()), optimizer)


@case(None, told="without gradients")
def gradients_by_a_zeroth_order_method(watch: Watch) -> Iterator[Tensor]:
    """MeZO: two forwards without gradients, and an update along a random direction."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(20):
        directions = [vectors(step, each.numel()).view_as(each) for each in model.parameters()]
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                for each, direction in zip(model.parameters(), directions, strict=True):
                    each += sign * 1e-3 * direction
                values.append(loss_of(model, step))
            for each, direction in zip(model.parameters(), directions, strict=True):
                each += 1e-3 * direction
                each.grad = (values[0] - values[1]) / 2e-3 * direction
        optimizer.step()
        yield values[0]


@case()
def root_is_bypassed_by_parts(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        h = model.embedding(tokens(step))
        for block in model.blocks:
            h = block(h)
        yield update(model.head(h).square().mean(), optimizer)


@case()
def wrapper_of_the_users_own_is_called(watch: Watch) -> Iterator[Tensor]:
    """The attached model is inside the module that the loop calls."""

    class Trainer(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, step: int) -> Tensor:
            return loss_of(self.model, step)

    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    trainer = Trainer(model)
    for step in range(8):
        yield update(trainer(step), optimizer)


@case(None, told="not attached")
def leaves_alone(watch: Watch) -> Iterator[Tensor]:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, V))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    yield from train(watch, Mlp())
