"""Dashboard of the monitors: load, rejected messages and history writes."""

from __future__ import annotations

from typing import Any

from koopmon.telemetry.alerts import MAX_REJECTED_PER_SECOND
from koopmon.telemetry.metrics import BY_NAME, MAX_LAYERS
from manual.dashboards import panels
from manual.dashboards.layout import dashboard, label_variable, sized
from manual.dashboards.panels import GREEN, RED, Json, warn

UID = "koopmon-monitor"
OF = '{job=~"$job",instance=~"$instance"}'
LOST = '{job=~"$job",instance=~"$instance",reason!="incomplete"}'
UNSENT = '{job=~"$job",instance=~"$instance",outcome=~"failed|dropped"}'
VERSIONS = "{{version}} (protocol {{protocol}}, Python {{python}}, torch {{torch}})"
INSTANCE, REASON = "{{instance}}", "{{reason}}"


def make() -> Json:
    """Return the dashboard's JSON."""
    up, version, runs, store = _now()
    return dashboard(
        UID,
        "koopmon / Monitor",
        "The monitors: load, rejected messages and history writes.",
        {
            "Now": [*sized(4, 4, up), *sized(10, 4, version), *sized(5, 4, runs, store)],
            "Engine": sized(8, 8, *_engine()),
            "Messages and store": sized(8, 8, *_messages()),
            "Scrapes": sized(12, 7, *_scrapes()),
        },
        variables=[label_variable("instance", "Monitor", 'koopmon_build_info{job=~"$job"}', "instance")],
        links={"koopmon-fleet": "Fleet"},
    )


def _rate(metric: str, of: str = OF) -> str:
    return f"rate(koopmon_{metric}{of}[$__rate_interval])"


def _increase(metric: str, of: str = OF) -> str:
    return f"increase(koopmon_{metric}{of}[$__rate_interval])"


def _now() -> list[Json]:
    def state(title: str, text: str, expr: str, off: str, on: str) -> Json:
        mappings = {"0": (off, RED), "1": (on, GREEN)}
        return panels.stat(title, text, expr, INSTANCE, steps=((None, RED), (1, GREEN)), mappings=mappings)

    versions = "Versions of koopmon, its protocol, Python and torch."
    running = 'sum by (instance) (koopmon_run_state{job=~"$job",instance=~"$instance",state="running"})'
    recording = "State of the history. No decision is taken while it is paused."
    return [
        state("Up", "1 if Prometheus can scrape the monitor.", f"up{OF}", "down", "up"),
        panels.stat("Version", versions, f"koopmon_build_info{OF}", VERSIONS, text=True),
        panels.stat("Runs watched", "Runs in the state running, by monitor.", running, INSTANCE, decimals=0),
        state("Store", recording, f"koopmon_store_recording{OF}", "paused", "recording"),
    ]


def _lines(title: str, text: str, legend: str, expr: str, **settings: Any) -> Json:
    return panels.lines(title, text, {legend: expr}, **settings)


def _engine() -> list[Json]:
    bucket = f"sum by (le, instance) ({_rate('dmd_duration_seconds_bucket')})"
    quantiles = {
        f"{INSTANCE} {name}": f"histogram_quantile({part}, {bucket})"
        for part, name in ((0.5, "50%"), (0.9, "90%"), (0.99, "99%"))
    }
    profiles, busy = _rate("dmd_duration_seconds_count"), _rate("dmd_duration_seconds_sum")
    load = "Share of the time in which the engine computes. Near 100% it does not keep up."
    age, oldest = BY_NAME["snapshot_age_seconds"].help, f"max by (instance) (koopmon_snapshot_age_seconds{OF})"
    stride, largest = BY_NAME["min_stride"].help, f"max by (instance) (koopmon_min_stride{OF})"
    lost = f"sum by (reason) ({_rate('snapshots_dropped_total', LOST)})"
    queue = f"{BY_NAME['engine_queue_length'].help} A queue that is never empty delays alerts."
    return [
        panels.lines("Duration of a profile", BY_NAME["dmd_duration_seconds"].help, quantiles, unit="s"),
        _lines("Profiles", "Profiled snapshots per second.", INSTANCE, profiles, unit="ops"),
        _lines("Engine queue", queue, INSTANCE, f"koopmon_engine_queue_length{OF}", steps=warn(1)),
        _lines("Engine load", load, INSTANCE, busy, unit="percentunit"),
        _lines("Age of a snapshot", f"The largest of all runs. {age}", INSTANCE, oldest, unit="s"),
        _lines("Steps between snapshots", f"The largest of all runs. {stride}", INSTANCE, largest),
        _lines("Snapshots lost in the monitor", "Per second, by reason.", REASON, lost, unit="ops"),
    ]


def _messages() -> list[Json]:
    rejected = f"sum by (reason) ({_rate('messages_rejected_total')})"
    failures = {
        f"{INSTANCE} not judged": _increase("engine_failures_total"),
        f"{INSTANCE} not written": _increase("store_lost_total"),
        f"{INSTANCE} errors": f"sum by (instance) ({_increase('internal_errors_total')})",
        f"{INSTANCE} not notified": f"sum by (instance) ({_increase('notifications_total', UNSENT)})",
    }
    text = "Snapshots without a profile or assessment, records not written, internal errors, notifications not sent."
    limit, recording = warn(MAX_REJECTED_PER_SECOND), BY_NAME["store_recording"].help
    return [
        _lines("Messages rejected", "Per second, by reason.", REASON, rejected, unit="ops", steps=limit),
        panels.lines("Failures", text, failures),
        _lines("Recording", recording, INSTANCE, f"koopmon_store_recording{OF}", maximum=1),
    ]


def _scrapes() -> list[Json]:
    series = f"Samples of a scrape, by monitor. Above {MAX_LAYERS} layers, neighbours share a series."
    return [
        _lines("Duration of a scrape", "Duration of /metrics.", INSTANCE, f"scrape_duration_seconds{OF}", unit="s"),
        _lines("Series", series, INSTANCE, f"scrape_samples_scraped{OF}"),
    ]
