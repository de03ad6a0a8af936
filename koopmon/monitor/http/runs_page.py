"""The page of all runs."""

from __future__ import annotations

from collections.abc import Sequence

from koopmon.config import PolicyConfig
from koopmon.monitor.http import page
from koopmon.views import svg_charts
from koopmon.views.html import Child, Markup, join, tag
from koopmon.views.run_view import RunView

HEADS = ("Run", "State", "Adapter", "Step", "Risk", "Forecast", "Rate scale", "KSS alpha", "Seen", "Last decision")
ORDER = {"running": 0, "vanished": 1, "ended": 2, "recorded": 3}
CLASSES = {
    "Step": "number",
    "Forecast": "number",
    "Rate scale": "number",
    "KSS alpha": "number",
    "Risk": "risk-column",
    "Last decision": "long",
}


def render(root: str, views: Sequence[RunView], now: float, config: PolicyConfig, *, num_hidden: int = 0) -> str:
    """Return the document. `now` is Unix seconds."""
    running = [view for view in views if view.state == "running"]
    at_risk = [view for view in running if view.latest is not None and view.latest.risk >= config.act_risk]
    held = [view for view in running if view.lr_scale < 1.0 or view.kss_alpha > 0.0]
    counts = (
        ("Running", len(running), ""),
        ("At risk", len(at_risk), "bad" if at_risk else ""),
        ("Held back", len(held), "held" if held else ""),
        ("Over", len(views) - len(running), ""),
    )
    tiles = [
        tag("div", tag("dt", name), tag("dd", count), class_=f"tile {kind}".strip()) for name, count, kind in counts
    ]
    main = join(
        tag("h1", "Runs"),
        tag("section", tag("dl", *tiles, class_="tiles"), id="counts", data_live=True, aria_label="Counts"),
        page.card("runs", "All runs", _runs(root, views, now, config), _hidden(num_hidden)),
    )
    title = f"{len(at_risk)} at risk · koopmon" if at_risk else f"{len(running)} running · koopmon"
    return page.page(root, title, main, events="api/v1/events")


def level(risk: float | None, config: PolicyConfig) -> str:
    """CSS class of a risk by the policy's thresholds."""
    if risk is None or risk < config.release_risk:
        return "level low"
    return "level severe" if risk >= config.severe_risk else "level high" if risk >= config.act_risk else "level raised"


def _runs(root: str, views: Sequence[RunView], now: float, config: PolicyConfig) -> Markup:
    if not views:
        words = ("No run yet. Start one with ", tag("code", "koopmon run -- torchrun train.py"), ", or give the")
        return tag("p", *words, " endpoint of this monitor to it with ", tag("code", "--monitor"), ".")
    # Running runs keep their order of arrival: rows that move are hard to read.
    ordered = sorted(
        views, key=lambda view: (ORDER.get(view.state, 9), 0.0 if view.state == "running" else -view.last_heard)
    )
    heads = [tag("th", head, scope="col", role="columnheader") for head in HEADS]
    # In narrow windows the table has a card layout. Without explicit roles, screen readers would not detect it as a
    # table.
    return tag(
        "table",
        tag("caption", "Every run that this monitor knows, those that go on first.", class_="unseen"),
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *(_row(root, view, now, config) for view in ordered), role="rowgroup"),
        class_="fleet",
        role="table",
    )


def _row(root: str, view: RunView, now: float, config: PolicyConfig) -> Markup:
    latest, last = view.latest, view.decisions[-1] if view.decisions else None
    risk = None if latest is None else latest.risk
    shown = tag("span", svg_charts.decimal(risk), class_=level(risk, config))
    values: tuple[Child, ...] = (
        page.state(view.state),
        view.adapter or "–",
        f"{view.step:,}",
        tag("span", shown, svg_charts.sparkline(view.points, config.act_risk), class_="risk-cell"),
        svg_charts.decimal(None if latest is None else latest.forecast),
        svg_charts.number(view.lr_scale),
        svg_charts.number(view.kss_alpha),
        page.moment(view.last_heard, now),
        "–" if last is None else f"step {last.step:,}: {last.reason}",
    )
    cells = [
        tag("td", tag("span", value, class_="value"), role="cell", data_label=head, class_=CLASSES.get(head))
        for head, value in zip(HEADS[1:], values, strict=True)
    ]
    link = tag("a", view.name, href=page.run_address(root, view.name))
    return tag("tr", tag("th", link, scope="row", role="rowheader"), *cells, role="row")


def _hidden(count: int) -> Child:
    if not count:
        return None
    words = f"{count} runs had to give way to these; they are in the history."
    return tag("p", words, class_="quiet")
