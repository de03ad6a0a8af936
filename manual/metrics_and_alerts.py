"""Generates the Markdown reference of metrics and alerts from the two tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from koopmon.grafana.rules import GROUPS
from koopmon.telemetry.alerts import ALERTS, Alert
from koopmon.telemetry.metrics import KEPT_WHEN_VANISHED, MAX_LAYERS, PREFIX, TABLE, Series
from manual import dashboards

WRITTEN = "<!-- Written by `python -m manual.write`: edit the tables in koopmon/telemetry, not this. -->"
SECTIONS = {("run", "layer"): "For each layer of each run", ("run",): "For each run", (): "For each monitor"}


def pages() -> dict[str, str]:
    """Return the text of each page by file name."""
    return {"alerts.md": alerts_page(), "metrics.md": metrics_page()}


def alerts_page() -> str:
    """Return the page with the meaning, checks and remedy of each alert, each under an anchor with its name."""
    titles = {each["uid"]: each["title"] for each in dashboards.make()}
    rows = [
        (f"[{alert.name}](#{alert.name})", alert.severity, _time(alert.for_seconds), _plain(alert.summary))
        for alert in ALERTS
    ]
    parts = [
        "# Alerts",
        WRITTEN,
        "Meaning, checks and remedy of each alert. Every monitor serves the same text at `/alerts`. The `runbook_url`"
        " of an alert leads there, unless `--docs-url` names another page. [Grafana and Prometheus](grafana.md)"
        " describes the installation, [Metrics](metrics.md) the series behind the alerts.",
        _table(("alert", "severity", "fires after", "summary"), rows),
    ]
    for group, (title, _) in GROUPS.items():
        parts.append(f"## {title.removeprefix('koopmon ').capitalize()}")
        parts += [line for alert in ALERTS if alert.group == group for line in _alert(alert, titles[alert.panel[0]])]
    return "\n\n".join(parts) + "\n"


def metrics_page() -> str:
    """Return the page of all metrics with their types and labels."""
    parts = [
        "# Metrics",
        WRITTEN,
        "Series that a monitor serves to Prometheus at `/metrics`. Names, types and labels are a contract: the"
        " changelog lists every change. A value that is not finite has no series. Counters start at 0 for every known"
        f" value of their labels. Above {MAX_LAYERS} layers, neighbours share a series. The series of a run stay for 5"
        " minutes after its end. Of a run that vanished only "
        + " and ".join(f"`{PREFIX}{name}`" for name in sorted(KEPT_WHEN_VANISHED))
        + " stay, for a day.",
    ]
    for labels, title in SECTIONS.items():
        members = [series for series in TABLE if _of(series) == labels]
        parts += [f"## {title}", _table(("metric", "type", "further labels", "description"), map(_metric, members))]
    return "\n\n".join(parts) + "\n"


def _of(series: Series) -> tuple[str, ...]:
    return tuple(label for label in series.labels if label in ("run", "layer"))


def _metric(series: Series) -> tuple[str, ...]:
    suffix = {"counter": "_total", "info": "_info"}.get(series.kind, "")
    labels = [
        f"`{label}`"
        + (f": {', '.join(f'`{value}`' for value in series.known[label])}" if label in series.known else "")
        for label in series.labels
        if label not in ("run", "layer")
    ]
    return f"`{PREFIX}{series.name}{suffix}`", series.kind, "; ".join(labels) or "-", series.help


def _alert(alert: Alert, board: str) -> Iterable[str]:
    kept = f", and is kept for {_time(alert.keep_firing_seconds)}" if alert.keep_firing_seconds else ""
    yield f'<a id="{alert.name}"></a>\n\n### {alert.name}'
    yield (
        f"Severity {alert.severity}; fires {_time(alert.for_seconds, 'after ')}{kept}. Shown on the panel"
        f" *{alert.panel[1]}* of the dashboard *{board}*."
    )
    yield f"**What it means.** {alert.means}"
    yield f"**What to look at.** {alert.look}"
    yield f"**What to do.** {alert.do}"
    yield f"```promql\n{alert.expr}\n```"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rows))


def _time(seconds: int, before: str = "") -> str:
    if not seconds:
        return "at once"
    return before + (f"{seconds // 60} min" if seconds % 60 == 0 else f"{seconds} s")


def _plain(template: str) -> str:
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"the \1", template)
