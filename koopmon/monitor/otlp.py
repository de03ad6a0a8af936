"""Pushes the metrics of the registry to an OpenTelemetry collector, or to Prometheus 3, with OTLP over HTTP.

The variables OTEL_* configure it; the exporter of OpenTelemetry reads those of endpoint, headers, certificates,
compression and timeout itself. A thread of its own pushes, so that no state of the collector reaches the monitor.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prometheus_client.registry import CollectorRegistry

from koopmon import __version__
from koopmon.deadline import LimitedCalls
from koopmon.errors import describe_error, one_line

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import HistogramDataPoint, MetricsData
    from opentelemetry.sdk.metrics.export import Metric as OtlpMetric
    from prometheus_client.core import Metric
    from prometheus_client.samples import Sample

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
DEFAULT_INTERVAL_SECONDS = 60.0
"""The default of the specification."""
MIN_INTERVAL_SECONDS = 0.1
PUSH_SECONDS = 60.0
"""Maximum time for one push; the exporter's own timeout bounds each read, not the whole."""
CLOSE_SECONDS = 3.0
"""Maximum time for the last push at the end."""


def open_push(registry: CollectorRegistry, environ: Mapping[str, str], instance: str) -> OtlpPush | None:
    """Start to push if `environ` names an endpoint and nothing prevents it. A line gives the reason if something does.

    `instance` identifies this monitor: Prometheus makes it the label `instance`. The function raises nothing, because
    the variables may be meant for another program on this host.
    """
    endpoint = next((name for name in ENDPOINTS if environ.get(name)), "")
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not endpoint or disabled or environ.get("OTEL_METRICS_EXPORTER", "otlp") != "otlp":
        return None
    variable = next((name for name in PROTOCOLS if environ.get(name)), "")
    why = ""
    if variable and environ[variable] != PROTOCOL:
        why = f"{variable} is {environ[variable]!r}, and koopmon has {PROTOCOL}"
    elif find_spec("opentelemetry") is None:
        why = "OpenTelemetry is not installed: pip install 'koopmon[otlp]'"
    else:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

            exporter = OTLPMetricExporter()
        except Exception as error:  # a package that is missing, or a value that the exporter does not take
            why = describe_error(error)
        else:
            return OtlpPush(registry, exporter, _interval(environ), instance)
    logger.info("otlp: %s is set, but no metrics are pushed: %s", endpoint, one_line(why))
    return None


def _interval(environ: Mapping[str, str]) -> float:
    """Return the time in seconds between two pushes."""
    given = environ.get(INTERVAL, "")
    try:
        seconds = float(given or DEFAULT_INTERVAL_SECONDS * 1000) / 1000
    except ValueError:
        seconds = math.nan
    if not MIN_INTERVAL_SECONDS <= seconds < math.inf:
        words = "otlp: %s is %r: expected milliseconds from %.0f; the interval is %.0f s"
        logger.warning(words, INTERVAL, given, MIN_INTERVAL_SECONDS * 1000, DEFAULT_INTERVAL_SECONDS)
        return DEFAULT_INTERVAL_SECONDS
    return seconds


class _FirstMessage(logging.Filter):
    """Keeps the first message of the exporter, which would log each attempt, for our one line."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.text = self.text or one_line(record.getMessage())
        return False


class OtlpPush:
    """The thread that pushes, from its creation until `close`."""

    def __init__(
        self, registry: CollectorRegistry, exporter: OTLPMetricExporter, seconds: float, instance: str
    ) -> None:
        self._registry = registry
        self._exporter = exporter
        self._seconds = seconds
        self._instance = instance
        self._started = time.time_ns()
        self._closing = threading.Event()
        self._calls = LimitedCalls(PUSH_SECONDS)
        self._failing = False
        self._said = _FirstMessage()
        self._exporters_logger = logging.getLogger(type(exporter).__module__)
        self._exporters_logger.addFilter(self._said)
        self._thread = threading.Thread(target=self._run, name="koopmon-otlp", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Push the last values, unless the last push failed, for at most CLOSE_SECONDS, and stop the thread."""
        self._closing.set()
        if not self._failing:
            self._thread.join(CLOSE_SECONDS)
        self._exporter.shutdown()
        self._exporters_logger.removeFilter(self._said)

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            self._push()
        if not self._failing:
            self._push()

    def _push(self) -> None:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        self._said.text = ""
        try:
            data = metrics_data(self._registry, self._started, self._instance)
            result = self._calls.run(lambda: self._exporter.export(data))
            why = "" if result is MetricExportResult.SUCCESS else self._said.text or "no reason is known"
        except Exception as error:  # a library for HTTP may raise any kind
            why = describe_error(error)
        if bool(why) is not self._failing:
            self._failing = bool(why)
            if why:
                logger.warning("otlp: the metrics were not pushed: %s; further failures are not logged", why)
            else:
                logger.warning("otlp: the metrics are pushed again")


def metrics_data(registry: CollectorRegistry, started: int, instance: str) -> MetricsData:
    """Return the current values in OpenTelemetry's form. `started` is the time in ns since which counters count.

    No metric has a unit: Prometheus would append it to the name, which is otherwise that of a scrape.
    """
    from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
    from opentelemetry.sdk.resources import (
        SERVICE_INSTANCE_ID,
        SERVICE_NAME,
        SERVICE_VERSION,
        OTELResourceDetector,
        Resource,
    )
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    now = time.time_ns()
    own = {SERVICE_NAME: "koopmon", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: instance}
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES replace ours.
    given = OTELResourceDetector().detect()
    resource = Resource.create(own).merge(given)
    metrics = [metric for family in registry.collect() for metric in _converted(family, started, now)]
    scope = ScopeMetrics(InstrumentationScope("koopmon", __version__), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _converted(family: Metric, started: int, now: int) -> Iterator[OtlpMetric]:
    from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Histogram, NumberDataPoint, Sum
    from opentelemetry.sdk.metrics.export import Metric as OtlpMetric

    def points(samples: Iterable[Sample], since: int) -> list[NumberDataPoint]:
        return [NumberDataPoint(each.labels, since, now, float(each.value)) for each in samples]

    data: Sum | Gauge | Histogram
    name = family.name
    if family.type == "counter":
        totals = points((each for each in family.samples if each.name.endswith("_total")), started)
        data = Sum(totals, AggregationTemporality.CUMULATIVE, is_monotonic=True)
    elif family.type == "histogram":
        data = Histogram(_histogram_points(family.samples, started, now), AggregationTemporality.CUMULATIVE)
    else:
        name = f"{name}_info" if family.type == "info" else name
        data = Gauge(points(family.samples, now))
    if data.data_points:
        yield OtlpMetric(name, family.documentation, "", data)


def _histogram_points(samples: Iterable[Sample], started: int, now: int) -> list[HistogramDataPoint]:
    """Return the points of a histogram without labels of its own, whose buckets are cumulative."""
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    values = {each.name.rpartition("_")[2]: each.value for each in samples if "le" not in each.labels}
    buckets = sorted((float(each.labels["le"]), int(each.value)) for each in samples if "le" in each.labels)
    counts = [count - before for (_, count), (_, before) in zip(buckets, [(0.0, 0), *buckets], strict=False)]
    bounds = [bound for bound, _ in buckets if bound < math.inf]
    total = buckets[-1][1] if buckets else 0
    unknown: Any = None  # smallest and largest value stay unset
    point = HistogramDataPoint({}, started, now, total, values.get("sum", 0.0), counts, bounds, unknown, unknown)
    return [point] if buckets else []
