"""All checks by name, in the order in which their failures are easiest to understand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import SkipTest

from koopmon.api import ArchitectureAdapter, ExampleModel
from koopmon.conformance import check_selection, check_state_io, check_training, families
from koopmon.conformance.harness import Bench
from koopmon.conformance.result import CheckResult, ConformanceError
from koopmon.errors import AdapterError, KoopmonError, foreign_code
from koopmon.plugins import adapters, original

BATTERY: dict[str, Callable[[Bench], str]] = {
    "example": check_selection.example,
    "settings": check_selection.settings,
    "claim": check_selection.claim,
    "restraint": check_selection.restraint,
    "untouched": check_selection.untouched,
    "discovery": check_selection.discovery,
    "shapes": check_state_io.shapes,
    "reading": check_state_io.reading,
    "round-trip": check_state_io.round_trip,
    "taps": check_training.taps,
    "taps-accumulation": partial(check_training.taps, microbatches=3),
    "taps-evaluation": partial(check_training.taps, evaluate=True),
    "taps-checkpointing": partial(check_training.taps, checkpointing=True),
    "losses": check_training.losses,
    "observables": families.observables,
    "kss-shields": families.shields,
    "kss-gradient": check_training.kss,
    "kss-checkpointing": partial(check_training.kss, checkpointing=True),
    "learning-rate": check_training.learning_rate,
    "kss-on-and-off": check_training.kss_on_and_off,
}
"""Function of each check: takes a bench with an adapter and an example model, and returns the result in one line."""
WITHOUT_EXAMPLE = ("example", "settings")
"""Checks that run without a valid example model: one validates the model and the other does not use it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one adapter with one example model. A call runs it; `str` returns its name."""

    name: str
    bench: Bench

    def __call__(self) -> str:
        """Run the check and return the outcome in one line.

        Raises ConformanceError, an AssertionError, with the reason when the adapter violates the requirement. Raises
        unittest.SkipTest, which pytest reports as skipped, when the requirement cannot be tested.
        """
        if self.name not in WITHOUT_EXAMPLE and self.bench.flaw:
            raise SkipTest(f"needs a sound example model: {self.bench.flaw}")
        try:
            with foreign_code(ConformanceError, SkipTest):  # the code of the adapter or its model
                return BATTERY[self.name](self.bench)
        except ConformanceError:
            raise
        except KoopmonError as error:
            raise ConformanceError(str(error)) from error

    def run(self) -> CheckResult:
        """Run the check and return any outcome as a CheckResult; raises nothing."""
        names = (self.bench.adapter.name, self.bench.example.name, self.name)
        try:
            return CheckResult(*names, "passed", self())
        except SkipTest as skipped:
            return CheckResult(*names, "skipped", str(skipped))
        except ConformanceError as broken:
            return CheckResult(*names, "failed", str(broken))

    def __str__(self) -> str:
        return self.name


def checks(adapter: str | ArchitectureAdapter | type[ArchitectureAdapter], example: ExampleModel) -> list[Check]:
    """Return all checks of `adapter` (name, class or instance) with `example`, for pytest's `parametrize` with ids=str.

    Raises AdapterError for a name that is not installed.
    """
    if isinstance(adapter, str):
        known = adapters()
        if adapter not in known:
            raise AdapterError(f"adapter = {adapter!r}: allowed are {', '.join(known) or 'none'}")
        adapter = original(known[adapter])
    elif isinstance(adapter, type):
        adapter = adapter()
    bench = Bench(adapter, example)
    return [Check(name, bench) for name in BATTERY]
