"""K14: a model or an optimizer that changes after attach is followed, or told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.agent.instances.battery import (
    Battery,
    Block,
    D,
    Net,
    Watch,
    blocks,
    loss_of,
    sgd,
    update,
)

battery = Battery()
case = battery.case
CHANGED = "have changed|were removed"


def around(watch: Watch, model: nn.Module, change: Any, before: int = 4, after: int = 10) -> Iterator[Tensor]:
    """Train, `change(model, optimizer)`, and train on, with the optimizer that it returns."""
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(before):
        yield update(loss_of(model, step), optimizer)
    optimizer = change(model, optimizer) or optimizer
    for step in range(before, before + after):
        yield update(loss_of(model, step), optimizer)


@case(layers=5, told=CHANGED)
def block_is_appended(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        model.blocks.append(Block())
        optimizer.add_param_group({"params": list(model.blocks[-1].parameters())})

    yield from around(watch, Net(), change)


@case(layers=5, told=CHANGED, lines=2)
def block_is_inserted(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        model.blocks.insert(1, Block())

    yield from around(watch, Net(), change)


@case(layers=3, told=CHANGED)
def block_is_removed(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        del model.blocks[1]

    yield from around(watch, Net(), change, after=30)


@case(layers=8, told=CHANGED)
def stack_is_doubled(watch: Watch) -> Iterator[Tensor]:
    """Depth up-scaling: a new list that holds the old blocks and copies."""
    import copy

    def change(model: Net, optimizer: Any) -> Any:
        model.blocks = nn.ModuleList([each for block in model.blocks for each in (block, copy.deepcopy(block))])
        return sgd(model)

    yield from around(watch, Net(), change)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a, self.b = nn.Linear(D, 2), nn.Linear(2, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.b(self.a(x))


@case(told=CHANGED)
def block_is_wrapped_for_low_rank(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> Any:
        model.blocks[2] = Wrapped(model.blocks[2])
        return sgd(model)

    yield from around(watch, Net(), change)


@case(layers=4, told=CHANGED)
def block_is_replaced(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> Any:
        model.blocks[2] = Block()
        return sgd(model)

    yield from around(watch, Net(), change, after=30)


@case(layers=4, told=CHANGED)
def all_blocks_are_replaced(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> Any:
        model.blocks = blocks()
        return sgd(model)

    yield from around(watch, Net(), change, after=30)


@case(layers=4, told=CHANGED)
def hooks_are_cleared(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()

    yield from around(watch, Net(), change)


@case(layers=4, told=CHANGED)
def hooks_of_the_blocks_are_cleared(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        for module in model.blocks:
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()

    yield from around(watch, Net(), change)


@case(layers=4, told=CHANGED)
def hooks_are_new_tables(watch: Watch) -> Iterator[Tensor]:
    from collections import OrderedDict

    def change(model: Net, optimizer: Any) -> None:
        for module in model.modules():
            module._forward_hooks = OrderedDict()
            module._forward_pre_hooks = OrderedDict()

    yield from around(watch, Net(), change)


@case()
def optimizer_is_replaced(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> Any:
        return torch.optim.Adam(model.parameters(), lr=1e-3)

    yield from around(watch, Net(), change, after=30)


@case()
def hooks_of_the_optimizer_are_cleared(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        optimizer._optimizer_step_pre_hooks.clear()
        optimizer._optimizer_step_post_hooks.clear()

    yield from around(watch, Net(), change, after=30)


@case(layers=4, told="step is compiled")
def step_is_compiled(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(4):
        yield update(loss_of(model, step), optimizer)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(4, 14):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        compiled()
        yield loss


@case()
def weights_are_made_empty_and_new(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> Any:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.to_empty(device="cpu")
        model.load_state_dict(state)

    yield from around(watch, Net(), change)


@case()
def weights_are_assigned(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> Any:
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        return sgd(model)

    yield from around(watch, Net(), change)


@case()
def data_of_parameters_is_swapped(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    average = [each.detach().clone() for each in model.parameters()]
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        for slow, fast in zip(average, model.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.1)
        kept = [each.data for each in model.parameters()]
        for parameter, slow in zip(model.parameters(), average, strict=True):
            parameter.data = slow
        with torch.no_grad():
            yield loss_of(model, 99)
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.data = value


@case(told="trains 2 of 4 blocks")
def group_is_added(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    model.blocks[:2].requires_grad_(False)
    optimizer = torch.optim.Adam(model.blocks[2:].parameters(), lr=1e-3)
    watch(model, optimizer)
    for step in range(10):
        if step == 4:
            model.requires_grad_(True)
            optimizer.add_param_group({"params": list(model.blocks[:2].parameters()), "lr": 1e-4})
        yield update(loss_of(model, step), optimizer)


class Louder(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1.1 * self.update(x)


@case()
def class_of_blocks_changes(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        for block in model.blocks:
            block.__class__ = Louder

    yield from around(watch, Net(), change)


@case()
def forward_of_blocks_is_patched(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        for block in model.blocks:
            block.forward = lambda x, block=block: x + 0.9 * block.update(x)

    yield from around(watch, Net(), change)


@case()
def model_is_compiled_later(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(4):
        yield update(loss_of(model, step), optimizer)
    compiled = torch.compile(model, backend="eager")
    for step in range(4, 14):
        yield update(loss_of(compiled, step), optimizer)


@case()
def model_is_compiled_in_place_before_the_first_forward(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    model.compile(backend="eager")
    for step in range(8):
        yield update(loss_of(model, step), optimizer)


@case()
def blocks_are_compiled_in_place_later(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        for block in model.blocks:
            block.compile(backend="eager")

    yield from around(watch, Net(), change)


@case()
def blocks_are_compiled_wrappers_later(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = torch.compile(block, backend="eager")

    yield from around(watch, Net(), change)


@case()
def checkpointing_is_applied_later(watch: Watch) -> Iterator[Tensor]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    def change(model: Net, optimizer: Any) -> None:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))

    yield from around(watch, Net(), change)


@case()
def precision_changes(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        model.to(torch.bfloat16).to(torch.float64)

    yield from around(watch, Net(), change)


@case(layers=4, told=CHANGED)
def order_of_blocks_changes(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        model.blocks = nn.ModuleList([model.blocks[index] for index in (2, 0, 3, 1)])

    yield from around(watch, Net(), change, after=30)


@case(layers=4, told=CHANGED, lines=2)
def blocks_become_identities(watch: Watch) -> Iterator[Tensor]:
    """Structured pruning of half of the depth."""

    def change(model: Net, optimizer: Any) -> None:
        model.blocks[1] = nn.Identity()
        model.blocks[2] = nn.Identity()

    yield from around(watch, Net(), change, after=30)


@case()
def weights_are_parametrized(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> Any:
        for block in model.blocks:
            parametrizations.weight_norm(block.up)
        return sgd(model)

    yield from around(watch, Net(), change)


@case()
def linears_are_quantised(watch: Watch) -> Iterator[Tensor]:
    class Rounded(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("weight", (linear.weight.detach() * 16).round().to(torch.int8))
            self.bias = nn.Parameter(linear.bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.float() / 16, self.bias)

    def change(model: Net, optimizer: Any) -> Any:
        for block in model.blocks:
            block.up = Rounded(block.up)
        return sgd(model)

    yield from around(watch, Net(), change)


@case()
def blocks_are_frozen(watch: Watch) -> Iterator[Tensor]:
    def change(model: Net, optimizer: Any) -> None:
        model.blocks.requires_grad_(False)

    yield from around(watch, Net(), change)


@case()
def wrapper_calls_the_blocks_itself(watch: Watch) -> Iterator[Tensor]:
    """A pipeline made of the parts of the model replaces it in the loop."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(4):
        yield update(loss_of(model, step), optimizer)
    parts = nn.Sequential(model.embedding, *model.blocks, model.head)
    for step in range(4, 14):
        yield update(loss_of(parts, step), optimizer)
