"""Two real ranks: koopmon changes both at one step, and nothing else."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koopmon.wire.messages import Goodbye, Heartbeat, Hello, KssSettings
from tests.agent.programs.ddp import koopmon_settings
from tests.agent.scripted_monitor import ScriptedMonitor

pytestmark = pytest.mark.distributed
Result = tuple[dict[str, Any], dict[str, Any]]


LONG_WAIT = {"control": {"timeout_seconds": 60.0}}


def results(out: Path) -> list[Result]:
    """Return the results of both ranks by phase."""
    first, second = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2))
    return list(zip(first, second, strict=True))


def started(monitor: ScriptedMonitor, job: Any, run: str) -> None:
    """Wait until the first forward of the run is done and rank 0 has reported it."""

    def told() -> bool:
        if any(process.poll() for process in job.processes):
            job.wait()
        return any(hello.run == run and hello.num_layers and not hello.process_rank for hello in monitor.of(Hello))

    monitor.wait(told, 90.0)


def ended(monitor: ScriptedMonitor, run: str) -> bool:
    return any(goodbye.run == run for goodbye in monitor.of(Goodbye))


def test_commands_change_both_ranks_at_one_step_and_nothing_else_changes_anything(
    ranks: Callable[..., Any], monitor: ScriptedMonitor, tmp_path: Path
) -> None:
    long = {"steps": 250, "pause": 0.01, "endpoint": monitor.endpoint}
    phases = [
        {"accumulate": 2},
        {"accumulate": 2, "endpoint": "tcp://127.0.0.1:9"},
        {"accumulate": 2, "endpoint": monitor.endpoint},
        {**long, "run": "random-0"},
        {**long, "run": "random-1"},
        {**long, "run": "kss", "alpha": 0.7, "steps": 1000},
        {**long, "run": "stop", "steps": 1000},
    ]
    job = ranks("ddp.py", tmp_path / "out", json.dumps(phases))
    sent: list[list[str]] = [[], []]
    for seed, commands in enumerate(sent):
        started(monitor, job, f"random-{seed}")
        generator = random.Random(seed)
        while not ended(monitor, f"random-{seed}"):
            time.sleep(generator.uniform(0.0, 0.3))
            ramp = generator.choice([0, 1, 7])
            if generator.random() < 0.6:
                scale = generator.uniform(0.1, 1.0)
                commands.append(monitor.command("set_lr_scale", f"random-{seed}", lr_scale=scale, ramp_steps=ramp))
            else:
                kss = KssSettings(alpha=generator.uniform(0.0, 0.2), svd_rank=8, num_samples=32)
                commands.append(monitor.command("set_kss", f"random-{seed}", kss=kss, ramp_steps=ramp))
    started(monitor, job, "kss")
    while not ended(monitor, "kss"):
        time.sleep(0.2)
        monitor.command("set_kss", "kss", kss=koopmon_settings(0.7))
    started(monitor, job, "stop")
    while not ended(monitor, "stop"):
        monitor.command("stop", "stop")
        time.sleep(0.2)
    job.wait()
    plain, alone, watched, *randoms, kss, stop = results(tmp_path / "out")

    for rank in range(2):
        assert alone[rank]["losses"] == plain[rank]["losses"]
        assert watched[rank]["losses"] == plain[rank]["losses"]
        assert watched[rank]["digest"] == alone[rank]["digest"] == plain[0]["digest"]
        assert watched[rank]["status"]["sent"] > 0
        assert watched[rank]["status"]["dropped"]["incomplete"] == 0
    run = watched[0]["status"]["run"]
    assert run.startswith("ddp-"), "the script's name and 8 digits"
    assert run == watched[1]["status"]["run"]
    shards = [header for header, _ in monitor.shards if header.run == run]
    by_rank = [{header.step for header in shards if header.process_rank == rank} for rank in range(2)]
    assert by_rank[0] & by_rank[1], "both ranks send their parts of the same snapshots"
    assert len({(header.num_samples, header.num_senders) for header in shards}) == 1
    assert {goodbye.process_rank for goodbye in monitor.of(Goodbye) if goodbye.run == run} == {0, 1}

    for commands, (first, second) in zip(sent, randoms, strict=True):
        assert first["scales"] == second["scales"]
        assert first["alphas"] == second["alphas"]
        assert first["digest"] == second["digest"]
        assert len(set(first["scales"])) > 1
        assert any(first["alphas"])
        acks = [monitor.ack(command_id) for command_id in commands if monitor.acked(command_id)]
        # "failed" while the ranks had not met yet, "refused" when the run had ended as the command arrived.
        assert {ack.outcome for ack in acks if "another run" not in ack.detail} in ({"applied"}, {"applied", "failed"})
        assert first["ready"].index(True) < 100

    for each in kss:
        assert len(each["errors"]) > 1
        assert max(each["errors"]) < 1e-12, "the mean over ranks of the local KSS losses"
    assert len(stop[0]["losses"]) == len(stop[1]["losses"]) < 1000
    assert stop[0]["checkpoints"] == stop[1]["checkpoints"] == []
    for phase in (alone, watched, *randoms, kss, stop):
        assert [each["status"]["errors"] for each in phase] == [0, 0]


def test_both_ranks_read_each_request_to_their_loop_at_one_step_or_neither_does(
    ranks: Callable[..., Any], monitor: ScriptedMonitor, tmp_path: Path
) -> None:
    """A rank that leaves its loop alone leaves the other one in a collective: the job would never end."""
    long = {"pause": 0.01, "endpoint": monitor.endpoint}
    phases = [
        {**long, "run": "asked", "steps": 3000},
        {**long, "run": "alone", "steps": 300, "fail_step": 100, "config": {"control": {"timeout_seconds": 0.5}}},
    ]
    job = ranks("ddp.py", tmp_path / "out", json.dumps(phases))
    started(monitor, job, "asked")
    requests: list[str] = []
    while sum(monitor.ack(each).outcome == "applied" for each in requests if monitor.acked(each)) < 3:
        requests.append(monitor.command("checkpoint", "asked"))
        time.sleep(0.2)
    while not ended(monitor, "asked"):
        monitor.command("stop", "asked")
        time.sleep(0.2)
    started(monitor, job, "alone")
    while monitor.of(Heartbeat)[-1].run != "alone" or monitor.of(Heartbeat)[-1].step < 90:
        time.sleep(0.02)
    lonely: list[str] = []
    while not ended(monitor, "alone") and all(process.poll() is None for process in job.processes):
        lonely += [monitor.command(kind, "alone") for kind in ("checkpoint", "stop")]
        time.sleep(0.1)
    job.wait()
    asked, alone = results(tmp_path / "out")
    applied = [ack for each in requests if monitor.acked(each) and (ack := monitor.ack(each)).outcome == "applied"]
    assert asked[0]["checkpoints"] == asked[1]["checkpoints"] == [ack.step for ack in applied]
    assert len(asked[0]["losses"]) == len(asked[1]["losses"]) < 3000
    for name in ("losses", "checkpoints"):
        assert len(alone[0][name]) == len(alone[1][name])


def test_under_fsdp2_kss_and_back_off_act_alike_on_both_ranks_once_allowed_to(
    ranks: Callable[..., Any], monitor: ScriptedMonitor, tmp_path: Path
) -> None:
    act = {"limits": {"act": "always"}}
    common = {"shard": True, "endpoint": monitor.endpoint, "config": act}
    phases = [
        {"shard": True},
        {**common, "run": "watched"},
        {**common, "run": "kss", "alpha": 0.7, "steps": 1000},
        {**common, "run": "both", "steps": 200, "pause": 0.01},
    ]
    job = ranks("ddp.py", tmp_path / "out", json.dumps(phases))
    started(monitor, job, "kss")
    while not ended(monitor, "kss"):
        time.sleep(0.2)
        monitor.command("set_kss", "kss", kss=koopmon_settings(0.7))
    started(monitor, job, "both")
    for scale, alpha in ((0.5, 0.3), (0.25, 0.0), (1.0, 0.1)):
        outcome = ""
        while outcome != "applied":  # "failed" while the ranks have not met yet
            cut = monitor.command("set_lr_scale", "both", lr_scale=scale, ramp_steps=3)
            monitor.command("set_kss", "both", kss=koopmon_settings(alpha), ramp_steps=5)
            monitor.wait(lambda: monitor.acked(cut))  # noqa: B023 - called in this turn of the loop only
            outcome = monitor.ack(cut).outcome
        time.sleep(0.2)
    job.wait()
    plain, watched, kss, both = results(tmp_path / "out")
    for rank in range(2):
        assert watched[rank]["losses"] == plain[rank]["losses"]
        assert watched[rank]["digest"] == plain[rank]["digest"]
        assert len(kss[rank]["errors"]) > 1
        assert max(kss[rank]["errors"]) < 1e-12, "the mean over ranks of the local KSS losses"
    assert both[0]["digest"] == both[1]["digest"] != plain[0]["digest"]
    assert both[0]["scales"] == both[1]["scales"]
    assert both[0]["alphas"] == both[1]["alphas"]
    assert min(both[0]["scales"]) < 1.0 < 1.0 + max(both[0]["alphas"])
    for phase in (watched, kss, both):
        assert [each["status"]["errors"] for each in phase] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("lagging", [0, 1])
def test_ranks_with_different_counts_of_steps_meet_after_one_time_out(
    ranks: Callable[..., Any], monitor: ScriptedMonitor, tmp_path: Path, lagging: int
) -> None:
    """Rank `lagging` steps in every third iteration only."""
    config = {"control": {"timeout_seconds": 1.0}, "limits": {"max_actions_per_hour": 100_000}}
    common = {"endpoint": monitor.endpoint, "pause": 0.02, "steps": 400, "lagging": lagging, "config": config}
    job = ranks("ddp.py", tmp_path / "out", json.dumps([{**common, "run": "lag", "lag": "accumulate"}]))
    started(monitor, job, "lag")
    sent: list[str] = []
    while job.processes[0].poll() is None and not ended(monitor, "lag"):
        sent.append(monitor.command("set_lr_scale", "lag", lr_scale=0.9 - 0.01 * (len(sent) % 80)))
        time.sleep(0.2)
    outputs = job.wait()
    (both,) = results(tmp_path / "out")
    pairs = [pair for pair in zip(both[0]["scales"], both[1]["scales"], strict=True) if None not in pair]
    assert len({one for one, _ in pairs[-20:]}) > 1, "commands came in force to the end"
    assert all(one == other for one, other in pairs[-20:])
    assert "applied" in {monitor.ack(each).outcome for each in sent if monitor.acked(each)}
    assert [each["status"]["errors"] for each in both] == [0, 0]
    assert "".join(each for _, each in outputs).count("control is off") <= 2, "once on each rank"


def test_commands_are_refused_inside_join(ranks: Callable[..., Any], monitor: ScriptedMonitor, tmp_path: Path) -> None:
    phase = {
        "endpoint": monitor.endpoint,
        "pause": 0.02,
        "steps": 250,
        "config": LONG_WAIT,
        "run": "join",
        "lag": "join",
    }
    job = ranks("ddp.py", tmp_path / "out", json.dumps([phase]))
    started(monitor, job, "join")
    sent = []
    while job.processes[0].poll() is None and not ended(monitor, "join"):
        sent.append(monitor.command("set_lr_scale", "join", lr_scale=0.5))
        time.sleep(0.2)
    outputs = job.wait()
    (both,) = results(tmp_path / "out")
    assert {monitor.ack(each).outcome for each in sent if monitor.acked(each)} == {"refused"}
    assert {scale for rank in both for scale in rank["scales"]} == {1.0}
    errors = "".join(each for _, each in outputs)
    assert "control is off" not in errors
    assert errors.count("watches, does not act: the ranks may take different numbers of steps inside join()") == 1
    assert [each["status"]["connected"] for each in both] == [True, True], "no rank waits for the group of the other"


def test_ranks_that_hang_leave_early_or_never_come(
    ranks: Callable[..., Any], monitor: ScriptedMonitor, tmp_path: Path
) -> None:
    act = {"control": {"timeout_seconds": 1.0}, "limits": {"act": "always", "max_actions_per_hour": 100_000}}
    common = {"endpoint": monitor.endpoint, "config": act, "pause": 0.02}
    hang = {"hang_step": 60, "hang_seconds": 1.4}
    phases = [
        {**common, "run": "early", "steps": 60, "config": {}, "early": True},
        {**common, **hang, "run": "hung-ddp", "steps": 150},
        {**common, **hang, "run": "hung", "steps": 300, "ddp": False},
        {**common, "run": "uneven", "steps": 150, "ddp": False, "uneven": 60},
        {**common, "run": "absent", "steps": 60, "only_rank": 0},
        {**common, "run": "watch", "steps": 60, "ddp": False, "config": {}},
        {**common, "run": "last", "steps": 100, "close": False},
    ]
    job = ranks("ddp.py", tmp_path / "out", json.dumps(phases))
    sent = []
    for phase in phases:
        started(monitor, job, phase["run"])
        while not ended(monitor, phase["run"]) and (phase is not phases[-1] or job.processes[0].poll() is None):
            scale = 0.9 - 0.001 * (len(sent) % 500)
            sent.append(monitor.command("set_lr_scale", phase["run"], lr_scale=scale))
            time.sleep(0.05)
    outputs = job.wait()
    early, hung_ddp, hung, uneven, absent, watch, last = results(tmp_path / "out")
    acks = [each for command_id in sent if monitor.acked(command_id) for each in [monitor.ack(command_id)]]

    def outcomes(run: str) -> set[str]:
        return {ack.outcome for ack in acks if ack.run == run and "another run" not in ack.detail}

    # Attached to the inner model before the ranks have met: the wrapper is detected in the first forward.
    assert early[0]["status"]["layout"] == early[1]["status"]["layout"] == "ddp"
    assert "applied" in outcomes("early")
    assert early[0]["scales"] == early[1]["scales"]

    # Under DDP the ranks wait for each other anyway: the exchange waits with them, and nothing fails.
    assert "applied" in outcomes("hung-ddp")
    assert hung_ddp[0]["scales"] == hung_ddp[1]["scales"]
    assert hung_ddp[0]["digest"] == hung_ddp[1]["digest"]

    # Separately, the timeout turns control off on both; they continue and meet again.
    assert outcomes("hung") == {"applied", "failed"}
    for each in hung:
        assert len(each["losses"]) == 300
        up = each["ready"].index(True)
        down = each["ready"].index(False, up)
        assert True in each["ready"][down:], "control came back"
    assert hung[0]["scales"][-1] == hung[1]["scales"][-1], "and what is in force is the same again"
    assert any("control is off" in errors for _, errors in outputs)

    assert [len(each["losses"]) for each in uneven] == [150, 90]
    assert uneven[0]["status"]["enabled"]
    assert absent[1]["status"] is None
    assert absent[0]["status"]["enabled"]
    assert outcomes("absent") == {"failed"}, "one rank alone changes nothing"
    assert set(absent[0]["scales"]) == {1.0}
    assert outcomes("watch") == {"refused"}, "ranks that train apart are a layout not proven"
    assert any("watch-only" in errors for _, errors in outputs)
    assert "applied" in outcomes("last")
    for phase in (early, hung_ddp, hung, uneven, watch, last):
        assert [each["status"]["errors"] for each in phase] == [0, 0]
    assert all("Traceback" not in errors and "terminate" not in errors for _, errors in outputs)
    monitor.wait(lambda: ended(monitor, "last"))
