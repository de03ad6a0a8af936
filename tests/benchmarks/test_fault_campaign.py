"""A slice of the fault campaign, and tests that its checks find problems."""

from __future__ import annotations

import itertools
import random
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_campaign import hostile, kinds, scripts
from benchmarks.fault_campaign.__main__ import percentile
from benchmarks.fault_campaign.checks import NUM_RESTORED, Chapter, Entry, doubted_decisions, examine
from benchmarks.fault_campaign.machine import Job
from benchmarks.fault_campaign.scenes import KINDS, beside_monitor, summary, under_script
from benchmarks.fault_campaign.stages import RESTLESS, write_config
from benchmarks.fault_campaign.table import WORDS
from benchmarks.fault_campaign.training import RATE, Line, Stretch, follow, last_line, read_lines
from koopmon.config import load


def write_logs(job: Job, stretch: Stretch, *, name: str = "0-0", pid: int = 7) -> None:
    """Write the log that the ranks of `job` would have written."""
    (steps,) = follow([stretch])
    scale, version = 1.0, 0
    texts = [""] * stretch.world
    for step, expected in steps.items():
        scale, version = stretch.scales.get(step, scale), version + (step in stretch.scales)
        for rank in range(stretch.world):
            line = Line(step, expected.losses[rank], (RATE * scale).hex(), version, float(step), expected.digest)
            texts[rank] += str(line)
    for rank, text in enumerate(texts):
        job.log(name, rank).write_text(text)
        Path(f"{job.log(name, rank)}.pid").write_text(str(pid))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path / "job", "job", "ipc:///nowhere", tmp_path / "none.toml", world=2)
    write_logs(job, Stretch(first=0, last=20, world=2, scales={8: 0.5, 12: 0.25}))
    return job


ENTRIES = (
    Entry("00000001", "applied", (8,), 0.5),
    Entry("00000002", "expired", (), 0.75),
    Entry("00000003", "applied", (12,), 0.25),
)


def problems(job: Job, *entries: Entry) -> list[tuple[str, float]]:
    return [(each.kind, each.at) for each in examine(job, [Chapter("job", 7, entries)]).problems]


def test_a_training_that_did_what_the_audit_log_says_is_left_in_peace(job: Job) -> None:
    found = examine(job, [Chapter("job", 7, ENTRIES), Chapter("job", 8, ENTRIES[:1])])
    assert found.problems == []
    assert (found.num_steps, found.num_applied) == (21, 2)


def test_a_loss_that_differs_in_its_last_bit_is_noticed(job: Job) -> None:
    lines = read_lines(job.log("0-0", 1))
    off = float.fromhex(lines[15].loss) * (1.0 + 2.0**-50)
    lines[15] = replace(lines[15], loss=off.hex())
    job.log("0-0", 1).write_text("".join(map(str, lines)))
    assert problems(job, *ENTRIES) == [("training", 15.0)]


def test_replicas_that_differ_are_noticed(job: Job) -> None:
    lines = read_lines(job.log("0-0", 1))
    lines[13] = replace(lines[13], rate=RATE.hex())
    job.log("0-0", 1).write_text("".join(map(str, lines)))
    assert problems(job, *ENTRIES) == [("replicas", 13.0)]


@pytest.mark.parametrize("entries", [ENTRIES[:2], (*ENTRIES[:2], replace(ENTRIES[2], outcome="x", applied_at=()))])
def test_a_change_that_no_answer_explains_is_a_lost_decision(job: Job, entries: tuple[Entry, ...]) -> None:
    assert ("lost", 12.0) in problems(job, *entries)


@pytest.mark.parametrize(("step", "expected"), [(20, []), (30, ["lost"])])
def test_rank_0_may_be_killed_before_it_writes_the_line_of_a_change(job: Job, step: int, expected: list[str]) -> None:
    write_logs(job, Stretch(first=0, last=20, world=2, scales={20: 0.5}))
    log = job.log("0-0", 0)
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    found = problems(job, Entry("00000001", "applied", (step,), 0.5))
    assert [kind for kind, _ in found] == expected


def test_an_answer_without_a_change_and_a_command_applied_twice_are_doubled_decisions(job: Job) -> None:
    again = Entry("00000004", "applied", (15,), 0.25)
    assert problems(job, *ENTRIES, again) == [("doubled", 15.0)]
    twice = replace(ENTRIES[2], applied_at=(12, 15))
    assert {kind for kind, _ in problems(job, *ENTRIES[:2], twice)} == {"doubled"}


def test_a_command_at_another_step_than_its_ack_says_is_noticed(job: Job) -> None:
    found = problems(job, ENTRIES[0], replace(ENTRIES[2], applied_at=(13,)))
    assert {"lost", "doubled"} == {kind for kind, _ in found}


def test_a_resumed_job_may_get_back_what_was_applied_and_nothing_else(job: Job) -> None:
    first = Stretch(first=0, last=50, world=2, scales={8: 0.5})
    for scale, expected in ((0.5, []), (0.25, ["lost"])):
        second = Stretch(first=40, last=60, world=1, scales={44: scale})
        both = [list(each.items()) for each in follow([first, second])]
        write_logs(job, first)
        lines = [
            Line(
                step,
                e.losses[0],
                (RATE * (scale if step >= 44 else 1.0)).hex(),
                NUM_RESTORED * (step >= 44),
                step,
                e.digest,
            )
            for step, e in both[1]
        ]
        job.log("1-0", 0).write_text("".join(map(str, lines)))
        Path(f"{job.log('1-0', 0)}.pid").write_text("9")
        job.worlds = {"0": 2, "1": 1}
        found = examine(job, [Chapter("job", 7, ENTRIES[:1]), Chapter("job", 9, ())])
        assert [each.kind for each in found.problems] == expected
        assert found.num_restored == 1 - len(expected)


@pytest.mark.parametrize(
    ("version", "expected"), [(NUM_RESTORED + 1, []), (NUM_RESTORED, ["lost"]), (NUM_RESTORED + 2, ["lost"])]
)
def test_what_is_handed_back_may_come_with_the_next_command(job: Job, version: int, expected: list[str]) -> None:
    first = Stretch(first=0, last=50, world=2, scales={8: 0.5})
    second = Stretch(first=40, last=60, world=2, scales={44: 0.75})
    write_logs(job, first)
    _, resumed = follow([first, second])
    for rank in range(2):
        lines = []
        for step, e in resumed.items():
            rate, changes = (RATE * 0.75, version) if step >= 44 else (RATE, 0)
            lines.append(Line(step, e.losses[rank], rate.hex(), changes, step, e.digest))
        job.log("1-0", rank).write_text("".join(map(str, lines)))
    Path(f"{job.log('1-0', 0)}.pid").write_text("9")
    job.worlds = {"0": 2, "1": 2}
    following = Entry("00000009", "applied", (4,), 0.75)
    found = examine(job, [Chapter("job", 7, ENTRIES[:1]), Chapter("job", 9, (following,))])
    assert [each.kind for each in found.problems] == expected
    assert found.num_restored == 1 - len(expected)


@pytest.mark.parametrize(("applied_at", "expected"), [(51, []), (60, ["lost"])])
def test_what_was_answered_as_the_rank_was_killed_is_handed_back(
    job: Job, applied_at: int, expected: list[str]
) -> None:
    first, second = Stretch(first=0, last=50, world=2), Stretch(first=40, last=60, world=2, scales={40: 0.5})
    write_logs(job, first)
    _, resumed = follow([first, second])
    for rank in range(2):
        lines = [
            Line(step, e.losses[rank], (RATE * 0.5).hex(), NUM_RESTORED, step, e.digest) for step, e in resumed.items()
        ]
        job.log("1-0", rank).write_text("".join(map(str, lines)))
    Path(f"{job.log('1-0', 0)}.pid").write_text("9")
    job.worlds = {"0": 2, "1": 2}
    entry = Entry("00000001", "applied", (applied_at,), 0.5)
    found = examine(job, [Chapter("job", 7, (entry,)), Chapter("job", 9, ())])
    assert [each.kind for each in found.problems] == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (Entry("00000001", "unanswered", (), 0.5), []),
        (Entry("00000001", "unanswered", (), 0.25), ["lost"]),
        (Entry("00000001", "applied", (51,), 0.25), ["lost"]),
    ],
)
def test_a_launch_may_begin_with_the_command_in_flight_at_the_kill_and_with_no_other_value(
    job: Job, entry: Entry, expected: list[str]
) -> None:
    """Under `koopmon run` a file has the settings in force. It is written before the ack."""
    first, second = Stretch(first=0, last=50, world=2), Stretch(first=40, last=60, world=2, scales={40: 0.5})
    write_logs(job, first)
    _, resumed = follow([first, second])
    for rank in range(2):
        lines = [Line(step, e.losses[rank], (RATE * 0.5).hex(), -1, step, e.digest) for step, e in resumed.items()]
        job.log("1-0", rank).write_text("".join(map(str, lines)))
    Path(f"{job.log('1-0', 0)}.pid").write_text("9")
    job.worlds = {"0": 2, "1": 2}
    found = examine(job, [Chapter("job", 7, (entry,)), Chapter("job", 9, ())])
    assert [each.kind for each in found.problems] == expected


def test_a_rank_may_be_killed_right_after_a_checkpoint() -> None:
    whole, first = Stretch(first=0, last=44, world=2), Stretch(first=0, last=39, world=2)
    (expected,) = follow([whole])
    _, resumed = follow([first, Stretch(first=40, last=44, world=2)])
    assert resumed == {step: expected[step] for step in range(40, 45)}


def test_a_decision_that_only_the_log_knows_is_lost_and_one_that_stands_twice_is_doubled(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite3"
    with sqlite3.connect(path) as database:
        database.executescript(
            "CREATE TABLE runs (id, name); CREATE TABLE incarnations (id, run_id);"
            "CREATE TABLE decisions (step, incarnation_id, phase, reason);"
            "INSERT INTO runs VALUES (1, 'job'); INSERT INTO incarnations VALUES (1, 1);"
            "INSERT INTO decisions VALUES (10, 1, 'acting', 'why'), (20, 1, 'acting', 'why'), (20, 1, 'acting', 'why');"
        )
    database.close()
    said = [f"koopmon: run job step {step}: acting: why (risk 0.50)" for step in (10, 20, 30)]
    assert doubted_decisions(path, said) == ["lost: run job step 30", "doubled: run job step 20: why"]


def test_the_restless_configuration_is_one_and_every_kind_has_its_words(tmp_path: Path) -> None:
    config = load(write_config(tmp_path / "c.toml", {"limits": {"act": "never"}}))
    assert config.limits.act == "never"
    assert config.policy.act_risk == RESTLESS["policy"]["act_risk"]
    assert set(WORDS) == set(KINDS)
    assert sum(plan.scenes * plan.count for plan in KINDS.values()) >= 500


def test_the_last_whole_line_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("")
    assert last_line(path) is None
    lines = [Line(step, (0.1).hex(), RATE.hex(), 0, 1.0, "") for step in range(50)]
    path.write_text("".join(map(str, lines)) + "50 0x1")
    assert last_line(path) == lines[-1]


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([], 0.95) is None
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert percentile([float(each) for each in range(1, 101)], 0.95) == 95.0


BESIDE_MONITOR = (
    kinds.monitor_killed,
    kinds.disk_read_only,
    kinds.rank_hung,
    kinds.monitor_stopped,
    kinds.poisoned,
    kinds.extreme_numbers,
    kinds.agents_flood,
    kinds.monitor_floods,
)
UNDER_SCRIPT = (
    scripts.duplicate,
    scripts.conflicting,
    scripts.expired,
    scripts.reordered,
)


def in_turn(faults: Any) -> Any:
    """One kind of fault that differs at each injection."""
    order: Iterator[Any] = itertools.cycle(faults)
    return lambda stage: next(order)(stage)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("play", "count"),
    [
        (beside_monitor(in_turn(BESIDE_MONITOR), spare=True), 18),
        (under_script(in_turn(UNDER_SCRIPT)), 8),
        (hostile.hostile_plugin, 1),
    ],
    ids=["monitor", "script", "plugin"],
)
def test_a_slice_of_the_campaign(play: Any, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("f")  # a short path, because it has sockets
    told = summary(play(directory, random.Random(0), count), own=True)
    assert told["problems"] == []
    assert told["num_applied"] > 0
    assert [each["unaffected"] for each in told["injections"]] == [True] * count
    assert all(each["recovery_seconds"] is not None for each in told["injections"])
