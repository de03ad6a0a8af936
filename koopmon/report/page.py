"""HTML page of a run report: one file without scripts or external resources. templates/report.html has the elements."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from koopmon import __version__
from koopmon.report.glance import glance
from koopmon.report.run_report import RunReport, delay_steps
from koopmon.views.heatmap import heatmap
from koopmon.views.html import number, render
from koopmon.views.run_view import SCALARS
from koopmon.views.spectra import QUANTITIES, Column, mean_over_layers
from koopmon.views.svg_charts import (
    StepAxis,
    depth_legend,
    eigenvalue_plot,
    logged_charts,
    plotted_modulus,
    risk_chart,
    scalar_chart,
)

STYLES = (("koopmon.views", "static/views.css"), ("koopmon.report", "static/report.css"))
MAX_ROWS = 300
"""Maximum number of rows of one table on the page; `--json` contains all rows."""
MAX_LAYERS = 64


def document(template: str, kind: str, heading: str, **values: Any) -> str:
    """Return a page of one file. `kind` is its kind in words."""
    style = Markup("\n".join(files(package).joinpath(name).read_text("utf-8") for package, name in STYLES))  # noqa: S704 - ours
    return render("koopmon.report", template, kind=kind, heading=heading, version=__version__, style=style, **values)


def page(report: RunReport) -> str:
    """Return the whole document."""
    profiles, points = report.profiles, report.points
    axis = StepAxis.of(points, report.logged)
    spectra, columns = profiles.spectra, profiles.columns
    limit = plotted_modulus([modulus for each in spectra for modulus in each.spectrum.moduli()])
    return document(
        "report.html",
        "report",
        report.run,
        report=report,
        glance=glance(report),
        launches={each.incarnation: number for number, each in enumerate(report.launches, 1)},
        most=MAX_ROWS,
        command=shlex.join(["koopmon", "doctor", "--run", report.run]),
        again=[
            shlex.join(["koopmon", *words])
            for words in (
                ("report", report.run, "--store", report.store, "--json"),
                ("replay", report.run, "--store", report.store, "--policy", "lr"),
                ("replay", report.run, "--store", report.store, "--config", "careful.toml"),
            )
        ],
        risk_chart=risk_chart(points, report.decisions, report.policy, axis),
        scalar_charts=Markup("").join(scalar_chart(points, scalar, axis) for scalar in SCALARS),
        logged_charts=logged_charts(report.logged, axis),
        scalars=[scalar for scalar in SCALARS if scalar.is_shown(points)],
        highlights=[
            ("first", points[0]),
            ("highest risk", max(points, key=lambda point: point.risk)),
            ("last", points[-1]),
        ]
        if points
        else [],
        compared=[each for each in report.actions if each.effect is not None],
        commands=[(each, command) for each in report.decisions for command in each.commands or (None,)],
        delay_steps=delay_steps,
        planes=[(each, eigenvalue_plot(each.spectrum, limit)) for each in spectra],
        legend=depth_legend(spectra[0].spectrum.labels) if spectra else "",
        quantities=QUANTITIES,
        mean_over_layers=mean_over_layers,
        heatmaps=[
            (words, heatmap(columns, name, num_snapshots=profiles.num_snapshots))
            for name, words in QUANTITIES.items()
            if columns
        ],
        layers=_layers(columns),
    )


def _layers(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    """First and last value of each quantity, by layer."""
    if not columns:
        return []
    first, last = columns[0].values, columns[-1].values
    ends = (
        [f"{number(old, 2)} → {number(new, 2)}" for old, new in zip(first[name], last[name], strict=False)]
        for name in QUANTITIES
    )
    return [(str(layer), *row) for layer, row in enumerate(zip(*ends, strict=True))][:MAX_LAYERS]
