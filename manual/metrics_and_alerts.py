"""Generates the Markdown reference of metrics and alerts from the two tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from koopmon.grafana.rules import GROUPS
from koopmon.telemetry.alerts import ALERTS, Alert, plain_summary
from koopmon.telemetry.metrics import KEPT_WHEN_VANISHED, MAX_LAYERS, OBSERVABLE, PREFIX, TABLE, Series
from manual import dashboards
from manual.cells import cell

WRITTEN = "<!-- Written by `python -m manual.write`: edit the tables in koopmon/telemetry, not this. -->"
SECTIONS = {("run", "layer"): "For each layer of each run", ("run",): "For each run", (): "For each monitor"}

RENAMED = (
    ("`koopmon_observable{name}`", f"`{PREFIX}{OBSERVABLE}NAME`: one quantity each"),
    (
        "`koopmon_commands_total{kind,outcome}`",
        "`koopmon_commands_issued_total{kind}` and `koopmon_commands_settled_total{kind,outcome}`: each counts a"
        " command once",
    ),
    (
        "`koopmon_snapshots_dropped_total`",
        "`koopmon_snapshots_dropped_total` for those that the monitor lost, and"
        " `koopmon_agent_snapshots_dropped_total` for those that agents did not send",
    ),
    ("`koopmon_taps_missing`, a gauge", "`koopmon_taps_missing_total`"),
    ("`koopmon_run_state`, 0, 1 or 2", "`koopmon_run_state{state}`, 0 or 1"),
    ("`koopmon_initial_risk`", "`koopmon_initial_near_unit_mass`"),
    ('`layer="7"`', '`layer="07"`, with as many digits as the last layer'),
)
CHOICES = (
    (
        "`koopmon_logged_value` has several units",
        "The training chooses names and units at run time. A metric name per script would make no dashboard and no rule"
        " possible, and would let a peer create metric names.",
    ),
    (
        "`_created` samples double the series of the counters",
        "OpenMetrics has them, as the client library of Prometheus does. Its variable"
        " `PROMETHEUS_DISABLE_CREATED_SERIES=true` leaves them out; no rule needs them.",
    ),
    (
        "a run name with random digits makes new series at each launch",
        "A fixed name (`--run`, `KOOPMON_RUN`) keeps one set of series. Series end 5 minutes after the run.",
    ),
    (
        "counters at 0 are most series of a small run",
        "`increase` misses the first event of a counter that does not exist. The number is fixed, not per layer.",
    ),
    (
        "port 9464 is also the default of OpenTelemetry's exporter",
        "`--http` takes another one, and `koopmon run` takes a free one.",
    ),
    (
        "`runbook_url` points at the monitor",
        "It is the default because it needs no other server. `koopmon grafana export --docs-url`, `_config.docsUrl` of"
        " the mixin, or `prometheusRule.docsUrl` of the Helm chart names a static page.",
    ),
    (
        "alerts of severity info",
        "They inform on a dashboard. Route them nowhere, or use the InfoInhibitor of kube-prometheus: all alerts keep"
        " the label `namespace` of their target, and have the label `severity`.",
    ),
    (
        "thresholds are fixed at the export",
        "Those of the risk come from `koopmon_risk_threshold` of the run. The others are limits of the monitoring"
        " itself; `_config` of the mixin, or an edit of the exported file, changes them.",
    ),
    (
        "the rules need a job whose name contains koopmon",
        "Only KoopmonMonitorDown and KoopmonMonitorAbsent do: a vanished target has no other mark.",
    ),
    (
        "no rule notices a long scrape interval",
        "Queries of events span at least one minute, so an interval of 15 s misses none.",
    ),
    (
        "classic dashboards, without `__inputs`, and no ConfigMaps",
        "The classic form is that of Grafana 11, and newer versions import it; `dashboards-v2` has schema V2. Neither"
        " was tried with a running Grafana. The data source is a variable, so an import needs no input. The Helm chart"
        " has ConfigMaps.",
    ),
    (
        "the dashboards are not built with grafana-foundation-sdk",
        "Its builders have a class for each schema. One source makes both forms here, and the SDK reads both back"
        " without loss in a test, which finds a wrong key as its builders would.",
    ),
)


def pages() -> dict[str, str]:
    """Return the text of each page by file name."""
    return {"alerts.md": alerts_page(), "metrics.md": metrics_page()}


def alerts_page() -> str:
    """Return the page with the meaning, checks and remedy of each alert, each under an anchor with its name."""
    titles = {each["uid"]: each["title"] for each in dashboards.make()}
    rows = [
        (f"[{alert.name}](#{alert.name})", alert.severity, _time(alert.for_seconds), plain_summary(alert))
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
    parts += [
        f"Each measurement of an architecture adapter is a metric of its own, `{PREFIX}{OBSERVABLE}NAME`, for each"
        f" layer: `{PREFIX}{OBSERVABLE}router_entropy`, `{PREFIX}{OBSERVABLE}top_expert_share`. Labels of layers have"
        " leading zeros. `process_*` are the monitor's own memory, CPU time and open files.",
        "## Renamed since 0.1",
        _table(("before", "now"), RENAMED),
        "## Choices",
        _table(("objection", "answer"), CHOICES),
    ]
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
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in (heading, ["---"] * len(heading), *rows))


def _time(seconds: int, before: str = "") -> str:
    if not seconds:
        return "at once"
    return before + (f"{seconds // 60} min" if seconds % 60 == 0 else f"{seconds} s")
