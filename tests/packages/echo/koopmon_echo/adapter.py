"""koopmon adapter for Echo networks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from koopmon import ArchitectureAdapter, ExampleModel, Stack, block_lists, call_arguments, hookimpl

from .model import Echo, EchoBlock


class EchoAdapter(ArchitectureAdapter):
    """Lists of EchoBlock, which return (echo, state)."""

    name = "echo"

    def specificity(self, model: nn.Module) -> int:
        return 20 if self.stacks(model) else 0

    def stacks(self, model: nn.Module) -> list[Stack]:
        found = [each for each in block_lists(model) if all(isinstance(block, EchoBlock) for _, block in each.blocks)]
        return [each.stack(residual=True) for each in found]

    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        return output[1]

    def with_block_output(self, module: nn.Module, output: Any, state: Tensor) -> Any:
        return output[0], state

    def token_mask(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stack: Stack | None = None
    ) -> Tensor | None:
        padding = call_arguments(model, args, kwargs).get("padding")
        return None if padding is None else ~padding


@hookimpl
def koopmon_architecture_adapters() -> list[ArchitectureAdapter]:
    return [EchoAdapter()]


def build(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a small network and one batch; koopmon has seeded torch with `seed`."""
    padding = torch.arange(12) >= torch.tensor([[12], [12], [9], [7]])
    return Echo(), {"tokens": torch.randint(30, (4, 12)), "padding": padding}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute the cross-entropy of the next token."""
    logits = model(**batch)[:, :-1]
    targets = batch["tokens"].masked_fill(batch["padding"], -100)[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@hookimpl
def koopmon_example_models() -> list[ExampleModel]:
    return [ExampleModel("echo-small", "echo", build, loss)]
