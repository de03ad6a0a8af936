"""Registry of runs with a simulated clock."""

from __future__ import annotations

import contextlib
import math
import random
from typing import Any, cast

import msgspec
import pytest

from koopmon.config import MAX_STEPS, Config, MonitorConfig
from koopmon.errors import ProtocolError
from koopmon.history.schema import RunState
from koopmon.monitor.registry import LAST_STEP, MAX_RETIRED, SILENT_SECONDS, RunRegistry
from koopmon.monitor.run import Run
from koopmon.monitor.run_controller import RunController
from koopmon.monitor.turnover import MAX_LAUNCHES, MAX_TURNOVER
from koopmon.wire.authorized_keys import AuthorizedKeys
from koopmon.wire.messages import (
    MAX_STEP,
    Ack,
    Applied,
    Goodbye,
    Heartbeat,
    Hello,
    Shard,
    TrainingStep,
)
from tests import factories
from tests.factories import admit

FIRST, SECOND = "aaaaaaaa", "bbbbbbbb"
CONFIG = MonitorConfig(
    max_runs=2, vanished_after_seconds=60.0, ended_series_seconds=300.0, vanished_series_seconds=86400.0
)


def hello(run: str = "job", incarnation: str = FIRST, rank: int = 0, **fields: Any) -> Hello:
    return factories.hello(run, incarnation, process_rank=rank, **{"world_size": 8, "num_senders": 2, **fields})


def heartbeat(rank: int = 0, incarnation: str = FIRST, step: int = 5, run: str = "job", **fields: Any) -> Heartbeat:
    return factories.heartbeat(step, run, incarnation, process_rank=rank, **fields)


def goodbye(rank: int = 0, step: int = 9) -> Goodbye:
    return Goodbye(run="job", incarnation=FIRST, process_rank=rank, step=step)


def shard(incarnation: str = FIRST, step: int = 3) -> Shard:
    return Shard(
        run="job",
        incarnation=incarnation,
        process_rank=0,
        num_senders=1,
        training=TrainingStep(step=step),
        first_point=0,
        num_points=2,
        num_samples=4,
        width=4,
        dtype="float32",
    )


@pytest.fixture
def registry() -> RunRegistry:
    return RunRegistry(CONFIG)


def test_hello_admits_and_tells_what_is_new(registry: RunRegistry) -> None:
    first = admit(registry, 0.0, hello(), b"p0")
    again = admit(registry, 1.0, hello(rank=1), b"p1")
    assert (first.before, first.settled) == (None, False)
    assert again.before is again.run
    assert not again.settled
    assert first.run is again.run
    assert first.run.leader is first.run.peers[0]
    registry.on_message(2.0, heartbeat(0), b"p0")
    settled = admit(registry, 3.0, hello(), b"p0-again")
    assert settled.settled
    registry.on_message(4.0, heartbeat(0), b"p0-again")
    with pytest.raises(ProtocolError, match="another peer"):
        registry.on_message(5.0, heartbeat(0), b"p0")


def test_a_run_ends_when_all_ranks_said_goodbye_and_its_series_go_later(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    admit(registry, 0.0, hello(rank=1), b"p1")
    assert registry.on_message(10.0, goodbye(0), b"p0").state is RunState.RUNNING
    run = registry.on_message(11.0, goodbye(1), b"p1")
    assert run.state is RunState.ENDED
    assert run.leader is None
    assert registry.next_deadline() == 311.0
    assert registry.expire(310.9) == ([], [])
    assert registry.expire(311.0) == ([], [run])
    assert registry.next_deadline() == math.inf


def test_a_straggling_shard_does_not_revive_a_run_that_ended(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    registry.on_message(1.0, goodbye(), b"p0")
    assert registry.on_shard(2.0, shard()).state is RunState.ENDED
    late = Ack(run="job", incarnation=FIRST, command_id="0" * 8, outcome="applied", step=9, applied=Applied())
    assert registry.on_message(3.0, late, b"p0").state is RunState.ENDED


def test_silence_makes_a_run_vanish_and_a_word_brings_it_back(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    registry.on_message(30.0, heartbeat(), b"p0")
    assert registry.expire(89.9) == ([], [])
    assert [run.state for run in registry.expire(90.0)[0]] == [RunState.VANISHED]
    assert registry.expire(86489.0) == ([], [])
    run = registry.on_shard(86489.5, shard(step=7))
    assert (run.state, run.step) == (RunState.RUNNING, 7)
    assert registry.expire(86489.5 + 60) == ([run], [])
    assert run.state is RunState.VANISHED
    assert registry.expire(86489.5 + 60 + 86400) == ([], [run])


def test_goodbye_of_one_rank_and_silence_of_the_others_is_an_end(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    admit(registry, 0.0, hello(rank=1), b"p1")
    registry.on_message(1.0, goodbye(0), b"p0")
    ((run,), _) = registry.expire(61.0)
    assert run.state is RunState.ENDED


def test_a_new_incarnation_takes_over_for_good(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    taken = admit(registry, 1.0, hello(incarnation=SECOND), b"q0")
    assert taken.before is not None
    assert (taken.before.incarnation, taken.run.incarnation) == (FIRST, SECOND)
    for message in (heartbeat(), goodbye()):
        with pytest.raises(ProtocolError) as caught:
            registry.on_message(2.0, message, b"p0")
        assert caught.value.reason == "stale_incarnation"
    with pytest.raises(ProtocolError, match="now has the incarnation"):
        registry.on_shard(2.0, shard())
    with pytest.raises(ProtocolError, match="KOOPMON_RUN"):
        admit(registry, 3.0, hello(), b"p0")


def test_incarnations_retired_before_a_restart_stay_retired(registry: RunRegistry) -> None:
    with pytest.raises(ProtocolError, match="taken over"):
        admit(registry, 0.0, hello(), b"p0", retired=[FIRST])
    assert list(registry) == []
    admit(registry, 0.0, hello(incarnation=SECOND), b"p0", retired=[FIRST])
    with pytest.raises(ProtocolError, match="taken over"):
        admit(registry, 0.0, hello(), b"p0")


def test_too_many_runs_are_refused_until_one_is_over(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello("a"), b"a")
    admit(registry, 0.0, hello("b"), b"b")
    with pytest.raises(ProtocolError, match="max_runs"):
        admit(registry, 1.0, hello("c"), b"c")
    registry.on_message(2.0, Goodbye(run="a", incarnation=FIRST, process_rank=0, step=1), b"a")
    admission = admit(registry, 3.0, hello("c"), b"c")
    assert admission.run.name == "c"
    assert [run.name for run in admission.removed] == ["a"]
    assert sorted(run.name for run in registry) == ["b", "c"]


def test_strangers_are_told_apart(registry: RunRegistry) -> None:
    with pytest.raises(ProtocolError) as caught:
        registry.on_message(0.0, heartbeat(), b"p0")
    assert caught.value.reason == "unknown_run"
    with pytest.raises(ProtocolError):
        registry.on_shard(0.0, shard())
    admit(registry, 0.0, hello(), b"p0")
    with pytest.raises(ProtocolError) as caught:
        registry.on_message(0.0, heartbeat(rank=3), b"p3")
    assert caught.value.reason == "unknown_run"


def test_only_rank_0_tells_what_is_applied_and_steps_never_fall(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(step=4), b"p0")
    admit(registry, 0.0, hello(rank=1, applied=Applied(lr_scale=0.1)), b"p1")
    half = Applied(lr_scale=0.5)
    run = registry.on_message(1.0, heartbeat(0, step=20, applied=half, loss=2.0), b"p0")
    registry.on_message(1.0, heartbeat(1, step=18, applied=Applied(lr_scale=0.25), loss=3.0), b"p1")
    assert (run.applied, run.step) == (half, 20)
    assert run.training == TrainingStep(step=20, loss=2.5, lr_scale=0.5)


def test_the_scale_of_a_run_is_the_measured_one_until_others_are_commanded(registry: RunRegistry) -> None:
    capped = Applied(max_rate=1e-3)
    run = admit(registry, 0.0, hello(applied=capped), b"p0").run
    registry.on_message(1.0, heartbeat(0, step=8, applied=capped, lr_scale=0.25), b"p0")
    assert run.training == TrainingStep(step=8, lr_scale=0.25), "the cap holds the rate below its schedule"
    ack = Ack(
        run="job", incarnation=FIRST, command_id="0" * 8, outcome="applied", step=9, applied=Applied(lr_scale=0.5)
    )
    registry.on_message(2.0, ack, b"p0")
    assert run.training == TrainingStep(step=9, lr_scale=0.5)


# Bounds, each on the side that the text names


def test_steps_leave_room_for_the_expiry_of_a_command(registry: RunRegistry) -> None:
    assert LAST_STEP == MAX_STEP - MAX_STEPS
    with pytest.raises(ProtocolError, match="at most"):
        admit(registry, 0.0, hello(step=LAST_STEP + 1), b"p0")
    admit(registry, 0.0, hello(step=LAST_STEP), b"p0")
    assert registry.on_message(1.0, heartbeat(step=LAST_STEP), b"p0").step == LAST_STEP
    for message in (heartbeat(step=LAST_STEP + 1), goodbye(step=LAST_STEP + 1)):
        with pytest.raises(ProtocolError) as caught:
            registry.on_message(2.0, message, b"p0")
        assert caught.value.reason == "refused"
    with pytest.raises(ProtocolError) as caught:
        registry.on_shard(2.0, shard(step=LAST_STEP + 1))
    assert caught.value.reason == "refused"


def test_the_last_64_incarnations_stay_retired(registry: RunRegistry) -> None:
    names = [f"{index:08x}" for index in range(67)]
    for now, name in enumerate(names):
        admit(registry, float(now), hello(incarnation=name), b"p0")
    for name in names[2:-1]:
        with pytest.raises(ProtocolError, match="taken over"):
            admit(registry, 100.0, hello(incarnation=name), b"p0")
    run = registry.get("job")
    assert run is not None
    assert run.retired == names[2:-1]
    assert len(run.retired) == MAX_RETIRED == 64


def test_incarnations_before_a_restart_count_among_them(registry: RunRegistry) -> None:
    earlier = [f"{index:08x}" for index in range(64)]
    run = admit(registry, 0.0, hello(incarnation=FIRST), b"p0", retired=earlier).run
    assert run.retired == earlier
    run = admit(registry, 1.0, hello(incarnation=SECOND), b"p0", retired=["cccccccc"]).run
    assert run.retired == [*earlier[1:], FIRST], "of a run that the registry knows, its own list counts"


def test_ranks_beyond_the_bound_are_refused_and_those_within_may_say_hello_again() -> None:
    registry = RunRegistry(MonitorConfig(max_peers=2))
    admit(registry, 0.0, hello(rank=0), b"p0")
    admit(registry, 0.0, hello(rank=5), b"p5")
    with pytest.raises(ProtocolError, match="max_peers"):
        admit(registry, 0.0, hello(rank=1), b"p1")
    run = admit(registry, 0.0, hello(rank=5), b"p5-again").run
    assert sorted(run.peers) == [0, 5]
    admit(registry, 0.0, hello(rank=1, incarnation=SECOND), b"p1")  # a new launch has new ranks


def test_a_refused_hello_changes_nothing() -> None:
    registry = RunRegistry(MonitorConfig(max_peers=1))
    run = admit(registry, 5.0, hello(step=3), b"p0").run
    for refused in (hello(rank=1, step=9), hello(step=LAST_STEP + 1)):
        with pytest.raises(ProtocolError):
            admit(registry, 50.0, refused, b"p1")
    assert (run.step, run.last_heard, sorted(run.peers)) == (3, 5.0, [0])
    assert registry.next_deadline() == 5.0 + MonitorConfig().vanished_after_seconds


def test_a_controller_that_cannot_be_made_leaves_the_registry_as_it_was(registry: RunRegistry) -> None:
    def fail(before: Run | None) -> tuple[RunController, Applied | None]:
        raise OSError("no room")

    admit(registry, 0.0, hello("a"), b"a")
    admit(registry, 0.0, hello("b"), b"b")
    registry.on_message(1.0, Goodbye(run="a", incarnation=FIRST, process_rank=0, step=1), b"a")
    with pytest.raises(OSError, match="no room"):
        registry.admit(2.0, hello("c"), b"c", fail)
    assert sorted(run.name for run in registry) == ["a", "b"]
    with pytest.raises(OSError, match="no room"):
        registry.admit(2.0, hello("b", SECOND), b"b", fail)
    assert [run.incarnation for run in registry] == [FIRST, FIRST]


def test_values_to_restore_go_with_the_new_incarnation(registry: RunRegistry) -> None:
    held = Applied(lr_scale=0.25)
    befores: list[Run | None] = []

    def begin(before: Run | None) -> tuple[RunController, Applied | None]:
        befores.append(before)
        return RunController(Config(), hello(), Applied()), held

    first = registry.admit(0.0, hello(applied=Applied(lr_scale=0.5)), b"p0", begin).run
    assert (first.restore, first.applied) == (held, Applied(lr_scale=0.5))
    registry.admit(1.0, hello(rank=1), b"p1", begin)
    registry.admit(2.0, hello(incarnation=SECOND), b"q0", begin)
    assert befores == [None, first], "once for each incarnation"


def test_of_several_closed_runs_the_one_that_closed_first_makes_room() -> None:
    registry = RunRegistry(MonitorConfig(max_runs=3))
    for name in "abc":
        admit(registry, 0.0, hello(name), name.encode())
    for now, name in ((3.0, "a"), (1.0, "b"), (2.0, "c")):
        registry.on_message(now, Goodbye(run=name, incarnation=FIRST, process_rank=0, step=1), name.encode())
    assert [run.name for run in admit(registry, 4.0, hello("d"), b"d").removed] == ["b"]
    assert admit(registry, 4.0, hello("a", SECOND), b"a").removed == [], "a run that is known needs no room"


# Timeouts


def test_a_run_is_silent_from_its_last_message_on(registry: RunRegistry) -> None:
    admit(registry, 10.0, hello(), b"p0")
    admit(registry, 20.0, hello("other"), b"o")
    assert registry.next_deadline() == 70.0
    registry.on_shard(30.0, shard())
    assert registry.next_deadline() == 80.0
    closed, removed = registry.expire(80.0)
    assert [run.name for run in closed] == ["other"]
    assert registry.next_deadline() == 90.0
    assert removed == []


def test_a_vanished_run_keeps_its_series_for_a_day_and_an_ended_one_for_minutes(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello("a"), b"a")
    admit(registry, 0.0, hello("b"), b"b")
    registry.on_message(0.0, Goodbye(run="a", incarnation=FIRST, process_rank=0, step=1), b"a")
    registry.expire(60.0)
    assert registry.next_deadline() == 300.0
    assert [run.name for run in registry.expire(300.0)[1]] == ["a"]
    assert registry.next_deadline() == 60.0 + 86400.0


def test_a_goodbye_counts_as_a_word_and_says_the_last_step(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(step=20), b"p0")
    admit(registry, 0.0, hello(rank=1), b"p1")
    assert registry.on_message(5.0, goodbye(1, step=30), b"p1").step == 30
    run = registry.on_message(6.0, goodbye(0, step=25), b"p0")
    assert (run.step, run.last_heard, run.closed_at) == (30, 6.0, 6.0)


def test_a_rank_that_said_goodbye_and_then_hello_is_back(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    registry.on_message(1.0, heartbeat(), b"p0")
    registry.on_message(2.0, goodbye(), b"p0")
    back = admit(registry, 3.0, hello(), b"p0-again")
    assert (back.run.state, back.run.closed_at, back.settled) == (RunState.RUNNING, math.inf, True)
    assert back.run.leader is not None
    assert back.run.leader.identity == b"p0-again"
    assert [each.step for each in back.run.heartbeats] == [5]


# Whose run it is


class Keys:
    """Two agents by their keys: `one` may use every run, `two` the run `job` only."""

    def name_of(self, key: str) -> str | None:
        return {"k1": "one", "k2": "two"}.get(key)

    def is_authorized(self, name: str, run: str) -> bool:
        return name == "one" or run == "job"


@pytest.fixture
def keyed() -> RunRegistry:
    return RunRegistry(CONFIG, cast(AuthorizedKeys, Keys()))


def test_without_keys_everybody_is_the_same_agent(registry: RunRegistry) -> None:
    assert registry.agent("anything", "job") == ""


@pytest.mark.parametrize(("key", "run", "match"), [("k9", "job", "no agent has"), ("k2", "other", "may not use")])
def test_a_key_is_checked_at_every_message(keyed: RunRegistry, key: str, run: str, match: str) -> None:
    for call in (
        lambda: keyed.agent(key, run),
        lambda: admit(keyed, 0.0, hello(run), b"p", key=key),
        lambda: keyed.on_message(0.0, heartbeat(run=run), b"p", key=key),
    ):
        with pytest.raises(ProtocolError, match=match) as caught:
            call()
        assert caught.value.reason == "authorisation"
    assert keyed.agent("k1", "other") == "one"


def test_a_running_run_belongs_to_the_agent_of_its_first_hello(keyed: RunRegistry) -> None:
    run = admit(keyed, 0.0, hello(), b"p0", key="k1").run
    assert run.agent == "one"
    for said in (hello(rank=1), hello(incarnation=SECOND)):
        with pytest.raises(ProtocolError, match="belongs to another") as caught:
            admit(keyed, 1.0, said, b"q", key="k2")
        assert caught.value.reason == "identity"
    for message in (heartbeat(), goodbye()):
        with pytest.raises(ProtocolError) as refused:
            keyed.on_message(1.0, message, b"p0", key="k2")
        assert refused.value.reason == "identity"
    with pytest.raises(ProtocolError) as refused:
        keyed.on_shard(1.0, shard(), key="k2")
    assert refused.value.reason == "identity"
    assert keyed.on_message(1.0, heartbeat(), b"p0", key="k1") is run


def test_a_run_that_is_over_may_be_taken_by_another_agent_as_another_incarnation(keyed: RunRegistry) -> None:
    admit(keyed, 0.0, hello(), b"p0", key="k1")
    keyed.on_message(1.0, goodbye(), b"p0", key="k1")
    with pytest.raises(ProtocolError, match="belongs to another"):
        admit(keyed, 2.0, hello(), b"q0", key="k2")
    run = admit(keyed, 2.0, hello(incarnation=SECOND), b"q0", key="k2").run
    assert (run.agent, run.retired) == ("two", [FIRST])


# What the monitor keeps of a rank and a run


def test_only_ranks_that_sent_one_have_a_heartbeat(registry: RunRegistry) -> None:
    run = admit(registry, 0.0, hello(), b"p0").run
    admit(registry, 0.0, hello(rank=1), b"p1")
    assert run.heartbeats == []
    registry.on_message(1.0, heartbeat(1), b"p1")
    assert [each.process_rank for each in run.heartbeats] == [1]
    assert not admit(registry, 2.0, hello(), b"p0").settled
    assert admit(registry, 2.0, hello(rank=1), b"p1").settled


def test_a_message_from_another_peer_than_the_hello_changes_nothing(registry: RunRegistry) -> None:
    run = admit(registry, 0.0, hello(), b"p0").run
    with pytest.raises(ProtocolError) as caught:
        registry.on_message(9.0, heartbeat(step=50, applied=Applied(lr_scale=0.5)), b"stranger")
    assert caught.value.reason == "identity"
    assert (run.step, run.last_heard, run.applied, run.heartbeats) == (0, 0.0, Applied(), [])


def test_an_ack_is_of_rank_0(registry: RunRegistry) -> None:
    run = admit(registry, 0.0, hello(), b"p0").run
    admit(registry, 0.0, hello(rank=1), b"p1")
    half = Applied(lr_scale=0.5)
    ack = Ack(run="job", incarnation=FIRST, command_id="0" * 8, outcome="applied", step=9, applied=half)
    with pytest.raises(ProtocolError, match="another peer"):
        registry.on_message(1.0, ack, b"p1")
    assert registry.on_message(1.0, ack, b"p0") is run
    assert (run.applied, run.step, run.last_heard) == (half, 9, 1.0)


def test_the_hello_of_rank_0_describes_the_run(registry: RunRegistry) -> None:
    run = admit(registry, 0.0, hello(rank=1, width=8), b"p1").run
    assert run.leader is None
    assert (run.name, run.incarnation) == ("job", FIRST)
    admit(registry, 0.0, hello(rank=0, width=16, applied=Applied(lr_scale=0.5)), b"p0")
    assert (run.hello.width, run.applied.lr_scale) == (16, 0.5)
    admit(registry, 0.0, hello(rank=1, width=32), b"p1")
    assert (run.hello.width, run.applied.lr_scale) == (16, 0.5)


def test_a_run_is_launched_at_most_once_a_second_on_average(registry: RunRegistry) -> None:
    names = [f"{number:08x}" for number in range(2 * MAX_LAUNCHES)]
    for name in names[:MAX_LAUNCHES]:
        admit(registry, 10.0, hello(incarnation=name), b"p0")
    with pytest.raises(ProtocolError, match="was launched 60 times within a minute"):
        admit(registry, 69.9, hello(incarnation=names[MAX_LAUNCHES]), b"p0")
    assert registry.get("job").incarnation == names[MAX_LAUNCHES - 1]  # type: ignore[union-attr]
    admit(registry, 69.9, hello(incarnation=names[MAX_LAUNCHES - 1], rank=1), b"p1")
    admit(registry, 69.9, hello("other"), b"p2")
    admit(registry, 70.0, hello(incarnation=names[MAX_LAUNCHES]), b"p0")
    for name in names[MAX_LAUNCHES + 1 : -1]:
        admit(registry, 70.0, hello(incarnation=name), b"p0")
    admit(registry, 129.9, hello(incarnation=names[-1]), b"p0")
    with pytest.raises(ProtocolError, match="was launched 60 times"):
        admit(registry, 129.9, hello(incarnation="ffffffff"), b"p0")


def test_launches_under_many_names_are_limited_too() -> None:
    registry = RunRegistry(MonitorConfig(max_runs=2))
    most = (MAX_LAUNCHES + 2 * MAX_TURNOVER) // 2
    for number in range(most):
        admit(registry, 10.0, hello(f"job{number}"), b"p")
        registry.on_message(10.0, Goodbye(run=f"job{number}", incarnation=FIRST, process_rank=0, step=1), b"p")
    with pytest.raises(ProtocolError, match=f"{most} new runs came within a minute, {most} of them from this peer"):
        admit(registry, 69.9, hello("another"), b"p")
    admit(registry, 69.9, hello(f"job{most - 1}", rank=1), b"q")
    admit(registry, 69.9, hello(f"job{most - 1}", SECOND), b"p")
    admit(registry, 70.0, hello("another"), b"p")


def begin_and_end(registry: RunRegistry, now: float, name: str, identity: bytes) -> None:
    admit(registry, now, hello(name), identity)
    registry.on_message(now, Goodbye(run=name, incarnation=FIRST, process_rank=0, step=1), identity)


@pytest.mark.parametrize("num_flooding", [1, 2, 5])
def test_peers_that_flood_new_runs_leave_room_for_others(num_flooding: int) -> None:
    """However many hellos each of them sends; all together stay within the limit."""
    registry = RunRegistry(MonitorConfig(max_runs=64))
    num_begun = 0
    for number in range(1000):
        for peer in range(num_flooding):
            with contextlib.suppress(ProtocolError):
                begin_and_end(registry, 10.0, f"job{peer}.{number}", b"flood%d" % peer)
                num_begun += 1
    limit = MAX_LAUNCHES + 64 * MAX_TURNOVER
    assert limit * num_flooding / (num_flooding + 2) < num_begun < limit
    for number in range(10):
        begin_and_end(registry, 10.0, f"honest{number}", b"honest%d" % number)
    for number in range(1000):
        with contextlib.suppress(ProtocolError):
            begin_and_end(registry, 10.0, f"more{number}", b"more%d" % number)
            num_begun += 1
    assert num_begun + 10 == limit, "peers with a name each cannot exceed it either"
    begin_and_end(registry, 70.0, "later", b"flood0")


def test_a_full_monitor_makes_room_for_a_peer_that_has_fewer_runs() -> None:
    """The oldest run without a snapshot of the peer with the most runs goes; a run with a snapshot never does."""
    registry = RunRegistry(MonitorConfig(max_runs=4))
    for number in range(3):
        admit(registry, float(number), hello(f"flood{number}"), b"flood")
    admit(registry, 3.0, hello(), b"p0")
    registry.on_shard(4.0, shard())
    first = admit(registry, 5.0, hello("new"), b"p1")
    assert first.displaced is not None
    assert first.displaced.name == "flood0"
    assert first.displaced.state is RunState.VANISHED
    assert first.removed == [first.displaced]
    assert {run.name for run in registry} == {"flood1", "flood2", "job", "new"}
    with pytest.raises(ProtocolError, match="max_runs"):
        admit(registry, 5.0, hello("flood3"), b"flood")
    with pytest.raises(ProtocolError, match="max_runs"):
        admit(registry, 5.0, hello("equal"), b"p1")


def test_a_full_monitor_makes_room_once_a_run_has_sent_nothing_but_its_hello() -> None:
    registry = RunRegistry(MonitorConfig(max_runs=3))
    admit(registry, 0.0, hello("alive"), b"p0")
    registry.on_message(0.0, heartbeat(run="alive"), b"p0")
    admit(registry, 0.0, hello("sampled"), b"p1")
    registry.on_shard(0.0, msgspec.structs.replace(shard(), run="sampled"))
    admit(registry, 0.0, hello("silent"), b"p2")
    with pytest.raises(ProtocolError, match="max_runs"):
        admit(registry, SILENT_SECONDS - 0.1, hello("new"), b"p3")
    displaced = admit(registry, SILENT_SECONDS, hello("new"), b"p3").displaced
    assert displaced is not None
    assert displaced.name == "silent"


def test_with_keys_the_connections_of_an_agent_count_together() -> None:
    class Names:
        def name_of(self, key: str) -> str:
            return f"agent {key}"

        def is_authorized(self, name: str, run: str) -> bool:
            return True

    registry = RunRegistry(MonitorConfig(max_runs=4), cast(AuthorizedKeys, Names()))
    for number in range(4):
        admit(registry, float(number), hello(f"flood{number}"), b"p%d" % number, key="a")
    with pytest.raises(ProtocolError, match="max_runs"):
        admit(registry, 4.0, hello("more"), b"p9", key="a")
    displaced = admit(registry, 4.0, hello("other"), b"q0", key="b").displaced
    assert displaced is not None
    assert displaced.name == "flood0"


def test_deadlines_are_those_of_a_walk_over_all_runs() -> None:
    """Random messages and ticks, against the smallest deadline of all runs; some series go at once."""
    choice = random.Random(0)
    for seconds in (0.0, 300.0):
        registry = RunRegistry(MonitorConfig(max_runs=4, ended_series_seconds=seconds, vanished_series_seconds=100.0))
        now, num_closed = 0.0, 0
        for turn in range(3000):
            now += choice.choice([0.0, 0.5, 20.0, 70.0])
            name, due = choice.choice("abcdef"), {run.name for run in registry if now >= registry._deadline(run)}
            closed, removed = registry.expire(now)
            num_closed += len(closed)
            assert {run.name for run in (*closed, *removed)} == due
            assert registry.next_deadline() == min(map(registry._deadline, registry), default=math.inf)
            with contextlib.suppress(ProtocolError):
                match choice.randrange(4):
                    case 0:
                        admit(registry, now, hello(name, choice.choice([FIRST, f"{turn:08x}"])), b"p")
                    case 1:
                        said = Goodbye(run=name, incarnation=FIRST, process_rank=0, step=1)
                        registry.on_message(now, said, b"p")
                    case _ if (run := registry.get(name)) is not None:
                        registry.on_message(now, factories.heartbeat(turn, name, run.incarnation), b"p")
            assert registry.next_deadline() == min(map(registry._deadline, registry), default=math.inf)
        assert num_closed > 100
        assert len(registry._heap) < 50
