"""False monitors, and a monitor with excessive commands, against a real training: the limits of the agent hold."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from koopmon.agent.comms.control_channel import MIN_HEARTBEAT_SECONDS
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.codec import encode
from koopmon.wire.headers import PREFIX
from koopmon.wire.messages import Ack, Command, Heartbeat, Hello, KssSettings
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.keyring import Keyring

Train = Callable[..., Any]
Demanding = Callable[..., Any]
MIN_SCALE = 0.25
SCALES = (0.0, -0.0, -1.0, 100.0, 1.0000001, math.nan, math.inf, -math.inf, "1", True)


def welcomed(training: Any, monitor: Any) -> dict[str, Any]:
    """Common fields of every command for this training."""
    training.until(lambda: training.agent.status()["connected"])
    hello = monitor.of(Hello)[-1]
    return {"run": hello.run, "incarnation": hello.incarnation, "reason": "a demand", "expires_step": 1 << 40}


def outcomes(monitor: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for ack in monitor.of(Ack):
        counts[ack.outcome] = counts.get(ack.outcome, 0) + 1
    return counts


def test_an_impostor_commands_nobody(
    ring: Keyring, train: Train, demanding: Demanding, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Keyring(tmp_path / "impostor")
    other.agent()
    impostor = demanding(other.trust())
    training = train(impostor.endpoint, control={"monitor_lost_seconds": 0.5})
    training.until(lambda: "monitor.key" in caplog.text)
    assert "training goes on" in caplog.text
    assert impostor.heard == []
    assert training.agent.status()["sent"] == 0, "no state leaves for who cannot prove himself"
    assert training.untouched()


def test_a_monitor_without_keys_commands_nobody(
    train: Train, demanding: Demanding, caplog: pytest.LogCaptureFixture
) -> None:
    plain = demanding(AuthPolicy())
    training = train(plain.endpoint, control={"monitor_lost_seconds": 0.5})
    training.until(lambda: "no monitor at" in caplog.text)
    assert plain.heard == []
    assert training.untouched()


def absurd(common: dict[str, Any]) -> list[bytes]:
    """Headers of commands that `encode` would refuse."""
    rate = {**common, "type": "command", "id": "0" * 16, "kind": "set_lr_scale"}
    kss = {**common, "type": "command", "id": "0" * 16, "kind": "set_kss"}
    settings = msgspec.to_builtins(KssSettings(alpha=1.0))
    headers = [{**rate, "lr_scale": scale} for scale in SCALES]
    headers += [
        {**kss, "kss": {**settings, **wrong}}
        for wrong in ({"alpha": math.nan}, {"alpha": -1.0}, {"alpha": 1e9}, {"svd_rank": 1 << 40}, {"num_samples": 0},
                      {"temperature": 0.0}, {"tau_u": math.inf}, {"every": 0}, {"layer_fraction": 2.0})
    ]  # fmt: skip
    headers += [
        {**rate, "lr_scale": 0.5, "kind": "format_disk"},
        {**rate},
        {**rate, "lr_scale": 0.5, "kss": settings},
        {**rate, "lr_scale": 0.5, "expires_step": -1},
        {**rate, "lr_scale": 0.5, "ramp_steps": 1 << 60},
        {**rate, "lr_scale": 0.5, "id": "../../x"},
    ]
    return [PREFIX + msgspec.msgpack.encode(header) for header in headers]


def test_absurd_demands_are_no_messages(ring: Keyring, train: Train, demanding: Demanding) -> None:
    monitor = demanding(ring.trust())
    training = train(monitor.endpoint)
    common = welcomed(training, monitor)
    demands = absurd(common)
    assert len(demands) == 25
    monitor.send(*[[demand] for demand in demands])
    training.until(lambda: training.agent.status()["rejected"] == {"schema": len(demands)})
    training.go_on()
    assert outcomes(monitor) == {}
    assert training.agent.status()["applied"]["lr_scale"] == 1.0
    assert set(training.rates) == {0.01}
    assert training.untouched()


def test_rubbish_from_the_monitor_is_counted_by_reason(ring: Keyring, train: Train, demanding: Demanding) -> None:
    monitor = demanding(ring.trust())
    training = train(monitor.endpoint)
    hello = (welcomed(training, monitor), monitor.of(Hello)[-1])[1]
    for _ in range(50):
        monitor.send([b"rubbish"], [PREFIX + b"\xdf\xff\xff\xff\xff"], [PREFIX[:-1] + b"\x63"], encode(hello))
        monitor.send([PREFIX + bytes(1 << 16)])
    training.until(lambda: sum(training.agent.status()["rejected"].values()) >= 250)
    assert training.agent.status()["rejected"] == {"garbage": 100, "version": 50, "direction": 50, "size": 50}
    training.go_on()
    assert training.untouched()


def test_a_message_of_several_frames_costs_the_monitor_its_connection(
    ring: Keyring, train: Train, demanding: Demanding
) -> None:
    monitor = demanding(ring.trust())
    training = train(monitor.endpoint)
    welcomed(training, monitor)
    monitor.send([b"a", b"b"], [b"a", b"b"])
    training.until(lambda: training.agent.status()["rejected"] == {"size": 1})
    training.until(lambda: training.agent.status()["connected"])
    assert training.agent.status()["rejected"] == {"size": 1}, "the rest was dropped with the connection"
    training.go_on()
    assert training.untouched()


def test_commands_for_others_and_from_the_past_are_refused(ring: Keyring, train: Train, demanding: Demanding) -> None:
    monitor = demanding(ring.trust())
    training = train(monitor.endpoint)
    common = welcomed(training, monitor)
    scaled = {**common, "kind": "set_lr_scale", "lr_scale": 0.5}
    recorded = [
        encode(Command(**{**scaled, "id": "a" * 16, "run": "victim/other"})),
        encode(Command(**{**scaled, "id": "b" * 16, "incarnation": "deadbeef"})),
        encode(Command(**{**scaled, "id": "c" * 16, "expires_step": 0})),
    ]
    monitor.send(*recorded, *recorded)
    training.until(lambda: len(monitor.of(Ack)) == 6)
    assert outcomes(monitor) == {"refused": 4, "expired": 2}
    training.go_on()
    assert training.untouched()


def test_a_replayed_command_is_applied_once(ring: Keyring, train: Train, demanding: Demanding) -> None:
    monitor = demanding(ring.trust())
    training = train(monitor.endpoint)
    common = welcomed(training, monitor)
    down = encode(Command(**common, id="a" * 16, kind="set_lr_scale", lr_scale=0.5))
    back = encode(Command(**common, id="b" * 16, kind="set_lr_scale", lr_scale=1.0))
    monitor.send(down)
    training.until(lambda: outcomes(monitor) == {"applied": 1})
    monitor.send(back)
    training.until(lambda: outcomes(monitor) == {"applied": 2})
    monitor.send(*[down] * 20)
    training.until(lambda: outcomes(monitor) == {"applied": 2, "duplicate": 20})
    assert training.agent.status()["applied"]["lr_scale"] == 1.0
    assert set(training.rates) == {0.01, 0.005}
    assert training.rates[-1] == 0.01


def test_ten_thousand_commands_with_no_budget_change_nothing(ring: Keyring, train: Train, demanding: Demanding) -> None:
    monitor = demanding(ring.trust())
    training = train(monitor.endpoint, limits={"max_actions_per_hour": 0})
    common = welcomed(training, monitor)
    monitor.send(
        *[
            encode(Command(**common, id=f"{number:016x}", kind="set_lr_scale", lr_scale=0.05 + 0.9 * (number % 2)))
            for number in range(10_000)
        ]
    )
    last = Command(**common, id="f" * 16, kind="set_cadence", cadence_steps=1)

    def heard_out() -> bool:
        monitor.send(encode(last))  # an ack may be lost if the monitor reads slowly
        return monitor.acked(last.id)

    training.until(heard_out, seconds=200.0)
    refused = [ack for ack in monitor.of(Ack) if ack.command_id != last.id]
    assert {ack.outcome for ack in refused} == {"refused"}
    assert len(refused) > 100
    training.go_on()
    assert training.agent.status()["applied"]["lr_scale"] == 1.0
    assert training.untouched()


def test_a_greedy_monitor_gets_what_the_caps_allow_and_no_more(
    ring: Keyring, train: Train, demanding: Demanding
) -> None:
    monitor = demanding(ring.trust())
    limits = {"max_actions_per_hour": 3, "min_lr_scale": MIN_SCALE, "max_kss_alpha": 0.0, "max_kss_svd_rank": 2}
    training = train(monitor.endpoint, limits=limits)
    welcomed(training, monitor)
    greedy = KssSettings(alpha=1000.0, svd_rank=512, num_samples=65536, temperature=1000.0)
    for number in range(10):
        rate = monitor.command("set_lr_scale", lr_scale=1e-300, id=f"{number:016x}")
        kss = monitor.command("set_kss", kss=greedy, id=f"{number + 99:016x}")
        training.until(lambda rate=rate, kss=kss: monitor.acked(rate) and monitor.acked(kss))
    assert outcomes(monitor) == {"applied": 13, "refused": 7}
    training.go_on()
    applied = training.agent.status()["applied"]
    assert applied["lr_scale"] == MIN_SCALE
    assert (applied["kss"]["alpha"], applied["kss"]["svd_rank"], applied["kss"]["num_samples"]) == (0.0, 2, 1024)
    assert set(training.rates) == {0.01, 0.01 * MIN_SCALE}
    rates = [ack for ack in monitor.of(Ack) if ack.outcome == "applied" and "lr_scale" in ack.detail]
    assert len(rates) == 3
    assert all(f"lr_scale capped at {MIN_SCALE}" in ack.detail for ack in rates)
    assert training.agent.status()["errors"] == 0


def test_heartbeats_are_not_asked_for_faster_than_they_cost_nothing(
    ring: Keyring, train: Train, tmp_path: Path
) -> None:
    with ScriptedMonitor(tmp_path / "m", trust=ring.trust(), heartbeat_seconds=1e-9) as monitor:
        training = train(monitor.endpoint)
        welcomed(training, monitor)
        first, steps = len(monitor.of(Heartbeat)), len(training.losses)
        started = time.monotonic()
        training.until(lambda: len(training.losses) >= steps + 30)
        elapsed = time.monotonic() - started
        assert len(monitor.of(Heartbeat)) - first <= elapsed / MIN_HEARTBEAT_SECONDS + 5
        assert training.untouched()


def test_a_file_of_keys_that_is_open_to_others_keeps_koopmon_out_and_training_on(
    ring: Keyring, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    loose = Keyring(tmp_path / "loose")
    secret = loose.agent("victim").secret
    path = loose.place / "victim.secret"
    path.chmod(0o644)
    training = train("tcp://127.0.0.1:1", security={**loose.security(), "agent": "victim"})
    assert not training.agent.enabled
    assert f"chmod 600 {path}" in training.agent.status()["reason"]
    assert sum("training goes on" in record.getMessage() for record in caplog.records) == 1
    assert secret not in caplog.text
