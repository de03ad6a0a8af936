"""Examples for the fit of a calibrator, from recorded runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from koopmon.history.reader import HistoryReader
from koopmon.risk.calibration import Example
from koopmon.risk.initial_score import initial_risk
from koopmon.spectral import SpectralProfile

MAX_LOSS, MAX_GRADIENT_NORM = 50.0, 500.0
"""Largest loss and gradient norm of a run that has not diverged: the values of arXiv 2602.22988.

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
        rows, profiles = list(history.observations(run)), list(history.profiles(run))
        for incarnation in history.incarnations(run):
            seen = [row for row in rows if row.incarnation == incarnation.incarnation]
            rates = [row.training.learning_rate for row in seen if row.training.learning_rate]
            first = next((p for p in profiles if p.incarnation == incarnation.incarnation and p.profile), None)
            if first is None or first.profile is None or first.step > MAX_FIRST_STEP or incarnation.hello is None:
                yield RunExample(run, None, None, f"no profile of its first {MAX_FIRST_STEP} steps")
                continue
            try:
                profile = SpectralProfile.from_dict(first.profile)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                yield RunExample(run, None, None, f"its first profile cannot be read: {error!r}")
                continue
            adapter = incarnation.hello.adapter
            initial = initial_risk(profile)
            exponent = incarnation.hello.update_exponent
            if not initial.informative or exponent is None:
                why = initial.reason or "its blocks do not change the state"
                yield RunExample(run, adapter, None, f"its first profile is not informative: {why}")
            elif not incarnation.hello.rate_sized_steps:
                yield RunExample(run, adapter, None, "the learning rate does not give the step length of its optimizer")
            elif not rates:
                yield RunExample(run, adapter, None, "its learning rate is unknown")
            elif any(row.training.lr_scale < 1.0 or row.training.kss_alpha > 0.0 for row in seen):
                yield RunExample(run, adapter, None, "koopmon acted on it, so its outcome without actions is unknown")
            else:
                # `not loss <= MAX_LOSS` is also True for NaN.
                diverged = any(
                    row.non_finite
                    or (row.training.loss is not None and not row.training.loss <= MAX_LOSS)
                    or (row.training.grad_norm is not None and not row.training.grad_norm <= MAX_GRADIENT_NORM)
                    for row in seen
                )
                yield RunExample(
                    run,
                    adapter,
                    Example(
                        update_exponent=exponent,
                        learning_rate=max(rates),
                        width=max(incarnation.hello.width, 1),
                        num_layers=max(profile.num_layers, 1),
                        diverged=diverged,
                    ),
                )
