"""Dashboard of the monitors: load, rejected messages and history writes."""

from __future__ import annotations

from koopmon.grafana.layout import dashboard, datasource_variable, label_variable, link, sized
from koopmon.grafana.panels import GREEN, RED, Json, lines, stat, warn
from koopmon.telemetry.alerts import MAX_REJECTED_PER_SECOND

UID = "koopmon-monitor"
OF = '{instance=~"$instance"}'
LOST = '{instance=~"$instance",reason=~"assembler_full|engine_.*|superseded"}'
FINE = ((None, RED), (1, GREEN))
VERSIONS = "{{version}} (protocol {{protocol}}, Python {{python}}, torch {{torch}})"
INSTANCE = "{{instance}}"


def _rate(metric: str, of: str = OF) -> str:
    return f"rate(koopmon_{metric}{of}[$__rate_interval])"


def make() -> Json:
    """Return the dashboard's JSON."""
    bucket = f"sum by (le, instance) ({_rate('dmd_duration_seconds_bucket')})"
    up = stat(
        "Up",
        "Whether Prometheus can scrape the monitor.",
        f"up{OF}",
        INSTANCE,
        steps=FINE,
        mappings={"0": ("down", RED), "1": ("up", GREEN)},
    )
    version = stat(
        "Version",
        "Versions of koopmon, its protocol, Python and torch in the monitor.",
        f"koopmon_build_info{OF}",
        VERSIONS,
        text=True,
    )
    runs = stat(
        "Runs watched",
        "Runs that are running, on each monitor.",
        f"sum by (instance) (koopmon_run_state{OF} == bool 1)",
        INSTANCE,
        decimals=0,
    )
    recording = stat(
        "Store",
        "Whether history is written. While it is paused no decision is taken.",
        f"koopmon_store_recording{OF}",
        INSTANCE,
        steps=FINE,
        mappings={"0": ("paused", RED), "1": ("recording", GREEN)},
    )
    engine = [
        lines(
            "Duration of a profile",
            "Time to profile one snapshot, all of its layers: median, 90% and 99%.",
            {
                f"{INSTANCE} {name}": f"histogram_quantile({part}, {bucket})"
                for part, name in ((0.5, "50%"), (0.9, "90%"), (0.99, "99%"))
            },
            unit="s",
        ),
        lines("Profiles", "Snapshots profiled a second.", {INSTANCE: _rate("dmd_duration_seconds_count")}, unit="ops"),
        lines(
            "Engine queue",
            "Snapshots that wait. A queue that is never empty means that warnings come late.",
            {INSTANCE: f"koopmon_engine_queue_length{OF}"},
            steps=warn(1),
        ),
        lines(
            "Engine load",
            "Share of the time in which the engine computes; near 100% it cannot keep up.",
            {INSTANCE: _rate("dmd_duration_seconds_sum")},
            unit="percentunit",
        ),
    ]
    messages = [
        lines(
            "Messages rejected",
            "Messages and requests that were refused, a second, by reason.",
            {"{{reason}}": f"sum by (reason) ({_rate('messages_rejected_total')})"},
            unit="ops",
            steps=warn(MAX_REJECTED_PER_SECOND),
        ),
        lines(
            "Failures",
            "Snapshots that an error kept from being profiled or judged, records that were not written, and other"
            " errors of the monitor's own, in all.",
            {
                f"{INSTANCE} not judged": f"koopmon_engine_failures_total{OF}",
                f"{INSTANCE} not written": f"koopmon_store_lost_total{OF}",
                f"{INSTANCE} errors": f"sum by (instance) (koopmon_internal_errors_total{OF})",
            },
        ),
        lines(
            "Snapshots lost in the monitor",
            "Whole snapshots that the monitor dropped, a second, by reason.",
            {"{{reason}}": f"sum by (reason) ({_rate('snapshots_dropped_total', LOST)})"},
            unit="ops",
        ),
        lines(
            "Recording",
            "1 while history is written, 0 while the store is paused.",
            {INSTANCE: f"koopmon_store_recording{OF}"},
            maximum=1,
        ),
    ]
    scrapes = [
        lines(
            "Duration of a scrape",
            "What it takes Prometheus to read /metrics.",
            {INSTANCE: f"scrape_duration_seconds{OF}"},
            unit="s",
        ),
        lines(
            "Series",
            "Samples in a scrape. It grows with runs and layers, and layers share series above 64.",
            {INSTANCE: f"scrape_samples_scraped{OF}"},
        ),
    ]
    return dashboard(
        UID,
        "koopmon / Monitor",
        "The monitors themselves: whether they keep up, what they refuse, whether they record.",
        {
            "Now": [*sized(4, 4, up), *sized(10, 4, version), *sized(5, 4, runs, recording)],
            "Engine": sized(12, 8, *engine),
            "Messages and store": sized(12, 8, *messages),
            "Scrapes": sized(12, 7, *scrapes),
        },
        variables=[datasource_variable(), label_variable("instance", "Monitor", "koopmon_build_info", "instance")],
        links=[link("koopmon-fleet", "Fleet")],
    )
