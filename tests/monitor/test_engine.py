"""Engine: newest snapshots, fair shares of the time, NaN before any decomposition, failures, and drops."""

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
        self.drops: list[tuple[str, str]] = []
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

    def finish(self, *snapshots: Snapshot) -> None:
        """Profile one snapshot after the other."""
        for snapshot in snapshots:
            self.submit(snapshot)
            assert self.engine.drain(WAIT_SECONDS)

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
    bench.finish(make_snapshot(states=states), make_snapshot(step=2))
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
        patch.setattr(engine_module, "profile_in_batches", fail)
        bench.finish(*map(make_snapshot, (1, 2, 3)))
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


def test_a_newer_snapshot_replaces_a_waiting_one(bench: Bench) -> None:
    """The first one of a run stays: it has the run's initial score."""
    bench.engine.max_waiting = 10
    bench.hold()
    for run, step in (("a", 1), ("b", 2), ("b", 3), ("b", 4), ("b", 5), ("c", 6)):
        bench.submit(make_snapshot(step=step, run=run))
    assert bench.drops == [("b", "superseded")] * 2
    assert bench.engine.queue_length == 4
    bench.gate.set()
    assert bench.engine.drain(WAIT_SECONDS)
    assert sorted((result.snapshot.run, result.snapshot.step) for result in bench.results[1:]) == [
        ("a", 1),
        ("b", 2),
        ("b", 5),
        ("c", 6),
    ]


def test_under_a_steady_overload_only_the_newest_is_profiled(bench: Bench) -> None:
    """Two snapshots arrive during each profile."""
    bench.hold()
    bench.submit(make_snapshot(step=0))
    for step in range(1, 11):
        bench.gate.clear()
        bench.submit(make_snapshot(step=2 * step - 1))
        bench.submit(make_snapshot(step=2 * step))
        profiled = len(bench.results)
        bench.gate.set()
        deadline = time.monotonic() + WAIT_SECONDS
        while len(bench.results) == profiled:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert bench.engine.drain(WAIT_SECONDS)
    steps = [result.snapshot.step for result in bench.results if result.snapshot.run == "job"]
    assert steps == sorted(steps)
    assert steps[-1] == 20
    assert ("job", "superseded") in bench.drops


def test_bytes_are_bounded_too_but_one_snapshot_always_fits() -> None:
    size = make_snapshot().num_bytes
    bench = Bench(max_waiting=100, max_bytes=2 * size)
    bench.hold()
    for run in "abcd":
        bench.submit(make_snapshot(run=run))
    assert [reason for _, reason in bench.drops] == ["engine_queue_full"] * 2
    assert bench.engine.queue_length == 2
    bench.gate.set()
    bench.engine.close()
    tight = Bench(max_bytes=1)
    tight.submit(make_snapshot())
    assert tight.engine.drain(WAIT_SECONDS)
    assert len(tight.results) == 1
    tight.engine.close()


class Parts:
    """A stand-in for `profile_in_batches`: a snapshot of width D takes D batches, and each takes `seconds`.

    `order` has the width of each batch, in the order of computing; `gate` holds the next batch.
    """

    def __init__(self, patch: pytest.MonkeyPatch, engine: Engine) -> None:
        self.order: list[int] = []
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.clock = 0.0
        self.profile = profile_states(make_snapshot().states(), svd_rank=4, kreiss="never")
        assert engine.drain(WAIT_SECONDS)
        patch.setattr(engine_module, "profile_in_batches", self)
        patch.setattr(engine_module.time, "perf_counter", lambda: self.clock)

    def __call__(self, states: torch.Tensor, **_: Any) -> Iterator[None]:
        width = states.shape[-1]
        for index in range(width):
            self.entered.release()
            assert self.gate.wait(WAIT_SECONDS)
            self.order.append(width)
            self.clock += 1.0
            if index < width - 1:
                yield
        return self.profile


def wide(width: int, run: str, step: int = 1) -> Snapshot:
    return make_snapshot(step=step, run=run, states=torch.zeros((3, 40, width)))


def test_a_large_snapshot_does_not_hold_up_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, bench.engine)
    bench.submit(wide(50, "large"))
    assert parts.entered.acquire(timeout=WAIT_SECONDS)
    for run, width in (("a", 1), ("b", 2), ("c", 3)):
        bench.submit(wide(width, run))
    parts.gate.set()
    assert bench.engine.drain(WAIT_SECONDS)
    assert [result.snapshot.run for result in bench.results] == ["a", "b", "c", "large"]
    assert max(parts.order.index(width) for width in (1, 2, 3)) <= 4
    assert bench.results[-1].seconds == 50.0, "its own batches, without those of the others"


def test_runs_share_the_time_and_not_the_snapshots(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of small snapshots has its turn after each of its snapshots, however many the flooding runs have sent."""
    parts = Parts(monkeypatch, bench.engine)
    parts.gate.set()
    bench.engine.max_waiting = 100
    bench.hold()
    for run in "abcdef":
        bench.submit(wide(20, run))
    bench.submit(wide(1, "honest", step=1))
    bench.gate.set()
    assert bench.engine.drain(WAIT_SECONDS)
    assert [result.snapshot.run for result in bench.results][1] == "honest"
    assert [result.seconds for result in bench.results][2:] == [20.0] * 6


def test_a_full_queue_drops_the_run_that_used_the_most_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, bench.engine)
    parts.gate.set()
    bench.finish(wide(1, "small"))
    bench.hold()  # eight seconds
    bench.submit(wide(9, "held", step=2))
    for run in ("small", "new", "newer"):
        bench.submit(wide(1, run, step=2))
    assert bench.drops == [("held", "engine_queue_full")]


def test_full_memory_costs_the_largest_snapshots_and_no_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are new have used no time, however large their snapshots are."""
    bench = Bench(max_waiting=100, max_bytes=3 * wide(9, "").num_bytes)
    parts = Parts(monkeypatch, bench.engine)
    parts.gate.set()
    bench.finish(wide(1, "honest"))
    bench.hold()
    bench.submit(wide(1, "honest", step=2))
    for number in range(6):
        bench.submit(wide(9, f"large-{number}"))
    assert {run for run, _ in bench.drops} == {f"large-{number}" for number in range(4)}
    bench.gate.set()
    bench.engine.close()


def test_time_without_work_earns_no_credit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins late does not displace the others until it has caught up with hours of their work."""
    parts = Parts(monkeypatch, bench.engine)
    parts.gate.set()
    for step in range(30):
        bench.finish(wide(10, "old", step=step))
    parts.gate.clear()
    while parts.entered.acquire(blocking=False):
        pass
    bench.submit(wide(3, "late"))
    assert parts.entered.acquire(timeout=WAIT_SECONDS)
    bench.submit(wide(5, "old", step=31))
    parts.order.clear()
    parts.gate.set()
    assert bench.engine.drain(WAIT_SECONDS)
    assert parts.order.index(5) <= 3, "not after all of the late run's work"


def test_a_stop_waits_for_the_current_batch_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(monkeypatch, bench.engine)
    bench.submit(wide(1000, "large"))
    assert parts.entered.acquire(timeout=WAIT_SECONDS)
    assert not bench.engine.close(timeout_seconds=0.01), "it computes"
    parts.gate.set()
    assert bench.engine.close(timeout_seconds=WAIT_SECONDS)
    assert (len(parts.order), bench.results) == (1, [])


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
        bench.finish(*map(make_snapshot, (1, 2)))
    assert [result.profile is not None for result in bench.results] == [True, True]
    assert caplog.text.count("going on on the CPU") == 1
