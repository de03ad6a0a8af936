"""Adapters for experts, state spaces and splines on third-party models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import koopmon
from benchmarks.families import Family, Scheme, language_model
from koopmon.chain_verifier import ChainVerifier, known_exponent
from koopmon.plugins import adapters, select
from koopmon.profiling import capture_states
from koopmon.risk.normalization import UNNORMALIZED
from koopmon.spectral import profile_states
from tests.adapters import zoo
from tests.adapters.family_zoo import CASES, Case, L, T, jamba, mixtral, own_kan
from tests.agent.scripted_monitor import ScriptedMonitor

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and has no effect:FutureWarning")


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def case(name: str) -> Case:
    return build(name)


def build(name: str) -> Case:
    """Return the same model for the same name."""
    torch.manual_seed(0)
    return CASES[name][0]()


def loss_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    output = model(*args, **kwargs)
    if isinstance(output, Tensor):
        return output.square().mean()
    loss = getattr(output, "loss", None)
    return loss if loss is not None else output[0].square().mean()


def test_discovers_every_block(name: str, case: Case) -> None:
    _, adapter, stack, _, flags = CASES[name]
    model, args, kwargs = case
    found = koopmon.discover(model, *args, **kwargs)
    assert found.verified
    assert (found.adapter.name, found.stack.name, found.flags) == (adapter, stack, flags)
    assert found.adapter.specificity(model) == 20
    assert [point.layer for point in found.points] == list(range(L))
    assert all(model.get_submodule(point.name) is point.module for point in found.points)
    assert koopmon.discover(model).stack == found.stack, "the best candidate is the one verified"


def test_profiles(name: str, case: Case) -> None:
    model, args, kwargs = case
    profile = koopmon.profile(model, *args, num_samples=1000, svd_rank=4, **kwargs)
    assert profile.num_layers == L
    assert profile.num_samples == torch.Size(CASES[name][3][:-1]).numel()


def test_a_state_can_be_put_back(case: Case) -> None:
    model, args, kwargs = case
    found = koopmon.discover(model, *args, **kwargs)
    model.eval()
    before = loss_of(model, args, kwargs)
    for point in found.points:
        for factor, same in ((1.0, True), (1.5, False)):

            def replace(module: nn.Module, args: tuple[Any, ...], output: Any, factor: float = factor) -> Any:
                state = found.adapter.block_output(module, output)
                assert state is not None
                scale = torch.linspace(1.0, factor, state.shape[-1])
                return found.adapter.with_block_output(module, output, state * scale)

            handle = point.module.register_forward_hook(replace)
            try:
                after = loss_of(model, args, kwargs)
            finally:
                handle.remove()
            assert torch.equal(before, after) == same


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[ScriptedMonitor]:
    with ScriptedMonitor(tmp_path / "m") as scripted:
        yield scripted


def train(model: nn.Module, args: Any, kwargs: Any, monitor: ScriptedMonitor | None, steps: int = 4) -> Any:
    """Return the losses of a few steps in all bits, and with a monitor the status of the agent. Every step is a
    snapshot.
    """
    model.train()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    agent, losses = None, []
    if monitor is not None:
        cadence = {"warmup_steps": 1000, "initial_credit_seconds": 1000.0}
        config = {"cadence": cadence, "sampling": {"num_samples": 16}}
        agent = koopmon.attach(model, optimizer, endpoint=monitor.endpoint, config=config)
        monitor.wait(lambda: agent.status()["connected"])
    try:
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model, args, kwargs)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
            if monitor is not None:  # the first forward verifies the chain; each later one is a snapshot
                monitor.wait(lambda seen=step: len(monitor.shards) == seen)
        status = {} if agent is None else agent.status()
    finally:
        if agent is not None:
            agent.close()
    return torch.stack(losses), status


def test_the_agent_s_taps_fire_once_and_change_nothing(name: str, monitor: ScriptedMonitor) -> None:
    first, second = build(name), build(name)
    second[0].load_state_dict(first[0].state_dict())  # pykan's least-squares start differs in its last bits
    plain, _ = train(*first, None)
    tapped, status = train(*second, monitor)
    assert torch.equal(plain, tapped)
    assert status["enabled"]
    assert (status["adapter"], status["taps_missing"], status["errors"]) == (CASES[name][1], 0, 0)
    expected = known(capture_states(*first[:1], *first[1], **first[2]).observables)
    for header, states in monitor.shards:
        assert known(header.observables) == expected, "every reading of every block, the last one's too"
        assert header.num_points == L + 1
        assert states.shape[2] == CASES[name][3][-1]
        assert all(not torch.equal(x, y) for x, y in itertools.pairwise(states))


def known(observables: Mapping[str, Sequence[float | None]]) -> dict[str, list[bool]]:
    """Return True for each layer with a measurement, by name."""
    return {name: [value is not None for value in values] for name, values in observables.items()}


@pytest.mark.parametrize("given", zoo.CASES)
def test_plain_transformers_stay_the_transformer_adapter_s(given: str) -> None:
    model = zoo.CASES[given][0]()[0]
    selection = select(model)
    assert selection.adapter.name == "transformer"
    assert [adapter.name for adapter in selection.families] == ["transformer"]


def test_a_hybrid_has_one_adapter_and_the_other_family_s_name() -> None:
    model = jamba()[0]
    known = adapters()
    assert {name: adapter.specificity(model) for name, adapter in known.items()} == {
        "kan": 0,
        "mamba": 20,
        "moe": 15,
        "transformer": 10,
    }
    assert [adapter.name for adapter in select(model).families] == ["mamba", "moe"]
    assert [adapter.name for adapter in select(model, "transformer").families] == ["transformer", "mamba", "moe"]


def test_a_network_of_splines_is_taken_where_it_keeps_its_width() -> None:
    model, args, _ = own_kan((4, 8, 8, 8, 2))
    found = koopmon.discover(model, *args)
    assert (found.stack.name, [point.name for point in found.points]) == ("act_fun[1:3]", ["act_fun.1", "act_fun.2"])
    model, args, _ = own_kan((4, 6, 2))
    with pytest.raises(koopmon.DiscoveryError, match=r"shape \(32, 6\) where the chain began with \(32, 4\)"):
        koopmon.discover(model, *args)


@pytest.mark.parametrize("family", ["kan", "moe-1"])
@pytest.mark.parametrize("scheme", ["pre", "none"])
def test_splines_and_experts_are_braked_where_their_blocks_normalise(family: Family, scheme: Scheme) -> None:
    """Near zero, splines add a constant: the states alone would suggest a normalisation."""
    model = language_model(family, width=16, num_layers=2, vocabulary=64, num_tokens=16, seed=0, scheme=scheme)
    captured = capture_states(model, torch.randint(64, (8, 16)))
    read = profile_states(captured.states).update_exponent
    assert family != "kan" or (read is not None and read < UNNORMALIZED / 2)
    assert captured.known_exponent == (0.0 if scheme == "pre" else 1.0)
    verifier = ChainVerifier(captured.discovery.adapter, [captured.discovery.stack])
    assert verifier.update_exponent(captured.discovery.stack) == captured.known_exponent, "the value in the hello"


@pytest.mark.parametrize(("said", "known"), [(float("nan"), 0.0), (float("inf"), 0.0), (-7e9, -100.0), (0.3, 0.3)])
def test_what_an_adapter_says_of_the_brake_is_a_number_that_travels(said: float, known: float) -> None:
    class Teller(type(adapters()["transformer"])):  # type: ignore[misc]
        def update_exponent(self, stack: koopmon.Stack) -> float | None:
            return said

    stack = koopmon.discover(mixtral()[0]).stack
    assert known_exponent(Teller(), stack) == known, "what is none is as if nothing was said"


def test_every_block_of_a_model_in_use_normalises(name: str, case: Case) -> None:
    model, args, kwargs = case
    normalises = name != "own_kan"
    assert koopmon.normalised(koopmon.discover(model, *args, **kwargs).stack) is normalises


def test_heads_beside_blocks_are_no_routers_beside_experts() -> None:
    """As many classes as blocks and as many positions as heads: rows alone do not make a router."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
            self.head = nn.Linear(8, 3)

        def forward(self, h: Tensor) -> Tensor:
            for block in self.blocks:
                h = h + 0.1 * block(h)
            return self.head(h)

    assert adapters()["moe"].specificity(Classifier()) == 0
    selection = select(zoo.nano()[0])
    assert selection.adapter.name == "transformer"


def test_masks_are_taken_from_the_call() -> None:
    model, args, kwargs = mixtral()
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, -4:] = 0
    profile = koopmon.profile(model, *args, attention_mask=mask, num_samples=1000, svd_rank=4, **kwargs)
    assert profile.num_samples == 2 * T - 4
