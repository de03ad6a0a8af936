"""Examples for the fit of a calibrator, from recorded runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from koopmon.history.reader import HistoryReader
from koopmon.history.rows import IncarnationRow, ObservationRow, ProfileRow
from koopmon.risk.calibration import Example
from koopmon.risk.initial_score import initial_risk
from koopmon.spectral import SpectralProfile

MAX_LOSS, MAX_GRADIENT_NORM = 50.0, 500.0
"""Largest loss and gradient norm of a run that has not diverged: the values of arXiv 2602.22988.

They are for a loss that is a mean. In a run that begins above a bound, as with a sum, its first value is the bound.
Losses, gradient norms and states that are not finite count as diverged too.
"""
MAX_FIRST_STEP = 10
"""Latest step of a profile that counts as one of the initialisation. Chosen by hand."""


@dataclass(frozen=True, slots=True)
class RunExample:
    """One incarnation of a run as an example."""

    run: str
    adapter: str | None
    """Name of the adapter; None where the first profile is missing or cannot be read."""
    example: Example | None
    """Features and outcome; None where the incarnation is not usable."""
    why: str = ""
    """Reason against a usable example; empty with one."""


def calibration_examples(history: HistoryReader) -> Iterator[RunExample]:
    """Yield one entry for every incarnation of every run in the store.

    A usable example has an informative profile of the first steps, an update exponent and a known learning rate. The
    rate gives the step length of its optimizer. koopmon did not act on its training.
    """
    for run in history.runs():
        finite: dict[str, int] = {}
        for head in history.profile_heads(run):
            if not head.non_finite:
                finite.setdefault(head.incarnation, head.id)
        first = {row.incarnation: row for row in history.profiles_at(finite.values())}
        rows: dict[str, list[ObservationRow]] = defaultdict(list)
        for row in history.observations(run):
            rows[row.incarnation].append(row)
        for incarnation in history.incarnations(run):
            yield _run_example(incarnation, first.get(incarnation.incarnation), rows[incarnation.incarnation])


def _run_example(incarnation: IncarnationRow, first: ProfileRow | None, rows: list[ObservationRow]) -> RunExample:
    """Return one incarnation as an example, or the reason against it. `first` is its first profile."""
    run, hello = incarnation.run, incarnation.hello
    if first is None or first.profile is None or first.step > MAX_FIRST_STEP or hello is None:
        return RunExample(run, None, None, f"no profile of its first {MAX_FIRST_STEP} steps")
    try:
        profile = SpectralProfile.from_dict(first.profile.to_dict())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        return RunExample(run, None, None, f"its first profile cannot be read: {error!r}")

    def unusable(why: str) -> RunExample:
        return RunExample(run, hello.adapter, None, why)

    initial = initial_risk(profile)
    if not initial.informative or hello.update_exponent is None:
        why = "its blocks do not change the state" if initial.informative else initial.reason
        return unusable(f"its first profile is not informative: {why}")
    if not hello.rate_sized_steps:
        return unusable("the learning rate does not give the step length of its optimizer")
    rates = [row.training.learning_rate for row in rows if row.training.learning_rate]
    if not rates:
        return unusable("its learning rate is unknown")
    if any(row.training.lr_scale < 1.0 or row.training.kss_alpha > 0.0 for row in rows):
        return unusable("koopmon acted on it, so its outcome without actions is unknown")
    example = Example(
        update_exponent=hello.update_exponent,
        learning_rate=max(rates),
        width=max(hello.width, 1),
        num_layers=max(profile.num_layers, 1),
        diverged=any(row.non_finite for row in rows)
        or _leaves([row.training.loss for row in rows], MAX_LOSS)
        or _leaves([row.training.grad_norm for row in rows], MAX_GRADIENT_NORM),
    )
    return RunExample(run, hello.adapter, example)


def _leaves(values: Iterable[float | None], bound: float) -> bool:
    """Return True if a known value is above `bound` and above the first known one, or not finite."""
    known = [value for value in values if value is not None]
    # A comparison with NaN is False.
    return any(not value <= max(bound, known[0]) or math.isinf(value) for value in known)
