"""Byte by byte what prometheus_client writes, whatever changes between two scrapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from koopmon.telemetry.exposition import MAX_FORMATS, Exposition
from koopmon.telemetry.metrics import Metrics

FORMATS = [
    "",
    "text/plain;version=0.0.4",
    "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8",
    "text/plain;version=1.0.0;escaping=allow-utf-8",
]
runs = st.text(max_size=12)  # line breaks, quotes and backslashes among them
numbers = st.floats(allow_nan=False, allow_infinity=False)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("set"), runs, numbers),
        st.tuples(st.just("layer"), runs, numbers),
        st.tuples(st.just("begin"), runs, numbers),
        st.tuples(st.just("end"), runs, numbers),
    ),
    max_size=8,
)


def expected(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def change(metrics: Metrics, what: str, run: str, number: float) -> None:
    match what:
        case "set":
            metrics.set("risk", number, run)
        case "layer":
            metrics.set("near_unit_mass", number, run, "3")
        case "begin":
            metrics.begin_run(run)
        case "end":
            metrics.end_run(run)


@given(scrapes=st.lists(changes, min_size=1, max_size=4))
def test_every_scrape_is_the_library_s(scrapes: list[list[tuple[str, str, float]]]) -> None:
    registry = CollectorRegistry()
    metrics, exposition = Metrics(registry, {"version": "0"}), Exposition(registry)
    metrics.observe_duration(0.02)
    for each in scrapes:
        for what, run, number in each:
            change(metrics, what, run, number)
        for accept in FORMATS:
            assert exposition.render(accept) == expected(registry, accept)


def test_numbers_are_those_of_now() -> None:
    registry = CollectorRegistry()
    metrics, exposition = Metrics(registry, {}), Exposition(registry)
    metrics.set("risk", 0.375, "a")
    assert b'koopmon_risk{run="a"} 0.375\n' in exposition.render("")[0]
    metrics.set("risk", 0.5, "a")
    text = exposition.render("")[0]
    assert b'koopmon_risk{run="a"} 0.5\n' in text
    assert b"0.375" not in text
    metrics.end_run("a")
    assert b'run="a"' not in exposition.render("")[0]


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text;version=x", "nonsense/;;q=", "text/plain;version=9.9"]
)
def test_what_nobody_can_read_is_answered_with_text(accept: str) -> None:
    exposition = Exposition(CollectorRegistry())
    assert exposition.render(accept)[1].startswith("text/plain")


def test_formats_are_bounded_and_runs_that_went_are_forgotten() -> None:
    registry = CollectorRegistry()
    metrics, exposition = Metrics(registry, {}), Exposition(registry)
    for index in range(20):
        metrics.set("risk", 1.0, f"run-{index}")
        for accept in FORMATS:
            exposition.render(accept)
        metrics.end_run(f"run-{index}")
    assert len(exposition._formats) == MAX_FORMATS
    exposition.render("")
    assert all(not family["koopmon_risk"].lines for family in [exposition._formats[expected(registry, "")[1]]])
