"""Engine: profiles in order, detection of NaN before any decomposition, survival of failures, and drops."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from koopmon.monitor import engine as engine_module
from koopmon.monitor.assembler import Snapshot
from koopmon.monitor.engine import Engine, Result
from koopmon.spectral import profile_states
from koopmon.wire.messages import TrainingStep

WAIT_SECONDS = 60.0


def make_snapshot(step: int = 1, run: str = "job", states: torch.Tensor | None = None) -> Snapshot:
    if states is None:
        states = torch.cumsum(torch.randn((3, 40, 8), generator=torch.Generator().manual_seed(step)), dim=0)
    return Snapshot(
        run=run,
        incarnation="aaaaaaaa",
        training=TrainingStep(step=step),
        blocks=tuple((point[:10], point[10:]) for point in states),
        masked=False,
        num_shards=2,
    )


class Bench:
    """An engine with recorded results; `gate` blocks the worker before it delivers a result."""

    def __init__(self, **options: Any) -> None:
        self.results: list[Result] = []
        self.drops: list[str] = []
        self.failures: list[tuple[str, Exception]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.engine = Engine(
            **{
                "device": "cpu",
                "svd_rank": 4,
                "max_waiting": 3,
                "max_bytes": 1 << 30,
                "on_result": self._take,
                "on_failure": lambda run, error: self.failures.append((run, error)),
                **options,
            }
        )

    def submit(self, snapshot: Snapshot, *, wait: bool = False) -> None:
        self.drops += self.engine.submit(snapshot, wait=wait)

    def _take(self, result: Result) -> None:
        assert self.gate.wait(WAIT_SECONDS)
        self.results.append(result)

    def hold(self) -> None:
        """Let the worker take one snapshot and keep it there."""
        self.gate.clear()
        self.submit(make_snapshot(step=0, run="held"))
        deadline = time.monotonic() + WAIT_SECONDS
        while self.engine.queue_length:
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.gate.set()
    bench.engine.close()


def test_profiles_equal_those_of_the_spectral_core(bench: Bench) -> None:
    snapshot = make_snapshot()
    bench.submit(snapshot)
    assert bench.engine.drain(WAIT_SECONDS)
    (result,) = bench.results
    expected = profile_states(snapshot.states(), svd_rank=4, kreiss="never")
    assert result.profile is not None
    assert (result.failed, result.non_finite) == (False, False)
    assert result.snapshot.step == 1
    assert result.snapshot.blocks == (), "results do not hold on to states"
    for layer, other in zip(result.profile.layers, expected.layers, strict=True):
        assert torch.allclose(layer.eigenvalues, other.eigenvalues)
        assert layer.kreiss_constant is None, "it costs more than the rest, and no decision uses it"


def test_a_result_that_cannot_be_handed_over_costs_that_snapshot_alone(bench: Bench) -> None:
    """All runs share the worker."""
    real, bench.engine.on_result = bench.engine.on_result, lambda _: 1 / 0  # type: ignore[assignment,return-value]
    bench.submit(make_snapshot(run="bad"))
    assert bench.engine.drain(WAIT_SECONDS)
    bench.engine.on_result = real
    bench.submit(make_snapshot(run="good"))
    assert bench.engine.drain(WAIT_SECONDS)
    assert [result.snapshot.run for result in bench.results] == ["good"]
    ((run, error),) = bench.failures
    assert (run, type(error)) == ("bad", ZeroDivisionError)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_states_that_are_not_finite_are_a_result(bench: Bench, bad: float) -> None:
    states = torch.randn((3, 40, 8))
    states[1, 7, 3] = bad
    bench.submit(make_snapshot(states=states))
    bench.submit(make_snapshot(step=2))
    assert bench.engine.drain(WAIT_SECONDS)
    results = bench.results
    assert [(result.non_finite, result.profile is None, result.failed) for result in results] == [
        (True, True, False),
        (False, False, False),
    ]


def test_an_exception_is_a_result_and_the_worker_lives_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("on purpose")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        assert bench.engine.drain(WAIT_SECONDS)
        patch.setattr(engine_module, "profile_states", fail)
        for step in (1, 2, 3):
            bench.submit(make_snapshot(step=step))
        assert bench.engine.drain(WAIT_SECONDS)
    assert [result.failed for result in bench.results] == [True] * 3
    assert len(caplog.records) == 1, "a failure that repeats is logged once a minute"
    assert "on purpose" in caplog.text
    bench.submit(make_snapshot(step=4))
    assert bench.engine.drain(WAIT_SECONDS)
    assert bench.results[-1].profile is not None


def test_states_too_small_to_analyse_do_no_harm(bench: Bench) -> None:
    bench.submit(make_snapshot(states=torch.zeros((2, 12, 3))))
    assert bench.engine.drain(WAIT_SECONDS)
    (result,) = bench.results
    assert result.failed or (result.profile is not None and not result.profile.informative)


def test_the_oldest_of_the_run_with_most_gives_way(bench: Bench) -> None:
    bench.hold()
    for run, step in (("a", 1), ("b", 2), ("b", 3), ("b", 4), ("c", 5)):
        bench.submit(make_snapshot(step=step, run=run))
    assert bench.drops == ["b", "b"]
    assert bench.engine.queue_length == 3
    bench.gate.set()
    assert bench.engine.drain(WAIT_SECONDS)
    assert [(result.snapshot.run, result.snapshot.step) for result in bench.results][1:] == [
        ("a", 1),
        ("b", 4),
        ("c", 5),
    ]


def test_bytes_are_bounded_too_but_one_snapshot_always_fits() -> None:
    size = make_snapshot().num_bytes
    bench = Bench(max_waiting=100, max_bytes=2 * size)
    bench.hold()
    for step in range(1, 5):
        bench.submit(make_snapshot(step=step))
    assert (bench.drops, bench.engine.queue_length) == (["job", "job"], 2)
    bench.gate.set()
    bench.engine.close()
    tight = Bench(max_bytes=1)
    tight.submit(make_snapshot())
    assert tight.engine.drain(WAIT_SECONDS)
    assert len(tight.results) == 1
    tight.engine.close()


def test_with_wait_nothing_gives_way(bench: Bench) -> None:
    bench.hold()

    def submit() -> None:
        for step in range(1, 8):
            bench.submit(make_snapshot(step=step), wait=True)

    thread = threading.Thread(target=submit)
    thread.start()
    bench.gate.set()
    thread.join(WAIT_SECONDS)
    assert bench.engine.drain(WAIT_SECONDS)
    assert bench.drops == []
    assert [result.snapshot.step for result in bench.results] == list(range(8))


def test_drain_tells_when_it_is_not_done(bench: Bench) -> None:
    bench.hold()
    assert not bench.engine.drain(0.01)


def test_a_device_that_fails_is_given_up_for_the_cpu(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The meta device can allocate but not compute: it simulates a failing accelerator.
    monkeypatch.setattr(engine_module, "choose_device", lambda _: torch.device("meta"))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            bench.submit(make_snapshot(step=step))
        assert bench.engine.drain(WAIT_SECONDS)
    assert [result.profile is not None for result in bench.results] == [True, True]
    assert caplog.text.count("going on on the CPU") == 1
