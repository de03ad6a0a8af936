"""The controller of small trainings: its cap and its copies are those of the agent."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW

from benchmarks.control import Cap, Controller, Copies
from koopmon.agent.control.lr_backoff import LrBackoff
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rewind import START_COPY_STEPS
from koopmon.agent.control.state import ActionState, ControlState, Ramp
from koopmon.config import LimitsConfig
from koopmon.spectral import profile_states
from koopmon.wire.messages import Rewind

STATES = torch.cumsum(torch.randn((3, 64, 8), generator=torch.Generator().manual_seed(0)), dim=0)
PROFILE = profile_states(list(STATES), svd_rank=4, kreiss="never")


@given(
    rates=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=30),
    cap=st.floats(1e-6, 1.0),
    warmup=st.integers(0, 20),
    first=st.integers(0, 10),
)
def test_the_cap_is_that_of_the_agent(rates: list[float], cap: float, warmup: int, first: int) -> None:
    ours, agents = Cap(cap, first, warmup, 0.0), LrBackoff(LimitsConfig())
    parameters = {
        "max_rate": cap,
        "capped_from": first,
        "peak_rate": 0.0,
        "warmup_from": first,
        "warmup_steps": warmup,
    }
    state = ControlState(actions={"set_lr_scale": ActionState(ramp=Ramp(start=1.0, target=1.0), parameters=parameters)})
    optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)
    agents._optimizers = OptimizerSet(optimizer)
    for step, rate in enumerate(rates, first):
        optimizer.param_groups[0]["lr"] = rate
        agents._follow_peak(first)
        assert ours.scale(step, rate) == pytest.approx(agents.effective(state, step))


def small_training() -> tuple[nn.Module, AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()


def test_it_goes_back_to_the_newest_copy_from_a_low_rate() -> None:
    model, optimizer = small_training()
    copies, weights = Copies(model, optimizer), {}
    for step in range(100):
        copies.take(step, 0.01 * step)
        weights[step] = model.weight.detach().clone()
        train(model, optimizer)
    assert copies.restore(100, Rewind(max_rate=0.5, min_age_steps=8)) == 48
    assert torch.equal(model.weight, weights[48])
    assert copies.restore(101, Rewind(max_rate=0.5, min_age_steps=80)) == 0, "the start is always old enough"
    assert torch.equal(model.weight, weights[0])
    assert not optimizer.state, "no update precedes the start"


def test_without_a_fitting_copy_nothing_changes() -> None:
    model, optimizer = small_training()
    copies = Copies(model, optimizer)
    for step in range(0, START_COPY_STEPS + 1, 16):
        copies.take(step, 1.0)
        train(model, optimizer)
    before = model.weight.detach().clone()
    assert copies.restore(START_COPY_STEPS + 1, Rewind(max_rate=0.5, min_age_steps=8)) is None
    assert torch.equal(model.weight, before)


def test_an_alarm_of_a_training_with_copies_rewinds_it() -> None:
    model, optimizer = small_training()
    controller = Controller("auto", width=64, num_layers=2, exponent=0.0, copies=Copies(model, optimizer))
    start = model.weight.detach().clone()
    for step in range(12):
        controller.begin(step, 0.1)
        if step == 9:  # the second states that are not finite, seen at step 7, take effect two steps later
            assert torch.equal(model.weight, start)
        controller.see(step, None if step in (6, 7) else PROFILE, 2.0, 0.1)
        train(model, optimizer)
    assert (controller.num_rewinds, controller.lost_steps, controller.first_action) == (1, 9, 7)
    assert controller.lr_scale < 0.05, "the warm-up under the cap has only begun"


def test_another_policy_never_rewinds() -> None:
    model, optimizer = small_training()
    controller = Controller("lr", width=64, num_layers=2, exponent=0.0, copies=Copies(model, optimizer))
    for step in range(12):
        controller.begin(step, 0.1)
        controller.see(step, None, 2.0, 0.1)
    assert controller.num_rewinds == 0
    assert controller.min_lr_scale < 1.0


def test_a_group_at_fault_is_bounded_as_by_the_agent() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = AdamW([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.01)
    controller = Controller("auto", width=64, num_layers=2, exponent=0.0, copies=Copies(model, optimizer))
    in_force = []
    for step in range(84):
        controller.begin(step, 0.001 if step < 83 else 0.0005, 30.0 if step >= 70 else 1.0)
        in_force.append((controller.scheduled, controller.apart, controller.lr_scale))
        controller.see(step, None if step in (79, 80) else PROFILE, 2.0, controller.scheduled)
        train(model, optimizer)
    assert in_force[69] == (0.001, 1.0, 1.0)
    assert in_force[81] == (pytest.approx(0.03), 30.0, 1.0)
    assert controller.num_rewinds == 1
    assert in_force[82][:2] == (0.001, pytest.approx(1.0))
    assert in_force[83][:2] == (0.0005, pytest.approx(1.0)), "the schedule moves on"
    assert controller.lost_steps == 82 - 48, "the newest copy is of the fault"
