"""The battery: every check by its name, in the order in which their reasons are best read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import SkipTest

from koopmon.api import ArchitectureAdapter, ExampleModel
from koopmon.conformance import claims, families, reading, steering
from koopmon.conformance.bench import Bench
from koopmon.conformance.verdict import ConformanceError, Outcome, told
from koopmon.errors import AdapterError, raise_from_signal
from koopmon.plugins import adapters, original

BATTERY: dict[str, Callable[[Bench], str]] = {
    "example": claims.example,
    "settings": claims.settings,
    "claim": claims.claim,
    "restraint": claims.restraint,
    "untouched": claims.untouched,
    "discovery": claims.discovery,
    "shapes": reading.shapes,
    "reading": reading.reading,
    "round-trip": reading.round_trip,
    "taps": steering.taps,
    "taps-accumulation": partial(steering.taps, microbatches=3),
    "taps-evaluation": partial(steering.taps, evaluate=True),
    "taps-checkpointing": partial(steering.taps, checkpointing=True),
    "losses": steering.losses,
    "observables": families.observables,
    "kss-shields": families.shields,
    "kss-gradient": steering.kss,
    "kss-checkpointing": partial(steering.kss, checkpointing=True),
    "learning-rate": steering.learning_rate,
    "kss-on-and-off": steering.kss_on_and_off,
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
            raise ConformanceError(f"raised {told(error)}") from error

    def run(self) -> Outcome:
        """The outcome, whatever it is; raises nothing."""
        names = (self.bench.adapter.name, self.bench.example.name, self.name)
        try:
            return Outcome(*names, "passed", self())
        except SkipTest as skipped:
            return Outcome(*names, "skipped", str(skipped))
        except ConformanceError as broken:
            return Outcome(*names, "failed", str(broken))

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
