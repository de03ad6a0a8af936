"""Ceilings on writing weights: found after the first command, held after each update, and released."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from koopmon.agent.control import ceilings as ceilings_module
from koopmon.agent.control.action import RequestRefusedError, towards
from koopmon.agent.control.ceilings import MAX_SEARCH_STEPS, Ceilings, _equal_on_all
from koopmon.agent.control.rank_group import MESSAGE_BYTES
from koopmon.agent.control.rate_shares import PREFIX as SHARE
from koopmon.agent.control.state import ActionState, ControlState, ControlUpdate, Ramp
from koopmon.agent.parallelism import ParallelLayout
from koopmon.config import LimitsConfig
from koopmon.wire.messages import MAX_HELD_LAYERS, MAX_LAYERS, Applied, Command, Heartbeat, Hello, Rewind
from tests.agent.bench import Bench, benches
from tests.agent.models import build, checkpointed, train_step
from tests.agent.scripted_monitor import ScriptedMonitor


class Projected(Bench):
    """A training whose agent holds ceilings."""

    def __init__(self, *args: Any, **limits: Any) -> None:
        super().__init__(*args, **limits)
        self.norms: list[float] = []
        """Norm of the writing weight of block 0 after each step."""

    @property
    def action(self) -> Ceilings:
        return next(each for each in self.runtime.actions if isinstance(each, Ceilings))

    @property
    def held(self) -> list[int]:
        return list(self.action.facts()["held_layers"])

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses += super().train(1)
            self.norms.append(float(self.model.blocks[0].down.weight.detach().norm()))
        return losses

    def set_ceilings(self, ceilings: dict[int, float], **fields: Any) -> str:
        return self.submit("set_ceilings", ceilings=ceilings, **fields)

    def ask(self, ceilings: dict[int, float], *, steps: int = 4) -> tuple[str, str]:
        """Submit a command and train until it is answered."""
        asked = self.set_ceilings(ceilings)
        self.train(steps)
        (result,) = [each for each in self.outcomes if each.command_id == asked]
        assert self.runtime.breaker.num_errors == self.runtime.steps.lasting_breaker.num_errors == 0
        return result.outcome, result.detail


@pytest.fixture
def bench() -> Iterator[Callable[..., Projected]]:
    with benches(Projected) as make:
        yield make


def test_a_command_holds_the_norms_until_the_release(bench: Callable[..., Projected]) -> None:
    training = bench()
    training.train(3)
    assert training.ask({0: 0.5}, steps=5) == ("applied", "")
    first = next(at for at, norm in enumerate(training.norms) if norm < 0.7 * training.norms[2])
    ceiling = 0.5 * training.norms[first - 1]
    training.train(5)
    assert all(norm <= ceiling * (1 + 1e-6) for norm in training.norms[first:])
    assert training.held == [0]
    assert training.runtime.lifecycle.applied().held_layers == (0,)
    assert training.runtime.lifecycle.at_step().kss_held_layers == 1.0
    free = training.model.blocks[1].down.weight.norm()
    assert free > ceiling
    assert training.ask({}, steps=2) == ("applied", "")
    assert training.held == []
    training.train(5)
    assert training.norms[-1] > ceiling * 1.01


def test_it_is_acknowledged_only_after_two_updates_with_the_ceilings(bench: Callable[..., Projected]) -> None:
    training = bench()
    training.train(3)
    training.set_ceilings({0: 0.5, 2: 0.9})
    while not training.outcomes:
        training.train(1)
        assert training.step < 20
    (result,) = training.outcomes
    held = [norm < 0.6 * training.norms[2] for norm in training.norms]
    assert result.outcome == "applied"
    assert held.count(True) == 2
    assert held[result.step - 1 :] == [True, True], "the first update with the ceilings has the number of the ack"


def test_a_correction_sets_them_from_the_norms_of_its_moment_and_releases_the_layers_that_it_leaves_out(
    bench: Callable[..., Projected],
) -> None:
    training = bench()
    training.train(3)
    training.ask({0: 0.5, 1: 0.5}, steps=5)
    before = training.norms[-1]
    assert training.ask({0: 1.5, 2: 0.5}, steps=2) == ("applied", "")
    assert training.held == [0, 2]
    ceiling = training.action._held[0][0].ceiling
    assert ceiling == pytest.approx(1.5 * before, rel=1e-3)
    training.train(1)
    assert training.norms[-1] > before


def test_nothing_runs_without_a_command(bench: Callable[..., Projected], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("called without a command")

    monkeypatch.setattr(ceilings_module, "WritingWeightsSearch", fail)
    monkeypatch.setattr(ceilings_module, "hold", fail)
    monkeypatch.setattr(ceilings_module, "why_not_to_scale", fail)
    training, twin = bench(), build()
    optimizer = AdamW(twin.parameters(), lr=0.01)
    assert training.train(40) == [train_step(twin, optimizer, step) for step in range(40)]
    assert training.action.next_work(training.runtime.lifecycle.state.control, 7) > 1 << 60
    assert training.runtime.breaker.num_errors == 0


def test_the_search_changes_no_value(bench: Callable[..., Projected]) -> None:
    """A factor of 2 is above every norm: the losses are those of a training alone."""
    training, twin = bench(), build()
    optimizer = AdamW(twin.parameters(), lr=0.001)
    for group in training.optimizer.param_groups:
        group["lr"] = 0.001
    losses = training.train(3)
    training.set_ceilings({0: 2.0, 1: 2.0, 2: 2.0})
    losses += training.train(20)
    assert training.held == [0, 1, 2]
    assert losses == [train_step(twin, optimizer, step) for step in range(23)]


def test_a_layer_whose_weights_are_zero_has_no_ceiling(bench: Callable[..., Projected]) -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.blocks[1].down.parameters():
            parameter.zero_()
    training = bench(model, lambda parameters: SGD(parameters, lr=0.0))
    training.train(3)
    outcome, detail = training.ask({1: 0.5}, steps=6)
    assert (outcome, detail) == ("failed", "the writing weights are 0 or not finite")
    assert training.ask({0: 0.5, 1: 0.5}) == ("applied", "")
    assert training.held == [0]


class Stream(nn.Module):
    """Blocks of a given form, with the parts of `tests.agent.models.Model` that `train_step` needs."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(make() for _ in range(3))
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) * 1.0
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(h)
        return logits


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.norm(h + self.down(torch.tanh(self.up(h))))
        return out


class BatchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.1)

    def forward(self, h: Tensor) -> Tensor:
        normed = self.norm(h.flatten(0, 1)).view_as(h)
        out: Tensor = h + self.dropout(self.down(torch.relu(self.up(normed))))
        return out


def test_post_layer_norm_is_refused_for_good(bench: Callable[..., Projected]) -> None:
    training = bench(Stream(PostNorm))
    training.train(3)
    asked = training.set_ceilings({0: 0.5})
    training.train(4)
    (result,) = training.outcomes
    assert (result.command_id, result.outcome, result.permanent) == (asked, "refused", True)
    assert result.detail == (
        "KSS by projection is refused: block 0: a normalisation lies between its linear layers and its output"
    )
    again = training.set_ceilings({0: 0.5})
    training.train(1)
    last = training.outcomes[-1]
    assert (last.command_id, last.outcome, last.permanent, last.detail) == (again, "refused", True, result.detail)
    assert training.held == []


def test_buffers_and_random_numbers_of_the_training_are_left_alone(bench: Callable[..., Projected]) -> None:
    training, twin = bench(Stream(BatchNormed)), Stream(BatchNormed)
    twin.load_state_dict(copy.deepcopy(training.model.state_dict()))
    optimizer = AdamW(twin.parameters(), lr=0.01)
    torch.manual_seed(5)
    losses = training.train(3)
    training.set_ceilings({0: 2.0})
    losses += training.train(4)
    torch.manual_seed(5)
    assert losses == [train_step(twin, optimizer, step) for step in range(7)]
    for name, value in twin.state_dict().items():
        assert torch.equal(value, training.model.state_dict()[name]), name


def test_checkpointed_blocks_are_found(bench: Callable[..., Projected]) -> None:
    training = bench(build(run=checkpointed))
    training.train(3)
    assert training.ask({0: 0.5}, steps=6) == ("applied", "")


def test_an_optimizer_with_copies_of_the_weights_is_refused(bench: Callable[..., Projected]) -> None:
    class WithMaster(SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for each in group["params"]:
                    master = self.state[each].setdefault("master", each.detach().double())
                    if each.grad is not None:
                        master -= group["lr"] * each.grad.double()
                        each.data.copy_(master)

    training = bench(None, lambda parameters: WithMaster(parameters, lr=0.01))
    training.train(3)
    outcome, detail = training.ask({0: 0.5}, steps=5)
    assert outcome == "refused"
    assert "the optimizer keeps a copy of blocks.0.down" in detail


def test_a_weight_that_comes_back_is_seen_before_the_acknowledgement(bench: Callable[..., Projected]) -> None:
    training = bench()
    training.train(3)
    weight = training.model.blocks[0].down.weight
    kept = weight.detach().clone()
    training.set_ceilings({0: 0.5})
    for _ in range(8):
        with torch.no_grad():
            weight.copy_(kept)
        training.train(1)
    (result,) = training.outcomes
    assert result.outcome == "failed"
    assert result.detail.startswith("blocks.0.down.weight has the norm")
    assert training.held == []
    kept_norm = kept.norm()
    training.train(1)
    assert training.norms[-1] > 0.9 * kept_norm


def test_a_weight_that_no_forward_uses_ends_the_search(bench: Callable[..., Projected]) -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.down = self.experts[0]

        def forward(self, h: Tensor) -> Tensor:
            out: Tensor = h + self.experts[0](torch.tanh(h))
            return out

    training = bench(Stream(Expert))
    training.train(3)
    outcome, detail = training.ask({0: 0.5}, steps=MAX_SEARCH_STEPS + 3)
    assert (outcome, detail) == ("refused", "KSS by projection is refused: block 0 has not used experts.1.weight")


def test_layers_that_the_model_does_not_have_are_refused(bench: Callable[..., Projected]) -> None:
    training = bench()
    training.train(3)
    reason = "no ceilings: layer 7 is none of the 3 layers"
    assert training.ask({0: 0.5, 7: 0.5}, steps=5) == ("refused", reason)
    assert training.held == []
    assert training.ask({7: 0.5}, steps=2) == ("refused", reason)
    assert training.ask({2: 0.5}, steps=4) == ("applied", "")


def test_a_repeated_command_is_no_second_one(bench: Callable[..., Projected]) -> None:
    training = bench()
    training.train(3)
    asked = training.set_ceilings({0: 0.5})
    training.set_ceilings({0: 0.5}, id=asked)
    training.train(1)
    training.set_ceilings({0: 0.5}, id=asked)
    training.train(5)
    assert [each.outcome for each in training.outcomes] == ["applied"]
    training.set_ceilings({0: 0.5}, id=asked)
    training.train(1)
    assert [each.outcome for each in training.outcomes] == ["applied", "duplicate"]


def test_a_command_during_the_search_waits_and_a_release_does_not(bench: Callable[..., Projected]) -> None:
    training = bench()
    training.train(3)
    first = training.set_ceilings({0: 0.5})
    training.train(1)
    second = training.set_ceilings({1: 0.5})
    training.train(1)
    third = training.set_ceilings({})
    training.train(4)
    outcomes = {each.command_id: (each.outcome, each.detail) for each in training.outcomes}
    assert outcomes == {
        second: ("refused", "no ceilings: the command before is not complete"),
        first: ("failed", "a later command replaced it"),
        third: ("applied", ""),
    }
    assert training.held == []


def test_a_rewind_releases_them(bench: Callable[..., Projected]) -> None:
    training = bench()
    training.train(20)
    training.ask({0: 0.5}, steps=5)
    training.submit("rewind", rewind=Rewind(max_rate=1.0, min_age_steps=0))
    training.train(1)
    assert training.outcomes[-1].outcome == "applied"
    training.train(1)
    assert training.held == []
    assert training.ask({0: 0.5}) == ("applied", "")


def test_only_the_first_ceilings_use_the_hourly_allowance_and_have_a_line(bench: Callable[..., Projected]) -> None:
    training = bench(max_actions_per_hour=1)
    training.train(3)
    assert training.ask({0: 0.5}, steps=6)[0] == "applied"
    assert training.ask({0: 1.0})[0] == "applied"
    assert [each.corrects for each in training.outcomes] == [False, True]
    training.ask({})
    assert training.ask({0: 0.5}) == ("refused", "1 actions in the last hour, the most allowed")


def test_small_factors_are_capped(bench: Callable[..., Projected]) -> None:
    training = bench(min_ceiling_factor=0.5)
    training.train(3)
    training.set_ceilings({0: 0.1, 1: 0.7})
    training.train(6)
    assert training.outcomes[0].outcome == "applied"
    first, second = (training.action._held[layer][0].ceiling for layer in (0, 1))
    assert first == pytest.approx(0.5 * training.norms[2], rel=0.05)
    assert second > first


def test_the_action_keeps_no_weight_alive(bench: Callable[..., Projected]) -> None:
    action = Ceilings(LimitsConfig())
    weight = nn.Parameter(torch.ones(4))
    action._held = {0: [ceilings_module.HeldWeight("w", weakref.ref(weight), 1.0)]}
    ceilings_module.hold(action._held[0])
    assert float(weight.detach().norm()) == pytest.approx(1.0)
    del weight
    gc.collect()
    ceilings_module.hold(action._held[0])
    assert "norm nan" in action._above()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_left_alone(value: float) -> None:
    weight = nn.Parameter(torch.tensor([value, 1.0]))
    ceilings_module.hold([ceilings_module.HeldWeight("w", weakref.ref(weight), 0.5)])
    assert weight[1] == 1.0


def test_a_large_weight_counts_as_held() -> None:
    action, weight = Ceilings(LimitsConfig()), nn.Parameter(torch.randn(1500, 1500))
    held = [ceilings_module.HeldWeight("w", weakref.ref(weight), 0.9 * float(weight.detach().double().norm()))]
    action._held = {0: held}
    assert action._above().startswith("w has the norm")
    ceilings_module.hold(held)
    assert action._above() == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_each_type_of_weights_is_held(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(64, 64).to(dtype))
    ceilings_module.hold([ceilings_module.HeldWeight("w", weakref.ref(weight), 3.0)])
    assert float(weight.detach().double().norm()) == pytest.approx(3.0, rel=2.0 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("layout", "act", "reason"),
    [
        (ParallelLayout("single", True), "auto", ""),
        (ParallelLayout("ddp", True), "auto", ""),
        (ParallelLayout("fsdp2", True), "auto", "each rank must hold whole weights, and the layout is fsdp2"),
        (ParallelLayout("tp", True), "always", "each rank must hold whole weights, and the layout is tp"),
        (ParallelLayout("single", True, device="cuda"), "auto", "it is not proven on cuda"),
        (ParallelLayout("single", True, device="cuda"), "always", ""),
    ],
)
def test_layouts_in_which_it_is_not_proven_are_refused(layout: ParallelLayout, act: Any, reason: str) -> None:
    found = Ceilings(LimitsConfig(act=act)).capability(layout)
    assert found.acts == (not reason)
    assert found.reason == (reason and f"KSS by projection is refused: {reason}")


def test_compiled_blocks_are_refused() -> None:
    action = Ceilings(LimitsConfig())
    action.set_obstacle("the blocks run inside a compiled graph, which it cannot change")
    assert "compiled graph" in action.capability(ParallelLayout("single", True)).reason


def test_a_killed_launch_hands_on_no_ceilings() -> None:
    action, applied = Ceilings(LimitsConfig()), Applied(held_layers=(0, 2))
    target = action.target(applied, ControlState(), 0)
    state = towards(ControlState(), action, target, 0, num_steps=0)
    assert action.applied(state, 0) == {"held_layers": ()}
    assert action._command(state) == -1


@pytest.mark.parametrize("values", [(0, 0), (5, 5), (0xFFFFFFFF, 0xFFFFFFFF), (5, 4), (0, 1 << 31)])
def test_ranks_compare_a_value_by_votes(values: tuple[int, int]) -> None:
    first, second = values
    answers = []
    for own, other in ((first, second), (second, first)):
        votes: list[bool] = []

        def agree(value: bool, own: int = own, other: int = other, votes: list[bool] = votes) -> bool:
            place, asks_for_ones = _place(votes)
            votes.append(value)
            return value and bool(other >> place & 1) == asks_for_ones

        def _place(votes: list[bool]) -> tuple[int, bool]:
            place = at = 0
            while at < len(votes):
                at += 1 if first >> place & 1 and second >> place & 1 else 2
                place += 1
            return (place, True) if at == len(votes) else (place - 1, False)

        answers.append(_equal_on_all(own, agree))
    assert answers == [first == second] * 2


def test_the_largest_state_fits_into_an_exchange() -> None:
    layers = range(MAX_LAYERS - MAX_HELD_LAYERS, MAX_LAYERS)
    parameters: dict[str, int | float] = {f"layer.{each}": 1 / 3 for each in layers}
    shares: dict[str, int | float] = {f"{SHARE}{65535 - each}": 1 / 3 for each in range(32)}
    steps = dict.fromkeys(("at_step", "copy_step", "interval", "bounded_at"), 1 << 52)
    rate = {"max_rate": 1 / 3, "capped_from": 1 << 52, "peak_rate": 1 / 3, "warmup_from": 1 << 52, "warmup_steps": 1}
    kss = dict.fromkeys(("temperature", "tau_u", "tau_l", "gamma", "beta", "layer_fraction"), 1 / 3)
    ramp = Ramp(first_step=1 << 52, start=1 / 3, target=2 / 3, num_steps=100_000)
    parts: dict[str, dict[str, int | float]] = {
        "set_ceilings": {"at_step": 1 << 52, **parameters},
        "rewind": {**shares, **steps},
        "set_lr_scale": dict(rate),
        "set_kss": {**kss, "svd_rank": 512, "num_samples": 65536, "every": 10000},
        "stop": {"at_step": 1 << 52},
        "checkpoint": {"at_step": 1 << 52},
    }
    actions = {kind: ActionState(ramp=ramp, parameters=values) for kind, values in parts.items()}
    state = ControlState(version=1 << 52, actions=actions, cadence_steps=100_000, cadence_until_step=1 << 53)
    update = ControlUpdate(step=1 << 52, state=state, snapshots=(1 << 52, 1 << 52, 1), next_step=1 << 52)
    assert len(msgspec.msgpack.encode(update)) <= MESSAGE_BYTES - 2


def test_a_search_without_an_exchange_ends() -> None:
    action = Ceilings(LimitsConfig())
    state = ControlState(actions={"set_ceilings": ActionState(ramp=Ramp(), parameters={"at_step": 4, "layer.0": 0.5})})
    outcomes = [action.at_edge(state, step, lambda _: False) for step in range(5, 60)]
    (done,) = [each for each in outcomes if each is not None]
    assert (done.outcome, done.detail, done.permanent) == ("failed", "the ranks do not exchange", False)
    with pytest.raises(RequestRefusedError, match="not complete"):
        Ceilings(LimitsConfig()).target(
            Command(
                run="r",
                incarnation="0" * 8,
                id="0" * 8,
                kind="set_ceilings",
                reason="",
                expires_step=9,
                ceilings={0: 1.0},
            ),
            state,
            6,
        )


@pytest.mark.distributed
def test_two_ranks_hold_the_same_ceilings_bit_for_bit(
    ranks: Callable[..., Any], monitor: ScriptedMonitor, tmp_path: Path
) -> None:
    job = ranks("ceilings.py", tmp_path / "out", monitor.endpoint)
    monitor.wait(lambda: any(each.num_layers and not each.process_rank for each in monitor.of(Hello)), 90.0)
    monitor.wait(lambda: any(each.control_ready for each in monitor.of(Heartbeat)), 60.0)
    outcomes = []
    for factors in ({0: 0.5}, {0: 0.9, 1: 0.6}, {}, {2: 0.5}):
        asked = monitor.command("set_ceilings", ceilings=factors)
        outcomes.append((monitor.ack(asked, 60.0).outcome, monitor.ack(asked).applied.held_layers))
    asked = monitor.command("stop")
    assert monitor.ack(asked, 60.0).outcome == "applied"
    job.wait()
    assert outcomes == [("applied", (0,)), ("applied", (0, 1)), ("applied", ()), ("applied", (2,))]
    first, second = (json.loads(Path(f"{tmp_path / 'out'}.{rank}").read_text()) for rank in range(2))
    assert first == second
    assert first["norms"][-1] < 0.7 * max(first["norms"])
