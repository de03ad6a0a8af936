"""HTML page of `koopmon compare`: figures, facts of the bad runs alone, and charts on one axis of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from koopmon.config import PolicyConfig
from koopmon.report.page import document
from koopmon.views.comparison import SharedFact
from koopmon.views.run_summary import RecordedRun
from koopmon.views.run_view import SCALARS
from koopmon.views.svg_charts import StepAxis, risk_chart, scalar_chart

CHARTS = ("loss", "learning_rate")
"""Scalars with a chart below the risk."""


def comparison_page(
    rows: Mapping[str, Sequence[str]],
    shared: Sequence[SharedFact],
    nothing: str,
    runs: Sequence[RecordedRun],
    policy: PolicyConfig,
) -> str:
    """Return the document. `rows` has one text for each run, by title; `nothing` is the sentence without `shared`."""
    axis = StepAxis.of(*(run.points for run in runs))

    def charts(run: RecordedRun) -> Markup:
        own = StepAxis(axis.first, axis.last, StepAxis.of(run.points).launches)
        below = [scalar_chart(run.points, scalar, own) for scalar in SCALARS if scalar.name in CHARTS]
        return Markup("").join([risk_chart(run.points, run.decisions, policy, own), *below])

    names = [run.name for run in runs]
    return document(
        "comparison.html",
        "comparison",
        f"{len(runs)} runs",
        names=names,
        rows=[(title, *cells) for title, cells in rows.items()],
        shared=shared,
        nothing=nothing,
        courses=[(run.name, charts(run)) for run in runs],
    )
