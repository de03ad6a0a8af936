"""Commands and records from peers' numbers and the history stay within the bounds of protocol and SQLite."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import sqlite3
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from prometheus_client import CollectorRegistry

from koopmon import policy
from koopmon.config import Config, KssConfig, MonitorConfig, PolicyConfig, RiskConfig, StoreConfig, merged
from koopmon.errors import ProtocolError
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.assembler import Assembler
from koopmon.monitor.pending_commands import MAX_REPLACED, Answered
from koopmon.monitor.registry import LAST_STEP, RunRegistry
from koopmon.monitor.run_controller import Assessment, ControllerCheckpoint, RunController
from koopmon.risk import online_detector
from koopmon.risk.loss_zscore import LossZScore
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.telemetry.metrics import MAX_LAYERS, Metrics
from koopmon.wire.codec import encode
from koopmon.wire.messages import (
    MAX_MODULUS,
    MAX_STEP,
    Ack,
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    Hello,
    KssSettings,
    Shard,
    TrainingStep,
)
from tests import factories

NAME: dict[str, Any] = {"run": "job", "incarnation": "aaaaaaaa"}
LARGEST = sys.float_info.max


def hello(**fields: Any) -> Hello:
    values = {"process_rank": 0, "world_size": 2, "num_senders": 1, "adapter": "x", "num_layers": 2, "width": 8}
    words = {"koopmon_version": "0", "torch_version": "0", "applied": Applied(), "acts": True, "step": 0}
    return Hello(**NAME, **{**values, **words, **fields})


def sample(step: int, **fields: Any) -> TrainingStep:
    scalars = {"learning_rate": 0.1, "loss": 2.0, "grad_norm": 1.0, "lr_scale": 1.0, "kss_alpha": 0.0}
    return TrainingStep(step=step, **{**scalars, **fields})


def make_guard(name: str = "lr", *, memory: bytes | None = None, step: int = 0, **fields: Any) -> RunController:
    config = Config(policy=PolicyConfig(name=name, cooldown_steps=1), kss=KssConfig(method="published"))  # type: ignore[arg-type]
    return RunController(config, hello(step=step, **fields), Applied(), checkpoint=memory)


def explode(guard: RunController, step: int = 10, *, now: float = 0.0) -> Assessment:
    guard.policy_state = dataclasses.replace(guard.policy_state, high_streak=1)  # one alone is no alarm
    return guard.assess(now, sample(step), None, step=step)


@functools.cache
def amplifying(factor: float, seed: int = 0) -> SpectralProfile:
    """Build a stream that each layer multiplies: its spectral radius is about `factor`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((64, 8), generator=generator)
    rotation = torch.linalg.qr(torch.randn((8, 8), generator=generator))[0]
    return profile_states(torch.stack([x, factor * x @ rotation]), svd_rank=8, kreiss="never")


# Commands.


@pytest.mark.parametrize("step", [0, 1, LAST_STEP, MAX_STEP - 60, MAX_STEP - 14, MAX_STEP - 1, MAX_STEP])
@pytest.mark.parametrize("name", ["lr", "kss+lr"])
def test_no_step_takes_a_command_beyond_what_can_be_said(step: int, name: str) -> None:
    verdict = explode(make_guard(name), step)
    assert {command.kind for command in verdict.commands} == {"set_lr_scale", "set_cadence"}
    for command in verdict.commands:
        assert encode(command)
        assert step <= command.expires_step <= MAX_STEP


ABSURD = [
    {"kind": "set_lr_scale", "lr_scale": 0.0},
    {"kind": "set_lr_scale", "lr_scale": -0.5},
    {"kind": "set_lr_scale", "lr_scale": 1.0000001},
    {"kind": "set_lr_scale", "lr_scale": math.nan},
    {"kind": "set_lr_scale", "lr_scale": math.inf},
    {"kind": "set_lr_scale"},
    {"kind": "set_lr_scale", "lr_scale": 0.5, "ramp_steps": 100_001},
    {"kind": "set_lr_scale", "lr_scale": 0.5, "ramp_steps": -1},
    {"kind": "set_lr_scale", "lr_scale": 0.5, "ramp_steps": 1 << 70},
    {"kind": "set_lr_scale", "lr_scale": 0.5, "expires_in_steps": -100},
    {"kind": "set_cadence", "cadence_steps": 0},
    {"kind": "set_cadence", "cadence_steps": 100_001},
    {"kind": "set_cadence", "cadence_steps": 1 << 64},
    {"kind": "set_cadence", "cadence_steps": 1, "cadence_until_step": -1},
    {"kind": "set_lr_scale", "lr_scale": 0.5, "cadence_until_step": 5},
    {"kind": "set_kss", "kss": KssSettings(tau_u=1000.1)},
    {"kind": "set_kss", "kss": KssSettings(tau_u=math.inf)},
    {"kind": "set_kss", "kss": KssSettings(temperature=0.0)},
    {"kind": "set_kss", "kss": KssSettings(beta=math.nan)},
    {"kind": "set_kss", "kss": KssSettings(every=10_001)},
    {"kind": "set_kss", "kss": KssSettings(alpha=1e4)},
    {"kind": "set_kss", "kss": KssSettings(svd_rank=1 << 63)},
    {"kind": "panic"},
    {"kind": "stop", "reason": "\ud800"},
]


@pytest.mark.parametrize("fields", ABSURD, ids=str)
def test_a_command_that_cannot_be_said_is_neither_recorded_nor_expected(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = make_guard("kss+lr")
    before = guard.policy_state = policy.PolicyState(high_streak=1)
    actions = (policy.Action(kind="stop", reason="sound"), policy.Action(**{"reason": "on purpose", **fields}))

    def decide(*_: Any) -> policy.Decision:
        state = policy.PolicyState(phase="acting", lr_scale=0.5, acted_at=10, action_times=(0.0, 0.0))
        return policy.Decision(state=state, commands=actions, reason="on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(policy, "decide", decide)
        verdict = explode(guard)
    assert verdict.unencodable is not None
    assert verdict.unencodable.reason == "schema"
    assert (verdict.decision, verdict.commands, verdict.remarkable) == (None, (), False)
    assert not guard.pending
    assert guard.pending.due(1e9) == []
    assert guard.policy_state == before, "as if it had not been decided"
    assert explode(guard, 11).commands, "the next one is"


def test_reasons_are_cut_to_what_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (command, *_) = explode(make_guard()).commands
    assert len(command.reason) <= 512
    long = policy.Action(kind="stop", reason="é" * 5000)
    guard = make_guard()
    assert encode(guard._command(long, 3))


@pytest.mark.parametrize(("factor", "tau_u"), [(2.0, 3.0), (600.0, 900.0), (700.0, MAX_MODULUS), (950.0, MAX_MODULUS)])
def test_kss_begins_where_the_protocol_allows_it(factor: float, tau_u: float) -> None:
    """1.5 times the calm radius, and at least the lower bound."""
    guard = make_guard("kss")
    for step in range(1, 30):
        verdict = guard.assess(float(step), sample(step), amplifying(factor), step=step)
        assert not verdict.commands
    lurch = guard.assess(30.0, sample(30), amplifying(1.0 if factor > 100.0 else 500.0), step=30)
    (command,) = [each for each in lurch.commands if each.kind == "set_kss"]
    assert command.kss is not None
    assert command.kss.tau_u == pytest.approx(tau_u, rel=0.02)
    assert encode(command)
    assert guard.policy_state.kss == command.kss, "what is remembered is what was said"


@pytest.mark.parametrize("factor", [1100.0, 1e6, 1e12])
def test_where_it_could_only_begin_below_the_calm_radius_kss_stays_off_and_says_so(factor: float) -> None:
    guard = make_guard("kss+lr")
    for step in range(1, 30):
        guard.assess(float(step), sample(step), amplifying(factor), step=step)
    verdicts = [guard.assess(float(step), sample(step), amplifying(1.0), step=step) for step in range(30, 50)]
    kinds = [command.kind for verdict in verdicts for command in verdict.commands]
    assert "set_kss" not in kinds
    assert "set_lr_scale" in kinds, "back-off goes on alone"
    (said,) = [each for each in verdicts if each.decision and "KSS stays off" in each.decision.reason]
    assert guard.policy_state.kss_barred
    assert said.remarkable, "it is recorded, once"


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e300, LARGEST])
@pytest.mark.parametrize("slope", [0.0, 10.0, 1000.0])
def test_no_learning_rate_blinds_the_detector(rate: float, slope: float) -> None:
    """The risk of a run that jumps and stays is a number."""
    config = Config(risk=RiskConfig(prior_slope=slope, critical_rate=1e-9))
    guard = RunController(config, hello(rate_sized_steps=True, update_exponent=0.0), Applied())
    for step, factor in enumerate((2.0, 2.0, 300.0, 300.0), start=1):
        verdict = guard.assess(float(step), sample(step, learning_rate=rate), amplifying(factor), step=step)
        assert math.isfinite(verdict.risk.value)
        assert 0.0 <= verdict.risk.forecast <= 1.0
    assert verdict.risk.value > 0.0
    assert guard.divergence_probability is None


def test_a_risk_that_is_no_number_is_an_error_and_no_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = make_guard()
    state = online_detector.OnlineRisk(value=math.nan, reason="on purpose")
    monkeypatch.setattr(online_detector, "assess", lambda *_: (online_detector.RiskState(step=7), state))
    with pytest.raises(ArithmeticError, match="risk at step 3 is nan"):
        guard.assess(0.0, sample(3), None, step=3)


@pytest.mark.parametrize(
    "hints",
    [
        {"temperature": 1001.0, "beta": -1.0, "every": 10_001, "svd_rank": 513, "num_samples": 1 << 40},
        {"temperature": math.inf, "beta": math.nan, "layer_fraction": 0.0, "alpha": 1e308},
    ],
)
def test_hints_beyond_the_bounds_are_left_out(hints: dict[str, float]) -> None:
    assert merged(KssConfig(), hints, "kss") == KssConfig()


@pytest.mark.parametrize(
    "name", [f for f in RiskConfig.__struct_fields__ if f not in ("min_gap_steps", "max_gap_steps")]
)
def test_no_threshold_of_an_adapter_blinds_the_detector(name: str) -> None:
    for value in (0.0, 5e-324, 1e-6, 1.0, 1e6, LARGEST, -LARGEST):
        guard = make_guard(thresholds={name: value}, rate_sized_steps=True, update_exponent=0.0)
        for step, factor in enumerate((2.0, 300.0, 2.0), start=1):
            verdict = guard.assess(float(step), sample(step, learning_rate=1e300), amplifying(factor), step=step)
            assert math.isfinite(verdict.risk.value)


# Steps at receipt.


BEYOND = [LAST_STEP + 1, MAX_STEP - 14, MAX_STEP]


@pytest.mark.parametrize("step", BEYOND)
def test_a_hello_at_a_step_that_has_no_answer_is_refused_in_words(step: int) -> None:
    registry = RunRegistry(MonitorConfig())
    with pytest.raises(ProtocolError, match=f"at step {step}: expected a step of at most {LAST_STEP}") as caught:
        factories.admit(registry, 0.0, hello(step=step), b"peer")
    assert caught.value.reason == "refused"
    assert registry.get("job") is None
    assert factories.admit(registry, 0.0, hello(step=LAST_STEP), b"peer").run.step == LAST_STEP


@pytest.mark.parametrize("step", BEYOND)
def test_every_other_message_at_such_a_step_is_refused_and_leaves_the_run_as_it_is(step: int) -> None:
    registry = RunRegistry(MonitorConfig())
    factories.admit(registry, 0.0, hello(step=3), b"peer")
    shape = {"num_senders": 1, "first_point": 0, "num_points": 2, "num_samples": 1, "width": 1, "dtype": "float32"}
    later: list[Any] = [
        Heartbeat(**NAME, process_rank=0, training=TrainingStep(step=step), applied=Applied(lr_scale=0.5)),
        Ack(**NAME, command_id="b" * 8, outcome="applied", step=step, applied=Applied(lr_scale=0.5)),
        Goodbye(**NAME, process_rank=0, step=step),
    ]
    for message in later:
        with pytest.raises(ProtocolError, match=f"at step {step}") as caught:
            registry.on_message(1.0, message, b"peer")
        assert caught.value.reason == "refused"
    with pytest.raises(ProtocolError, match=f"at step {step}"):
        registry.on_shard(1.0, Shard(**NAME, process_rank=0, training=TrainingStep(step=step), **shape))
    run = registry.get("job")
    assert run is not None
    assert (run.step, run.last_heard, run.applied) == (3, 0.0, Applied())


# What the history hands back.


def altered(**changes: Any) -> bytes:
    """Return the memory of a guard with some values replaced."""
    guard = make_guard("kss+lr")
    for step in (1, 2, 3):
        guard.assess(float(step), sample(step), amplifying(2.0, step), step=step)
    told = json.loads(guard.checkpoint())
    for path, value in changes.items():
        part, _, name = path.partition("__")
        told[part][name] = value
    return json.dumps(told).encode()


FORGED = [
    *({"risk__step": value} for value in (-1, 1 << 53, 1 << 64, "x", None, 1.5)),
    *({"risk__z": value} for value in ([1e300], [0.0] * 5000, [None], "x")),
    *({"risk__speed": value} for value in ([1e300, 1e300], [-1.0], [0.1] * 7, [None, None])),
    *({"risk__restlessness": value} for value in (-1.0, 2.0, 1e308)),
    *({"risk__lr_scale": value} for value in (0.0, -1.0, 7.0)),
    *({"risk__surprise": {"losses": value, "value": 0.0}} for value in ([1e308] * 20, [1.0] * 1000)),
    *({"policy__lr_scale": value} for value in (0.0, -0.5, 2.0, 1e308, None)),
    *({"policy__phase": value} for value in ("panic", 3, None)),
    *({"policy__acted_at": value} for value in (-1, 1 << 53, 1 << 52, MAX_STEP)),
    *({"policy__calm_since": value} for value in (-1, 1 << 52, MAX_STEP)),
    *({"policy__kss_on_at": value} for value in (-1, 1 << 52, MAX_STEP)),
    *({"policy__dense_until": value} for value in (-1, 1 << 52, MAX_STEP, 1 << 60)),
    *({"policy__num_cuts": value} for value in (-1, 1 << 52, 1 << 80)),
    *({"policy__calm_radius": value} for value in (-1.0, 1e308, "x")),
    *({"policy__action_times": value} for value in ([1e300] * 200, [-1e300], [0.0] * 200_000, [None])),
    *({"policy__kss": value} for value in ({"tau_u": 1e9}, {"alpha": -1.0}, None)),
    *({"policy__loss_at_kss": value} for value in (1e308, -1e308)),
    *({"initial__score": value} for value in (7.0, -1.0, 1e308)),
]


@pytest.mark.parametrize("changes", FORGED, ids=str)
def test_what_a_history_hands_back_is_checked_like_what_a_peer_says(changes: dict[str, Any]) -> None:
    """With any value, the run is guarded, at once or after the time that real memory may need."""
    guard = make_guard("kss+lr", memory=altered(**changes), step=5)
    assert guard.initial is None or guard.initial.score is None or 0.0 <= guard.initial.score <= 1.0
    cuts: list[Command] = []
    for step in range(5, 200):
        verdict = guard.assess(1000.0 + step, sample(step), amplifying(300.0 if step % 20 == 0 else 2.0), step=step)
        assert math.isfinite(verdict.risk.value)
        assert verdict.unencodable is None
        for command in verdict.commands:
            assert encode(command)
        cuts += [command for command in verdict.commands if command.kind == "set_lr_scale"]
        msgspec.json.decode(guard.checkpoint(), type=ControllerCheckpoint)
    assert cuts, "it still backs off"
    assert guard.policy_state.kss_on_at is None or guard.policy_state.kss_on_at < 200


@pytest.mark.parametrize(
    "memory", [b"", b"\xff", b"[" * 100_000, b'{"x":' + b"[" * 100_000, b"null", b"1e400", 7, "{}"]
)
def test_a_memory_that_is_none_is_left_out_with_one_line(memory: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        guard = make_guard(memory=memory)
    assert guard.policy_state == policy.PolicyState()
    assert explode(guard).commands
    (record,) = caplog.records
    assert record.getMessage().isprintable()


@pytest.mark.parametrize("value", [7, b"\xff", "[", "[" * 100_000, '{"lr_scale": 1e400}', '{"lr_scale": 0}', 1.5])
def test_what_was_applied_is_checked_too(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite3"
    store = HistoryWriter.open(path)
    store.record_applied(0.0, "job", "aaaaaaaa", 3, Applied(lr_scale=0.5))
    assert store.launches.last_applied("job", other_than="bbbbbbbb") == Applied(lr_scale=0.5)
    store.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE incarnations SET applied = ?", (value,))
    database.close()
    store = HistoryWriter.open(path)
    assert store.launches.last_applied("job", other_than="bbbbbbbb") is None
    store.close()


def test_a_record_that_cannot_be_written_keeps_no_other_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Records of one run: SQLite has no integer beyond 2**63, and JSON no lone surrogate."""
    clock = [0.0]
    store = HistoryWriter.open(tmp_path / "history.sqlite3", StoreConfig(), clock=lambda: clock[0])
    for _ in range(5):
        store.record_applied(0.0, "bad", "aaaaaaaa", 1 << 70, Applied())
        store.record_heartbeat(
            0.0,
            Heartbeat(**{**NAME, "run": "bad"}, process_rank=0, training=TrainingStep(step=1 << 70), applied=Applied()),
        )
        store.record_hello(0.0, msgspec.structs.replace(hello(), run="bad", hostname="\ud800"))
        store.record_applied(0.0, "good", "aaaaaaaa", 3, Applied(lr_scale=0.5))
    assert store.recording
    assert store.take_lost() == 15
    assert store.launches.last_applied("good", other_than="") == Applied(lr_scale=0.5)
    assert caplog.text.count("a record that cannot be written is left out") == 1
    store.close()


# Means of what peers send.


def test_losses_and_observables_beyond_what_can_be_summed_make_a_snapshot() -> None:
    """This also holds if time closes the step, without a message to reject."""
    failures: list[Any] = []
    for num_senders, expected in ((2, 1), (3, 0)):
        assembler = Assembler(
            timeout_seconds=5.0,
            max_bytes=1 << 30,
            min_samples=1,
            on_drop=lambda *_: None,
            on_failure=lambda *each: failures.append(each),
        )
        snapshots = []
        for rank in (0, 1):
            header = Shard(
                **NAME,
                process_rank=rank,
                num_senders=num_senders,
                training=TrainingStep(step=1, loss=LARGEST, grad_norm=LARGEST),
                first_point=0,
                num_points=2,
                num_samples=3,
                width=2,
                dtype="float32",
                observables={"a": [LARGEST]},
            )
            snapshots += assembler.add(0.0, header, [torch.zeros((3, 2))] * 2)
        assert len(snapshots) == expected
        snapshots += assembler.expire(10.0)
        (snapshot,) = snapshots
        assert (snapshot.training.loss, snapshot.training.grad_norm) == (LARGEST, LARGEST)
        assert snapshot.observables["a"] == (LARGEST,)
    assert not failures


def test_series_that_share_layers_survive_what_cannot_be_summed() -> None:
    metrics = Metrics(CollectorRegistry(), {})
    metrics.set_observables("job", {"a": [LARGEST] * (2 * MAX_LAYERS), "b": [1.0] * (2 * MAX_LAYERS)})
    values = {
        family.name: sample.value
        for family in metrics.collect()
        for sample in family.samples
        if "observable" in family.name
    }
    assert values["koopmon_observable_b"] == 1.0
    assert all(math.isfinite(value) for value in values.values())


def test_a_loss_that_is_absurd_surprises_and_no_more() -> None:
    surprise = LossZScore()
    for loss in (2.0, 1e29, -1e29, LARGEST, -LARGEST, math.inf, math.nan, 1e-320) * 5:
        surprise = surprise.after(loss)
        assert surprise.value <= 1e6
        assert msgspec.json.decode(msgspec.json.encode(surprise), type=LossZScore) == surprise


# What became of commands, once each.


def test_a_replaced_command_counts_with_its_late_answer_or_not_at_all() -> None:
    guard = make_guard()
    first = explode(guard, 10).commands
    second = explode(guard, 100, now=1.0).commands
    for command in (*first, *second):
        ack = Ack(**NAME, command_id=command.id, outcome="applied", step=101, applied=Applied())
        answered = guard.acknowledge(ack)
        assert answered == Answered(command.kind, first=True, counts=True)
    assert guard.expire(1e9, MAX_STEP, Applied()) == []
    assert guard.pending.abandon() == []


def test_what_was_counted_as_unanswered_does_not_count_again() -> None:
    guard = make_guard()
    commands = explode(guard, 10).commands
    assert guard.expire(100.0, 1000, Applied()) == list(commands)
    for first in (True, False):
        for command in commands:
            ack = Ack(**NAME, command_id=command.id, outcome="applied", step=1001, applied=Applied())
            assert guard.acknowledge(ack) == Answered(command.kind, first=first, counts=False)


def test_replaced_commands_do_not_pile_up() -> None:
    guard = make_guard()
    counted = 0
    for number in range(500):  # a run whose step does not advance
        guard.policy_state = policy.PolicyState(high_streak=1)
        guard.assess(float(number), sample(10), None, step=LAST_STEP)
        counted += len(guard.expire(float(number), 10, Applied()))
    assert len(guard.pending._pending) <= MAX_REPLACED + 4
    assert counted + len(guard.pending._pending) == 1000
