"""Assembly of shards in any order, within bounds on memory and time."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from koopmon.errors import ProtocolError
from koopmon.monitor.assembler import SHARD_OVERHEAD_BYTES, Assembler, Snapshot
from koopmon.wire.messages import Shard, TrainingStep
from tests.factories import gathered

WIDTH = 4
INCARNATION = "0123456789abcdef"
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def make_shard(
    rank: int = 0,
    *,
    num_senders: int = 1,
    step: int = 1,
    points: int = 3,
    rows: int = 2,
    dtype: torch.dtype = torch.float32,
    states: Tensor | None = None,
    **fields: Any,
) -> tuple[Shard, list[Tensor]]:
    """Build a shard whose values encode rank, point, row and column."""
    if states is None:
        states = torch.arange(points * rows * WIDTH).reshape(points, rows, WIDTH).to(dtype) + 100 * rank
    shard = Shard(
        run=fields.pop("run", "job"),
        incarnation=fields.pop("incarnation", INCARNATION),
        process_rank=rank,
        num_senders=num_senders,
        first_point=fields.pop("first_point", 0),
        num_points=states.shape[0],
        num_samples=states.shape[1],
        width=fields.pop("width", WIDTH),
        dtype=DTYPES[states.dtype],
        **gathered({"step": step, **fields}),
    )
    return shard, list(states)


class Bench:
    """An assembler with a list of its drops."""

    def __init__(self, *, max_bytes: int = 1 << 20, min_samples: int = 1, timeout: float = 5.0) -> None:
        self.drops: list[tuple[str, str]] = []
        self.failures: list[tuple[str, Exception]] = []
        self.assembler = Assembler(
            timeout_seconds=timeout,
            max_bytes=max_bytes,
            min_samples=min_samples,
            on_drop=lambda run, reason: self.drops.append((run, reason)),
            on_failure=lambda run, error: self.failures.append((run, error)),
        )

    def add(self, shard: tuple[Shard, list[Tensor]], now: float = 0.0) -> list[Snapshot]:
        return self.assembler.add(now, *shard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_sender_makes_a_snapshot_at_once(dtype: torch.dtype) -> None:
    shard, states = make_shard(dtype=dtype, learning_rate=0.1, loss=2.0, lr_scale=0.5, kss_alpha=0.2, masked=True)
    (snapshot,) = Bench().add((shard, states))
    assert snapshot.states().dtype == torch.float32
    assert torch.equal(snapshot.states(), torch.stack(states).float())
    assert snapshot.states().shape == (3, 2, WIDTH)
    assert snapshot.training == TrainingStep(step=1, learning_rate=0.1, loss=2.0, lr_scale=0.5, kss_alpha=0.2)
    assert (snapshot.masked, snapshot.num_shards) == (True, 1)


@given(data=st.data(), num_senders=st.integers(1, 6))
def test_any_order_any_duplicates_any_loss(data: st.DataObject, num_senders: int) -> None:
    """Any order of shards gives the same snapshot, or a counted drop with too few of them; nothing remains."""
    shards = [make_shard(rank, num_senders=num_senders, rows=1 + rank, loss=float(rank)) for rank in range(num_senders)]
    arrivals = data.draw(st.lists(st.integers(0, num_senders - 1), max_size=3 * num_senders))
    bench = Bench()
    snapshots: list[Snapshot] = []
    refused = 0
    for now, rank in enumerate(arrivals):
        expected = "late" if snapshots else "duplicate"
        if snapshots or rank in arrivals[:now]:
            with pytest.raises(ProtocolError) as caught:
                bench.add(shards[rank])
            assert caught.value.reason == expected
            refused += 1
        else:
            snapshots += bench.add(shards[rank], now=float(now) / 100)
    snapshots += bench.assembler.expire(1000.0)
    came = sorted(set(arrivals))
    usable = 2 * len(came) >= num_senders
    assert len(snapshots) == (1 if came and usable else 0)
    assert bench.drops == ([("job", "incomplete")] if came and not usable else [])
    assert refused == len(arrivals) - len(came)
    assert bench.assembler.num_bytes == 0
    if snapshots:
        joined = torch.cat([torch.stack(shards[rank][1]) for rank in came], dim=1)
        assert torch.equal(snapshots[0].states(), joined)
        assert snapshots[0].training.loss == pytest.approx(sum(came) / len(came))
        assert snapshots[0].num_shards == len(came)


@given(
    arrivals=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 3), st.integers(1, 40)), max_size=60
    ),
    max_bytes=st.integers(1000, 8000),
)
def test_memory_stays_within_its_bound(arrivals: list[tuple[str, int, int, int]], max_bytes: int) -> None:
    bench = Bench(max_bytes=max_bytes)
    num_snapshots = 0
    accepted = set()
    for now, (run, step, rank, rows) in enumerate(arrivals):
        try:
            num_snapshots += len(bench.add(make_shard(rank, run=run, step=step, num_senders=3, rows=rows), float(now)))
        except ProtocolError:
            continue
        accepted.add((run, step))
        assert 0 <= bench.assembler.num_bytes <= max_bytes
    num_snapshots += len(bench.assembler.flush())
    assert bench.assembler.num_bytes == 0
    assert num_snapshots + len(bench.drops) == len(accepted)


@given(
    rows=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    values=st.lists(st.tuples(st.none() | st.floats(0, 5), st.none() | st.floats(0, 5)), min_size=4, max_size=4),
)
def test_observables_are_means_weighed_by_samples(
    rows: list[int], values: list[tuple[float | None, float | None]]
) -> None:
    """Compare with numpy's weighted average; a value that no rank has stays unknown."""
    bench = Bench()
    for rank, count in enumerate(rows):
        seen = {"load_imbalance": list(values[rank])}
        snapshots = bench.add(make_shard(rank, num_senders=len(rows), rows=count, observables=seen))
    (found,) = snapshots[0].observables.values()
    for layer in range(2):
        known = [(values[rank][layer], count) for rank, count in enumerate(rows) if values[rank][layer] is not None]
        if not known:
            assert found[layer] is None
        else:
            seen_values, weights = zip(*known, strict=True)
            assert found[layer] == pytest.approx(np.average(seen_values, weights=weights))


def test_at_most_eight_observables_are_kept_whatever_the_ranks_call_them() -> None:
    bench = Bench()
    for rank in range(3):
        named = {f"rank{rank}_{index}": [1.0, 2.0] for index in range(8)}
        snapshots = bench.add(make_shard(rank, num_senders=3, observables=named))
    assert len(snapshots[0].observables) == 8


def test_oldest_gives_way_when_memory_is_full() -> None:
    size = 3 * 2 * WIDTH * 4 + SHARD_OVERHEAD_BYTES
    bench = Bench(max_bytes=2 * size)
    for step in (1, 2, 3):
        assert bench.add(make_shard(0, num_senders=2, step=step)) == []
    assert bench.drops == [("job", "assembler_full")]
    assert [snapshot.step for snapshot in bench.add(make_shard(1, num_senders=2, step=2))] == [2]


@pytest.mark.parametrize("rows", [2, 40])
def test_a_run_that_fills_the_memory_takes_none_of_another(rows: int) -> None:
    """Many small steps, or few large ones, that never get their other shards."""
    bench = Bench(max_bytes=1 << 16)
    bench.add(make_shard(0, num_senders=2, step=1))
    for step in range(200):
        bench.add(make_shard(0, run="greedy", num_senders=2, step=step, rows=rows))
    assert {run for run, _ in bench.drops} == {"greedy"}
    assert bench.assembler.num_bytes <= 1 << 16
    assert [snapshot.step for snapshot in bench.add(make_shard(1, num_senders=2, step=1))] == [1]


def test_a_shard_larger_than_all_memory_is_dropped() -> None:
    bench = Bench(max_bytes=SHARD_OVERHEAD_BYTES)
    assert bench.add(make_shard(num_senders=2)) == []
    assert bench.drops == [("job", "assembler_full")]
    assert bench.assembler.num_bytes == 0


def test_a_complete_step_closes_the_earlier_ones_in_order() -> None:
    bench = Bench()
    bench.add(make_shard(0, num_senders=3, step=1))
    bench.add(make_shard(0, num_senders=3, step=2))
    bench.add(make_shard(1, num_senders=3, step=2))
    bench.add(make_shard(0, num_senders=3, step=3))
    bench.add(make_shard(1, num_senders=3, step=3))
    snapshots = bench.add(make_shard(2, num_senders=3, step=3))
    assert [(snapshot.step, snapshot.num_shards) for snapshot in snapshots] == [(2, 2), (3, 3)]
    assert bench.drops == [("job", "incomplete")]
    with pytest.raises(ProtocolError, match="closed") as caught:
        bench.add(make_shard(2, num_senders=3, step=2))
    assert caught.value.reason == "late"


def test_other_runs_and_incarnations_are_left_alone() -> None:
    bench = Bench()
    bench.add(make_shard(0, num_senders=2, step=1, run="other"))
    bench.add(make_shard(0, num_senders=2, step=1, incarnation="fedcba98"))
    assert len(bench.add(make_shard(0, step=9))) == 1
    assert len(bench.add(make_shard(1, num_senders=2, step=1, run="other"))) == 1
    bench.assembler.forget("job", "fedcba98")
    assert bench.assembler.num_bytes == 0
    assert bench.drops == []


def test_time_out_waits_its_time() -> None:
    bench = Bench(timeout=5.0)
    bench.add(make_shard(0, num_senders=2, step=1), now=10.0)
    assert bench.assembler.next_deadline() == 15.0
    assert bench.assembler.expire(14.9) == []
    assert [snapshot.num_shards for snapshot in bench.assembler.expire(15.0)] == [1]
    assert bench.assembler.next_deadline() == math.inf


def test_too_few_rows_are_no_snapshot() -> None:
    bench = Bench(min_samples=3)
    bench.add(make_shard(0, num_senders=2, rows=2))
    assert bench.assembler.flush() == []
    assert bench.drops == [("job", "incomplete")]


@pytest.mark.parametrize(
    "changes",
    [{"num_senders": 3}, {"width": WIDTH + 1}, {"points": 4}, {"last_stage": False}],
)
def test_shards_that_contradict_each_other(changes: dict[str, Any]) -> None:
    bench = Bench()
    bench.add(make_shard(0, num_senders=2))
    with pytest.raises(ProtocolError) as caught:
        bench.add(make_shard(1, **{"num_senders": 2, **changes}))
    assert caught.value.reason == "inconsistent"


def stages(*spans: tuple[int, int], rows: int = 2) -> list[tuple[Shard, list[Tensor]]]:
    """One rank for each pipeline stage (first point, points) of one stack."""
    whole = torch.randn((max(first + count for first, count in spans), rows, WIDTH))
    return [
        make_shard(
            rank,
            num_senders=len(spans),
            states=whole[first : first + count],
            first_point=first,
            last_stage=rank == len(spans) - 1,
        )
        for rank, (first, count) in enumerate(spans)
    ]


@pytest.mark.parametrize("spans", [((0, 3), (2, 3)), ((0, 3), (3, 2)), ((0, 2), (1, 2), (2, 3))])
def test_pipeline_stages_join(spans: tuple[tuple[int, int], ...]) -> None:
    bench = Bench()
    shards = stages(*spans)
    snapshots = [snapshot for shard in reversed(shards) for snapshot in bench.add(shard)]
    expected = {shard.first_point + p: state for shard, states in shards for p, state in enumerate(states)}
    assert torch.equal(snapshots[0].states(), torch.stack([expected[point] for point in sorted(expected)]))


@pytest.mark.parametrize("spans", [((0, 6),), ((0, 2), (2, 4))])
def test_pairs_of_states_join_and_have_one_value_for_each_block(spans: tuple[tuple[int, int], ...]) -> None:
    bench = Bench()
    snapshots = []
    for shard, states in stages(*spans):
        seen = {"load_imbalance": [float(shard.first_point + 2 * layer) for layer in range(shard.num_points // 2)]}
        paired = msgspec.structs.replace(shard, paired=True, observables=seen)
        snapshots += bench.add((paired, states))
    (snapshot,) = snapshots
    assert (snapshot.paired, len(snapshot.blocks)) == (True, 6)
    assert snapshot.observables == {"load_imbalance": (0.0, 2.0, 4.0)}


def test_a_shard_of_pairs_among_chains_is_refused() -> None:
    bench = Bench()
    bench.add(make_shard(0, num_senders=2, points=4))
    shard, states = make_shard(1, num_senders=2, points=4)
    with pytest.raises(ProtocolError, match="paired True, others said False"):
        bench.assembler.add(0.0, msgspec.structs.replace(shard, paired=True), states)


def test_stages_of_several_replicas_keep_their_rows_together() -> None:
    first, second = stages((0, 3), (2, 3)), stages((0, 3), (2, 3), rows=5)
    bench = Bench()
    ranks = [(0, first[0]), (1, second[0]), (2, first[1]), (3, second[1])]
    shards = [(torch_shard(shard, rank, 4), states) for rank, (shard, states) in ranks]
    snapshots = [snapshot for shard in (shards[3], shards[0], shards[2], shards[1]) for snapshot in bench.add(shard)]
    assert snapshots[0].states().shape[1] == 7
    assert torch.equal(snapshots[0].states()[4], torch.cat([first[1][1][2], second[1][1][2]]))


def torch_shard(shard: Shard, rank: int, num_senders: int) -> Shard:
    return msgspec.structs.replace(shard, process_rank=rank, num_senders=num_senders)


@pytest.mark.parametrize("missing", ["gap", "first", "last", "boundary", "rows"])
def test_stages_that_do_not_fit_are_dropped(missing: str) -> None:
    shards = {
        "gap": stages((0, 2), (3, 2)),
        "first": stages((1, 2), (3, 2)),
        "last": stages((0, 3), (2, 3))[:1],
        "boundary": [stages((0, 3), (2, 3))[0], stages((0, 3), (2, 3))[1]],
        "rows": [stages((0, 3), (3, 2))[0], stages((0, 3), (3, 2), rows=3)[1]],
    }[missing]
    bench = Bench()
    snapshots = [snapshot for shard in shards for snapshot in bench.add(shard)] + bench.assembler.flush()
    assert snapshots == []
    assert bench.drops == [("job", "incomplete")]


def test_a_boundary_of_nans_equals_itself() -> None:
    shards = stages((0, 3), (2, 3))
    for _, states in shards:
        for state in states:
            state.fill_(math.nan)
    bench = Bench()
    assert len([snapshot for shard in shards for snapshot in bench.add(shard)]) == 1


def test_a_single_point_has_no_transition() -> None:
    bench = Bench()
    assert bench.add(make_shard(points=1)) == []
    assert bench.drops == [("job", "incomplete")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_rank_with_a_loss_that_is_not_finite_shows(bad: float) -> None:
    bench = Bench()
    bench.add(make_shard(0, num_senders=2, loss=1.0))
    (snapshot,) = bench.add(make_shard(1, num_senders=2, loss=bad))
    assert snapshot.training.loss is not None
    assert math.isnan(snapshot.training.loss)


def test_without_states_is_light() -> None:
    (snapshot,) = Bench().add(make_shard())
    assert snapshot.num_bytes == 3 * 2 * WIDTH * 4
    assert snapshot.without_states().num_bytes == 0
    assert snapshot.without_states().step == snapshot.step


def test_the_scalars_of_several_ranks() -> None:
    """The largest rate, means of loss and gradient norm, the settings of the lowest rank, and no padding."""
    bench = Bench()
    bench.add(make_shard(2, num_senders=3, learning_rate=0.1, loss=1.0, grad_norm=8.0, lr_scale=0.25, kss_alpha=0.3))
    bench.add(make_shard(0, num_senders=3, learning_rate=0.3, loss=3.0, lr_scale=0.5, kss_alpha=0.1, masked=True))
    (found,) = bench.add(make_shard(1, num_senders=3, learning_rate=0.2, loss=5.0, grad_norm=2.0, masked=True))
    assert (found.training.learning_rate, found.training.loss, found.training.grad_norm) == (0.3, 3.0, 5.0)
    assert (found.training.lr_scale, found.training.kss_alpha, found.masked, found.num_shards) == (0.5, 0.1, False, 3)


def test_ranks_without_a_rate_know_none() -> None:
    bench = Bench()
    bench.add(make_shard(0, num_senders=2))
    (found,) = bench.add(make_shard(1, num_senders=2, masked=True))
    assert (found.training.learning_rate, found.training.loss, found.training.grad_norm, found.masked) == (
        None,
        None,
        None,
        False,
    )


def test_memory_is_counted_with_the_overhead_of_each_shard() -> None:
    bench = Bench()
    size = 3 * 2 * WIDTH * 4 + SHARD_OVERHEAD_BYTES
    bench.add(make_shard(0, num_senders=3, step=1))
    bench.add(make_shard(1, num_senders=3, step=1))
    bench.add(make_shard(0, num_senders=3, step=2))
    assert bench.assembler.num_bytes == 3 * size
    bench.assembler.forget("job", INCARNATION)
    assert bench.assembler.num_bytes == 0
    assert SHARD_OVERHEAD_BYTES == 1024


def test_what_fits_exactly_is_kept() -> None:
    size = 3 * 2 * WIDTH * 4 + SHARD_OVERHEAD_BYTES
    bench = Bench(max_bytes=2 * size)
    bench.add(make_shard(0, num_senders=3, step=1))
    bench.add(make_shard(1, num_senders=3, step=1))
    assert bench.drops == []
    bench.add(make_shard(0, num_senders=3, step=2))
    assert bench.drops == [("job", "assembler_full")]
    with pytest.raises(ProtocolError, match="closed"):
        bench.add(make_shard(2, num_senders=3, step=1))


def test_the_step_that_needs_the_room_gives_way_last() -> None:
    """Dropped steps count as closed in their own run only, also when an earlier step is dropped after a later one."""
    size = 3 * 2 * WIDTH * 4 + SHARD_OVERHEAD_BYTES
    bench = Bench(max_bytes=2 * size)
    bench.add(make_shard(0, num_senders=3, step=7))
    bench.add(make_shard(0, num_senders=3, step=3))
    bench.add(make_shard(0, num_senders=3, step=8))
    assert bench.drops == [("job", "assembler_full")], "step 7 came first"
    bench.add(make_shard(0, num_senders=3, step=9))
    assert len(bench.drops) == 2, "step 3 came next"
    with pytest.raises(ProtocolError, match="closed"):
        bench.add(make_shard(0, num_senders=3, step=7))
    assert bench.add(make_shard(0, run="other", step=1)) != []


def test_a_step_that_does_not_fit_by_itself_is_dropped_with_all_that_it_held() -> None:
    size = 3 * 2 * WIDTH * 4 + SHARD_OVERHEAD_BYTES
    bench = Bench(max_bytes=2 * size)
    bench.add(make_shard(0, num_senders=4))
    bench.add(make_shard(1, num_senders=4))
    assert bench.add(make_shard(2, num_senders=4)) == []
    assert bench.drops == [("job", "assembler_full")]
    assert bench.assembler.num_bytes == 0


def test_the_shard_that_completes_a_step_needs_no_room() -> None:
    size = 3 * 2 * WIDTH * 4 + SHARD_OVERHEAD_BYTES
    bench = Bench(max_bytes=size)
    bench.add(make_shard(0, num_senders=2))
    assert len(bench.add(make_shard(1, num_senders=2))) == 1
    assert bench.drops == []


@pytest.mark.parametrize(("came", "usable"), [(1, False), (2, True), (3, True)])
def test_half_of_the_shards_are_enough(came: int, usable: bool) -> None:
    bench = Bench()
    for rank in range(came):
        bench.add(make_shard(rank, num_senders=4))
    assert bool(bench.assembler.flush()) is usable


@pytest.mark.parametrize(("min_samples", "usable"), [(4, True), (5, False)])
def test_rows_of_an_incomplete_snapshot_are_counted_over_its_shards(min_samples: int, usable: bool) -> None:
    bench = Bench(min_samples=min_samples)
    for rank in range(2):
        bench.add(make_shard(rank, num_senders=3, rows=2))
    assert bool(bench.assembler.flush()) is usable
    complete = Bench(min_samples=100)
    assert complete.add(make_shard(rows=1)), "what is complete is used as it is"


def test_a_deadline_is_that_of_the_oldest_step() -> None:
    bench = Bench(timeout=5.0)
    bench.add(make_shard(0, num_senders=2, step=1), now=12.0)
    bench.add(make_shard(0, num_senders=2, step=2, run="other"), now=10.0)
    bench.add(make_shard(1, num_senders=3, step=3), now=11.0)
    assert bench.assembler.next_deadline() == 15.0
    assert [found.run for found in bench.assembler.expire(15.0)] == ["other"]
    assert bench.assembler.next_deadline() == 16.0


def test_a_step_at_its_time_closes_itself_and_leaves_earlier_ones_open() -> None:
    bench = Bench(timeout=5.0)
    bench.add(make_shard(0, num_senders=2, step=5), now=0.0)
    bench.add(make_shard(0, num_senders=2, step=4), now=3.0)
    assert [found.step for found in bench.assembler.expire(5.0)] == [5]
    assert [found.step for found in bench.assembler.expire(8.0)] == [4]
    with pytest.raises(ProtocolError, match="closed"):
        bench.add(make_shard(0, num_senders=2, step=5), now=9.0)


def test_a_later_step_stays_open_when_an_earlier_one_is_complete() -> None:
    bench = Bench()
    bench.add(make_shard(0, num_senders=2, step=2))
    bench.add(make_shard(0, num_senders=2, step=1))
    assert [found.step for found in bench.add(make_shard(1, num_senders=2, step=1))] == [1]
    assert [found.step for found in bench.add(make_shard(1, num_senders=2, step=2))] == [2]


def test_step_zero_is_a_step() -> None:
    bench = Bench()
    assert [found.step for found in bench.add(make_shard(step=0))] == [0]


def test_an_incarnation_that_was_forgotten_may_begin_again() -> None:
    bench = Bench()
    bench.add(make_shard(step=5))
    bench.assembler.forget("job", INCARNATION)
    assert len(bench.add(make_shard(step=1))) == 1


def test_a_snapshot_whose_assembly_fails_harms_no_other() -> None:
    bench = Bench()
    broken = make_shard(0, num_senders=2, step=1)
    bench.add(broken)
    broken[1].clear()  # the header has three points
    bench.add(make_shard(0, num_senders=2, step=2, run="other"))
    bench.add(make_shard(1, num_senders=2, step=1))
    assert [run for run, _ in bench.failures] == ["job"]
    assert [found.run for found in bench.assembler.flush()] == ["other"]
    assert bench.assembler.num_bytes == 0


def joined(*shards: tuple[Shard, list[Tensor]]) -> list[Snapshot]:
    bench = Bench()
    return [snapshot for shard in shards for snapshot in bench.add(shard)] + bench.assembler.flush()


def test_a_shared_point_that_differs_joins_nothing() -> None:
    first, second = stages((0, 3), (2, 3))
    assert len(joined(first, second)) == 1
    first, second = stages((0, 3), (2, 3))
    second[1][0] = second[1][0] + 1e-6
    assert joined(first, second) == []


def test_a_shared_point_of_another_precision_joins_nothing() -> None:
    first, second = stages((0, 3), (2, 3))
    second[1][0] = second[1][0].to(torch.float64)
    assert joined(first, second) == []


def test_nothing_follows_the_last_stage() -> None:
    shards = stages((0, 2), (1, 2), (2, 2))
    early = [
        (msgspec.structs.replace(shard, last_stage=rank >= 1), states) for rank, (shard, states) in enumerate(shards)
    ]
    assert len(joined(*shards)) == 1
    assert joined(*early) == []


def test_a_stack_without_its_last_stage_is_no_snapshot() -> None:
    shards = stages((0, 3), (2, 3))
    assert joined(*[(msgspec.structs.replace(shard, last_stage=False), states) for shard, states in shards]) == []


def test_stages_without_a_shared_point_need_all_ranks() -> None:
    """Two replicas of two stages. Without one shard, the rows of the stages may belong to different replicas."""
    first, second = stages((0, 2), (2, 2)), stages((0, 2), (2, 2))
    ranks = [first[0], second[0], first[1], second[1]]
    shards = [(torch_shard(shard, rank, 4), states) for rank, (shard, states) in enumerate(ranks)]
    assert len(joined(*shards)) == 1
    crossed = [shards[0], shards[3]]
    assert joined(*crossed) == [], "as many rows in both stages"


def test_a_shared_point_joins_an_incomplete_step() -> None:
    first, second = stages((0, 3), (2, 3)), stages((0, 3), (2, 3))
    ranks = [first[0], second[0], first[1], second[1]]
    shards = [(torch_shard(shard, rank, 4), states) for rank, (shard, states) in enumerate(ranks)]
    (found,) = joined(shards[0], shards[2])
    assert (len(found.blocks), found.num_shards) == (5, 2)
    assert joined(shards[0], shards[3]) == [], "the shared points of two replicas differ"


def test_a_stage_of_its_boundary_alone_adds_no_point() -> None:
    (found,) = joined(*stages((0, 3), (2, 1)))
    assert len(found.blocks) == 3


def test_observables_of_a_later_stage_are_those_of_its_own_transitions() -> None:
    shards = stages((0, 3), (2, 3))
    (found,) = joined(
        (msgspec.structs.replace(shards[0][0], observables={"load": [1.0, 2.0]}), shards[0][1]),
        (msgspec.structs.replace(shards[1][0], observables={"load": [3.0, 4.0]}), shards[1][1]),
    )
    assert found.observables == {"load": (1.0, 2.0, 3.0, 4.0)}


def test_points_of_the_same_stage_must_agree_on_the_last_one() -> None:
    bench = Bench()
    bench.add(make_shard(0, num_senders=3, last_stage=True))
    with pytest.raises(ProtocolError) as caught:
        bench.add(make_shard(1, num_senders=3, points=4, last_stage=True))
    assert caught.value.reason == "inconsistent"
    bench.add(make_shard(2, num_senders=3, points=4, first_point=2))  # another stage has another length


def test_a_shard_from_a_view_of_memory_is_compared_by_its_values() -> None:
    """Blocks that are not contiguous, like slices of a larger tensor."""
    first, second = stages((0, 3), (2, 3))
    wide = torch.zeros(2, 2 * WIDTH)
    wide[:, ::2] = second[1][0]
    second[1][0] = wide[:, ::2]
    assert len(joined(first, second)) == 1


def test_losses_beyond_all_sums_have_a_mean() -> None:
    bench = Bench()
    for rank in range(3):
        found = bench.add(make_shard(rank, num_senders=3, loss=1.5e308))
    assert found[0].training.loss == pytest.approx(1.5e308)


def test_a_run_counts_from_zero() -> None:
    """Each way to close a step: complete, partial, or dropped to free memory."""
    bench = Bench()
    assert [found.step for step in range(4) for found in bench.add(make_shard(step=step))] == [0, 1, 2, 3]
    bench = Bench()
    for step in range(4):
        bench.add(make_shard(0, num_senders=2, step=step))
        assert [found.step for found in bench.assembler.flush()] == [step]
    bench = Bench(max_bytes=10)
    for step in range(4):
        bench.add(make_shard(0, num_senders=2, step=step))
    assert len(bench.drops) == 4


def test_two_points_are_a_stack() -> None:
    (found,) = joined(make_shard(points=2))
    assert len(found.blocks) == 2


def test_a_shared_point_that_differs_in_one_replica_joins_nothing() -> None:
    first, second = stages((0, 3), (2, 3)), stages((0, 3), (2, 3))
    second[1][1][0] = second[1][1][0] + 1.0
    ranks = [first[0], second[0], first[1], second[1]]
    assert joined(*[(torch_shard(shard, rank, 4), states) for rank, (shard, states) in enumerate(ranks)]) == []


def heard(bench: Bench, step: int, now: float, ranks: tuple[int, ...] = (0, 1, 2)) -> list[Snapshot]:
    """Add the shards of `ranks`, of four senders; return the snapshots that they made."""
    return [made for rank in ranks for made in bench.add(make_shard(rank, num_senders=4, step=step), now)]


def test_a_silent_rank_delays_nothing_after_its_first_time_out(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    assert heard(bench, 1, 0.0) == []
    (first,) = bench.assembler.expire(5.0)
    assert first.num_shards == 3
    assert "run job: 1 of 4 ranks sent no snapshot of step 1" in caplog.text
    for step in range(2, 5):
        (snapshot,) = heard(bench, step, 10.0 * step)
        assert (snapshot.step, snapshot.num_shards) == (step, 3)


def test_a_rank_that_sends_again_is_waited_for_again() -> None:
    """Also when its shards come last, as they do on a slower host."""
    for order in ((3, 0, 1, 2), (0, 1, 2, 3)):
        bench = Bench()
        heard(bench, 1, 0.0)
        bench.assembler.expire(5.0)
        made = []
        for step in (2, 3):
            for rank in order:
                with contextlib.suppress(ProtocolError):
                    made += bench.add(make_shard(rank, num_senders=4, step=step), 10.0 * step + 0.1 * order.index(rank))
        assert [snapshot.num_shards for snapshot in made][-1] == 4


def test_a_rank_that_is_always_too_late_is_not_waited_for() -> None:
    bench = Bench()
    heard(bench, 1, 0.0)
    bench.assembler.expire(5.0)
    for step in (2, 3, 4):
        assert len(heard(bench, step, 10.0 * step)) == 1
        with pytest.raises(ProtocolError, match="already closed"):
            heard(bench, step, 10.0 * step + 5.0, (3,))


def test_a_further_rank_that_falls_silent_costs_one_time_out() -> None:
    bench = Bench()
    heard(bench, 1, 0.0)
    bench.assembler.expire(5.0)
    assert heard(bench, 2, 10.0, (0, 1)) == []
    (second,) = bench.assembler.expire(15.0)
    (third,) = heard(bench, 3, 20.0, (0, 1))
    assert (second.num_shards, third.num_shards) == (2, 2)


def test_silence_belongs_to_one_incarnation() -> None:
    bench = Bench()
    heard(bench, 1, 0.0)
    bench.assembler.expire(5.0)
    bench.assembler.forget("job", INCARNATION)
    assert heard(bench, 2, 10.0) == []


def test_a_rank_that_sent_in_time_is_no_longer_silent() -> None:
    bench = Bench()
    heard(bench, 1, 0.0)
    bench.assembler.expire(5.0)
    assert [made.num_shards for made in heard(bench, 2, 10.0, (3, 0, 1, 2))] == [4]
    assert heard(bench, 3, 20.0) == []
    assert [made.num_shards for made in heard(bench, 3, 21.0, (3,))] == [4]


def test_the_line_about_silence_comes_once_a_minute_for_each_run(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    for incarnation in ("aaaaaaaa", "bbbbbbbb"):
        bench.add(make_shard(0, num_senders=2, incarnation=incarnation), now=0.0)
        bench.assembler.expire(5.0)
    bench.add(make_shard(0, num_senders=2, run="other"), now=6.0)
    bench.assembler.expire(11.0)
    assert [record.message.split(":")[0] for record in caplog.records] == ["run job", "run other"]
