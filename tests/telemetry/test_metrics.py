"""Table of metrics, parsed by the client library of Prometheus."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from koopmon.spectral import LayerProfile, SpectralProfile, profile_states
from koopmon.telemetry.metrics import (
    COMMAND_KINDS,
    COMMAND_OUTCOMES,
    KEPT_WHEN_VANISHED,
    LAYER_FIELDS,
    MONITOR_DROPS,
    OBSERVABLE,
    PREFIX,
    REJECTIONS,
    RUN_STATES,
    TABLE,
    Metrics,
    layer_buckets,
)
from koopmon.wire.messages import DROP_REASONS, MAX_OBSERVABLES, TrainingStep

GOLDEN = Path(__file__).parent / "metrics.golden"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry, {"version": "0"})


def make_profile(num_layers: int, **fields: Any) -> SpectralProfile:
    template = profile_states(torch.randn((2, 24, 3)), kreiss="never").layers[0].to_dict()
    layers = []
    for layer in range(num_layers):
        values = {name: float(layer) for name in LAYER_FIELDS}
        layers.append(LayerProfile.from_dict({**template, **values, **fields}))
    return SpectralProfile(layers=tuple(layers))


def exposed(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_names_types_and_labels_are_the_public_contract(metrics: Metrics, registry: CollectorRegistry) -> None:
    """Compare with the golden file. A change there affects dashboards and alerts."""
    metrics.begin_run("job")
    for series in TABLE:
        if series.kind == "gauge":
            metrics.set(series.name, 1.0, *(f"a-{label}" for label in series.labels))
        elif series.kind == "counter" and not series.known.keys() >= {*series.labels} - {"run"}:
            metrics.add(
                series.name, *(f"a-{label}" for label in series.labels)
            )  # the table has no values of its labels
    lines = []
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        labels = sorted({label for sample in family.samples for label in sample.labels})
        lines.append(f"{family.name} {family.type} {','.join(labels)}".rstrip())
    assert "\n".join(lines) + "\n" == GOLDEN.read_text()


def test_every_metric_of_the_contract_is_there() -> None:
    names = {series.name + ("_total" if series.kind == "counter" else "") for series in TABLE}
    assert names >= {
        *("near_unit_mass", "expansive_mass", "contractive_mass", "spectral_radius", "eigenvector_condition_number"),
        *("nonlinearity_ratio", "update_ratio", "reliable_mode_ratio", "reliable_near_unit_mass"),
        *("risk", "initial_near_unit_mass", "divergence_probability", "informative", "kss_alpha", "lr_scale", "step"),
        *("run_state", "last_snapshot_timestamp_seconds", "agent_overhead_ratio", "taps_missing_total", "ranks"),
        *("acting", "watch_only", "risk_threshold", "agent_snapshots_dropped_total", "commands_issued_total"),
        *("snapshots_received_total", "snapshots_dropped_total", "commands_settled_total", "messages_rejected_total"),
        *("dmd_duration_seconds", "engine_queue_length", "build"),
    }


def test_counters_start_at_zero_for_every_known_label_value(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.begin_run("job")
    found = exposed(registry)
    for reason in REJECTIONS:
        assert found[PREFIX + "messages_rejected_total", (("reason", reason),)] == 0
    for prefix, reasons in (("agent_", DROP_REASONS), ("", MONITOR_DROPS)):
        for reason in reasons:
            assert found[f"{PREFIX}{prefix}snapshots_dropped_total", (("reason", reason), ("run", "job"))] == 0
    for kind in COMMAND_KINDS:
        for outcome in COMMAND_OUTCOMES:
            labels = (("kind", kind), ("outcome", outcome), ("run", "job"))
            assert found[PREFIX + "commands_settled_total", labels] == 0
    metrics.add("commands_settled", "job", "stop", "applied")
    metrics.begin_run("job")
    assert metrics.value("commands_settled", "job", "stop", "applied") == 1


def test_labels_are_bounded(metrics: Metrics) -> None:
    with pytest.raises(KeyError, match="invented"):
        metrics.add("messages_rejected", "invented")
    with pytest.raises(ValueError, match="zip"):
        metrics.add("messages_rejected")


def test_the_scalars_of_a_step_are_the_gauges_of_their_names(metrics: Metrics) -> None:
    metrics.set_training("job", TrainingStep(step=7, loss=2.0, lr_scale=0.5, kss_alpha=0.1))
    found = {name: metrics.value(name, "job") for name in ("step", "lr_scale", "kss_alpha")}
    assert found == {"step": 7, "lr_scale": 0.5, "kss_alpha": 0.1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_value_that_is_not_finite_takes_the_series_away(metrics: Metrics, bad: float | None) -> None:
    metrics.set("risk", 0.5, "job")
    metrics.set("risk", bad, "job")
    assert metrics.value("risk", "job") is None


def test_no_layer_value_is_ever_not_finite(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.set_layers("job", make_profile(2, spectral_radius=math.inf, near_unit_mass=math.nan))
    found = exposed(registry)
    assert all(math.isfinite(value) for value in found.values())
    assert not any(name == PREFIX + "spectral_radius" for name, _ in found)
    assert found[PREFIX + "update_ratio", (("layer", "1"), ("run", "job"))] == 1.0


def test_fewer_layers_leave_no_stale_series(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.set_layers("job", make_profile(3))
    metrics.set_layers("other", make_profile(1))
    metrics.set_layers("job", make_profile(2))
    layers = [dict(labels) for name, labels in exposed(registry) if name == PREFIX + "update_ratio"]
    assert layers == [{"layer": "0", "run": "job"}, {"layer": "1", "run": "job"}, {"layer": "0", "run": "other"}]
    metrics.set_layers("job", None)
    assert [dict(labels)["run"] for name, labels in exposed(registry) if name.endswith("_ratio")] == ["other"] * 3


def test_observables_are_bucketed_as_layers_are_and_leave_nothing_stale(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    metrics.set_observables("other", {"load_imbalance": [1.0]})
    metrics.set_observables("job", {"router_entropy": [0.5, None, math.nan], "load_imbalance": [2.0, 3.0, 4.0]})
    metrics.set_observables("job", {"router_entropy": [None] * 64 + [0.25, 0.75]})

    def series(run: str) -> dict[tuple[str, str], float]:
        found = {(name, dict(labels)["layer"], dict(labels)["run"]): value for (name, labels), value in observed()}
        return {(name, layer): value for (name, layer, whose), value in found.items() if whose == run}

    def observed() -> list[Any]:
        return [each for each in exposed(registry).items() if each[0][0].startswith(PREFIX + OBSERVABLE)]

    assert series("job") == {("koopmon_observable_router_entropy", "64-65"): 0.5}
    assert series("other") == {("koopmon_observable_load_imbalance", "0"): 1.0}
    metrics.set_observables("job", {})
    assert series("job") == {}
    metrics.end_run("other")
    assert series("other") == {}


def test_a_run_has_series_of_its_first_observables_only(metrics: Metrics, registry: CollectorRegistry) -> None:
    """A peer that names each snapshot's measurements differently cannot fill Prometheus."""
    for first in range(0, 40, 8):
        metrics.set_observables("job", {f"name{first + index}": [1.0] for index in range(MAX_OBSERVABLES)})

    def names() -> set[str]:
        return {name.removeprefix(PREFIX + OBSERVABLE) for name, _ in exposed(registry) if OBSERVABLE in name}

    assert names() == set()
    metrics.set_observables("job", {"name0": [1.0], "name40": [1.0]})
    assert names() == {"name0"}
    metrics.end_run("job")
    metrics.set_observables("job", {"name40": [1.0]})
    assert names() == {"name40"}


@pytest.mark.parametrize(
    ("num_layers", "count", "first", "last"),
    [
        (0, 0, None, None),
        (1, 1, "0", "0"),
        (64, 64, "0", "63"),
        (65, 33, "0-1", "64-64"),
        (4096, 64, "0-63", "4032-4095"),
    ],
)
def test_layers_share_series_above_the_bound(num_layers: int, count: int, first: str | None, last: str | None) -> None:
    buckets = layer_buckets(num_layers)
    assert len(buckets) == count <= 64
    assert [layer for _, span in buckets for layer in span] == list(range(num_layers))
    if buckets:
        assert (buckets[0][0], buckets[-1][0]) == (first, last)


def test_a_bucket_shows_the_mean_or_the_worst(metrics: Metrics) -> None:
    metrics.set_layers("job", make_profile(66))
    assert metrics.value("update_ratio", "job", "02-03") == 2.5
    assert metrics.value("spectral_radius", "job", "02-03") == 3.0


@pytest.mark.parametrize("num_layers", [1, 2, 10, 11, 64, 65, 100, 1001, 4096])
def test_labels_of_layers_are_in_the_order_of_the_layers_as_text_too(
    metrics: Metrics, registry: CollectorRegistry, num_layers: int
) -> None:
    metrics.set_observables("job", {"router_entropy": [float(layer) for layer in range(num_layers)]})
    found = {dict(labels)["layer"]: value for (name, labels), value in exposed(registry).items() if OBSERVABLE in name}
    assert [value for _, value in sorted(found.items())] == sorted(found.values())
    assert len({len(label) for label in found}) == 1


def test_a_run_that_vanished_keeps_two_series_and_one_that_is_removed_none(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    before = exposed(registry)
    metrics.begin_run("job")
    metrics.set_layers("job", make_profile(2))
    metrics.set_state("run_state", "vanished", RUN_STATES, "job")
    metrics.set("last_snapshot_timestamp_seconds", 1.0, "job")
    metrics.end_run("job", keep=KEPT_WHEN_VANISHED)
    left = {name for name, labels in exposed(registry) if ("run", "job") in labels}
    assert left == {PREFIX + name for name in KEPT_WHEN_VANISHED}
    metrics.end_run("job")
    assert exposed(registry) == before


def test_durations_make_a_histogram(metrics: Metrics, registry: CollectorRegistry) -> None:
    for seconds in (0.0005, 0.001, 0.02, 100.0):
        metrics.observe_duration(seconds)
    found = exposed(registry)
    name = PREFIX + "dmd_duration_seconds"
    assert found[name + "_bucket", (("le", "0.001"),)] == 2
    assert found[name + "_bucket", (("le", "0.025"),)] == 3
    assert found[name + "_bucket", (("le", "+Inf"),)] == found[name + "_count", ()] == 4
    assert found[name + "_sum", ()] == pytest.approx(100.0215)


def test_openmetrics_is_valid_too(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.begin_run("job")
    metrics.set_layers("job", make_profile(2))
    metrics.observe_duration(0.1)
    families = {family.name: family for family in parse_openmetrics(generate_openmetrics(registry).decode())}
    assert families[PREFIX + "snapshots_received"].type == "counter"
    units = {name: family.unit for name, family in families.items() if family.unit}
    assert units == {name: name.rpartition("_")[2] for name in families if name.endswith(("_seconds", "_ratio"))}, (
        "each with a unit in its name declares it"
    )
    assert units
    assert families[PREFIX + "build"].samples[0].labels == {"version": "0"}
    assert not any(
        "rank" in sample.labels or "step" in sample.labels for f in families.values() for sample in f.samples
    )


@pytest.mark.parametrize("encode", [generate_latest, generate_openmetrics])
def test_the_exposition_is_that_of_the_client_library(
    metrics: Metrics, registry: CollectorRegistry, encode: Callable[[Any], bytes]
) -> None:
    assert metrics.exposition(encode) == encode(registry)
    for run in ("job", "a/job:2"):
        metrics.begin_run(run)
        metrics.set_layers(run, make_profile(12))
        metrics.set_observables(run, {"router_entropy": [1e-9, 2.5e12, -3.0]})
        metrics.set("last_snapshot_timestamp_seconds", 1.75e9, run)
    metrics.observe_duration(0.1)
    text = metrics.exposition(encode)
    assert text == encode(registry)
    assert b'koopmon_observable_router_entropy{layer="1",run="a/job:2"} 2.5e+12' in text


def test_openmetrics_has_the_start_of_every_counter(metrics: Metrics) -> None:
    metrics.begin_run("job")
    metrics.set("risk", 0.5, "job")
    metrics.add("band_departures", "job", "kl")
    metrics.observe_duration(0.1)
    began = time.time()
    text = metrics.exposition(generate_openmetrics, created=True).decode()
    lines = text.splitlines(keepends=True)
    assert (
        "".join(line for line in lines if "_created" not in line) == metrics.exposition(generate_openmetrics).decode()
    )
    starts: dict[bool, list[float]] = {True: [], False: []}
    for family in parse_openmetrics(text):
        samples = [sample for sample in family.samples if not sample.name.endswith(("_bucket", "_sum"))]
        counted = [sample for sample in samples if not sample.name.endswith("_created")]
        created = [sample for sample in samples if sample.name.endswith("_created")]
        expected = [sample.labels for sample in counted] if family.type in ("counter", "histogram") else []
        assert [sample.labels for sample in created] == expected
        for sample in created:
            starts["run" in sample.labels].append(sample.value)
    assert len(set(starts[True])) == len(set(starts[False])) == 1, "one start for a run, and one for the monitor"
    assert 0.0 <= began - starts[True][0] <= began - starts[False][0] < 3600.0
    metrics.end_run("job")
    metrics.begin_run("job")
    again = parse_openmetrics(metrics.exposition(generate_openmetrics, created=True).decode())
    (alarms,) = [family for family in again if family.name == "koopmon_risk_alarms"]
    assert alarms.samples[1].name == "koopmon_risk_alarms_created"
    assert alarms.samples[1].value > starts[True][0], "a new run counts from now on"


def test_a_layer_has_six_digits(metrics: Metrics) -> None:
    metrics.set_layers("job", make_profile(1, spectral_radius=1.23456789))
    assert metrics.value("spectral_radius", "job", "0") == 1.23457


@pytest.mark.needs("promtool")
@pytest.mark.process
def test_promtool_has_no_complaint(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.begin_run("job")
    for series in TABLE:
        if series.kind == "gauge":
            metrics.set(series.name, 1.0, *(f"a-{label}" for label in series.labels))
        elif series.kind == "counter" and not series.known.keys() >= {*series.labels} - {"run"}:
            metrics.add(
                series.name, *(f"a-{label}" for label in series.labels)
            )  # the table has no values of its labels
    metrics.set_observables("job", {"router_entropy": [0.5], "load_imbalance": [2.0], "dropped_token_ratio": [0.0]})
    metrics.observe_duration(0.1)
    text = generate_latest(registry)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
