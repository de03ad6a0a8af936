"""Table of the monitor's metrics, and the collector of their values.

The metric objects of prometheus_client do not fit. A series must disappear with its run and while its value is not
finite. Counters must show 0 before their first increment. PROMETHEUS_MULTIPROC_DIR of a trainer must have no effect.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from koopmon.numbers import LARGEST, mean
from koopmon.wire.headers import REJECTION_REASONS
from koopmon.wire.messages import DROP_REASONS, MAX_OBSERVABLES, AckOutcome, CommandKind, TrainingStep

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

PREFIX = "koopmon_"
MAX_LAYERS = 64
"""Maximum number of series per layer metric; above it, adjacent layers share a series."""

MONITOR_REJECTIONS = (
    "unknown_run",
    "stale_incarnation",
    "refused",
    "duplicate",
    "late",
    "inconsistent",
    "unknown_command",
    "http_garbage",
    "http_slow",
    "http_connections",
    "internal",
    "handshake",
    "key",
    "flood",
)
MONITOR_DROPS = ("incomplete", "assembler_full", "engine_queue_full", "engine_failed", "superseded")
REJECTIONS: tuple[str, ...] = tuple(dict.fromkeys((*REJECTION_REASONS, *MONITOR_REJECTIONS)))
OBSERVABLE = "observable_"
"""Prefix of the metric of each measurement of the architecture adapters."""
UNITS = ("seconds", "ratio")
COMMAND_KINDS: tuple[str, ...] = get_args(CommandKind)
COMMAND_OUTCOMES: tuple[str, ...] = ("dry_run", *get_args(AckOutcome), "unanswered")
RUN_STATES = ("ended", "running", "vanished")
EFFECTS = ("effect", "no_effect")
NOTIFICATION_CHANNELS = ("webhook", "mail")
NOTIFICATION_OUTCOMES = ("sent", "failed", "dropped", "held_back")
ErrorPart = Literal[
    "message", "snapshot", "judgement", "command", "store", "metrics", "page", "annotation", "notification", "loop"
]
"""Source of an internal error of the monitor."""
DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Kind = Literal["gauge", "counter", "histogram", "info"]
Values = Mapping[str, Mapping[str, Mapping[tuple[str, ...], float]]]
"""Values of series by run ("" for those without a run), by name of the metric, and by their label values."""
RUN = ("run",)
RUN_LAYER = ("run", "layer")
RUN_NAME = ("run", "name")


@dataclass(frozen=True, slots=True)
class Series:
    """One metric. `name` lacks the prefix and a counter's `_total`; `known` lists bounded label values."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bucket: Literal["mean", "max"] = "mean"
    """Reduction over layers that share a series."""

    @property
    def of_run(self) -> bool:
        """True if the first label is the run."""
        return self.labels[:1] == RUN

    def lines(self, values: Mapping[tuple[str, ...], float], began: float | None) -> Iterator[str]:
        """Return the lines of these series in a text format of Prometheus: that of gauges and counters is in all alike.

        Each counter also has a line with its start, Unix seconds, if `began` is given. Label values need no escape: the
        protocol bounds the characters of names, and the others are in this table.
        """
        pairs = ",".join(f'{label}="{{{index}}}"' for label, index in sorted(zip(self.labels, itertools.count())))
        of = f"{{{{{pairs}}}}} ".format
        name, suffix = PREFIX + self.name, "_total" if self.kind == "counter" else ""
        start = floatToGoString(began) if began is not None and suffix else ""  # type: ignore[no-untyped-call]
        for labels, value in values.items():
            place = of(*labels)
            yield f"{name}{suffix}{place}{floatToGoString(value)}\n"  # type: ignore[no-untyped-call]
            if start:
                yield f"{name}_created{place}{start}\n"


def _layer(name: str, text: str, bucket: Literal["mean", "max"] = "mean") -> Series:
    return Series(name, "gauge", text, RUN_LAYER, bucket=bucket)


def _run(name: str, text: str) -> Series:
    return Series(name, "gauge", text, RUN)


def _counter(name: str, text: str, labels: tuple[str, ...] = (), **known: tuple[str, ...]) -> Series:
    return Series(name, "counter", text, (*labels, *known), known)


TABLE: tuple[Series, ...] = (
    _layer("near_unit_mass", "Fraction of eigenvalues with modulus in [0.90, 1.05]."),
    _layer("expansive_mass", "Fraction of eigenvalues with modulus above 1.05."),
    _layer("contractive_mass", "Fraction of eigenvalues with modulus below 0.80."),
    _layer("spectral_radius", "Largest modulus of the eigenvalues.", "max"),
    _layer("eigenvector_condition_number", "Condition number of the unit-norm right eigenvectors.", "max"),
    _layer("nonlinearity_ratio", "Residual of the linear fit relative to the layer's update."),
    _layer("update_ratio", "Size of the layer's update relative to its input. Near 0 the spectrum has no meaning."),
    _layer("update_exponent", "k of |update| ~ |state|^k over tokens: 0 behind a normalisation, 1 for a linear layer."),
    _layer("reliable_mode_ratio", "Fraction of modes with a ResDMD residual of at most 0.1."),
    _layer("reliable_near_unit_mass", "Near-unit mass among the reliable modes."),
    _layer("stream_rms", "Root mean square of the states behind the layer.", "max"),
    _run("risk", "Online risk of divergence, 0 to 1."),
    _run(
        "forecast",
        "Forecast of divergence, 0 to 1, from the prior and the loss, or the expansive mass without one. Only warns.",
    ),
    Series(
        "risk_threshold",
        "gauge",
        "Risk at which the policy of the run acts, acts at once, or is calm.",
        (*RUN, "level"),
    ),
    _run("initial_near_unit_mass", "Mean near-unit mass of the first informative snapshot."),
    _run("divergence_probability", "Calibrated probability of divergence. Absent without a calibrator."),
    _run("informative", "1 if the last profile is informative, else 0."),
    _run("acting", "1 if the monitor sends the policy's commands and the agents apply them, else 0."),
    _run("watch_only", "1 if the policy would act and no command is sent: watch-only agents, or an earlier error."),
    _run("ranks", "Connected ranks that send messages."),
    _run("kss_alpha", "Weight of Koopman Spectral Shaping in force."),
    _run("kss_held_layers", "Number of layers whose writing weights are under ceilings, by KSS by projection."),
    _run("lr_scale", "LR scale: factor on the learning rate in force."),
    _run("step", "Largest optimizer step in a message of the run."),
    _run("loss", "Loss of the latest measured step, mean over ranks. Absent if unknown or not finite."),
    _run(
        "learning_rate",
        "Largest learning rate of all parameter groups, as the schedule set it, within the bounds on single groups.",
    ),
    _run(
        "gradient_norm",
        "Norm of the gradients of the latest measured step, mean over ranks. Absent if unknown or not finite.",
    ),
    _run(
        "update_rms_ratio",
        "RMS over parameters of gradient norm over root second moment. Absent without Adam's state. Near 1 if steady.",
    ),
    _run("log_partition_nats", "Mean log(sum(exp(logits))) of some output tokens. Absent without known logits."),
    Series(
        "logged_value",
        "gauge",
        "Latest value of a scalar that the user's loop logs, in its own unit. Absent if not finite.",
        RUN_NAME,
    ),
    Series("band_low", "gauge", "Lower limit of the band of the scalar's own history.", RUN_NAME),
    Series("band_high", "gauge", "Upper limit of the band of the scalar's own history, also of the loss.", RUN_NAME),
    _run("step_seconds", "Mean duration of an optimizer step, on the slowest rank."),
    Series("run_state", "gauge", "1 for the state of the run, 0 for the other states.", (*RUN, "state")),
    _run("last_snapshot_timestamp_seconds", "Unix time of the last snapshot received."),
    _run("snapshot_age_seconds", "Age of the last profiled snapshot when its profile was complete."),
    _run("min_stride", "Least steps between snapshots that the engine can judge: 1 until it falls behind."),
    _run("agent_overhead_ratio", "Largest share of the step time that a rank spends in koopmon's hooks."),
    _counter("taps_missing", "Snapshots in which a tap did not fire, summed over ranks.", RUN),
    _counter("snapshots_received", "Snapshots that were assembled and passed to the engine.", RUN),
    _counter(
        "agent_snapshots_dropped", "Shards of snapshots that agents did not send, by reason.", RUN, reason=DROP_REASONS
    ),
    _counter("snapshots_dropped", "Snapshots that the monitor lost, by reason.", RUN, reason=MONITOR_DROPS),
    _counter("commands_issued", "Commands that were sent, or would be without dry_run.", RUN, kind=COMMAND_KINDS),
    _counter(
        "commands_settled",
        "Issued commands by the first acknowledgement, as unanswered, or as dry_run if they were not to be sent.",
        RUN,
        kind=COMMAND_KINDS,
        outcome=COMMAND_OUTCOMES,
    ),
    _counter("band_departures", "Times that a scalar left its band: three values in a row outside it.", RUN_NAME),
    _counter("risk_alarms", "Snapshots with a risk of at least act_risk.", RUN),
    _counter(
        "effect_checks", "Snapshots after the cooldown of an action, by its effect on the risk.", RUN, outcome=EFFECTS
    ),
    _counter("messages_rejected", "Rejected messages by reason.", reason=REJECTIONS),
    Series("dmd_duration_seconds", "histogram", "Time to profile all layers of one snapshot."),
    Series("engine_queue_length", "gauge", "Snapshots that wait for the engine."),
    _counter("engine_failures", "Snapshots that were not profiled or assessed because of an error."),
    _counter(
        "internal_errors",
        "Internal errors of the monitor by part. Each affects at most one run or one message.",
        part=get_args(ErrorPart),
    ),
    _counter(
        "notifications",
        "Notifications by outcome. A full queue drops the oldest; the limit per hour holds further ones back.",
        channel=NOTIFICATION_CHANNELS,
        outcome=NOTIFICATION_OUTCOMES,
    ),
    Series("store_recording", "gauge", "1 while the store records, 0 while it is paused."),
    _counter("store_lost", "Records that were not written. Decisions wait and are not lost while the store is paused."),
    Series("build", "info", "Version of the monitor."),
)
BY_NAME: Mapping[str, Series] = {series.name: series for series in TABLE}
LAYER_FIELDS: tuple[str, ...] = tuple(series.name for series in TABLE if series.labels == RUN_LAYER)
_METRICS_OF_FIELDS = {
    "grad_norm": "gradient_norm",
    "update_rms": "update_rms_ratio",
    "log_partition": "log_partition_nats",
}
TRAINING_FIELDS: Mapping[str, str] = {
    name: field for field in TrainingStep.__struct_fields__ if (name := _METRICS_OF_FIELDS.get(field, field)) in BY_NAME
}
"""Metrics of the scalars of a step, each with its field of `TrainingStep`."""
KEPT_WHEN_VANISHED = frozenset({"last_snapshot_timestamp_seconds", "run_state"})


@functools.lru_cache(maxsize=64)
def layer_buckets(num_layers: int) -> tuple[tuple[str, range], ...]:
    """Label and layers of each series: one layer each up to MAX_LAYERS, else adjacent layers such as "4-5"."""
    size = max(1, math.ceil(num_layers / MAX_LAYERS))
    starts = range(0, num_layers, size)
    spans = [range(start, min(start + size, num_layers)) for start in starts]
    return tuple((str(span[0]) if size == 1 else f"{span[0]}-{span[-1]}", span) for span in spans)


def _bucketed(values: Sequence[float | None], reduction: Literal["mean", "max"]) -> Iterator[tuple[str, float]]:
    """Label and value of each series: the reduction of the finite values of its layers, where it is finite."""
    for label, span in layer_buckets(len(values)):
        known = [value for value in map(_finite, values[span.start : span.stop]) if value is not None]
        reduced = max(known, default=None) if reduction == "max" else mean(known)
        if reduced is not None:
            yield label, float(f"{reduced:.6g}")  # further digits double the size of a compressed scrape


def _reduction(observable: str) -> Literal["mean", "max"]:
    return "max" if observable.startswith(LARGEST) else "mean"


def _padded(label: str, num_layers: int) -> str:
    """Return a label of layers with leading zeros, so that its order as text is that of the layers."""
    width = len(str(max(num_layers - 1, 0)))
    return "-".join(part.zfill(width) for part in label.split("-"))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


class Metrics(Collector):
    """Values of the metrics in TABLE. Safe to read from any thread while one thread writes."""

    def __init__(self, registry: CollectorRegistry, build: Mapping[str, str]) -> None:
        """Register with `registry`; `build` holds the labels of build_info."""
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, dict[tuple[str, ...], float]]] = {"": {}}
        self._began = {"": time.time()}
        """Unix seconds since which the counters of a run count; "" for those without a run."""
        self._bucket_counts = [0] * (len(DURATION_BUCKETS) + 1)
        self._duration_sum = 0.0
        self._observables: dict[str, list[str]] = {}
        """Names of each run. Their metrics are not in TABLE: only the adapters know them."""
        self._build = dict(build)
        self._start_counters()
        self.set("engine_queue_length", 0)
        self.set("store_recording", 1)
        registry.register(self)

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Set a gauge; None or a non-finite value removes the series."""
        with self._lock:
            self._set(name, value, labels)

    def set_gauges(self, run: str, values: Mapping[str, float | None]) -> None:
        """Set gauges of `run` by name, as `set` does."""
        with self._lock:
            for name, value in values.items():
                self._set(name, value, (run,))

    def _set(self, name: str, value: float | None, labels: tuple[str, ...]) -> None:
        series, finite = self._series(name, labels), _finite(value)
        if finite is None:
            series.pop(labels, None)
        else:
            series[labels] = finite

    def set_training(self, run: str, training: TrainingStep) -> None:
        """Set the gauge of every field of `training` that has a metric."""
        self.set_gauges(run, {name: getattr(training, field_name) for name, field_name in TRAINING_FIELDS.items()})

    def add(self, name: str, *labels: str, amount: int = 1) -> None:
        """Increment a counter. Raises KeyError for a label value outside the table: labels are bounded."""
        series = BY_NAME[name]
        for label, value in zip(series.labels, labels, strict=True):
            if label in series.known and value not in series.known[label]:
                raise KeyError(f"{name}: {label} {value!r} is not among {', '.join(series.known[label])}")
        with self._lock:
            values = self._series(name, labels)
            values[labels] = values.get(labels, 0.0) + amount

    def set_state(self, name: str, value: str, known: Iterable[str], *labels: str) -> None:
        """Set a gauge with a state as its last label: 1 for `value`, 0 for the others of `known`."""
        for each in known:
            self.set(name, float(each == value), *labels, each)

    def value(self, name: str, *labels: str) -> float | None:
        """Return the value of one series; None when it is absent."""
        with self._lock:
            run = labels[0] if BY_NAME[name].of_run else ""
            return self._values.get(run, {}).get(name, {}).get(labels)

    def gauges(self, names: Iterable[str]) -> dict[str, dict[str, float]]:
        """Return the known values of some gauges of runs, by run and name. A run without one of them is left out."""
        chosen = tuple(names)
        with self._lock:
            known = {
                run: {name: series[name][run,] for name in chosen if (run,) in series.get(name, {})}
                for run, series in self._values.items()
            }
        return {run: values for run, values in known.items() if values}

    def observe_duration(self, seconds: float) -> None:
        """Add the duration of one profile to dmd_duration_seconds."""
        with self._lock:
            self._bucket_counts[bisect.bisect_left(DURATION_BUCKETS, seconds)] += 1
            self._duration_sum += seconds

    def begin_run(self, run: str) -> None:
        """Initialise the counters of `run` to 0 if they do not exist."""
        self._began.setdefault(run, time.time())
        self._start_counters(run)

    def end_run(self, run: str, *, keep: Iterable[str] = ()) -> None:
        """Remove the series of `run` except the names in `keep`."""
        self._observables.pop(run, None)
        self._began.pop(run, None)
        with self._lock:
            series = self._values.pop(run, {})
            if kept := {name: series[name] for name in keep if name in series}:
                self._values[run] = kept

    def set_layers(self, run: str, profile: SpectralProfile | None) -> None:
        """Replace the per-layer series of `run` by those of `profile`; None removes them."""
        layers = () if profile is None else profile.layers
        fresh: dict[str, dict[tuple[str, ...], float]] = {}
        for name in LAYER_FIELDS:
            values = [getattr(layer, name) for layer in layers]
            fresh[name] = {
                (run, _padded(label, len(values))): value for label, value in _bucketed(values, BY_NAME[name].bucket)
            }
        self._replace(run, fresh)

    def set_observables(self, run: str, observables: Mapping[str, Sequence[float | None]]) -> None:
        """Replace the series of `run` of the adapters' measurements, each of which is a metric of its own.

        `observables` maps each name to one value per transition, None for a missing value. A run has series of its
        first MAX_OBSERVABLES names: Prometheus keeps each name that it has ever seen.
        """
        fresh: dict[str, dict[tuple[str, ...], float]] = {}
        names = self._observables.setdefault(run, [])
        names += [name for name in observables if name not in names][: MAX_OBSERVABLES - len(names)]
        for name in names:
            row, reduction = observables.get(name, ()), _reduction(name)
            fresh[OBSERVABLE + name] = {
                (run, _padded(label, len(row))): value for label, value in _bucketed(row, reduction)
            }
        self._replace(run, fresh)

    def _replace(self, run: str, fresh: Mapping[str, dict[tuple[str, ...], float]]) -> None:
        """Replace all series of `run` of some metrics at once."""
        with self._lock:
            self._values.setdefault(run, {}).update(fresh)

    def _series(self, name: str, labels: tuple[str, ...]) -> dict[tuple[str, ...], float]:
        """Return the values of the metric and the run of one series."""
        run = labels[0] if BY_NAME[name].of_run else ""
        return self._values.setdefault(run, {}).setdefault(name, {})

    def collect(self) -> Iterator[Metric]:
        """Return all metrics for prometheus_client, as a consistent copy."""
        values = self._copy()
        return self._families(values, _observed(values))

    def exposition(self, encode: Callable[[Any], bytes], *, created: bool = False) -> bytes:
        """Return the same text as `encode` of prometheus_client, in a fifth of its time.

        It writes the lines of the runs itself: 100 runs of 48 layers have 60,000. With `created`, which is for
        OpenMetrics, each counter and histogram also has the time of its start.
        """
        values = self._copy()
        began = dict(self._began) if created else {}
        observed = _observed(values)
        text = encode(
            SimpleNamespace(collect=lambda: self._families({"": values[""]}, observed, began.get("")))
        ).decode()
        by_name = {**BY_NAME, **{each.name: each for each in observed}}
        parts: list[str] = []
        series: Series | None = None
        for line in (*text.splitlines(keepends=True), ""):
            if series is not None and (line.startswith(("# HELP ", "# EOF")) or not line):
                for run, found in _of_runs(series, values):
                    parts += series.lines(found, began.get(run))
                series = None
            parts.append(line)
            if line.startswith("# TYPE "):
                named = by_name.get(line.split()[2].removeprefix(PREFIX).removesuffix("_total"))
                series = named if named is not None and named.of_run else None
        return "".join(parts).encode()

    def _copy(self) -> Values:
        with self._lock:
            return {
                run: {name: dict(values) for name, values in series.items()} for run, series in self._values.items()
            }

    def _families(self, values: Values, observed: Sequence[Series], began: float | None = None) -> Iterator[Metric]:
        with self._lock:
            counts, total = list(self._bucket_counts), self._duration_sum
        for series in (*TABLE, *observed):
            yield self._family(series, values, counts, total, began)

    def _family(self, series: Series, values: Values, counts: list[int], total: float, began: float | None) -> Metric:
        name = PREFIX + series.name
        if series.kind == "info":
            return InfoMetricFamily(name, series.help, value=self._build)
        if series.kind == "histogram":
            bounds = [*map(str, DURATION_BUCKETS), "+Inf"]
            cumulative = zip(bounds, map(float, itertools.accumulate(counts)), strict=True)
            made = HistogramMetricFamily(name, series.help, buckets=list(cumulative), sum_value=total, unit="seconds")
            if began is not None:
                made.add_sample(f"{name}_created", {}, began)
            return made
        unit = name.rpartition("_")[2]
        make = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
        start: Any = {"created": began} if series.kind == "counter" else {}
        family = make(name, series.help, labels=series.labels, unit=unit if unit in UNITS else "")
        for _, each in _of_runs(series, values):
            for labels, value in each.items():
                family.add_metric(labels, value, **start)
        return family

    def _start_counters(self, *run: str) -> None:
        """Start the counters of `run`, or those without a run."""
        for series in TABLE:
            if series.kind == "counter" and series.of_run == bool(run):
                known = [series.known.get(label, ()) for label in series.labels[len(run) :]]
                with self._lock:
                    for labels in itertools.product(*known):
                        self._series(series.name, (*run, *labels)).setdefault((*run, *labels), 0.0)


def _of_runs(series: Series, values: Values) -> Iterator[tuple[str, Mapping[tuple[str, ...], float]]]:
    """Yield each run with its values of one metric."""
    for run in sorted(values) if series.of_run else [""]:
        yield run, values[run].get(series.name, {})


def _observed(values: Values) -> list[Series]:
    """Return the metrics of the adapters' measurements that have a value, by name."""
    names = {
        name
        for series in values.values()
        for name, found in series.items()
        if found and name.startswith(OBSERVABLE) and name not in BY_NAME
    }
    words = {name: name.removeprefix(OBSERVABLE).replace("_", " ") for name in sorted(names)}
    return [_layer(name, f"Measurement of the architecture adapter: {text}.") for name, text in words.items()]
