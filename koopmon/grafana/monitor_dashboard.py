"""Dashboard of the monitors: load, rejected messages and history writes."""

from __future__ import annotations

from koopmon.grafana.layout import dashboard, datasource_variable, label_variable, link
from koopmon.grafana.panels import GREEN, ORANGE, RED, Json, lines, query, stat
from koopmon.telemetry.alerts import MAX_REJECTED_PER_SECOND

UID = "koopmon-monitor"
OF = '{instance=~"$instance"}'
UP_OR_DOWN = {"0": ("down", RED), "1": ("up", GREEN)}
RECORDING = {"0": ("paused", RED), "1": ("recording", GREEN)}


def make() -> Json:
    """Return the dashboard's JSON."""
    return dashboard(
        UID,
        "koopmon / Monitor",
        "The monitors themselves: whether they keep up, what they refuse, whether they record.",
        {
            "Now": _now(),
            "Engine": [(each, 12, 8) for each in _engine()],
            "Messages and store": [(each, 12, 8) for each in _refusals_and_store()],
            "Scrapes": [(each, 12, 7) for each in _scrapes()],
        },
        variables=[datasource_variable(), label_variable("instance", "Monitor", "koopmon_build_info", "instance")],
        links=[link("koopmon-fleet", "Fleet")],
    )


def _now() -> list[tuple[Json, int, int]]:
    up = stat(
        "Up",
        "Whether Prometheus can scrape the monitor.",
        [query(f"up{OF}", "{{instance}}", instant=True)],
        steps=((None, RED), (1, GREEN)),
        mappings=UP_OR_DOWN,
    )
    versions = "{{version}} (protocol {{protocol}}, Python {{python}}, torch {{torch}})"
    version = stat(
        "Version",
        "Versions of koopmon, its protocol, Python and torch in the monitor.",
        [query(f"koopmon_build_info{OF}", versions, instant=True)],
        text=True,
    )
    runs = stat(
        "Runs watched",
        "Runs that are running, on each monitor.",
        [query(f"sum by (instance) (koopmon_run_state{OF} == bool 1)", "{{instance}}", instant=True)],
        decimals=0,
    )
    recording = stat(
        "Store",
        "Whether history is written. While it is paused no decision is taken.",
        [query(f"koopmon_store_recording{OF}", "{{instance}}", instant=True)],
        steps=((None, RED), (1, GREEN)),
        mappings=RECORDING,
    )
    return [(up, 4, 4), (version, 10, 4), (runs, 5, 4), (recording, 5, 4)]


def _engine() -> list[Json]:
    bucket = f"sum by (le, instance) (rate(koopmon_dmd_duration_seconds_bucket{OF}[$__rate_interval]))"
    return [
        lines(
            "Duration of a profile",
            "Time to profile one snapshot, all of its layers: median, 90% and 99%.",
            [
                query(f"histogram_quantile({part}, {bucket})", f"{{{{instance}}}} {name}")
                for part, name in ((0.5, "50%"), (0.9, "90%"), (0.99, "99%"))
            ],
            unit="s",
            minimum=0,
        ),
        lines(
            "Profiles",
            "Snapshots profiled a second.",
            [query(f"rate(koopmon_dmd_duration_seconds_count{OF}[$__rate_interval])", "{{instance}}")],
            unit="ops",
            minimum=0,
        ),
        lines(
            "Engine queue",
            "Snapshots that wait. A queue that is never empty means that warnings come late.",
            [query(f"koopmon_engine_queue_length{OF}", "{{instance}}")],
            steps=((None, GREEN), (1, ORANGE)),
            minimum=0,
        ),
        lines(
            "Engine load",
            "Share of the time in which the engine computes; near 100% it cannot keep up.",
            [query(f"rate(koopmon_dmd_duration_seconds_sum{OF}[$__rate_interval])", "{{instance}}")],
            unit="percentunit",
            minimum=0,
        ),
    ]


def _refusals_and_store() -> list[Json]:
    dropped = '{instance=~"$instance",reason=~"assembler_full|engine_.*|superseded"}'
    return [
        lines(
            "Messages rejected",
            "Messages and requests that were refused, a second, by reason.",
            [query(f"sum by (reason) (rate(koopmon_messages_rejected_total{OF}[$__rate_interval]))", "{{reason}}")],
            unit="ops",
            steps=((None, GREEN), (MAX_REJECTED_PER_SECOND, ORANGE)),
            minimum=0,
        ),
        lines(
            "Failures",
            "Snapshots that an error kept from being profiled or judged, records that were not written, and other"
            " errors of the monitor's own, in all.",
            [
                query(f"koopmon_engine_failures_total{OF}", "{{instance}} not judged"),
                query(f"koopmon_store_lost_total{OF}", "{{instance}} not written"),
                query(f"sum by (instance) (koopmon_internal_errors_total{OF})", "{{instance}} errors"),
            ],
            minimum=0,
        ),
        lines(
            "Snapshots lost in the monitor",
            "Whole snapshots that the monitor dropped, a second, by reason.",
            [
                query(
                    f"sum by (reason) (rate(koopmon_snapshots_dropped_total{dropped}[$__rate_interval]))", "{{reason}}"
                )
            ],
            unit="ops",
            minimum=0,
        ),
        lines(
            "Recording",
            "1 while history is written, 0 while the store is paused.",
            [query(f"koopmon_store_recording{OF}", "{{instance}}")],
            minimum=0,
            maximum=1,
        ),
    ]


def _scrapes() -> list[Json]:
    return [
        lines(
            "Duration of a scrape",
            "What it takes Prometheus to read /metrics.",
            [query(f"scrape_duration_seconds{OF}", "{{instance}}")],
            unit="s",
            minimum=0,
        ),
        lines(
            "Series",
            "Samples in a scrape. It grows with runs and layers, and layers share series above 64.",
            [query(f"scrape_samples_scraped{OF}", "{{instance}}")],
            minimum=0,
        ),
    ]
