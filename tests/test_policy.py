"""The policy as a table: hand-made observations, a fake clock, and what must follow."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koopmon.config import KssConfig, PolicyConfig
from koopmon.policy import Action, Decision, PolicyState, acknowledge, decide, kss_shielded
from koopmon.risk.online_detector import OnlineRisk
from koopmon.wire.messages import Ack, Applied, KssSettings
from tests.factories import observation

CALM, WATCH, HIGH, SEVERE = 0.01, 0.3, 0.7, 0.95


@dataclass
class Run:
    """One run before the policy: feeds snapshots, collects the commands that change training."""

    config: PolicyConfig = field(default_factory=lambda: PolicyConfig(name="lr"))
    kss: KssConfig = field(default_factory=KssConfig)
    state: PolicyState = field(default_factory=PolicyState)
    step: int = 0
    now: float = 0.0
    excess: float | None = None
    """Of the scheduled rate over the critical one."""
    actions: list[tuple[int, Action]] = field(default_factory=list)

    def see(self, risk: float, *, steps: int = 1, **fields: Any) -> Decision:
        """`steps` snapshots of the same risk, one step and a tenth of a second apart; the last decision."""
        for _ in range(steps):
            seen = observation(**{"step": self.step, "max_spectral_radius": 1.2, **fields})
            judged = OnlineRisk(value=risk, reason="r", excess_rate=self.excess)
            decision = decide(self.now, self.state, seen, judged, self.config, self.kss)
            self.state = decision.state
            self.actions += [(self.step, action) for action in decision.commands if action.changes_training]
            self.step += 1
            self.now += 0.1
        return decision

    @property
    def scales(self) -> list[tuple[int, float | None]]:
        return [(step, action.lr_scale) for step, action in self.actions if action.kind == "set_lr_scale"]

    @property
    def alphas(self) -> list[tuple[int, float]]:
        return [(step, action.kss.alpha) for step, action in self.actions if action.kss is not None]


def test_a_calm_run_is_left_alone_for_ever() -> None:
    run = Run(PolicyConfig(name="kss+lr"))
    decision = run.see(CALM, steps=2000)
    assert run.actions == []
    assert decision.phase == "calm"
    assert "nothing to do" in decision.reason


def test_a_risk_between_release_and_act_only_asks_for_a_closer_look() -> None:
    run = Run()
    run.see(CALM, steps=5)
    decision = run.see(WATCH)
    assert [action.kind for action in decision.commands] == ["set_cadence"]
    assert decision.commands[0].cadence_steps == run.config.dense_every
    assert decision.commands[0].cadence_until_step == 5 + run.config.dense_steps
    assert decision.phase == "alert"
    assert run.see(WATCH).commands == ()
    assert run.see(CALM).phase == "calm"


@pytest.mark.parametrize(("risk", "factor"), [(HIGH, 0.5), (SEVERE, 0.25)])
def test_severity_picks_the_cut(risk: float, factor: float) -> None:
    run = Run()
    run.see(risk)
    assert run.scales == [(0, factor)]
    assert run.actions[0][1].ramp_steps == 0


@pytest.mark.parametrize(
    ("excess", "risk", "scale"),
    [
        (0.9, HIGH, 0.5),  # the rate does not explain it
        (0.9, SEVERE, 0.25),
        (1.1, HIGH, 0.85),
        (1.1, SEVERE, 0.6),
        (3.0, HIGH, 0.5),  # 1.5 times the critical rate
        (3.0, SEVERE, 0.5),
        (1000.0, SEVERE, 0.125),  # the floor
    ],
)
def test_a_rate_that_explains_the_alarm_is_taken_to_where_runs_have_a_chance(
    excess: float, risk: float, scale: float
) -> None:
    run = Run(excess=excess)
    run.see(risk)
    assert run.scales == [(0, pytest.approx(scale))]


def test_a_snapshot_after_its_time_tells_whether_an_action_took_effect() -> None:
    run = Run(PolicyConfig(name="lr", min_lr_scale=0.5, cooldown_steps=3))
    assert run.see(HIGH).took_effect is None, "that is when it was taken"
    assert run.see(HIGH, steps=2).took_effect is None, "it has not had its time"
    assert run.see(HIGH).took_effect is False
    assert run.see(HIGH).took_effect is False, "nothing is left to do, and each such snapshot says so"
    assert run.scales == [(0, 0.5)]
    assert run.see(WATCH).took_effect is True
    assert run.see(WATCH).took_effect is None, "it was told"
    assert Run(PolicyConfig(name="observe")).see(SEVERE, steps=20).took_effect is None


def test_from_there_on_the_cuts_feel_for_what_is_bearable() -> None:
    run = Run(excess=3.0)
    for _ in range(3):
        run.see(HIGH, lr_scale=run.state.lr_scale)
        run.see(CALM, steps=run.config.cooldown_steps, lr_scale=run.state.lr_scale)
    assert [scale for _, scale in run.scales] == pytest.approx([0.5, 0.5 * 0.85, 0.5 * 0.85**2])


def test_states_that_are_not_finite_are_severe() -> None:
    run = Run()
    run.see(CALM, non_finite=True, informative=False)
    assert run.scales == [(0, 0.25)]


def test_confirmation_waits_for_as_many_high_snapshots_in_a_row() -> None:
    run = Run(PolicyConfig(name="lr", confirm_snapshots=3))
    run.see(HIGH, steps=2)
    run.see(CALM)
    run.see(HIGH, steps=2)
    assert run.scales == []
    run.see(HIGH)
    assert run.scales == [(5, 0.5)]


def test_a_cut_without_effect_escalates_after_the_cooldown_down_to_the_floor() -> None:
    run = Run()
    run.see(HIGH, steps=100)
    cooldown = run.config.cooldown_steps
    assert run.scales == [(0, 0.5), (cooldown, 0.25), (2 * cooldown, 0.125)]
    assert "not enough" in run.actions[1][1].reason


def test_a_cut_with_effect_is_confirmed_in_words() -> None:
    run = Run()
    run.see(SEVERE)
    assert run.state.phase == "acting"
    decision = run.see(CALM, steps=run.config.cooldown_steps)
    assert decision.phase == "backed_off"
    assert "took effect: risk 0.95 -> 0.01" in decision.reason
    assert run.scales == [(0, 0.25)]


def test_calm_brings_the_rate_back_in_notches_and_each_cut_makes_it_slower() -> None:
    config = PolicyConfig(name="lr", hold_steps=10, rise_factor=2.0)
    run = Run(config)
    run.see(HIGH)
    run.see(CALM, steps=11)
    assert run.scales == [(0, 0.5), (11, 1.0)]
    assert run.actions[-1][1].ramp_steps == config.ramp_steps
    assert run.state.phase == "calm"
    assert run.state.num_cuts == 0
    twice = Run(config)
    twice.see(HIGH, steps=7)
    twice.see(CALM, steps=20)
    assert twice.scales == [(0, 0.5), (6, 0.25)]
    twice.see(CALM)
    assert twice.scales[-1] == (27, 0.5)


def test_hysteresis_a_risk_above_release_is_not_calm() -> None:
    run = Run(PolicyConfig(name="lr", hold_steps=10))
    run.see(HIGH)
    for _ in range(20):
        run.see(CALM, steps=8)
        run.see(WATCH)
    assert run.scales == [(0, 0.5)]


def test_a_flare_up_on_the_way_back_cuts_what_was_in_force() -> None:
    run = Run(PolicyConfig(name="lr", hold_steps=10, rise_factor=2.0, ramp_steps=100))
    run.see(HIGH)
    run.see(CALM, steps=11)
    run.see(HIGH, lr_scale=0.6)
    assert run.scales[-1] == (12, pytest.approx(0.3))


def test_kss_accompanies_a_back_off_once_for_a_while_above_the_calm_radius() -> None:
    run = Run(PolicyConfig(name="kss+lr", hold_steps=10_000))
    run.see(CALM, steps=10, max_spectral_radius=2.0)
    run.see(HIGH)
    run.see(HIGH)
    on = run.actions[1][1].kss
    assert on is not None
    assert on.alpha == run.kss.alpha
    assert on.beta == 0.0
    assert on.tau_u == pytest.approx(run.kss.radius_margin * 2.0)
    assert run.actions[1][1].ramp_steps == run.config.kss_ramp_steps
    run.see(CALM, steps=400)
    assert run.alphas == [(11, run.kss.alpha), (11 + run.config.kss_hold_steps, 0.0)]
    assert [scale for _, scale in run.scales] == [0.5]


def test_kss_is_reverted_and_barred_when_the_loss_rises_under_it() -> None:
    run = Run(PolicyConfig(name="kss+lr"))
    run.see(HIGH, loss=2.0)
    run.see(HIGH, loss=2.0)
    run.see(CALM, steps=30, loss=2.0 * run.config.harm_ratio * 1.01)
    assert [alpha for _, alpha in run.alphas] == [run.kss.alpha, 0.0]
    assert "loss rose" in run.actions[-1][1].reason
    run.see(SEVERE, steps=30, loss=9.0)
    assert len(run.alphas) == 2


def test_kss_is_reverted_when_the_risk_stays_severe_in_spite_of_it() -> None:
    run = Run(PolicyConfig(name="kss"))
    run.see(SEVERE, steps=40)
    assert [alpha for _, alpha in run.alphas] == [run.kss.alpha, 0.0]
    assert run.scales == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("lr", {"set_lr_scale"}), ("kss", {"set_kss"}), ("kss+lr", {"set_lr_scale", "set_kss"}), ("observe", set())],
)
def test_each_policy_uses_its_own_means(name: Any, kinds: set[str]) -> None:
    run = Run(PolicyConfig(name=name))
    run.see(HIGH, steps=60)
    assert {action.kind for _, action in run.actions} == kinds


def test_the_budget_holds_for_an_hour() -> None:
    run = Run(PolicyConfig(name="lr", max_actions_per_hour=1))
    run.see(HIGH, steps=20)
    assert len(run.actions) == 1
    assert "budget of 1 actions" in run.see(HIGH).reason
    run.now += 3600.0
    run.see(HIGH)
    assert len(run.actions) == 2


def test_a_command_that_was_refused_is_not_believed() -> None:
    run = Run()
    run.see(HIGH)
    ack = Ack(run="r", incarnation="0" * 8, command_id="0" * 16, outcome="refused", step=1, applied=Applied())
    state = acknowledge(run.now, run.state, ack)
    assert state.lr_scale == 1.0
    assert state.phase == "calm"
    applied = replace_outcome(ack, "applied")
    assert acknowledge(run.now, run.state, applied) == run.state


def replace_outcome(ack: Ack, outcome: Any) -> Ack:
    return Ack(
        run=ack.run,
        incarnation=ack.incarnation,
        command_id=ack.command_id,
        outcome=outcome,
        step=ack.step,
        applied=ack.applied,
    )


def shielded_kss(state: PolicyState) -> PolicyState:
    held = Applied(lr_scale=state.lr_scale)
    ack = Ack(run="r", incarnation="0" * 8, command_id="0" * 16, outcome="refused", step=1, shielded=True, applied=held)
    return kss_shielded(state, ack)


def test_where_the_model_is_shielded_from_kss_kss_and_back_off_act_as_back_off_alone() -> None:
    """The same cuts and returns at the same steps, from the same budget."""
    series = [CALM] * 5 + [HIGH] * 30 + [CALM] * 40 + [SEVERE] * 3 + [CALM] * 200
    plain, both = (Run(PolicyConfig(name=name, hold_steps=20, max_actions_per_hour=12)) for name in ("lr", "kss+lr"))
    for risk in series:
        plain.see(risk)
        for action in both.see(risk).commands:
            if action.kind == "set_kss":
                both.state = shielded_kss(both.state)
        assert len(both.state.action_times) == len(plain.state.action_times)
    assert len(both.alphas) == 1, "what is refused once is not asked for again"
    assert both.scales == plain.scales
    assert (both.state.phase, both.state.lr_scale) == (plain.state.phase, plain.state.lr_scale)


def test_where_the_model_is_shielded_from_kss_the_policy_of_kss_alone_rests() -> None:
    run = Run(PolicyConfig(name="kss"))
    run.see(HIGH)
    run.state = shielded_kss(run.state)
    assert (run.state.phase, run.state.acted_at, run.state.action_times) == ("calm", None, ())
    run.see(SEVERE, steps=50)
    assert run.alphas == [(0, KssConfig().alpha)]


def test_kss_in_force_survives_a_refused_cut() -> None:
    held = Applied(lr_scale=0.5, kss=KssSettings(alpha=0.1))
    ack = Ack(run="r", incarnation="0" * 8, command_id="0" * 16, outcome="failed", step=9, applied=held)
    state = acknowledge(0.0, replace(PolicyState(), phase="acting", kss_on_at=3), ack)
    assert (state.lr_scale, state.kss.alpha, state.kss_on_at) == (0.5, 0.1, 3)


risks = st.lists(st.floats(0, 1), min_size=1, max_size=200)


@settings(deadline=None)
@given(risks, st.sampled_from(["lr", "kss", "kss+lr", "observe"]))
def test_nothing_is_ever_more_aggressive_than_the_users_own_settings(series: list[float], name: Any) -> None:
    run = Run(PolicyConfig(name=name, hold_steps=3, kss_hold_steps=3))
    for risk in series:
        decision = run.see(risk)
        assert decision.reason
        assert run.config.min_lr_scale <= run.state.lr_scale <= 1.0
        assert run.state.kss.alpha in (0.0, run.kss.alpha)
    cuts = [step for step, action in run.actions if action.kind == "set_lr_scale" and action.ramp_steps == 0]
    assert all(b - a >= run.config.cooldown_steps for a, b in pairwise(cuts))
