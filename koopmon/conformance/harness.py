"""The test bench of an adapter: builds and trains an example model reproducibly.

Shapes: B batch, T tokens, D width, L blocks; a state is (..., T, D).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, ExampleModel, Stack
from koopmon.chain_verifier import ChainVerifier
from koopmon.conformance.result import ConformanceError, demand
from koopmon.discovery import probe, random_state_kept
from koopmon.errors import KoopmonError, foreign_code, raise_from_signal
from koopmon.plugins import adapters, select

MIN_TOKENS = 32
"""Minimum number of tokens of one microbatch for a meaningful spectrum."""


class Bench:
    """One adapter and one example model of its family. Results that several checks need are cached."""

    def __init__(self, adapter: ArchitectureAdapter, example: ExampleModel) -> None:
        self.adapter = adapter
        self.example = example
        self.alpha: float | None = None
        """The KSS weight of the checks, once one of them has computed it."""
        self._batches: dict[int, Any] = {}

    @cached_property
    def known(self) -> dict[str, ArchitectureAdapter]:
        """Installed adapters by name; the adapter under test replaces an installed one of the same name."""
        return {**adapters(), self.adapter.name: self.adapter}

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the model with the parameters of seed 0, in training mode and converted to `dtype` if given."""
        model = self._made(0)[0]
        return (model if dtype is None else model.to(dtype)).train()

    def batch(self, seed: int, dtype: torch.dtype | None = None) -> Any:
        """Return a fresh copy of the microbatch of `seed`, with floating-point tensors in `dtype` if given."""
        if seed not in self._batches:
            self._batches[seed] = self._made(seed)[1]
        return copied(self._batches[seed], dtype)

    def _made(self, seed: int) -> tuple[nn.Module, Any]:
        with seeded(seed):
            made: Any = self.example.build(seed)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
            raise ConformanceError(f"build({seed}) gives {type(made).__name__}, expected (model, batch)")
        return made

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the 0-d training loss of one forward pass of `model`."""
        if self.example.loss is not None:
            return self.example.loss(model, batch)
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        for part in parts(output).values():
            if isinstance(part, Tensor) and part.is_floating_point():
                return part.square().mean()
        raise ConformanceError(
            f"the model gives {described(output)}, without a loss: name one with ExampleModel(loss=)"
        )

    @cached_property
    def flaw(self) -> str:
        """Defect of the example model itself; empty for a valid one."""
        try:
            with foreign_code(lambda why: ConformanceError(f"the example model {why}")):
                self._check_example()
        except KoopmonError as error:
            return str(error)
        return ""

    def _check_example(self) -> None:
        first, second = self.build(), self.build()
        demand(first is not second, "build(0) gives one and the same model twice, expected a new one at each call")
        left, right = first.state_dict(), second.state_dict()
        for name in left:
            same = name in right and same_bits(left[name], right[name])
            demand(same, f"build(0) gives two models that differ in {name}, expected the same for the same seed")
        batches = (parts(self._made(0)[1]) for _ in range(2))
        for (path, one), other in zip(next(batches).items(), next(batches).values(), strict=True):
            same = not isinstance(one, Tensor) or same_bits(one, other)
            demand(same, f"build(0) gives two batches that differ in {path or 'their tensor'}, expected the same")
        losses = []
        for model in (first, second):
            with seeded(1):
                loss = self.loss(model, self.batch(0))
            scalar = isinstance(loss, Tensor) and loss.dim() == 0
            demand(scalar, f"its loss is {described(loss)}, expected a 0-d tensor")
            demand(torch.isfinite(loss), f"its loss is {loss.item()}, expected a finite number")
            demand(loss.requires_grad, "its loss has no gradient")
            losses.append(loss)
        demand(same_bits(*losses), f"the same training step gives {losses[0].item()!r} and {losses[1].item()!r}")
        losses[0].backward()  # type: ignore[no-untyped-call]

    @cached_property
    def shields(self) -> tuple[str, ...]:
        """Names of the modules that the model's families shield from KSS; raises the exceptions of shielded()."""
        model = self.build()
        selection = select(model, self.adapter)
        names = {module: name for name, module in model.named_modules()}
        found: dict[str, None] = {}
        for stack in selection.candidates:
            for family in selection.families:
                for module in family.shielded(stack):
                    known = isinstance(module, nn.Module) and module in names
                    demand(known, f"shielded() gives {described(module)} that is no module of the model")
                    found[names[module]] = None
        return tuple(found)

    @property
    def through_shielded(self) -> bool:
        """True if KSS requires `[kss] through_shielded`. Raises SkipTest when shielded() fails."""
        try:
            return bool(self.shields)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # the adapter's own code
            raise_from_signal(error)
            raise SkipTest("needs the modules shielded from KSS, which `kss-shields` does not find") from None

    @cached_property
    def chain(self) -> tuple[str | None, str]:
        """Name of the stack that a forward pass verifies and "", or None and the reason against each candidate."""
        try:
            with foreign_code(ConformanceError):  # the adapter's own code
                model = self.build()
                selection = select(model, self.adapter)
                verifier = ChainVerifier(self.adapter, selection.candidates)
                with probe(model) as bare, verifier.watch(), seeded(1):
                    self.loss(bare, self.batch(0))
                kept, reasons = verifier.verdict()
        except KoopmonError as error:
            return None, str(error)
        if kept is None:
            reason = "; ".join(f"{name or 'the model itself'}: {why}" for name, why in reasons.items())
            return None, f"no stack is a chain of residual blocks: {reason}"
        return kept.name, ""

    def stack(self, model: nn.Module) -> Stack:
        """Return the verified chain in `model`. Raises SkipTest without one; `discovery` reports the reason."""
        name = self.chain[0]
        if name is None:
            raise SkipTest("needs the chain that `discovery` does not find")
        return next(stack for stack in self.adapter.stacks(model) if stack.name == name)

    def likely_stack(self, model: nn.Module) -> Stack:
        """Return the verified chain, else the adapter's best candidate. Raises SkipTest when it has none."""
        stacks = self.adapter.stacks(model)
        if not stacks:
            raise SkipTest("needs a stack, and stacks() gives none")
        name = self.chain[0]
        return next((stack for stack in stacks if stack.name == name), stacks[0])

    @cached_property
    def precise(self) -> torch.dtype:
        """float64 if the example can compute in it, else float32."""
        try:
            model = self.build(torch.float64)
            with seeded(1):
                self.loss(model, self.batch(0, torch.float64)).backward()  # type: ignore[no-untyped-call]
        except Exception:  # the model requires its own dtype
            return torch.float32
        return torch.float64


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and random with `seed`, and restore their states at the end."""
    with random_state_kept():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield


def parts(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested tuples, lists, mappings and dataclasses by path, such as "[0].keys"."""
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f".{each.name}", getattr(value, each.name)) for each in dataclasses.fields(value)]
    else:
        return {path: value}
    return {where: leaf for step, item in items for where, leaf in parts(item, path + step).items()}


def copied(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Return `value` with all tensors cloned, floating-point ones converted to `dtype` if given."""
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        return copy.to(dtype) if dtype is not None and copy.is_floating_point() else copy
    if isinstance(value, Mapping):
        return {key: copied(item, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(copied(item, dtype) for item in value)
    return value


def same_bits(left: Any, right: Any) -> bool:
    """Return True if two tensors or other state-dict values have equal shape, type and values; NaN equals NaN."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return isinstance(left, Tensor) == isinstance(right, Tensor) and bool(left == right)
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def described(value: Any) -> str:
    """Return a short description of a value."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def at_points(
    stack: Stack,
    enter: Callable[[int, nn.Module, tuple[Any, ...], dict[str, Any]], None] | None = None,
    leave: Callable[[int, nn.Module, tuple[Any, ...], Any], Any] | None = None,
) -> ExitStack:
    """Register enter(layer, module, args, kwargs) before and leave(layer, module, args, output) after each block.

    Closing the result removes the hooks.
    """
    hooks = ExitStack()
    for point in stack.points:
        if enter is not None:
            before = partial(enter, point.layer)
            hooks.enter_context(point.entry.register_forward_pre_hook(before, with_kwargs=True))
        if leave is not None:
            hooks.enter_context(point.module.register_forward_hook(partial(leave, point.layer)))
    return hooks
