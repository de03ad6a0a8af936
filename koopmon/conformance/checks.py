"""The battery: every check by its name, in the order in which their reasons are best read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import SkipTest

from koopmon.api import ArchitectureAdapter, ExampleModel
from koopmon.conformance import check_selection, check_state_io, check_training, families
from koopmon.conformance.harness import Bench
from koopmon.conformance.result import CheckResult, ConformanceError, describe_error
from koopmon.errors import AdapterError, raise_from_signal
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
"""What each finds out, in one line, from an adapter and an example model on the bench."""
WITHOUT_EXAMPLE = ("example", "settings")
"""Checks that ask nothing of the example model, or all of it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one adapter with one example model; calling it makes it, `str` gives its name."""

    name: str
    bench: Bench

    def __call__(self) -> str:
        """The outcome in one line.

        Raises ConformanceError, an AssertionError, with the reason when the adapter breaks the promise, and
        unittest.SkipTest, which pytest reports as skipped, when the promise cannot be put to the test.
        """
        if self.name not in WITHOUT_EXAMPLE:
            self.bench.require_example()
        try:
            return BATTERY[self.name](self.bench)
        except (ConformanceError, SkipTest):
            raise
        except AdapterError as error:
            raise ConformanceError(str(error)) from error
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # the adapter's own code, or its model's
            raise_from_signal(error)
            raise ConformanceError(f"raised {describe_error(error)}") from error

    def run(self) -> CheckResult:
        """The outcome, whatever it is; raises nothing."""
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
    """Every check of `adapter`, by name, class or instance, with `example`: for pytest's `parametrize`, with ids=str.

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
