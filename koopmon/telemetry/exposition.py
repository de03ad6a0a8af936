"""What a scrape is answered with: prometheus_client's own words, of which only the numbers are written anew each time.

The library formats, escapes and sorts the labels of every sample at every scrape. Fifty runs of 48 layers have 27,000
samples, whose names and labels hardly ever change: each is asked of the library once and kept.
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
"""Types of families whose samples are a name, labels and a number; others are few, and left to the library."""
_number: Callable[[float], str] = floatToGoString
MAX_FORMATS = 4
"""Kept at once: a scraper asks for one, and a stranger must not fill the memory with all there are."""
EOF = "# EOF\n"


@dataclass(slots=True)
class _Family:
    """Of one family in one format: the lines above it, and what stands before the number of each sample."""

    heading: str
    lines: dict[Key, str] = field(default_factory=dict)


class Exposition:
    """The text of `registry`, as prometheus_client writes it. For one thread at a time per format is enough: two that
    render at once do some work twice."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._formats: dict[str, dict[str, _Family]] = {}

    def render(self, accept: str) -> tuple[bytes, str]:
        """Body and content type for an `Accept` header."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # it cannot read every version that may be asked for
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
    """`known` with the samples that `metric` has now, in their order."""
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
    """The family of `metric` with other samples."""
    alike = Metric(metric.name, metric.documentation, metric.type, metric.unit)
    alike.samples = list(samples)
    return alike


def _text(encode: Encoder, metric: Metric) -> str:
    class One(Collector):
        def collect(self) -> Iterable[Metric]:
            return [metric]

    return encode(One()).decode().removesuffix(EOF)
