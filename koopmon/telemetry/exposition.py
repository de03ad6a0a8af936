"""Text exposition with cached sample names, because formatting labels dominates a scrape.

prometheus_client formats, escapes and sorts the labels of every sample at every scrape. Fifty runs of 48 layers have
27,000 samples, whose names and labels rarely change. This module formats each of them once with the library and stores
the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

Encoder = Callable[[Collector], bytes]
Key = tuple[str, ...]
PLAIN = frozenset({"gauge", "counter"})
"""Family types whose samples consist of a name, labels and a number. The library formats the few other families."""
_number: Callable[[float], str] = floatToGoString
MAX_FORMATS = 4
"""Maximum number of cached formats. One scraper uses one; the bound keeps other clients from filling the memory."""
EOF = "# EOF\n"


@dataclass(slots=True)
class _Family:
    """Cache of one family in one format: its heading, and the text before the number of each sample."""

    heading: str
    lines: dict[Key, str] = field(default_factory=dict)


class Exposition:
    """The text of `registry` in the format of prometheus_client.

    Concurrent calls of `render` are safe; calls for the same format may repeat work.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._formats: dict[str, dict[str, _Family]] = {}

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return body and content type for an `Accept` header."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # choose_encoder rejects some version parameters
            encode, content_type = choose_encoder("")
        known = self._formats.get(content_type, {})
        fresh: dict[str, _Family] = {}
        parts: list[str] = []
        for metric in self._registry.collect():
            if metric.type not in PLAIN:
                parts.append(_text(encode, metric))
                continue
            family = fresh[metric.name] = _updated(encode, metric, known.get(metric.name))
            parts.append(family.heading)
            lines = zip(family.lines.values(), metric.samples, strict=True)
            parts.extend(f"{line} {_number(sample.value)}\n" for line, sample in lines)
        self._keep(content_type, fresh)
        if "openmetrics" in content_type:
            parts.append(EOF)
        return "".join(parts).encode(), content_type

    def _keep(self, content_type: str, families: dict[str, _Family]) -> None:
        formats = {name: each for name, each in self._formats.items() if name != content_type}
        for oldest in list(formats)[: max(0, len(formats) - MAX_FORMATS + 1)]:
            del formats[oldest]
        self._formats = formats | {content_type: families}


def _updated(encode: Encoder, metric: Metric, known: _Family | None) -> _Family:
    """Return `known` updated to the current samples of `metric`, in their order."""
    keys = [(sample.name, *sample.labels.values()) for sample in metric.samples]
    if known is None:
        known = _Family(_text(encode, _like(metric, ())))
    elif list(known.lines) == keys:
        return known
    new = [sample for sample, key in zip(metric.samples, keys, strict=True) if key not in known.lines]
    written = _text(encode, _like(metric, new))[len(known.heading) :].split("\n")[:-1]
    lines = known.lines | {
        (sample.name, *sample.labels.values()): line.rpartition(" ")[0]
        for sample, line in zip(new, written, strict=True)
    }
    return _Family(known.heading, {key: lines[key] for key in keys})


def _like(metric: Metric, samples: Sequence[Sample]) -> Metric:
    """Copy the family of `metric` with other samples."""
    alike = Metric(metric.name, metric.documentation, metric.type, metric.unit)
    alike.samples = list(samples)
    return alike


def _text(encode: Encoder, metric: Metric) -> str:
    class One(Collector):
        def collect(self) -> Iterable[Metric]:
            return [metric]

    return encode(One()).decode().removesuffix(EOF)
