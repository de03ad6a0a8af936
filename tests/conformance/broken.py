"""Adapters of the Echo example package that each break one requirement, with the check that must fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, Observable, Stack
from tests.packages.echo.koopmon_echo.adapter import EchoAdapter


class FiresTwice(EchoAdapter):
    """Taps the norm, which serves both halves of a block."""

    def stacks(self, model: nn.Module) -> list[Stack]:
        def inner(stack: Stack) -> Stack:
            return replace(
                stack,
                points=tuple(replace(p, name=f"{p.name}.norm", module=p.module.norm) for p in stack.points),
            )

        return [inner(stack) for stack in super().stacks(model)]

    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        return output

    def with_block_output(self, module: nn.Module, output: Any, state: Tensor) -> Any:
        return state


class WrongPart(EchoAdapter):
    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        return output[0]

    def with_block_output(self, module: nn.Module, output: Any, state: Tensor) -> Any:
        return state, output[1]


class WrongWidth(EchoAdapter):
    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        return output[1][..., :-1]


class ClaimsEverything(EchoAdapter):
    def specificity(self, model: nn.Module) -> int:
        return 90


class ClaimsOthers(EchoAdapter):
    """Claims any list of blocks."""

    def stacks(self, model: nn.Module) -> list[Stack]:
        from koopmon import block_lists

        return [each.stack(residual=True) for each in block_lists(model) if not each.is_planar]


class ClaimsTooHigh(EchoAdapter):
    def specificity(self, model: nn.Module) -> int:
        return 1000 if self.stacks(model) else 0


class Hesitates(EchoAdapter):
    """Makes a claim equal to that of another matching adapter."""

    def specificity(self, model: nn.Module) -> int:
        return 1 if self.stacks(model) else 0


class Remembers(EchoAdapter):
    def __init__(self) -> None:
        self.models: list[nn.Module] = []

    def specificity(self, model: nn.Module) -> int:
        self.models.append(model)
        return super().specificity(model)


class Marks(EchoAdapter):
    """Stores an attribute in the model."""

    def specificity(self, model: nn.Module) -> int:
        for module in model.modules():
            module.seen_by_echo = True  # type: ignore[assignment]
        return super().specificity(model)


class Shakes(EchoAdapter):
    """Changes a weight, visible only in its values."""

    def stacks(self, model: nn.Module) -> list[Stack]:
        for parameter in model.parameters():
            parameter.data.mul_(1.001)
        return super().stacks(model)


class Draws(EchoAdapter):
    def flags(self, model: nn.Module) -> frozenset[str]:
        torch.rand(())
        return frozenset()


class WritesInPlace(EchoAdapter):
    """Changes the user's own state."""

    def block_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        with torch.no_grad():
            return args[0].mul_(0.999)


class Detaches(EchoAdapter):
    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        return output[1].detach()


class Copies(EchoAdapter):
    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        return output[1].clone()


class SwallowsGraph(EchoAdapter):
    def with_block_output(self, module: nn.Module, output: Any, state: Tensor) -> Any:
        return output[0], state.detach()


class DropsPart(EchoAdapter):
    def with_block_output(self, module: nn.Module, output: Any, state: Tensor) -> Any:
        return None, state


class Inherits(EchoAdapter):
    """Reads the second part and lets the parent write the first."""

    with_block_output = ArchitectureAdapter.with_block_output


class Ignores(EchoAdapter):
    """Discards the new state."""

    def with_block_output(self, module: nn.Module, output: Any, state: Tensor) -> Any:
        return output


class Throws(EchoAdapter):
    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        raise KeyError("hidden\nstates")


class ThrowsInTraining(EchoAdapter):
    def token_mask(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stack: Stack | None = None
    ) -> Tensor | None:
        raise RuntimeError("no mask today")


class WrongMask(EchoAdapter):
    def token_mask(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stack: Stack | None = None
    ) -> Tensor | None:
        mask = super().token_mask(model, args, kwargs, stack)
        return None if mask is None else mask.long()


class WrongNames(EchoAdapter):
    def stacks(self, model: nn.Module) -> list[Stack]:
        def renamed(stack: Stack) -> Stack:
            return replace(stack, points=tuple(replace(p, name=f"layers.{p.layer}") for p in stack.points))

        return [renamed(stack) for stack in super().stacks(model)]


class Backwards(EchoAdapter):
    def stacks(self, model: nn.Module) -> list[Stack]:
        def turned(stack: Stack) -> Stack:
            points = [replace(point, layer=layer) for layer, point in enumerate(reversed(stack.points))]
            return replace(stack, points=tuple(points))

        return [turned(stack) for stack in super().stacks(model)]


class FindsNothing(EchoAdapter):
    def specificity(self, model: nn.Module) -> int:
        return 20 if super().stacks(model) else 0

    def stacks(self, model: nn.Module) -> list[Stack]:
        return []


class UnknownThreshold(EchoAdapter):
    def thresholds(self) -> Mapping[str, float]:
        return {"peak_sale": 0.3}


class BadThreshold(EchoAdapter):
    def thresholds(self) -> Mapping[str, float]:
        return {"peak_scale": -1.0}


class BadExponent(EchoAdapter):
    def update_exponent(self, stack: Stack) -> float | None:
        return float("nan")


class BadKss(EchoAdapter):
    def kss_settings(self) -> Mapping[str, float]:
        return {"svd_rank": 2.5}


class ShieldsAStranger(EchoAdapter):
    """Names a module of another model."""

    def shielded(self, stack: Stack) -> Sequence[nn.Module]:
        return [nn.Dropout()]


class CannotShield(EchoAdapter):
    def shielded(self, stack: Stack) -> Sequence[nn.Module]:
        return [stack.points[0].module.router]  # type: ignore[list-item]


class Measures(EchoAdapter):
    """Parent of adapters with a wrong measurement of how far a block moves the state."""

    measures: ClassVar[Mapping[str, str]] = {"reach": "Norm of the echo over that of the state."}

    def observables(self, stack: Stack) -> Sequence[Observable]:
        return [Observable("reach", point.layer, point.module, self.read) for point in stack.points]

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        return output[0].norm() / output[1].norm()


class Unlisted(Measures):
    measures: ClassVar[Mapping[str, str]] = {"range": "As above, under another name."}


class BadName(Measures):
    measures: ClassVar[Mapping[str, str]] = {"Reach!": "As above."}


class BeyondTheStack(Measures):
    def observables(self, stack: Stack) -> Sequence[Observable]:
        return [Observable("reach", len(stack.points), stack.points[-1].module, self.read)]


class ReadsAVector(Measures):
    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        return output[0].norm(dim=-1)


class ReadsNaN(Measures):
    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        return output[0].norm() * float("nan")


class DrawsToRead(Measures):
    """Reads some tokens only, at random."""

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        return output[0][:, torch.randperm(3)].norm()


class Case(NamedTuple):
    """`found`: all failing checks, the most specific first, whose reason matches `reason`."""

    adapter: type[EchoAdapter]
    reason: str
    found: tuple[str, ...]


TAPS = ("taps", "taps-accumulation", "taps-evaluation")
KSS = ("kss-gradient", "kss-checkpointing", "kss-on-and-off")

CASES = [
    Case(FiresTwice, r"tap at blocks\.0\.norm fires 2 times in one training forward", (*TAPS, "discovery")),
    Case(WrongPart, r"the output of blocks\.0 is not the input of blocks\.1", ("discovery",)),
    Case(WrongWidth, r"blocks\.0 gives a float32 tensor of shape \(4, 12, 15\)", ("shapes", "discovery", "round-trip")),
    Case(ClaimsEverything, "90 for a linear layer", ("restraint",)),
    Case(ClaimsOthers, "20 for '.+', a model of adapter '(kan|transformer)', which claims [12]0", ("restraint",)),
    Case(ClaimsTooHigh, "gives 1000 .*, allowed are 1 to 100", ("claim",)),
    Case(Hesitates, "adapter 'transformer' claims this model with 1, this one with 1: raise it above", ("claim",)),
    Case(Remembers, "keeps models of one model for the next", ("claim",)),
    Case(Marks, r"specificity\(\) changes the model: Echo", ("untouched",)),
    Case(
        Shakes,
        r"specificity\(\) changes the values of embedding\.weight",
        ("untouched", "round-trip", "losses", "learning-rate", "kss-checkpointing"),
    ),
    Case(Draws, r"flags\(\) draws from the global random generator", ("untouched",)),
    Case(WritesInPlace, r"block_input at blocks\.0 writes into a float32 tensor", ("reading", "discovery", "losses")),
    Case(Detaches, r"block_output at blocks\.0 cuts the state off", ("reading", "round-trip", *KSS)),
    Case(Copies, r"block_output at blocks\.0 gives a copy", ("reading", "round-trip")),
    Case(SwallowsGraph, r"the gradient of embedding\.weight is another", ("round-trip", *KSS)),
    Case(DropsPart, r"at blocks\.0 replaces part \[0\] of the output", ("round-trip",)),
    Case(Inherits, r"does not put the state where block_output at blocks\.0 reads it", ("round-trip", *KSS)),
    Case(Ignores, r"differs from the explicit one by 1\.0e\+00 of its norm", ("kss-gradient", "round-trip", *KSS[1:])),
    Case(Throws, "raised KeyError: .*states", ("discovery", "shapes", "reading", "round-trip", *TAPS)),
    Case(
        ThrowsInTraining,
        "the agent switches itself off: _enter_root: RuntimeError: no mask today",
        ("losses", "learning-rate", "shapes", "reading", *TAPS, "taps-checkpointing", *KSS),
    ),
    Case(WrongMask, "token_mask gives an? int64 tensor of shape .*, expected a boolean tensor", ("shapes",)),
    Case(WrongNames, r"point 'layers\.0' of stack 'blocks' names no module", ("discovery",)),
    Case(Backwards, r"blocks\.0 was called out of turn", ("discovery",)),
    Case(FindsNothing, r"stacks\(\) gives \[\]", ("discovery",)),
    Case(UnknownThreshold, r"risk\.peak_sale = 0\.3: allowed fields are .*peak_scale", ("settings",)),
    Case(BadExponent, r"update_exponent\(\) gives nan, expected None or a number", ("settings",)),
    Case(BadThreshold, r"risk\.peak_scale = -1\.0: expected `float` >= 1e-06 and <= 1000000\.0", ("settings",)),
    Case(ShieldsAStranger, r"shielded\(\) gives a Dropout that is no module of the model", ("kss-shields",)),
    Case(CannotShield, "raised AttributeError: .*router", ("untouched", "kss-shields")),
    Case(Unlisted, r"observables\(\) gives 'reach', and `measures` lists range", ("observables",)),
    Case(BadName, "its observable 'Reach!' is not called", ("observables",)),
    Case(BeyondTheStack, "'reach' is of transition 3, allowed are 0 to 2", ("observables",)),
    Case(ReadsAVector, r"observable reach reads a tensor of shape \(4, 12\), not a 0-d tensor", ("observables",)),
    Case(ReadsNaN, "observable 'reach' of transition 0 reads nan", ("observables",)),
    Case(DrawsToRead, "random state after microbatch", ("losses",)),
    Case(BadKss, r"kss\.svd_rank = 2\.5: expected `int`", ("settings",)),
]
