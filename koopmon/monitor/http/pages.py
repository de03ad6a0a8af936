"""The monitor's pages as HTML; templates/ has the elements. `root` is the relative path to the monitor's address."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from koopmon.config import PolicyConfig
from koopmon.monitor.http.policy_preview import preview
from koopmon.telemetry.alerts import ALERTS, plain_summary
from koopmon.views.heatmap import heatmap
from koopmon.views.html import decimal, number, render, templates
from koopmon.views.run_view import SCALARS, RunView
from koopmon.views.spectra import QUANTITIES
from koopmon.views.svg_charts import (
    StepAxis,
    depth_legend,
    eigenvalue_plot,
    logged_charts,
    risk_chart,
    scalar_chart,
    sparkline,
)

PACKAGE = "koopmon.monitor.http"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
ORDER = {"running": 0, "vanished": 1, "ended": 2, "recorded": 3}
ROWS = 30
"""Maximum number of rows of the risk table."""


def root_of(raw_path: bytes) -> str:
    """Return the relative path from a page to the monitor's address.

    It depends only on the number of slashes in the page's path, so it is correct behind any proxy.
    """
    return "../" * (raw_path.count(b"/") - 1)


def runs_page(root: str, views: Sequence[RunView], now: float, policy: PolicyConfig, *, num_hidden: int = 0) -> str:
    """Render the page of all runs. `now` is Unix seconds."""
    running = [view for view in views if view.state == "running"]
    return _page(
        "runs.html",
        root,
        events="api/v1/events",
        # Running runs keep their order of arrival: rows that move are hard to read.
        views=sorted(
            views, key=lambda view: (ORDER.get(view.state, 9), 0.0 if view.state == "running" else -view.last_heard)
        ),
        now=now,
        policy=policy,
        num_hidden=num_hidden,
        running=len(running),
        at_risk=sum(view.latest is not None and view.latest.risk >= policy.act_risk for view in running),
        held_back=sum(view.lr_scale < 1.0 or view.kss_alpha > 0.0 or view.num_held_layers > 0 for view in running),
        sparkline=sparkline,
    )


def run_page(root: str, view: RunView, now: float, policy: PolicyConfig, *, quantity: str) -> str:
    """Render the page of one run. `quantity`, one of QUANTITIES, selects the heatmap; `now` is Unix seconds."""
    axis = StepAxis.of(view.points, view.logged)
    acting = policy if view.standing is None else view.standing.policy
    spectrum = view.spectrum
    return _page(
        "run.html",
        root,
        events=f"api/v1/events?run={templates(PACKAGE).filters['quote'](view.name)}",
        view=view,
        now=now,
        policy=policy,
        quantity=quantity,
        quantities=QUANTITIES,
        preview=preview(view),
        risk_chart=risk_chart(view.points, view.decisions, acting, axis),
        heads=["Step", "Risk", "Forecast", *(scalar.title for scalar in SCALARS)],
        rows=[
            (
                f"{point.step:,}",
                decimal(point.risk),
                decimal(point.forecast),
                *(number(scalar.of(point), scalar.digits) for scalar in SCALARS),
            )
            for point in view.points[: -ROWS - 1 : -1]
        ],
        heatmap=heatmap(view.columns, quantity, () if spectrum is None else spectrum.labels) if view.columns else "",
        plane="" if spectrum is None else eigenvalue_plot(spectrum),
        legend="" if spectrum is None else depth_legend(spectrum.labels),
        layers=_layers(view),
        scalar_charts=[scalar_chart(view.points, scalar, axis) for scalar in SCALARS],
        logged_charts=logged_charts(view.logged, axis),
        shown={scalar.name: number(scalar.of(view.latest), scalar.digits) for scalar in SCALARS} if view.latest else {},
        drops=[(name.replace("_", " "), f"{count:,}") for name, count in sorted(view.health.dropped.items()) if count],
    )


def _layers(view: RunView) -> list[tuple[str, ...]]:
    """Values of all quantities by layer, for the step of the spectrum."""
    spectrum, column = view.spectrum, view.columns[-1] if view.columns else None
    if spectrum is None or column is None or len(column.values["spectral_radius"]) != len(spectrum.labels):
        return []
    return [
        (label, *(number(column.values[name][row]) for name in QUANTITIES)) for row, label in enumerate(spectrum.labels)
    ]


def unknown_run_page(root: str, name: str, known: Sequence[str]) -> str:
    """Render the page for a run that the monitor does not know, with links to `known` ones."""
    return _page("message.html", root, title="No such run", run=name[:128], known=known)


def not_found_page(root: str) -> str:
    """Render the page for an unknown address."""
    return _page("message.html", root, title="No such page")


def alerts_page() -> str:
    """Render the page with one section and anchor for each alert of the table. Links of firing alerts lead there."""
    return _page("alerts.html", "", title="Alerts", alerts=ALERTS)


def _page(template: str, root: str, *, events: str = "", **values: Any) -> str:
    return render(PACKAGE, template, root=root, events=events, **values)


def _inline(markdown: str) -> Markup:
    """Convert `code` in backticks."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(markdown))))  # noqa: S704 - escaped


templates(PACKAGE).filters |= {"inline": _inline, "plain": plain_summary}
