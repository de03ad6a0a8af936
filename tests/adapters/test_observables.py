"""Measurements of each family against another computation of the same quantity, and their way to the monitor."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import koopmon
from koopmon.api import Stack
from koopmon.observables import Readings, declared, flaw, shielded, tabulate
from koopmon.plugins import adapters, select
from koopmon.profiling import capture_states
from tests.adapters.family_zoo import CASES, E, L, jamba, kan_transformer, mamba2, mambapy, own_experts, switch_encoder
from tests.adapters.zoo import Case, nano
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.stacks import NoSynchronisation

torch.set_num_threads(1)


def build(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name][0]()


def measured(case: Case) -> Mapping[str, Sequence[float | None]]:
    model, args, kwargs = case
    return capture_states(model, *args, **kwargs).observables


@contextmanager
def recorded(model: nn.Module, suffix: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """Record (arguments, output) of every module with this suffix, in the order of the calls."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    chosen = [module for name, module in model.named_modules() if name.endswith(suffix)]
    handles = [each.register_forward_hook(lambda _, args, out: calls.append((args, out))) for each in chosen]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "own_experts"])
def test_routing_against_counts_and_logarithms(name: str) -> None:
    model, args, kwargs = build(name)
    model.eval()
    with recorded(model, ".gate") as calls, torch.no_grad():
        model(*args, **kwargs)
    found = measured((model, args, kwargs))
    entropies, loads = [], []
    for _, output in calls:
        logits = output[0] if isinstance(output, tuple) else output
        weights = logits.sigmoid() if name == "deepseek_v3" else logits.exp()
        shares = (weights / weights.sum(-1, keepdim=True)).reshape(-1, E).double()
        entropies.append(float(-(shares * shares.log()).sum(1).mean()) / math.log(E))
        chosen = output[2] if isinstance(output, tuple) else logits.topk(2).indices
        counts = [int((chosen == expert).sum()) for expert in range(E)]
        loads.append(max(counts) / (sum(counts) / E))
    if name == "own_experts":  # its forward calls the router twice
        entropies, loads = entropies[::2], loads[::2]
    assert [value for value in found["router_entropy"] if value is not None] == pytest.approx(entropies, abs=1e-5)
    assert [value for value in found["load_imbalance"] if value is not None] == pytest.approx(loads)
    shares = [2 * load / E for load in loads]
    assert [value for value in found["top_expert_share"] if value is not None] == pytest.approx(shares)
    assert "dropped_token_ratio" not in found, "nothing is dropped without a capacity"


def test_a_router_that_gives_probabilities_is_read_as_such() -> None:
    model, args, kwargs = build("own_experts")
    before = measured((model, args, kwargs))["router_entropy"]
    for block in model.transformer:
        block.mlp.gate.register_forward_hook(lambda module, args, logits: logits.softmax(-1))
    assert measured((model, args, kwargs))["router_entropy"] != pytest.approx(before)
    for block in model.transformer:  # all tokens on one expert: zero entropy and the largest imbalance
        block.mlp.gate.register_forward_hook(
            lambda module, args, shares: functional.one_hot(shares.argmax(-1) * 0, E) * 1.0
        )
        block.mlp.top_k = 1
    found = measured((model, args, kwargs))
    assert found["router_entropy"] == [0.0] * L
    assert found["load_imbalance"] == [float(E)] * L


def test_dropped_tokens_against_the_experts_own_capacity() -> None:
    model, args, kwargs = build("switch_encoder")
    model.eval()
    with recorded(model, ".router") as calls, torch.no_grad():
        model(*args, **kwargs)
    expected = []
    for _, (_, _, logits) in calls:
        kept = 0
        for row in logits.argmax(-1):  # two places per expert and sequence
            kept += sum(min(2, int((row == expert).sum())) for expert in range(E))
        expected.append(1 - kept / logits.shape[:-1].numel())
    found = [value for value in measured((model, args, kwargs))["dropped_token_ratio"] if value is not None]
    assert found == pytest.approx(expected)
    assert max(found) > 0


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba", "mambapy"])
def test_state_spectra_against_the_model_s_own_projections(name: str) -> None:
    """Compute every eigenvalue explicitly from the output of `x_proj` in the model's own forward."""
    model, args, kwargs = build(name)
    model.eval()
    with recorded(model, ".x_proj") as calls, torch.no_grad():
        model(*args, **kwargs)
    mixers = [module for module in model.modules() if "A_log" in module._parameters]
    radii, masses = [], []
    for mixer, (_, output) in zip(mixers, calls, strict=True):
        low_rank = output[..., : mixer.dt_proj.in_features]
        if getattr(mixer, "dt_layernorm", None) is not None:
            low_rank = mixer.dt_layernorm(low_rank)
        steps = functional.softplus(mixer.dt_proj(low_rank)).detach()
        spectrum = torch.exp(steps[..., None] * -mixer.A_log.detach().exp())
        radii.append(float(spectrum.max()))
        masses.append(float(((spectrum >= 0.9) & (spectrum <= 1.1)).float().mean()))
    found = measured((model, args, kwargs))
    assert [value for value in found["state_radius"] if value is not None] == pytest.approx(radii, abs=1e-5)
    assert [value for value in found["state_near_unit_mass"] if value is not None] == pytest.approx(masses, abs=2e-3)


def test_state_spectra_of_the_second_kind_obey_the_limit_of_the_step() -> None:
    torch.manual_seed(0)
    model, args, kwargs = mamba2()
    mixers = [module for module in model.modules() if "A_log" in module._parameters]
    free = measured((model, args, kwargs))
    for mixer in mixers:
        mixer.time_step_limit = (0.5, 0.5)
    held = measured((model, args, kwargs))
    for layer, mixer in enumerate(mixers):
        spectrum = torch.exp(-0.5 * mixer.A_log.detach().exp())
        assert held["state_radius"][layer] == pytest.approx(float(spectrum.max()))
        assert held["state_near_unit_mass"][layer] == pytest.approx(float((spectrum >= 0.9).float().mean()))
        with recorded(model.eval(), f"layers.{layer}.mixer.in_proj") as calls, torch.no_grad():
            mixer.time_step_limit = (0.0, math.inf)
            model(*args, **kwargs)
        steps = functional.softplus(calls[0][1][..., -8:] + mixer.dt_bias.detach())
        assert free["state_radius"][layer] == pytest.approx(float((steps * -mixer.A_log.detach().exp()).exp().max()))


def test_long_batches_are_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, (batch,), _ = mambapy()
    module = __import__(type(adapters()["mamba"]).__module__, fromlist=["MAX_TOKENS"])
    whole = measured((model, (batch[:1, :4],), {}))
    monkeypatch.setattr(module, "MAX_TOKENS", 4)
    assert measured((model, (batch,), {}))["state_radius"] == pytest.approx(whole["state_radius"], abs=1e-6)


def test_grid_overflow_against_a_count() -> None:
    torch.manual_seed(0)
    model, args, kwargs = kan_transformer()
    with recorded(model.eval(), ".mlp.layer") as calls, torch.no_grad():
        model(*args, **kwargs)
    expected = [float(((given[0] < -1) | (given[0] > 1)).float().mean()) for given, _ in calls]  # pykan's default grid
    assert measured((model, args, kwargs))["grid_overflow_ratio"] == pytest.approx(expected)
    assert min(expected) > 0
    assert adapters()["kan"].thresholds() == {"reliability_weight": 0.25}


def test_a_hybrid_measures_what_both_of_its_families_need() -> None:
    torch.manual_seed(0)
    found = measured(jamba())
    assert [value is None for value in found["state_radius"]] == [False, True, False, True]
    assert [value is None for value in found["router_entropy"]] == [True, False, True, False]


@pytest.mark.parametrize("name", ["mixtral", "switch_encoder", "mamba", "mamba2", "kan_transformer", "jamba"])
def test_readings_never_wait_for_the_device(name: str) -> None:
    model, args, kwargs = build(name)
    selection = select(model)
    readings = Readings()
    calls: list[Any] = []
    for observable in declared(selection.families, selection.candidates[0]):
        observable.module.register_forward_hook(
            lambda _, args, kwargs, out, each=observable: calls.append((each, args, kwargs, out)), with_kwargs=True
        )
    model(*args, **kwargs)
    with NoSynchronisation():
        for each, given, named, output in calls:
            readings.take(each, given, named, output)
        gathered = readings.gather()
    assert gathered is not None
    assert gathered.values.shape == (len(gathered.keys),)
    assert len(gathered.keys) == len({(each.name, each.layer) for each, *_ in calls})


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[ScriptedMonitor]:
    with ScriptedMonitor(tmp_path / "m") as scripted:
        yield scripted


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shard_carries_the_readings_of_its_own_forward(checkpointing: bool, monitor: ScriptedMonitor) -> None:
    """With a learning rate of 0 and no dropout, each snapshot measures the same values as a profile on its batch."""
    model, (tokens,), _ = build("mixtral")
    batches = [tokens, tokens.flip(1), (tokens + 7) % 50]
    expected = [measured((model, (batch,), {})) for batch in batches]
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with koopmon.attach(model, optimizer, endpoint=monitor.endpoint) as agent:
        monitor.wait(lambda: agent.status()["connected"])
        for step, batch in enumerate(batches):
            model(batch, labels=batch).loss.backward()
            model.eval()
            model(tokens)  # irrelevant, as are later calls of the same step
            model.train()
            model(batches[0])
            optimizer.step()
            monitor.wait(lambda seen=step: len(monitor.shards) == seen)
    for header, _ in monitor.shards:
        assert header.observables.keys() == expected[header.step].keys()
        for name, values in expected[header.step].items():
            assert header.observables[name] == pytest.approx(values, abs=1e-6)


class Faulty(type(adapters()["transformer"])):  # type: ignore[misc]
    """Adapter with the measurements of the test."""

    name = "faulty"
    measures = {"ours": "A reading."}  # noqa: RUF012

    def __init__(self, read: Any, name: str = "ours") -> None:
        self.read, self.called = read, name

    def observables(self, stack: Stack) -> list[koopmon.Observable]:
        return [koopmon.Observable(self.called, point.layer, point.module, self.read) for point in stack.points]

    def shielded(self, stack: Stack) -> list[nn.Module]:
        raise RuntimeError("cannot tell")


def failing(*_: Any) -> Tensor:
    raise RuntimeError("no reading")


@pytest.mark.parametrize(("read", "says"), [(failing, "no reading"), (lambda *_: torch.zeros(2), r"shape \(2,\)")])
def test_a_reading_that_fails_is_off_and_snapshots_go_on(
    read: Any, says: str, monitor: ScriptedMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    from koopmon.agent.runtime import AgentRuntime
    from koopmon.config import Config

    torch.manual_seed(0)
    model, args, _ = nano()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    runtime = AgentRuntime(model, optimizer, select(model, Faulty(read)), Config(), monitor.endpoint, "job")
    try:
        monitor.wait(lambda: runtime.io_thread is not None and runtime.io_thread.connected)
        for step in range(3):
            model(*args).square().mean().backward()
            optimizer.step()
            monitor.wait(lambda seen=step: len(monitor.shards) == seen)
    finally:
        runtime.close("")
    assert [header.observables for header, _ in monitor.shards] == [{}, {}]
    (line,) = [each.message for each in caplog.records if "observables" in each.message]
    assert "training goes on" in line
    assert pytest.importorskip("re").search(says, line)


def test_what_a_family_may_measure_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    assert flaw({"router_entropy": "x"}) == ""
    assert "'Entropy' is not called 1 to 40" in flaw({"Entropy": "x"})
    assert "9 observables, at most 8" in flaw({f"a{index}": "x" for index in range(9)})
    model = nano()[0]
    stack = select(model).candidates[0]
    with caplog.at_level(logging.WARNING):
        assert declared([Faulty(failing, "unlisted")], stack) == ()
    assert "'unlisted' is not among its measures" in caplog.text
    twice = declared([Faulty(failing), Faulty(None)], stack)
    assert [(each.layer, each.read) for each in twice] == [(layer, failing) for layer in range(3)]


def test_a_family_that_cannot_tell_what_it_shields_shields_something() -> None:
    model = nano()[0]
    assert shielded([Faulty(failing)], select(model).candidates[:1]) == [model.transformer[0]]
    assert shielded(select(model).families, select(model).candidates) == []
    for case in (own_experts, switch_encoder):
        model = case()[0]
        routers = shielded(select(model).families, select(model).candidates)
        assert routers == [module for name, module in model.named_modules() if name.endswith((".gate", ".router"))]


def test_a_table_holds_finite_values_or_none() -> None:
    keys = [("a", 0), ("a", 2), ("b", 1), ("b", 7)]
    assert tabulate(keys, [1.0, math.nan, 3.0, 4.0], 3) == {"a": [1.0, None, None], "b": [None, 3.0, None]}
