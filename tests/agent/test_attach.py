"""attach(): raised errors, logged errors, and copies, children and files without its objects."""

from __future__ import annotations

import copy
import gc
import io
import logging
import os
import pickle
import re
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import koopmon
from koopmon.config import Config, LimitsConfig
from koopmon.errors import AdapterError, ConfigError, EndpointError
from tests.agent.models import Model, batch, build, loss_of, record_rates, train_step
from tests.agent.scripted_monitor import Goodbye, Heartbeat, Hello, ScriptedMonitor

Attach = Callable[..., Any]
NOWHERE = "tcp://127.0.0.1:9"


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    modules = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return modules + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_without_an_endpoint_one_line_and_nothing_else(caplog: pytest.LogCaptureFixture, agents: Attach) -> None:
    model = build()
    optimizer = optimizer_of(model)
    with agents(model, optimizer) as agent:
        train_step(model, optimizer, 0)
        agent.log(loss=1.0, grad_norm=torch.tensor(2.0))
        assert not agent.enabled
        assert not agent.should_stop
        assert agent.status() == {"enabled": False, "reason": agent.status()["reason"]}
    assert hooks_of(model, optimizer) == 0
    (record,) = caplog.records
    assert "KOOPMON_ENDPOINT" in record.message
    assert "training goes on" in record.message


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"endpoint": "tcp://0.0.0.0:1"}, EndpointError, "name one host"),
        ({"endpoint": "nonsense"}, EndpointError, "nonsense"),
        ({"run": "no spaces allowed"}, ConfigError, "no spaces allowed"),
        ({"config": {"sampling": {"num_samples": 3}}}, ConfigError, "sampling.num_samples = 3"),
        (
            {"config": Config(limits=LimitsConfig(max_kss_alpha=1e9))},
            ConfigError,
            "limits.max_kss_alpha = 1000000000.0",
        ),
        ({"config": "/does/not/exist.toml"}, ConfigError, "/does/not/exist.toml"),
        ({"config": {"model": {"adapter": "telepathy"}}}, AdapterError, "telepathy"),
        ({"config": {"model": {"stack": "nowhere"}}}, AdapterError, "nowhere"),
    ],
)
def test_arguments_that_are_wrong_raise_in_one_line(
    arguments: dict[str, Any], kind: type[Exception], says: str, agents: Attach
) -> None:
    model = build()
    optimizer = optimizer_of(model)
    with pytest.raises(kind, match=re.escape(says)) as caught:
        agents(model, optimizer, **{"endpoint": NOWHERE, **arguments})
    assert "\n" not in str(caught.value)
    assert hooks_of(model, optimizer) == 0


def test_things_that_are_no_model_or_no_optimizer_raise(agents: Attach) -> None:
    with pytest.raises(TypeError, match="model is a function"):
        agents(build, optimizer_of(build()), endpoint=NOWHERE)
    with pytest.raises(TypeError, match="optimizer is a Model"):
        agents(build(), build(), endpoint=NOWHERE)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KOOPMON_ENDPOINT", "tcp://0.0.0.0:1", "name one host"),
        ("KOOPMON_ENDPOINT", "tcp://example.org:1", "/no/keys/here: no such file or directory; `koopmon keys make`"),
        ("KOOPMON_RUN", "no spaces allowed", "no spaces allowed"),
        ("KOOPMON_CONFIG", "/does/not/exist.toml", "/does/not/exist.toml"),
    ],
)
def test_an_environment_that_is_wrong_only_says_so(
    name: str,
    value: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    agents: Attach,
) -> None:
    monkeypatch.setenv("KOOPMON_ENDPOINT", NOWHERE)
    monkeypatch.setenv(name, value)
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer)
    train_step(model, optimizer, 0)
    assert not agent.enabled
    assert says in agent.status()["reason"]
    assert [says in record.message for record in caplog.records] == [True]


def test_an_adapter_that_only_the_environment_names_only_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agents: Attach
) -> None:
    (tmp_path / "k.toml").write_text('[model]\nadapter = "telepathy"\n')
    monkeypatch.setenv("KOOPMON_CONFIG", str(tmp_path / "k.toml"))
    agent = agents(build(), optimizer_of(build()), endpoint=NOWHERE)
    assert "telepathy" in agent.status()["reason"]


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.DataParallel(build())])
def test_a_model_that_cannot_be_watched_only_says_so(
    make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture, agents: Attach
) -> None:
    model = make()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=NOWHERE)
    assert not agent.enabled
    assert len(caplog.records) == 1
    assert hooks_of(model, optimizer) == 0


def test_blocks_that_are_no_chain_are_given_up_after_a_few_forwards(
    caplog: pytest.LogCaptureFixture, agents: Attach
) -> None:
    class Detour(Model):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            h = self.embedding(tokens)
            return self.head(sum(block(h) for block in self.blocks))

    torch.manual_seed(0)
    model = Detour()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=NOWHERE)
    for step in range(6):
        train_step(model, optimizer, step)
    assert "no residual chain" in agent.status()["reason"]
    assert sum("no snapshots" in record.message for record in caplog.records) == 1
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


def test_configuration_comes_as_an_object_a_mapping_or_a_file(tmp_path: Path, agents: Attach) -> None:
    (tmp_path / "k.toml").write_text("[sampling]\nnum_samples = 64\n")
    for config in (Config(), {"sampling": {"num_samples": 64}}, tmp_path / "k.toml", str(tmp_path / "k.toml")):
        model = build()
        assert agents(model, optimizer_of(model), endpoint=NOWHERE, config=config).enabled


def test_a_second_attach_gives_the_same_agent_and_close_lets_go_of_everything(
    monitor: ScriptedMonitor, agents: Attach
) -> None:
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="twice")
    num_hooks = hooks_of(model, optimizer)
    again = agents(model, optimizer_of(model), endpoint=monitor.endpoint)
    other = agents(nn.Sequential(model), optimizer, endpoint=monitor.endpoint)
    assert hooks_of(model, optimizer) == num_hooks > 0
    monitor.wait(lambda: agent.status()["connected"])
    assert again.status()["run"] == other.status()["run"] == "twice"
    again.close()
    again.close()
    agent.close()
    assert hooks_of(model, optimizer) == 0
    assert agent.status()["reason"] == "closed"
    monitor.wait(lambda: monitor.of(Goodbye))
    assert len(monitor.of(Goodbye)) == 1
    fresh = agents(model, optimizer, endpoint=monitor.endpoint)
    assert fresh.enabled
    monitor.wait(lambda: len({hello.incarnation for hello in monitor.of(Hello)}) == 2)


def test_an_exception_in_the_loop_goes_through_and_is_told(monitor: ScriptedMonitor) -> None:
    model = build()
    optimizer = optimizer_of(model)

    def loop() -> None:
        with koopmon.attach(model, optimizer, endpoint=monitor.endpoint) as agent:
            monitor.wait(lambda: agent.status()["connected"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    monitor.wait(lambda: monitor.of(Goodbye))
    assert monitor.of(Goodbye)[0].reason == "the training raised ZeroDivisionError"


def test_the_cadence_follows_what_the_monitor_can_judge(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    assert agent.status()["min_stride"] == 1
    monitor.min_stride, monitor.min_stride_from = 4, 6
    monitor.wait(lambda: "cannot judge all snapshots" in caplog.text)
    expected = [1, 2, 3, 4, 5, 9, 13, 17]
    for step in range(20):
        train_step(model, optimizer, step)
        num_sent = sum(each <= step for each in expected)
        monitor.wait(lambda num_sent=num_sent: len(monitor.shards) >= num_sent)  # none is dropped in a full queue
    assert [header.step for header, _ in monitor.shards] == expected
    assert agent.status()["min_stride"] == 4
    monitor.min_stride, monitor.min_stride_from = 1, 20
    monitor.wait(lambda: agent.status()["min_stride"] == 1)
    assert caplog.text.count("cannot judge all snapshots") == 1


def test_the_budget_is_charged_for_both_threads(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer = optimizer_of(model)
    cadence = {"dense_every": 1, "budget_ratio": 1e-12, "initial_credit_seconds": 100.0}
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": cadence})
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(20):
        train_step(model, optimizer, step)
        monitor.wait(lambda step=step: len(monitor.shards) >= step)
    stats, runtime = agent._runtime.stats, agent._runtime
    monitor.wait(lambda: train_step(model, optimizer, 0) is not None and len(monitor.shards) >= 20)
    assert min(stats.capture_seconds, stats.sending_seconds) > 0.0
    charged = 100.0 - runtime._budget.credit_seconds
    assert stats.capture_seconds < charged <= stats.snapshot_seconds + 1e-9


def test_copies_of_a_tapped_model_are_models_without_taps(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(3):
        train_step(model, optimizer, step)
    monitor.wait(lambda: len(monitor.shards) == 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        average,
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(model)),
    ):
        for _ in range(3):
            loss_of(twin, batch(0)).backward()
    assert agent.status()["step"] == 3
    assert agent.status()["errors"] == 0
    torch.save(optimizer.state_dict(), io.BytesIO())
    torch.save(model.state_dict(), io.BytesIO())
    copy.deepcopy(optimizer)
    train_step(model, optimizer, 3)
    monitor.wait(lambda: len(monitor.shards) == 3)


class Rows(Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.process
def test_data_loader_workers_are_left_alone(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    for step, _ in enumerate(DataLoader(Rows(), batch_size=2, num_workers=1, multiprocessing_context="fork")):
        train_step(model, optimizer, step)
        monitor.wait(lambda step=step: len(monitor.shards) == step)
    assert agent.enabled


@pytest.mark.process
def test_a_forked_child_can_train_and_end_and_says_nothing(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])
    train_step(model, optimizer, 0)
    child = os.fork()
    if child == 0:
        try:
            train_step(model, optimizer, 1)
            train_step(model, optimizer, 2)
            agent.close()
            again = koopmon.attach(model, optimizer, endpoint=NOWHERE)
            train_step(model, optimizer, 3)
            os._exit(0 if not agent.enabled and again.enabled else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    train_step(model, optimizer, 1)
    monitor.wait(lambda: monitor.shards)
    assert not monitor.of(Goodbye)
    assert agent.enabled


def test_a_hook_that_raises_shuts_the_agent_once(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = build(), build()
    optimizer, plain_optimizer = optimizer_of(model), optimizer_of(plain)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    monitor.wait(lambda: agent.status()["connected"])

    def broken(*_: Any) -> None:
        raise RuntimeError("the adapter is broken\nbadly")

    for step in range(8):
        if step == 4:
            monkeypatch.setattr(type(agent._runtime.adapter), "block_output", broken)
        assert train_step(model, optimizer, step) == train_step(plain, plain_optimizer, step)
    status = agent.status()
    assert not status["enabled"]
    assert status["errors"] == 1
    assert "the adapter is broken" in status["reason"]
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the adapter is broken" in record.message
    assert "\n" not in record.message
    monitor.wait(lambda: monitor.of(Goodbye))


def test_a_failing_agent_keeps_the_learning_rate_scale_in_force(
    monitor: ScriptedMonitor, agents: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint)
    monitor.wait(lambda: agent.status()["connected"])
    train_step(model, optimizer, 0)
    monitor.command("set_lr_scale", lr_scale=0.25)

    def rate_of_step(step: int) -> float:
        before = model.head.bias.detach().clone()
        train_step(model, optimizer, step)
        moved: Tensor = (before - model.head.bias.detach()) / model.head.bias.grad
        return round(float(moved.median()), 5)

    monitor.wait(lambda: rate_of_step(1) == 0.0025)
    agent._runtime.breaker.trip("a test", RuntimeError("broken"))
    assert rate_of_step(2) == 0.0025
    agent.close()
    assert rate_of_step(3) == 0.01


def test_the_agent_lives_and_dies_with_the_model(monitor: ScriptedMonitor) -> None:
    model = build()
    optimizer = optimizer_of(model)
    koopmon.attach(model, optimizer, endpoint=monitor.endpoint, config={"cadence": {"dense_every": 1}})
    gc.collect()
    monitor.wait(lambda: monitor.of(Hello))
    for step in range(20):
        train_step(model, optimizer, step)
        time.sleep(0.01)
    monitor.wait(lambda: monitor.shards)
    alive = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert alive() is None
    monitor.wait(lambda: monitor.of(Goodbye))
    monitor.wait(lambda: not any(thread.name == "koopmon-sender" for thread in threading.enumerate()))


ENDINGS = """
import os, signal, sys, time, torch, koopmon
from tests.agent.models import build, train_step

def script(end):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = koopmon.attach(model, optimizer, run=f"end-{end}")
    while not agent.status()["connected"]:
        time.sleep(0.01)
    for step in range(5):
        train_step(model, optimizer, step)
    if end == "exit":
        raise SystemExit(3)
    if end == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)  # another thread may be the one that the signal reaches

for end in ("return", "exit", "interrupt"):
    child = os.fork()
    if child == 0:  # a process that has imported what it needs, and ends as any interpreter does
        script(end)
        sys.exit(0)
    print(end, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.process
def test_a_script_that_never_closes_ends_well_with_a_goodbye(
    python: Callable[..., subprocess.CompletedProcess[str]], monitor: ScriptedMonitor
) -> None:
    done = python(ENDINGS, KOOPMON_ENDPOINT=monitor.endpoint)
    assert done.stdout.split() == ["return", "0", "exit", "3", "interrupt", "-2"]
    assert done.stderr.count("Traceback") == done.stderr.count("KeyboardInterrupt") == 1
    monitor.wait(lambda: len(monitor.of(Goodbye)) == 3)
    assert [goodbye.run for goodbye in monitor.of(Goodbye)] == ["end-return", "end-exit", "end-interrupt"]


def test_what_is_logged_reaches_the_monitor_and_nonsense_is_ignored(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    agent = agents(model, optimizer_of(model), endpoint=monitor.endpoint)
    monitor.wait(lambda: agent.status()["connected"])
    agent.log(loss=torch.tensor([2.5], requires_grad=True), grad_norm=3)
    agent.log(grad_norm=float("inf"))
    for _ in range(2):
        agent.log(loss="a lot")
        agent.log(loss=torch.zeros(3))
    beat = monitor.wait(lambda: next((each for each in monitor.of(Heartbeat) if each.training.loss is not None), None))
    assert beat.training.loss == 2.5
    assert beat.training.grad_norm == float("inf")
    assert sum("is ignored" in record.message for record in caplog.records) == 1


def test_processes_that_a_launcher_started_to_train_apart_are_runs_of_their_own(
    monitor: ScriptedMonitor, agents: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="apart", config={"cadence": {"dense_every": 1}})
    assert agent.status()["world_size"] is None, "ranks have been announced, and none has been met"
    for step in range(3):
        train_step(model, optimizer, step)
    monitor.wait(lambda: agent.status()["connected"])
    train_step(model, optimizer, 3)
    train_step(model, optimizer, 4)
    monitor.wait(lambda: monitor.shards)
    assert agent.status()["run"] == "apart-rank1"
    assert (agent.status()["process_rank"], agent.status()["world_size"], agent.status()["acts"]) == (0, 1, True)


class Nested(torch.optim.SGD):
    """A subclass whose step calls its parent's: both may have the hooks."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_whose_step_calls_another_is_scaled_once(monitor: ScriptedMonitor, agents: Attach) -> None:
    model, parameter = build(), nn.Parameter(torch.zeros(1))
    torch.optim.SGD([parameter], lr=1.0)  # from here on the parent's step runs hooks too
    optimizer = Nested(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint)
    monitor.wait(lambda: agent.status()["connected"])
    monitor.command("set_lr_scale", lr_scale=0.5)
    rates: list[float] = []
    record_rates(optimizer, rates)

    def step() -> bool:
        loss_of(model, batch(0)).backward()
        optimizer.step()
        return rates[-1] != 0.01

    monitor.wait(step)
    step()
    assert set(rates) - {0.01} == {0.005}
    assert agent.status()["step"] == len(rates) / 2, "both have called the hook"
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_hook_of_the_user_may_close_the_agent_in_a_step(monitor: ScriptedMonitor) -> None:
    """torch iterates over the hooks of an optimizer while it calls them. A change of them would end the training."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: agent.close() if len(calls) == 1 else None)
    agent = koopmon.attach(model, optimizer, endpoint=monitor.endpoint, run="job")
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for step in range(4):
        train_step(model, optimizer, step)
    assert len(calls) == 4
    assert not agent.enabled
