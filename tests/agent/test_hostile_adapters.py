"""Third-party adapters that fail inside a training: the training is unaffected and stays watched if possible."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest

from koopmon import plugin_calls
from koopmon.agent.optimizer_watch import OptimizerWatch
from tests.agent.models import build, train_step
from tests.agent.scripted_monitor import Hello, ScriptedMonitor
from tests.agent.test_attach import hooks_of, optimizer_of
from tests.test_hostile_plugins import adapter, method, write

Attach = Callable[..., Any]
EVERY_STEP = {"cadence": {"dense_every": 1, "calm_every": 1, "warmup_steps": 100, "budget_ratio": 0.5}}
numbers = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    plugin_calls.say_once.cache_clear()
    plugin_calls._overdue.clear()
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    names = []

    def put(source: str) -> None:
        names.append(f"agents_plugin_{next(numbers)}")
        write(site, source, module=names[-1])
        invalidate_caches()

    yield put
    for name in names:
        sys.modules.pop(name, None)


FAILS_AT_FIRST = {
    "input-exits": method("block_input", "sys.exit(3)"),
    "output-exits": method("block_output", "sys.exit(3)"),
    "output-interrupts": method("block_output", "raise KeyboardInterrupt"),
    "output-text": method("block_output", "return 'state'"),
    "no-chain": method("block_output", "return args[1] + 1"),
    "nothing": method("block_input", "return None"),
    "grad-mode": method("block_input", "torch.set_grad_enabled(False)\nreturn None"),
}


@pytest.mark.parametrize("methods", FAILS_AT_FIRST.values(), ids=FAILS_AT_FIRST)
def test_an_adapter_that_finds_no_chain_gives_its_place_to_koopmon_s_own(
    methods: str,
    monitor: ScriptedMonitor,
    agents: Attach,
    install: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(adapter(methods + method("thresholds", "return {'act': 0.9}")))
    model, plain = build(), build()
    optimizer, plain_optimizer = optimizer_of(model), optimizer_of(plain)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    assert agent.status()["adapter"] == "theirs"
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(8):
        assert train_step(model, optimizer, step) == train_step(plain, plain_optimizer, step)
    status = agent.status()
    assert (status["enabled"], status["adapter"], status["num_layers"], status["errors"]) == (True, "transformer", 3, 0)
    monitor.wait(lambda: monitor.shards)
    monitor.wait(lambda: any(hello.num_layers for hello in monitor.of(Hello)))
    last = monitor.of(Hello)[-1]
    assert (last.adapter, last.thresholds, last.num_layers) == ("transformer", {}, 3)
    assert sum("is used for Model, as adapter 'theirs' of plugin theirs (theirs 1.2) failed" in record.getMessage()
               for record in caplog.records) == 1  # fmt: skip
    agent.close()
    assert hooks_of(model, optimizer) == 0


FAILS_LATER = {
    "exits": "sys.exit(3)",
    "interrupts": "raise KeyboardInterrupt",
    "raises": "raise RuntimeError",
    "text": "return 'state'",
}


@pytest.mark.parametrize("failure", FAILS_LATER.values(), ids=FAILS_LATER)
@pytest.mark.parametrize("name", ["block_output", "block_input", "token_mask"])
def test_an_adapter_that_fails_later_ends_the_agent_alone(
    failure: str, name: str, monitor: ScriptedMonitor, agents: Attach, install: Callable[[str], None]
) -> None:
    calls = 2 if name == "token_mask" else 12
    body = f"self.calls = getattr(self, 'calls', 0) + 1\nif self.calls > {calls}:\n    {failure}\n"
    install(adapter(method(name, f"{body}return super().{name}(*args)")))
    model, plain = build(), build()
    optimizer, plain_optimizer = optimizer_of(model), optimizer_of(plain)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(20):
        assert train_step(model, optimizer, step) == train_step(plain, plain_optimizer, step)
    status = agent.status()
    assert not status["enabled"]
    assert f"plugin theirs (theirs 1.2): {name}() of its adapter 'theirs'" in status["reason"]
    assert status["errors"] == 1


def test_a_sound_adapter_is_used_and_named(
    monitor: ScriptedMonitor, agents: Attach, install: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    install(adapter())
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(4):
        train_step(model, optimizer, step)
    monitor.wait(lambda: monitor.shards)
    assert agent.status()["adapter"] == "theirs"
    lines = [record.getMessage() for record in caplog.records]
    assert "koopmon: taps 3 blocks of blocks, found by adapter 'theirs' of plugin theirs (theirs 1.2)" in lines
    assert any("in place of koopmon's own 'transformer'" in line for line in lines)


@pytest.mark.parametrize(
    "settings", ["{'svd_rank': 0}", "{'alpha': 1e9}", "{'unknown': 1.0}", "{'num_samples': 5.5}", "{'tau_u': 0.0}"]
)
def test_kss_settings_out_of_bounds_do_not_end_the_agent(
    settings: str, monitor: ScriptedMonitor, agents: Attach, install: Callable[[str], None]
) -> None:
    install(adapter(method("kss_settings", f"return {settings}")))
    model = build()
    agent = agents(model, optimizer_of(model), endpoint=monitor.endpoint)
    monitor.wait(lambda: monitor.of(Hello))
    assert agent.enabled


def test_a_plugin_does_not_end_the_process_that_makes_an_optimizer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ends(*_: object) -> None:
        raise SystemExit(7)

    monkeypatch.setattr("koopmon.attach", ends, raising=False)
    model = build()
    OptimizerWatch().on_optimizer_created(optimizer_of(model))
    (record,) = caplog.records
    assert "not attached, training goes on without koopmon: SystemExit: 7" in record.getMessage()
