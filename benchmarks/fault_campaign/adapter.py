"""Architecture adapter that raises at a given place. The fault campaign loads it as a third-party plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from koopmon import ArchitectureAdapter, Observable, Stack, block_lists, hookimpl

PLACES = (
    "specificity",
    "stacks",
    "block_input",
    "block_output",
    "token_mask",
    "observables",
    "read",
    "update_exponent",
    "thresholds",
    "kss_settings",
)
ENTRY_POINT = "[koopmon.adapters]\nfaulty = benchmarks.fault_campaign.adapter\n"


class Faulty(ArchitectureAdapter):
    """Claims the campaign's model. Its method `place` raises after `calls` successful calls."""

    name = "faulty"
    measures = {"reading": "Nothing of interest."}  # noqa: RUF012 - as every adapter declares it

    def __init__(self) -> None:
        self.place = ""
        self.calls = 0

    def _reached(self, place: str) -> None:
        if place == self.place:
            self.calls -= 1
            if self.calls < 0:
                raise RuntimeError(f"the fault campaign breaks {place}")

    def specificity(self, model: nn.Module) -> int:
        self._reached("specificity")
        return 50 if self.place and any(type(module).__name__ == "Tiny" for module in model.modules()) else 0

    def stacks(self, model: nn.Module) -> list[Stack]:
        self._reached("stacks")
        return [blocks.stack(residual=True) for blocks in block_lists(model)]

    def block_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        self._reached("block_input")
        return super().block_input(module, args, kwargs)

    def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
        self._reached("block_output")
        return super().block_output(module, output)

    def token_mask(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], stack: Stack | None = None
    ) -> Tensor | None:
        self._reached("token_mask")
        return super().token_mask(model, args, kwargs, stack)

    def observables(self, stack: Stack) -> Sequence[Observable]:
        self._reached("observables")
        return [Observable("reading", 0, stack.points[0].module, self._read)]

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
        self._reached("read")
        return None

    def update_exponent(self, stack: Stack) -> float | None:
        self._reached("update_exponent")
        return None

    def thresholds(self) -> Mapping[str, float]:
        self._reached("thresholds")
        return {}

    def kss_settings(self) -> Mapping[str, float]:
        self._reached("kss_settings")
        return {}


FAULTY = Faulty()


@hookimpl
def koopmon_architecture_adapters() -> list[ArchitectureAdapter]:
    return [FAULTY]
