"""Policy: decisions for given observations with a simulated clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import convert

from koopmon.config import KssConfig, PolicyConfig, PolicyName
from koopmon.policy import (
    Action,
    Decision,
    PolicyState,
    acknowledge,
    ceilings_answered,
    decide,
    kss_refused,
    rewound,
    stop_answered,
)
from koopmon.policy.decide import RATE_JUMP
from koopmon.policy.state import MAX_RATE, MIN_RATE
from koopmon.risk.online_detector import OnlineRisk
from koopmon.wire.messages import Ack, Applied, KssSettings, Rate, Rewind
from tests.factories import observation

CALM, WATCH, HIGH, SEVERE = 0.01, 0.3, 0.7, 0.95
NAN: dict[str, Any] = {"non_finite": True, "informative": False, "max_spectral_radius": None, "loss": math.nan}
"""Fields of a snapshot of a training that is not finite."""


@dataclass
class Run:
    """One run in front of the policy: it passes snapshots and collects the commands that change training."""

    config: PolicyConfig = field(default_factory=lambda: PolicyConfig(name="lr"))
    kss: KssConfig = field(default_factory=lambda: KssConfig(method="published"))
    state: PolicyState = field(default_factory=PolicyState)
    step: int = 0
    now: float = 0.0
    excess: float | None = None
    """Ratio of the scheduled rate to the critical rate."""
    causes: tuple[str, ...] = ()
    actions: list[tuple[int, Action]] = field(default_factory=list)

    def see(self, risk: float, *, steps: int = 1, **fields: Any) -> Decision:
        """Pass `steps` snapshots with one risk, one step and a tenth of a second apart; return the last decision."""
        for _ in range(steps):
            seen = observation(**{"step": self.step, "max_spectral_radius": 1.2, **fields})
            judged = OnlineRisk(value=risk, reason="r", excess_rate=self.excess, causes=self.causes)
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
        (0.9, HIGH, 0.5),  # the rate does not explain the alarm
        (0.9, SEVERE, 0.25),
        (1.1, HIGH, 0.85),
        (1.1, SEVERE, 0.6),
        (3.0, HIGH, 0.5),  # 1.5 times the critical rate
        (3.0, SEVERE, 0.5),
        (1000.0, SEVERE, 0.125),  # the lower bound
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


def test_states_that_are_not_finite_twice_are_severe() -> None:
    run = Run()
    run.see(CALM, steps=2, non_finite=True, informative=False)
    assert run.scales == [(1, 0.25)]


@pytest.mark.parametrize(
    "before", [(), (CALM,) * 5, (WATCH,) * 5], ids=["at the start", "after calm", "before the alarm"]
)
@pytest.mark.parametrize("confirm", [1, 3])
@pytest.mark.parametrize("excess", [None, 0.4, 6.0])
@pytest.mark.parametrize("name", ["auto", "lr", "kss", "kss+lr"])
@pytest.mark.parametrize("loss", [math.nan, 2.0, None])
def test_single_snapshots_that_are_not_finite_change_nothing(
    name: PolicyName, excess: float | None, confirm: int, before: tuple[float, ...], loss: float | None
) -> None:
    """A loop that drops such batches, as GradScaler does, keeps finite weights."""
    run = Run(PolicyConfig(name=name, confirm_snapshots=confirm), excess=excess)
    for risk in before:
        run.see(risk, **normalised())
    for _ in range(5):
        run.see(1.0, **normalised(**{**NAN, "loss": loss}))
        run.see(CALM, steps=3, **normalised())
    assert run.actions == []


def test_a_high_risk_before_it_makes_one_such_snapshot_an_alarm() -> None:
    run = Run(PolicyConfig(name="lr", confirm_snapshots=3))
    run.see(HIGH, **normalised())
    run.see(1.0, **normalised(**NAN))
    assert run.scales == [(1, 0.25)]


@pytest.mark.parametrize(
    ("fields", "num_bad", "barred"), [(NAN, 1, False), (NAN, 2, True), ({"loss": math.inf}, 1, False)]
)
def test_kss_is_not_barred_by_one_batch(fields: dict[str, Any], num_bad: int, barred: bool) -> None:
    run = Run(PolicyConfig(name="kss"))
    run.see(HIGH, loss=2.0)
    assert run.alphas
    run.see(CALM, steps=run.config.kss_ramp_steps + run.config.cooldown_steps, loss=2.0)
    run.see(CALM, steps=num_bad, **fields)
    assert run.state.kss_barred is barred


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


@pytest.mark.parametrize(("before", "is_barred"), [(0.1, True), (0.0, False), (-0.1, False)])
def test_a_loss_below_one_is_compared_and_one_without_a_ratio_is_not(before: float, is_barred: bool) -> None:
    run = Run(PolicyConfig(name="kss+lr"))
    run.see(HIGH, loss=before)
    run.see(HIGH, loss=before)
    run.see(CALM, steps=30, loss=0.1 * run.config.harm_ratio * 1.01)
    assert any("loss rose" in action.reason for _, action in run.actions) is is_barred


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
    state = acknowledge(run.state, ack)
    assert state.lr_scale == 1.0
    assert state.phase == "calm"
    applied = replace_outcome(ack, "applied")
    assert acknowledge(run.state, applied) == run.state


def replace_outcome(ack: Ack, outcome: Any) -> Ack:
    return Ack(
        run=ack.run,
        incarnation=ack.incarnation,
        command_id=ack.command_id,
        outcome=outcome,
        step=ack.step,
        applied=ack.applied,
    )


def refused_kss(state: PolicyState) -> PolicyState:
    held = Applied(lr_scale=state.lr_scale)
    ack = Ack(
        run="r", incarnation="0" * 8, command_id="0" * 16, outcome="refused", step=1, permanent=True, applied=held
    )
    return kss_refused(state, ack)


def test_where_the_model_is_shielded_from_kss_kss_and_back_off_act_as_back_off_alone() -> None:
    """The same back-offs and rises come at the same steps, from the same budget."""
    series = [CALM] * 5 + [HIGH] * 30 + [CALM] * 40 + [SEVERE] * 3 + [CALM] * 200
    plain, both = (Run(PolicyConfig(name=name, hold_steps=20, max_actions_per_hour=12)) for name in ("lr", "kss+lr"))
    for risk in series:
        plain.see(risk)
        for action in both.see(risk).commands:
            if action.kind == "set_kss":
                both.state = refused_kss(both.state)
        assert len(both.state.action_times) == len(plain.state.action_times)
    assert len(both.alphas) == 1, "what is refused once is not asked for again"
    assert both.scales == plain.scales
    assert (both.state.phase, both.state.lr_scale) == (plain.state.phase, plain.state.lr_scale)


def test_where_the_model_is_shielded_from_kss_the_policy_of_kss_alone_rests() -> None:
    run = Run(PolicyConfig(name="kss"))
    run.see(HIGH)
    run.state = refused_kss(run.state)
    assert (run.state.phase, run.state.acted_at, run.state.action_times) == ("calm", None, ())
    run.see(SEVERE, steps=50)
    assert run.alphas == [(0, KssConfig().alpha)]


def test_kss_in_force_survives_a_refused_cut() -> None:
    held = Applied(lr_scale=0.5, kss=KssSettings(alpha=0.1))
    ack = Ack(run="r", incarnation="0" * 8, command_id="0" * 16, outcome="failed", step=9, applied=held)
    state = acknowledge(replace(PolicyState(), phase="acting", kss_on_at=3), ack)
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


# Bounds of the rules: each value is on the side that docs/method.md, "Policy", and the configuration state.


@pytest.mark.parametrize(
    ("risk", "scale"),
    [(0.4, 0.5), (0.3999, None), (0.8, 0.25), (0.7999, 0.5)],
)
def test_a_risk_at_a_threshold_counts_as_above_it(risk: float, scale: float | None) -> None:
    run = Run(PolicyConfig(name="lr", act_risk=0.4, severe_risk=0.8))
    run.see(risk)
    assert run.scales == ([] if scale is None else [(0, scale)])


def test_a_risk_at_the_release_threshold_is_not_calm() -> None:
    run = Run(PolicyConfig(name="lr", release_risk=0.2))
    assert [action.kind for action in run.see(0.2).commands] == ["set_cadence"]
    assert run.state.phase == "alert"
    assert run.state.calm_since is None
    run.see(0.1999)
    assert (run.state.phase, run.state.calm_since) == ("calm", 1)


def test_an_action_is_confirmed_below_the_threshold_alone() -> None:
    run = Run(PolicyConfig(name="lr", act_risk=0.4, min_lr_scale=0.5, cooldown_steps=3, confirm_snapshots=2))
    run.see(0.4, steps=2)
    run.see(CALM, steps=2)
    decision = run.see(0.4)
    assert decision.took_effect is None, "one high snapshot is no alarm yet, and no relief either"
    assert decision.phase == "acting"
    decision = run.see(0.3999)
    assert decision.took_effect is True
    assert decision.phase == "backed_off"
    assert "the action at step 1 took effect: risk 0.40 -> 0.40" in decision.reason


def test_dense_snapshots_are_asked_for_again_half_of_their_time_before_they_end() -> None:
    """A run that stays above release_risk has dense snapshots at every step, by two commands in each period."""
    run = Run(PolicyConfig(name="observe", dense_steps=10, dense_every=2))
    asked = [(step, d.commands[0].cadence_until_step) for step in range(21) if (d := run.see(WATCH)).commands]
    assert asked == [(0, 10), (5, 15), (10, 20), (15, 25), (20, 30)]


def test_a_request_for_dense_snapshots_lives_as_long_as_they_do() -> None:
    config = PolicyConfig(name="observe", dense_steps=44, dense_every=3)
    (action,) = Run(config).see(WATCH).commands
    assert (action.kind, action.cadence_steps, action.cadence_until_step) == ("set_cadence", 3, 44)
    assert action.expires_in_steps == 44
    assert not action.changes_training


def test_dense_snapshots_asked_for_by_an_earlier_count_of_steps_are_asked_for_again() -> None:
    run = Run(PolicyConfig(name="observe", dense_steps=10), state=PolicyState(dense_until=50_000))
    assert run.see(WATCH).commands, "steps started again: the request would hold until step 50,000"
    run = Run(PolicyConfig(name="observe", dense_steps=10), state=PolicyState(dense_until=10))
    assert not run.see(WATCH).commands, "the request of this very step holds"


def test_a_policy_that_observes_says_so_as_before_and_keeps_every_setting() -> None:
    run = Run(PolicyConfig(name="observe"))
    decision = run.see(SEVERE, steps=30)
    assert decision.phase == "alert"
    assert "nothing to do" in decision.reason
    assert run.state == replace(PolicyState(), phase="alert", high_streak=30, dense_until=run.state.dense_until)


# Remembered steps and times


@pytest.mark.parametrize(("ahead", "kept"), [(10_000, True), (10_001, False)])
def test_steps_far_ahead_of_a_snapshot_belong_to_an_earlier_count(ahead: int, kept: bool) -> None:
    """The policy does not wait for steps of a restarted count, and keeps those of a late snapshot."""
    at = ahead + 7
    before = PolicyState(
        phase="acting", lr_scale=0.5, num_cuts=1, acted_at=at, kss=KssSettings(alpha=0.1), kss_on_at=at, calm_since=at
    )
    run = Run(PolicyConfig(name="kss+lr"), state=before, step=7)
    run.see(CALM)
    assert (run.state.acted_at, run.state.kss_on_at, run.state.calm_since) == ((at,) * 3 if kept else (7,) * 3)


def test_the_budget_counts_the_actions_of_the_last_hour() -> None:
    config = PolicyConfig(name="lr", max_actions_per_hour=1, cooldown_steps=1)

    def acts(*, since: float) -> bool:
        run = Run(config, state=PolicyState(action_times=(1000.0,)), now=1000.0 + since)
        run.see(HIGH)
        return bool(run.actions)

    assert not acts(since=0.0)
    assert not acts(since=3599.9)
    assert acts(since=3600.0)
    assert acts(since=-0.1), "a time ahead of the clock is of another boot"
    run = Run(config, now=50.0)
    run.see(HIGH)
    assert run.state.action_times == (50.0,)


def test_the_request_for_dense_snapshots_passes_a_spent_budget() -> None:
    run = Run(PolicyConfig(name="lr", max_actions_per_hour=0))
    decision = run.see(HIGH)
    assert [action.kind for action in decision.commands] == ["set_cadence"]
    assert (decision.phase, run.state.lr_scale, run.state.acted_at) == ("alert", 1.0, None)


# Back-off


def test_a_back_off_ends_the_calm_and_starts_the_count_of_high_snapshots_again() -> None:
    """A back-off on states that are not finite. Their risk may be low, and the snapshots before them calm."""
    run = Run(PolicyConfig(name="lr", confirm_snapshots=2, cooldown_steps=2, min_lr_scale=0.1))
    run.see(HIGH, steps=2)
    assert run.state.high_streak == 0
    assert run.state.calm_since is None
    run.see(CALM)
    run.see(HIGH)
    assert len(run.scales) == 1, "one high snapshot after the back-off is no confirmed alarm"
    run = Run(PolicyConfig(name="lr", hold_steps=5, cooldown_steps=1))
    run.see(CALM, steps=20)
    run.see(CALM, steps=2, non_finite=True)
    assert run.state.calm_since is None, "calm counts from after the back-off"
    run.see(CALM, steps=5)
    assert [scale for _, scale in run.scales] == [0.25]
    run.see(CALM)
    assert len(run.scales) == 2


def test_a_high_streak_that_was_acted_upon_is_not_acted_upon_again() -> None:
    run = Run(PolicyConfig(name="lr", confirm_snapshots=3, cooldown_steps=2, min_lr_scale=0.05))
    run.see(HIGH, steps=9)
    assert [step for step, _ in run.scales] == [2, 5, 8]


@pytest.mark.parametrize("exponent", [0.0, 0.2, 0.3, 0.4, 1.0])
def test_a_back_off_lands_between_the_landing_rates_of_both_kinds_of_layers(exponent: float) -> None:
    """The target is the geometric mean, weighted by the normalisation strength."""
    config = PolicyConfig(
        name="lr", landing_rate=2.0, normalized_landing_rate=0.25, min_lr_scale=0.05, gentle_factor=0.99
    )
    run = Run(config, excess=4.0)
    run.see(HIGH, update_exponent=exponent)
    share = {0.0: 1.0, 0.2: 1.0, 0.3: 0.5, 0.4: 0.0, 1.0: 0.0}[exponent]
    landing = math.exp((1 - share) * math.log(2.0) + share * math.log(0.25))
    assert run.scales == [(0, pytest.approx(landing / 4.0))]


def test_a_rate_at_the_critical_one_explains_an_alarm() -> None:
    run = Run(PolicyConfig(name="lr", landing_rate=50.0), excess=1.0)
    run.see(HIGH)
    assert run.scales == [(0, run.config.gentle_factor)]


# Return


def test_each_notch_of_the_return_waits_for_its_own_calm() -> None:
    run = Run(PolicyConfig(name="lr", hold_steps=10, rise_factor=1.5, ramp_steps=4))
    run.see(SEVERE)
    run.see(CALM, steps=60)
    assert run.scales == [(0, 0.25), (11, 0.375), (21, 0.5625), (31, 0.84375), (41, 1.0)]
    assert run.state.phase == "calm"
    assert [action.ramp_steps for _, action in run.actions] == [0, 4, 4, 4, 4]


def test_a_run_on_its_way_back_is_recovering_until_it_is_back() -> None:
    run = Run(PolicyConfig(name="lr", hold_steps=10, rise_factor=2.0))
    run.see(SEVERE)
    assert run.see(CALM, steps=10).phase == "backed_off"
    assert run.see(CALM).phase == "recovering"
    assert run.see(CALM, steps=9).phase == "recovering"
    assert run.see(CALM).phase == "calm"
    assert run.state.num_cuts == 0


def test_a_scale_below_the_own_rate_without_a_back_off_of_this_run_returns_too() -> None:
    """A restored run starts below its own rate without back-offs of its own: it waits for one period."""
    run = Run(PolicyConfig(name="lr", hold_steps=10), state=PolicyState(phase="backed_off", lr_scale=0.5))
    run.see(CALM, steps=10)
    assert run.scales == []
    run.see(CALM)
    assert run.scales == [(10, 0.625)]


def test_kss_accompanies_the_first_back_off_after_a_full_return_again() -> None:
    config = PolicyConfig(name="kss+lr", hold_steps=30, rise_factor=2.0, kss_hold_steps=10)
    run = Run(config)
    run.see(HIGH, steps=2)
    run.see(CALM, steps=60)
    assert run.state.lr_scale == 1.0
    assert run.state.phase == "calm"
    assert (run.state.num_cuts, run.state.kss_cut) == (0, 0)
    run.see(HIGH, steps=2)
    assert [alpha for _, alpha in run.alphas] == [run.kss.alpha, 0.0, run.kss.alpha]


def test_a_return_to_the_own_rate_under_kss_is_no_calm_yet() -> None:
    run = Run(PolicyConfig(name="kss+lr", hold_steps=5, rise_factor=2.0, kss_hold_steps=30))
    run.see(HIGH, steps=2)
    run.see(CALM, steps=6)
    assert run.state.lr_scale == 1.0
    assert run.state.kss.alpha > 0
    assert run.state.phase == "recovering"


# KSS


def test_kss_waits_under_the_policy_of_kss_for_its_cooldown_and_an_alarm() -> None:
    run = Run(PolicyConfig(name="kss", cooldown_steps=6, kss_hold_steps=3, kss_ramp_steps=2))
    run.see(CALM, steps=20)
    assert run.alphas == [], "no action is old enough to need one"
    run.see(HIGH)
    assert run.state.phase == "acting"
    assert (run.state.acted_at, run.state.risk_at_action) == (20, HIGH)
    run.see(HIGH, steps=5)
    assert [step for step, _ in run.alphas] == [20, 23], "off after its time, not on again within the cooldown"
    run.see(HIGH)
    assert [step for step, _ in run.alphas] == [20, 23, 26]


def test_beside_a_back_off_the_effect_is_that_of_the_back_off() -> None:
    run = Run(PolicyConfig(name="kss+lr"))
    run.see(HIGH)
    run.see(0.5)
    assert len(run.alphas) == 1
    assert (run.state.phase, run.state.acted_at, run.state.risk_at_action) == ("acting", 0, HIGH)


def test_after_the_policy_of_kss_turned_it_on_its_effect_is_confirmed() -> None:
    run = Run(PolicyConfig(name="kss", kss_hold_steps=50))
    run.see(HIGH)
    decision = run.see(CALM, steps=run.config.cooldown_steps)
    assert decision.took_effect is True
    assert decision.phase == "backed_off"
    assert "risk 0.70 -> 0.01" in decision.reason


def test_kss_by_weight_zero_is_no_kss() -> None:
    run = Run(PolicyConfig(name="kss"), kss=KssConfig(method="published", alpha=0.0))
    run.see(HIGH, steps=30)
    assert run.actions == []
    assert run.state.phase == "alert"


def test_states_that_are_not_finite_get_no_kss() -> None:
    run = Run(PolicyConfig(name="kss"))
    run.see(HIGH, steps=3, non_finite=True)
    assert run.alphas == []


def test_kss_settings_are_those_of_the_configuration() -> None:
    kss = KssConfig(
        method="published",
        alpha=0.2,
        temperature=11.0,
        beta=0.3,
        gamma=0.25,
        svd_rank=9,
        num_samples=77,
        every=3,
        layer_fraction=0.5,
        radius_margin=3.0,
    )
    run = Run(PolicyConfig(name="kss", expires_in_steps=21, kss_ramp_steps=4, kss_hold_steps=30), kss)
    run.see(HIGH)
    (action,) = (action for _, action in run.actions)
    assert (action.ramp_steps, action.expires_in_steps) == (4, 21)
    assert action.kss == KssSettings(
        alpha=0.2,
        temperature=11.0,
        tau_u=3.0,  # above modulus 1 without a calm snapshot
        beta=0.3,
        gamma=0.25,
        svd_rank=9,
        num_samples=77,
        every=3,
        layer_fraction=0.5,
    )
    assert run.state.kss == action.kss


@pytest.mark.parametrize(
    ("radius", "tau_u"),
    [(0.1, 1.05), (2.0, 3.0), (900.0, 1000.0), (999.9, 1000.0), (1000.0, None), (5000.0, None)],
)
def test_kss_starts_above_the_calm_radius_within_the_bounds_of_a_message(radius: float, tau_u: float | None) -> None:
    run = Run(PolicyConfig(name="kss"))
    run.see(CALM, max_spectral_radius=radius)
    decision = run.see(HIGH)
    if tau_u is not None:
        (on,) = (action.kss for _, action in run.actions)
        assert on is not None
        assert on.tau_u == pytest.approx(tau_u)
    else:
        assert run.actions == []
        assert run.state.kss_barred
        assert "KSS stays off" in decision.reason


def test_the_calm_radius_follows_calm_snapshots_slowly() -> None:
    """The newest radius has the weight 0.1. Other snapshots, or those without a radius, leave it unchanged."""
    run = Run(PolicyConfig(name="observe"))
    expected = 2.0
    for radius in (2.0, 3.0, 1.0, 4.0):
        run.see(CALM, max_spectral_radius=radius)
        expected += 0.1 * (radius - expected)
        assert run.state.calm_radius == pytest.approx(expected)
    run.see(WATCH, max_spectral_radius=50.0)
    run.see(CALM, max_spectral_radius=None)
    run.see(CALM, max_spectral_radius=50.0, informative=False)
    assert run.state.calm_radius == pytest.approx(expected)


def on_kss(**fields: Any) -> Run:
    """State of a run with KSS on since step 100 at loss 2, with a ramp of 4 steps, a cooldown of 3 and a hold of 50."""
    config = PolicyConfig(name="kss", kss_ramp_steps=4, cooldown_steps=3, kss_hold_steps=50, harm_ratio=1.5)
    state = PolicyState(
        **{"phase": "backed_off", "kss": KssSettings(alpha=0.1), "kss_on_at": 100, "loss_at_kss": 2.0, **fields}
    )
    return Run(config, state=state)


@pytest.mark.parametrize(
    ("step", "risk", "loss", "barred"),
    [
        (106, SEVERE, 9.0, False),  # before the end of its cooldown
        (107, SEVERE, 2.0, True),
        (107, CALM, 3.0, False),  # at the ratio
        (107, CALM, 3.01, True),
        (106, CALM, 3.01, False),
        (107, CALM, None, False),
        (149, CALM, 3.01, True),
    ],
)
def test_kss_is_barred_by_harm_after_its_ramp_and_cooldown(
    step: int, risk: float, loss: float | None, barred: bool
) -> None:
    run = on_kss()
    run.step = step
    run.see(risk, loss=loss)
    assert run.state.kss_barred is barred
    assert [alpha for _, alpha in run.alphas] == ([0.0] if barred else [])
    if barred:
        assert run.state.kss == KssSettings()
        assert run.state.kss_on_at is None
        assert run.actions[0][1].ramp_steps == 4


@pytest.mark.parametrize(("before", "after"), [(-2.0, -1.0), (-2.0, 9.0), (0.0, 1.0), (-1.0, -9.0)])
def test_a_loss_that_is_not_positive_has_no_ratio_and_bars_nothing(before: float, after: float) -> None:
    run = on_kss(loss_at_kss=before)
    run.step = 110
    run.see(CALM, loss=after)
    assert not run.state.kss_barred


def test_kss_without_a_loss_at_its_start_is_not_barred_by_a_loss() -> None:
    run = on_kss(loss_at_kss=None)
    run.step = 110
    run.see(CALM, loss=1e9)
    assert not run.state.kss_barred


@pytest.mark.parametrize(
    ("phase", "lr_scale", "after"),
    [
        ("backed_off", 1.0, "calm"),
        ("recovering", 1.0, "calm"),
        ("backed_off", 0.5, "backed_off"),
        ("recovering", 0.5, "recovering"),
    ],
)
def test_kss_goes_after_its_time_and_leaves_calm_where_nothing_else_is_in_force(
    phase: Any, lr_scale: float, after: str
) -> None:
    run = on_kss(phase=phase, lr_scale=lr_scale)
    run.step = 149
    run.see(CALM)
    assert run.alphas == []
    run.see(CALM)
    assert run.alphas == [(150, 0.0)]
    assert (run.state.phase, run.state.kss, run.state.kss_on_at) == (after, KssSettings(), None)
    assert not run.state.kss_barred


def test_kss_that_goes_while_an_action_is_open_leaves_it_open() -> None:
    run = on_kss(phase="acting", acted_at=149)
    run.step = 150
    assert run.see(WATCH).phase == "acting"
    assert run.alphas == [(150, 0.0)]


# Acknowledgements of an agent


def test_of_a_refused_command_the_settings_in_force_are_believed() -> None:
    before = PolicyState(phase="acting", lr_scale=0.25, kss=KssSettings(alpha=0.3), kss_on_at=5, acted_at=9, num_cuts=2)

    def after(lr_scale: float, alpha: float) -> PolicyState:
        held = Applied(lr_scale=lr_scale, kss=KssSettings(alpha=alpha))
        ack = Ack(run="r", incarnation="0" * 8, command_id="0" * 16, outcome="refused", step=1, applied=held)
        return acknowledge(before, ack)

    off = KssSettings(alpha=0.0)
    assert after(1.0, 0.0) == replace(before, phase="calm", lr_scale=1.0, kss=off, kss_on_at=None, acted_at=None)
    assert after(0.5, 0.0) == replace(before, lr_scale=0.5, kss=off, kss_on_at=None, acted_at=None)
    assert after(1.0, 0.1) == replace(before, lr_scale=1.0, kss=KssSettings(alpha=0.1), acted_at=None)
    ack = Ack(run="r", incarnation="0" * 8, command_id="0" * 16, outcome="duplicate", step=1, applied=Applied())
    assert acknowledge(before, ack) == before


def test_a_model_without_kss_keeps_the_back_off_and_drops_kss() -> None:
    before = PolicyState(
        phase="acting", lr_scale=0.5, kss=KssSettings(alpha=0.3), kss_on_at=5, acted_at=9, action_times=(1.0, 2.0)
    )
    after = refused_kss(before)
    assert after == replace(before, kss=KssSettings(), kss_on_at=None, kss_barred=True, action_times=(1.0,))
    held = Applied(lr_scale=0.5, kss=KssSettings(alpha=0.1))
    ack = Ack(
        run="r", incarnation="0" * 8, command_id="0" * 16, outcome="refused", step=1, permanent=True, applied=held
    )
    kept = kss_refused(before, ack)
    assert (kept.kss, kept.kss_on_at) == (held.kss, 5)


def test_an_action_that_says_no_life_time_lives_for_fifty_steps() -> None:
    assert Action(kind="set_lr_scale", reason="r").expires_in_steps == 50
    run = Run(PolicyConfig(name="lr", expires_in_steps=33, hold_steps=3))
    run.see(HIGH)
    run.see(CALM, steps=4)
    assert [action.expires_in_steps for _, action in run.actions] == [33, 33]


def test_a_new_run_has_no_history() -> None:
    state = PolicyState()
    assert (state.phase, state.lr_scale, state.num_cuts, state.kss.alpha) == ("calm", 1.0, 0, 0.0)
    assert (state.risk_at_action, state.dense_until, state.action_times) == (0.0, 0, ())


def test_a_policy_that_observes_leaves_a_lower_rate_and_kss_as_they_are() -> None:
    """Settings of another user or of an earlier policy: only a policy that acts returns from them."""
    before = PolicyState(phase="backed_off", lr_scale=0.5, kss=KssSettings(alpha=0.1), kss_on_at=0)
    run = Run(PolicyConfig(name="observe", hold_steps=5, kss_hold_steps=5), state=before)
    run.see(CALM, steps=50)
    assert run.actions == []


def test_a_spent_budget_does_not_hide_that_an_action_took_effect() -> None:
    before = PolicyState(phase="acting", lr_scale=0.5, acted_at=0, action_times=(0.0, 0.0))
    run = Run(PolicyConfig(name="lr", max_actions_per_hour=1), state=before, step=50)
    assert run.see(CALM).phase == "backed_off"


def test_an_action_keeps_the_request_for_dense_snapshots() -> None:
    run = Run()
    assert [action.kind for action in run.see(HIGH).commands] == ["set_cadence", "set_lr_scale"]
    assert run.state.dense_until == run.config.dense_steps
    assert run.see(HIGH).commands == ()


# Normalised layers: a cap on the rate, and a rewind.


def normalised(**fields: Any) -> dict[str, Any]:
    """Fields of a normalised model of width 100 at a rate of 0.03, whose agents can rewind."""
    return {"update_exponent": 0.0, "width": 100, "learning_rate": 0.03, "rewinds": True, **fields}


def auto(**fields: Any) -> Run:
    """A run under the default policy, at 6 times the critical rate of 0.005."""
    run = Run(PolicyConfig(**fields))
    run.excess = 6.0
    return run


def answer(command: Action, outcome: Any = "applied", step: int = 5, **applied: Any) -> Ack:
    return Ack(
        run="r", incarnation="aaaaaaaa", command_id="aaaaaaaa", outcome=outcome, step=step, applied=Applied(**applied)
    )


def test_an_alarm_of_normalised_layers_caps_the_rate_and_rewinds() -> None:
    run = auto()
    run.see(CALM, steps=3, **normalised())
    decision = run.see(HIGH, **normalised())
    cap, back = (action for action in decision.commands if action.changes_training)
    assert (cap.kind, back.kind) == ("set_lr_scale", "rewind"), "the cap is in force first"
    assert cap.max_rate == pytest.approx(0.5 * 0.005), "half of the critical rate"
    assert (cap.lr_scale, cap.warmup_steps) == (1.0, run.config.rewind_warmup_steps)
    assert back.rewind is not None
    assert (back.rewind.max_rate, back.rewind.min_age_steps) == (cap.max_rate, run.config.rewind_age_steps)
    assert (decision.state.max_rate, decision.state.num_rewinds, decision.phase) == (cap.max_rate, 1, "acting")


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        ({"rewinds": False}, {}),
        ({"update_exponent": 1.0}, {}),
        ({"update_exponent": None}, {}),
        ({}, {"max_rewinds": 0}),
        ({}, {"name": "lr"}),
        ({"learning_rate": None}, {"excess": None}),
        ({}, {"excess": None}),
        ({}, {"excess": 0.5}),
        ({"lr_scale": 0.08}, {}),
        ({"non_finite": True, "informative": False}, {"excess": 0.4}),
    ],
    ids=[
        "no copies",
        "not normalised",
        "unknown",
        "none allowed",
        "another policy",
        "no rate",
        "no critical rate",
        "at the landing rate",
        "scaled below it",
        "not finite at a low rate",
    ],
)
def test_otherwise_it_is_a_back_off(fields: dict[str, Any], config: dict[str, Any]) -> None:
    run = auto(**{key: value for key, value in config.items() if key != "excess"})
    run.excess = config.get("excess", run.excess)
    decision = run.see(HIGH, steps=1 + ("non_finite" in fields), **normalised(**fields))
    (action,) = (action for action in decision.commands if action.changes_training)
    assert (action.kind, action.max_rate, action.rewind) == ("set_lr_scale", None, None)
    assert action.lr_scale is not None
    assert action.lr_scale < 1.0


def test_a_budget_for_one_action_allows_no_other_in_place_of_a_cap_and_a_rewind() -> None:
    run = auto(max_actions_per_hour=1)
    assert "budget of 1 actions" in run.see(HIGH, **normalised()).reason
    assert run.actions == []


def test_nothing_else_is_done_until_the_rewind_is_answered() -> None:
    run = auto()
    run.see(HIGH, **normalised())
    run.see(SEVERE, steps=40, **normalised())
    assert len(run.actions) == 2
    run.state = rewound(run.state, answer(run.actions[1][1], step=run.step))
    run.see(SEVERE, steps=run.config.cooldown_steps, **normalised())
    assert len(run.actions) == 2, "within the cooldown after the return"
    run.see(SEVERE, **normalised())
    assert [action.kind for _, action in run.actions[2:]] == ["set_lr_scale", "rewind"]
    assert run.actions[2][1].max_rate == pytest.approx(run.config.rewind_factor * 0.5 * 0.005)


@pytest.mark.parametrize("outcome", ["refused", "failed", "expired"])
def test_a_rewind_that_failed_leaves_the_cap_and_later_rules_free(outcome: Any) -> None:
    run = auto()
    run.see(HIGH, **normalised())
    run.state = rewound(run.state, answer(run.actions[1][1], outcome))
    assert (run.state.max_rate, run.state.rewinding) == (pytest.approx(0.0025), False)
    run.see(SEVERE, steps=run.config.cooldown_steps + 1, **normalised())
    assert len(run.actions) == 4


def test_a_repeated_acknowledgement_changes_nothing() -> None:
    run = auto()
    run.see(HIGH, **normalised())
    assert rewound(run.state, answer(run.actions[1][1], "duplicate")) == run.state


def test_after_the_last_rewind_the_cap_alone_is_lowered() -> None:
    run = auto(max_rewinds=1)
    run.see(HIGH, **normalised())
    run.state = rewound(run.state, answer(run.actions[1][1], step=run.step))
    run.see(SEVERE, steps=run.config.cooldown_steps + 1, **normalised())
    ((_, lower),) = run.actions[2:]
    assert (lower.kind, lower.warmup_steps) == ("set_lr_scale", 0)
    assert lower.max_rate == pytest.approx(run.config.rewind_factor * 0.0025)


def test_a_cap_that_was_not_applied_is_forgotten() -> None:
    run = auto()
    run.see(HIGH, **normalised())
    state = acknowledge(run.state, answer(run.actions[0][1], "refused"))
    assert (state.max_rate, state.phase) == (None, "calm")
    state = acknowledge(run.state, answer(run.actions[0][1], "refused", max_rate=0.004))
    assert (state.max_rate, state.phase) == (0.004, "acting"), "an earlier cap is still in force"


def test_an_alarm_during_the_warm_up_takes_a_share_of_the_cap() -> None:
    run = auto()
    run.see(HIGH, **normalised())
    run.state = rewound(run.state, answer(run.actions[1][1], step=run.step))
    run.see(SEVERE, steps=run.config.cooldown_steps + 1, **normalised(lr_scale=0.001))
    assert run.state.max_rate == pytest.approx(run.config.rewind_factor * 0.0025)


def test_the_cap_is_below_the_rate_in_force() -> None:
    run = auto()
    run.excess = 0.9
    run.see(HIGH, **normalised(learning_rate=0.0025, lr_scale=0.8))
    assert run.state.max_rate == pytest.approx(run.config.rewind_factor * 0.0025 * 0.8)


@given(
    rate=st.floats(allow_nan=True) | st.none(),
    excess=st.none() | st.floats(1e-12, 1e12),
    scale=st.floats(1e-6, 1.0),
    last=st.none() | st.floats(1e-12, 1e6),
)
def test_a_cap_is_within_the_protocol_and_never_rises(
    rate: float | None, excess: float | None, scale: float, last: float | None
) -> None:
    run = auto()
    run.excess, run.state = excess, PolicyState(max_rate=last)
    decision = run.see(HIGH, **normalised(learning_rate=rate, lr_scale=scale))
    for action in decision.commands:
        if action.max_rate is not None:
            assert MIN_RATE <= action.max_rate <= MAX_RATE
            assert last is None or action.max_rate <= max(last, MIN_RATE)


def test_a_cap_ends_the_calm_and_starts_the_count_of_high_snapshots_again() -> None:
    run = auto()
    run.state = replace(run.state, calm_since=0)
    run.see(CALM, steps=2, **normalised(non_finite=True))
    assert run.state.num_rewinds == 1
    assert (run.state.calm_since, run.state.high_streak) == (None, 0)


def test_a_cap_is_an_action_to_be_confirmed() -> None:
    run = auto()
    run.see(CALM, steps=3, **normalised())
    run.see(HIGH, **normalised())
    assert (run.state.acted_at, run.state.risk_at_action) == (3, HIGH)


@pytest.mark.parametrize(("exponent", "caps"), [(0.28, True), (0.32, False)])
def test_layers_that_are_more_normalised_than_not_get_a_cap(exponent: float, caps: bool) -> None:
    """The strength is 1/2 at an exponent of 0.3."""
    run = auto()
    run.see(HIGH, **normalised(update_exponent=exponent))
    assert (run.state.max_rate is not None) is caps


def without_warmup(excess: float = 0.4, **fields: Any) -> Run:
    """A run whose rate of 0.002 is `excess` times the critical one from the first step on."""
    run = Run(PolicyConfig(**fields), causes=("warmup",))
    run.excess = excess
    return run


def test_a_training_without_a_warm_up_goes_back_to_the_start_and_gets_one() -> None:
    run = without_warmup()
    run.see(HIGH, **normalised(learning_rate=0.002))
    (_, cap), (_, back) = run.actions
    assert cap.max_rate == pytest.approx(0.5 * 0.005), "the landing rate: that of the schedule stays as it is"
    assert (cap.lr_scale, cap.warmup_steps) == (1.0, run.config.rewind_warmup_steps)
    assert back.rewind is not None
    assert back.rewind.max_rate == 0.001, "no copy from after the first update"
    assert back.rewind.min_age_steps == run.config.rewind_age_steps


def test_a_back_off_of_the_first_steps_ends_with_the_return_to_the_start() -> None:
    run = without_warmup()
    run.state = replace(run.state, lr_scale=0.5, num_cuts=1)
    decision = run.see(HIGH, **normalised(learning_rate=0.002, lr_scale=0.5))
    (_, cap), (_, back) = run.actions
    assert cap.lr_scale == decision.state.lr_scale == 1.0
    assert back.rewind is not None
    assert back.rewind.max_rate == 0.0005, "the rate in force is 0.001"


def test_a_rate_above_the_landing_rate_is_capped_as_at_any_alarm() -> None:
    run = without_warmup(0.9)
    run.see(HIGH, **normalised(learning_rate=0.0045))
    (_, cap), (_, back) = run.actions
    assert cap.max_rate == pytest.approx(0.5 * 0.005)
    assert back.rewind is not None
    assert back.rewind.max_rate == pytest.approx(0.5 * 0.0045)


@pytest.mark.parametrize(
    ("fields", "config"), [({"rewinds": False}, {}), ({"update_exponent": 1.0}, {}), ({}, {"name": "lr"})]
)
def test_without_a_rewind_a_missing_warm_up_is_a_back_off(fields: dict[str, Any], config: dict[str, Any]) -> None:
    run = without_warmup(**config)
    run.see(HIGH, **normalised(learning_rate=0.002, **fields))
    ((_, action),) = run.actions
    assert (action.kind, action.max_rate) == ("set_lr_scale", None)
    assert action.lr_scale is not None
    assert action.lr_scale < 1.0


@pytest.mark.parametrize("rate", [-0.5, 0.0, math.inf])
def test_a_rate_that_is_no_positive_number_gets_no_cap(rate: float) -> None:
    run = auto()
    run.excess = 0.1
    run.see(HIGH, **normalised(learning_rate=rate))
    assert run.state.max_rate is None
    assert run.state.lr_scale < 1.0


@pytest.mark.parametrize(("rate", "cap"), [(1e-30, 1e-12), (1e30, 1e6)])
def test_a_cap_of_an_extreme_rate_is_at_a_bound(rate: float, cap: float) -> None:
    run = auto()
    run.see(HIGH, **normalised(learning_rate=rate))
    assert run.state.max_rate == cap
    assert convert(cap, Rate) == cap, "the protocol allows it"


def test_a_back_off_and_a_return_have_no_warm_up() -> None:
    """A warm-up without a cap is against the protocol."""
    run = Run(PolicyConfig(name="lr", hold_steps=3))
    run.see(HIGH)
    run.see(CALM, steps=4)
    assert [action.warmup_steps for _, action in run.actions] == [0, 0]


def test_after_a_rewind_calm_and_alarms_count_from_new_snapshots() -> None:
    """Snapshots between the command and the return show weights that are gone."""
    before = PolicyState(phase="acting", rewinding=True, max_rate=0.1, acted_at=4, high_streak=3, calm_since=6)
    after = rewound(before, answer(Action(kind="rewind", reason="r"), step=9))
    assert after == replace(before, num_rewound=1, rewinding=False, acted_at=9, high_streak=0, calm_since=None)


# A stop of a ruined training.


def stopping(**fields: Any) -> Run:
    """A run that may be stopped after 3 snapshots over 10 steps."""
    return Run(PolicyConfig(**{"name": "lr", "stop": True, "stop_snapshots": 3, "stop_steps": 10, **fields}))


def stops(run: Run) -> list[tuple[int, str]]:
    return [(step, action.reason) for step, action in run.actions if action.kind == "stop"]


def sparse(run: Run, risk: float, at: list[int], **fields: Any) -> list[tuple[int, str]]:
    """Pass snapshots at these steps; return the stops."""
    for step in at:
        run.step = step
        run.see(risk, **fields)
    return stops(run)


def test_a_training_that_is_not_finite_is_stopped_after_its_steps() -> None:
    run = stopping()
    run.see(CALM, steps=3, loss=2.0)
    run.see(1.0, steps=11, **NAN)
    assert stops(run) == []
    decision = run.see(1.0, steps=3, **NAN)
    ((step, reason),) = stops(run)
    assert reason == f"stop: the states and the loss are not finite, for {step - 3} steps"
    assert step - 3 in (11, 12, 13), "between two back-offs"
    assert decision.state.stopping
    (action,) = (action for _, action in run.actions if action.kind == "stop")
    assert (action.expires_in_steps, action.lr_scale, action.ramp_steps) == (run.config.expires_in_steps, None, 0)


def test_no_run_is_stopped_unless_it_is_allowed() -> None:
    assert PolicyConfig().stop is False
    run = stopping(stop=False)
    run.see(1.0, steps=3000, **NAN)
    watched = stopping(name="observe")
    watched.see(1.0, steps=3000, **NAN)
    assert stops(run) == stops(watched) == []


def test_the_defaults_are_five_snapshots_over_a_hundred_steps() -> None:
    run = Run(PolicyConfig(name="kss", stop=True))
    assert sparse(run, 1.0, [0, 20, 40, 60, 99, 100, 120], **NAN) == [
        (100, "stop: the states and the loss are not finite, for 100 steps")
    ]


@pytest.mark.parametrize(
    ("at", "stopped"),
    [
        ([0, 5, 10], 10),
        ([0, 10], None),
        ([0, 10, 11], 11),
        ([0, 8, 9], None),
        ([0, 1, 2, 3, 9], None),
        ([0, 1, 2, 3, 10], 10),
    ],
)
def test_a_stop_takes_enough_snapshots_and_enough_steps(at: list[int], stopped: int | None) -> None:
    run = stopping(name="kss")
    assert [step for step, _ in sparse(run, 1.0, at, **NAN)] == ([] if stopped is None else [stopped])


@pytest.mark.parametrize(
    ("fields", "sign"),
    [
        ({"loss": math.nan}, "loss"),
        ({"loss": math.inf, "grad_norm": 3.0}, "loss"),
        ({"loss": math.nan, "grad_norm": math.nan}, "loss"),
        ({"loss": 2.0, "grad_norm": math.nan}, "gradient norm"),
        ({"loss": None, "grad_norm": math.inf}, "gradient norm"),
        ({"loss": None, "grad_norm": None}, ""),
        ({"loss": 2.0, "grad_norm": None}, ""),
        ({"loss": 2.0, "grad_norm": 3.0}, ""),
        ({"loss": None, "grad_norm": 3.0}, ""),
    ],
)
def test_states_that_are_not_finite_need_a_second_fact(fields: dict[str, Any], sign: str) -> None:
    """The states of padding tokens may be NaN in a healthy training."""
    run = stopping(name="kss")
    found = sparse(run, 1.0, list(range(40)), **{**NAN, **fields})
    assert [reason for _, reason in found] == (
        [f"stop: the states and the {sign} are not finite, for 10 steps"] * (sign != "")
    )


def test_a_loss_that_is_not_finite_with_finite_states_stops_nothing() -> None:
    """A batch without labels has a loss of NaN."""
    run = stopping(name="kss")
    assert sparse(run, CALM, list(range(100)), loss=math.nan) == []


def test_one_sound_snapshot_begins_the_count_again() -> None:
    run = stopping(name="kss")
    run.see(1.0, steps=10, **NAN)
    assert (run.state.ruined_streak, run.state.ruined_since) == (10, 0)
    run.see(1.0, **{**NAN, "loss": 2.0})
    assert (run.state.ruined_streak, run.state.ruined_since) == (0, None)
    run.see(1.0, steps=10, **NAN)
    assert stops(run) == []
    run.see(1.0, **NAN)
    assert [step for step, _ in stops(run)] == [21]


def spent(run: Run, risk: float = SEVERE, loss: float | None = 9.0, **fields: Any) -> list[tuple[int, str]]:
    """See a first loss of 4, then an alarm until the scale is as low as it may be and long after."""
    run.see(CALM, loss=4.0)
    for _ in range(100):
        run.see(risk, **{"loss": loss, "lr_scale": run.state.lr_scale, **fields})
    return stops(run)


def test_a_training_that_nothing_helped_is_stopped() -> None:
    run = stopping()
    ((step, reason),) = spent(run)
    lowest = next(at for at, scale in run.scales if scale == run.config.min_lr_scale)
    assert step >= lowest + 10
    worse = "the loss is 9, 2.2 times its first value, at the lowest learning-rate scale"
    assert reason == f"stop: {worse}, for {step - lowest - 1} steps"
    assert run.actions[-1][0] == step, "no command follows a stop"


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {"loss": 7.9}),
        ({}, {"loss": None}),
        ({}, {"loss": math.nan}),
        ({}, {"risk": 0.79}),
        ({"stop_loss_ratio": 3.0}, {}),
        ({"name": "kss"}, {}),
    ],
    ids=["it still learns", "no loss", "one fact", "not severe", "a higher ratio", "a policy that lowers no rate"],
)
def test_without_confirmation_nothing_is_stopped(config: dict[str, Any], fields: dict[str, Any]) -> None:
    assert spent(stopping(**config), **fields) == []


def test_the_bounds_of_a_ruin_belong_to_it() -> None:
    assert len(spent(stopping(), risk=0.8, loss=8.0)) == 1


def test_above_the_lowest_scale_something_is_left_to_do() -> None:
    run = stopping(max_actions_per_hour=1)
    assert spent(run) == []
    assert 0.125 < run.state.lr_scale < 1.0
    capped = stopping(max_actions_per_hour=2)
    assert len(spent(capped, lr_scale=0.125)) == 1, "a cap holds the scale in force down"


def test_a_lowest_scale_that_is_commanded_leaves_nothing_either() -> None:
    run = stopping()
    run.state = replace(run.state, lr_scale=0.125, first_loss=4.0)
    assert len(sparse(run, SEVERE, list(range(30)), loss=9.0, lr_scale=1.0)) == 1


def test_a_small_first_loss_has_a_ratio_too() -> None:
    run = stopping()
    run.state = replace(run.state, lr_scale=0.125, first_loss=0.5)
    assert len(sparse(run, SEVERE, list(range(30)), loss=1.0)) == 1


@pytest.mark.parametrize(("exponent", "caps"), [(0.24, True), (0.29, True), (0.31, False)])
def test_layers_that_are_more_normalised_than_not_are_capped(exponent: float, caps: bool) -> None:
    run = stopping(name="auto")
    run.excess = 6.0
    run.step = 20
    run.state = replace(run.state, high_streak=12, ruined_streak=12, ruined_since=0)
    run.see(1.0, **normalised(**{**NAN, "update_exponent": exponent}))
    assert [action.kind for _, action in run.actions] == ["set_lr_scale", "rewind"]
    assert (run.actions[0][1].max_rate is not None) == caps


@pytest.mark.parametrize("first", [0.0, -1.0])
def test_a_first_loss_that_is_not_positive_has_no_ratio(first: float) -> None:
    run = stopping()
    run.see(CALM, loss=first)
    run.see(SEVERE, steps=100, loss=9.0, lr_scale=0.125)
    assert stops(run) == []


def test_the_first_loss_is_the_first_finite_one() -> None:
    run = stopping()
    for loss in (None, math.nan, math.inf, 3.0, 2.0, None):
        run.see(CALM, loss=loss)
    assert run.state.first_loss == 3.0


def test_a_stop_waits_for_the_effect_of_the_last_action() -> None:
    run = stopping(cooldown_steps=20)
    run.see(1.0, steps=2, **NAN)
    assert run.state.acted_at == 1
    run.see(1.0, steps=19, **NAN)
    assert stops(run) == []
    run.see(1.0, **NAN)
    assert [step for step, _ in stops(run)] == [21]


def test_a_stop_waits_while_a_rewind_may_help() -> None:
    run = Run(PolicyConfig(stop=True, stop_snapshots=3, stop_steps=10, max_rewinds=2))
    run.excess = 6.0
    broken = normalised(**NAN)
    run.see(1.0, steps=2, **broken)
    assert [action.kind for _, action in run.actions] == ["set_lr_scale", "rewind"]
    run.see(1.0, steps=60, **broken)
    assert stops(run) == [], "the rewind is not answered"
    for number in (1, 2):
        run.state = rewound(run.state, answer(Action(kind="rewind", reason="r"), step=run.step))
        run.see(1.0, steps=run.config.cooldown_steps + 1, **broken)
        assert run.state.num_rewinds == 2
        assert len(stops(run)) == number - 1


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        ({"rewinds": False}, {}),
        ({"learning_rate": None}, {}),
        ({}, {"max_rewinds": 0}),
        ({}, {"name": "lr"}),
    ],
)
def test_a_rewind_that_will_not_come_delays_no_stop(fields: dict[str, Any], config: dict[str, Any]) -> None:
    run = stopping(**{"name": "auto", **config})
    run.excess = 6.0
    run.see(1.0, steps=13, **normalised(**{**NAN, **fields}))
    assert len(stops(run)) == 1


def restored(excess: float | None = 0.5, **fields: Any) -> Run:
    """A run under the default policy whose rate does not explain an alarm, after ten sound snapshots."""
    run = auto(**fields)
    run.excess = excess
    run.see(CALM, steps=10, **normalised(learning_rate=0.001))
    return run


@pytest.mark.parametrize("exponent", [0.0, 1.0, None], ids=["normalised", "without normalisation", "unknown"])
def test_a_training_that_is_not_finite_returns_to_its_last_copy_at_its_rate(exponent: float | None) -> None:
    run, broken = restored(), normalised(**NAN, learning_rate=0.001)
    broken["update_exponent"] = exponent
    run.see(1.0, **broken)
    assert run.actions == [], "one snapshot may be one bad batch"
    run.see(1.0, **broken)
    ((step, action),) = run.actions
    assert (step, action.kind, action.rewind) == (
        11,
        "rewind",
        Rewind(max_rate=MAX_RATE, min_age_steps=8, unless_finite=True),
    )
    assert action.reason == "the states and the loss are not finite: back to the last copy"
    run.see(1.0, steps=100, **broken)
    assert len(run.actions) == 1, "the rewind is not answered"
    assert (run.state.lr_scale, run.state.num_rewinds, run.state.rewinding) == (1.0, 1, True)
    run.state = rewound(run.state, answer(action, step=run.step))
    run.see(CALM, steps=50, **normalised(learning_rate=0.001))
    assert len(run.actions) == 1


def test_a_training_that_is_not_finite_again_gets_a_lower_rate_each_time() -> None:
    run, broken = restored(max_rewinds=3), normalised(**NAN, learning_rate=0.001)
    for _ in range(5):
        run.see(1.0, steps=2, **broken)
        run.state = rewound(run.state, answer(Action(kind="rewind", reason="r"), step=run.step))
        run.see(CALM, steps=run.config.cooldown_steps, **normalised(learning_rate=0.001))
    assert [action.kind for _, action in run.actions[:5]] == ["rewind", *["set_lr_scale", "rewind"] * 2]
    assert [scale for _, scale in run.scales[:2]] == [0.25, 0.125]
    assert all(action.kind != "rewind" for _, action in run.actions[5:]), "three are the most"


def test_refused_rewinds_lower_no_rate() -> None:
    """A loop that drops batches with a loss of NaN keeps finite weights."""
    run, broken = restored(), normalised(**NAN, learning_rate=0.001)
    for _ in range(3):
        run.see(1.0, steps=2, **broken)
        refused = answer(Action(kind="rewind", reason="r"), outcome="refused", step=run.step)
        run.state = rewound(run.state, refused)
        run.see(CALM, steps=run.config.cooldown_steps, **normalised(learning_rate=0.001))
    assert [action.kind for _, action in run.actions] == ["rewind"] * 3
    assert run.state.lr_scale == 1.0


def test_a_rate_above_the_critical_one_is_lowered_with_the_first_return() -> None:
    run, broken = restored(excess=3.0), normalised(**NAN, update_exponent=1.0)
    run.see(1.0, steps=2, **broken)
    assert [action.kind for _, action in run.actions] == ["set_lr_scale", "rewind"]
    assert run.scales == [(11, pytest.approx(0.5))]


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        ({"loss": 2.0}, {}),
        ({"loss": None}, {}),
        ({"non_finite": False, "informative": True}, {}),
        ({"rewinds": False}, {}),
        ({"learning_rate": None}, {}),
        ({}, {"name": "lr"}),
        ({}, {"name": "kss+lr"}),
        ({}, {"name": "observe"}),
        ({}, {"max_rewinds": 0}),
    ],
)
def test_a_return_needs_two_facts_copies_and_the_default_policy(fields: dict[str, Any], config: dict[str, Any]) -> None:
    run = restored(**config)
    run.see(1.0, steps=30, **normalised(**{**NAN, "learning_rate": 0.001, **fields}))
    assert all(action.kind != "rewind" for _, action in run.actions)


def test_a_gradient_norm_is_a_second_fact_too() -> None:
    run = restored()
    run.see(1.0, steps=2, **normalised(**{**NAN, "loss": 2.0}, grad_norm=math.inf, learning_rate=0.001))
    assert run.actions[-1][1].reason == "the states and the gradient norm are not finite: back to the last copy"


def test_a_stop_follows_once_no_return_is_left() -> None:
    run = stopping(name="auto", max_rewinds=1)
    broken = normalised(**NAN, learning_rate=0.001)
    run.see(1.0, steps=30, **broken)
    assert [action.kind for _, action in run.actions] == ["rewind"]
    run.state = rewound(run.state, answer(run.actions[-1][1], outcome="refused", step=run.step))
    run.see(1.0, steps=60, **broken)
    assert len(stops(run)) == 1


def test_no_command_follows_a_stop_while_the_training_is_ruined() -> None:
    run = stopping()
    run.see(1.0, steps=60, **NAN)
    ((step, _),) = stops(run)
    assert run.actions[-1][0] == step
    run.state = stop_answered(run.state, answer(run.actions[-1][1]))
    run.see(1.0, steps=60, **NAN)
    assert len(stops(run)) == 1
    run.see(SEVERE, steps=20, loss=2.0, lr_scale=0.125)
    assert not run.state.stopping, "the loop went on, and the training has recovered"
    run.see(CALM, steps=2000, loss=2.0)
    assert run.state.lr_scale > 0.125


@pytest.mark.parametrize("outcome", ["refused", "failed", "expired"])
def test_a_stop_that_was_not_applied_may_follow_again(outcome: Any) -> None:
    run = stopping(name="kss")
    run.see(1.0, steps=11, **NAN)
    (stop,) = (action for _, action in run.actions)
    run.state = stop_answered(run.state, answer(stop, outcome))
    assert (run.state.stopping, run.state.ruined_streak, run.state.ruined_since) == (False, 0, None)
    run.see(1.0, steps=10, **NAN)
    assert len(stops(run)) == 1
    run.see(1.0, **NAN)
    assert len(stops(run)) == 2


def test_an_applied_stop_leaves_the_state() -> None:
    run = stopping(name="kss")
    run.see(1.0, steps=11, **NAN)
    assert run.state.stopping
    for outcome in ("applied", "duplicate"):
        assert stop_answered(run.state, answer(run.actions[0][1], outcome)) == run.state


def test_a_count_of_steps_that_starts_again_delays_no_stop_for_ever() -> None:
    run = stopping(name="kss")
    run.step = 1_000_000
    run.see(1.0, steps=2, **NAN)
    assert [step for step, _ in sparse(run, 1.0, list(range(12)), **NAN)] == [10]


def test_a_stop_counts_in_the_budget() -> None:
    run = stopping(name="kss", max_actions_per_hour=0)
    run.see(1.0, steps=40, **NAN)
    assert stops(run) == []
    assert not run.state.stopping


# A checkpoint at an alarm.


def checkpoints(run: Run) -> list[int]:
    return [step for step, action in run.actions if action.kind == "checkpoint"]


def test_an_alarm_asks_for_one_checkpoint_beside_the_back_off() -> None:
    run = Run(PolicyConfig(name="lr", checkpoint=True))
    run.see(CALM, steps=3, loss=2.0)
    decision = run.see(HIGH, loss=2.0)
    assert [action.kind for action in decision.commands] == ["set_cadence", "checkpoint", "set_lr_scale"]
    assert decision.commands[1].reason == "risk 0.70: checkpoint"
    assert decision.commands[1].expires_in_steps == run.config.expires_in_steps
    assert "learning rate" in decision.reason
    assert len(run.state.action_times) == 2
    run.see(SEVERE, steps=50, loss=2.0)
    run.see(WATCH, steps=50, loss=2.0)
    run.see(HIGH, steps=50, loss=2.0)
    assert checkpoints(run) == [3], "the alarm was not over"
    run.see(CALM, loss=2.0)
    run.see(HIGH, loss=2.0)
    assert checkpoints(run) == [3, 155]


def test_a_checkpoint_is_asked_for_by_the_configuration_only() -> None:
    assert PolicyConfig().checkpoint is False
    plain, watched = Run(PolicyConfig(name="lr")), Run(PolicyConfig(name="observe", checkpoint=True))
    for run in (plain, watched):
        run.see(SEVERE, steps=50)
        assert checkpoints(run) == []


@pytest.mark.parametrize(
    ("fields", "asks"), [({"loss": None}, 1), ({"loss": math.nan}, 0), (NAN, 0), ({**NAN, "loss": 2.0}, 0)]
)
def test_a_checkpoint_comes_before_the_damage_or_not_at_all(fields: dict[str, Any], asks: int) -> None:
    run = Run(PolicyConfig(name="lr", checkpoint=True))
    run.see(SEVERE, steps=20, **fields)
    assert len(checkpoints(run)) == asks


def test_a_checkpoint_waits_for_the_confirmation_of_the_alarm() -> None:
    run = Run(PolicyConfig(name="lr", checkpoint=True, confirm_snapshots=3))
    run.see(HIGH, steps=4)
    assert checkpoints(run) == [2]


def test_a_checkpoint_counts_in_the_budget() -> None:
    run = Run(
        PolicyConfig(name="kss", checkpoint=True, max_actions_per_hour=1), kss=KssConfig(method="published", alpha=0.0)
    )
    for _ in range(2):
        run.see(HIGH)
        run.see(CALM)
    assert checkpoints(run) == [0]
    assert run.state.action_times == (0.0,)


def test_a_checkpoint_is_a_reason_where_nothing_else_is_done() -> None:
    run = Run(PolicyConfig(name="kss", checkpoint=True), kss=KssConfig(method="published", alpha=0.0))
    run.state = replace(run.state, dense_until=60)
    assert run.see(HIGH).reason == "risk 0.70: checkpoint"


@pytest.mark.parametrize(
    ("before", "now", "asks"),
    [
        (0.001, 0.03, True),
        (0.001, 0.001 * RATE_JUMP, True),
        (0.001, 0.0039, False),
        (0.001, None, False),
        (0.001, math.nan, False),
        (0.001, math.inf, False),
        (None, 0.03, False),
        (0.0, 0.03, False),
        (math.inf, 0.03, False),
        (math.nan, 0.03, False),
    ],
)
def test_a_jump_of_the_rate_asks_for_a_closer_look(before: float | None, now: float | None, asks: bool) -> None:
    run = Run(PolicyConfig(name="observe"))
    run.see(CALM, learning_rate=before)
    decision = run.see(CALM, learning_rate=now)
    assert [action.kind for action in decision.commands] == ["set_cadence"] * asks
    assert decision.phase == "calm", "no alarm"
    if asks:
        assert now is not None
        until = 1 + run.config.dense_steps
        assert (
            decision.commands[0].reason
            == f"the learning rate rose to {now:.3g}: a snapshot every step until step {until}"
        )
        assert decision.commands[0].cadence_until_step == until
    assert run.see(CALM, learning_rate=now).commands == ()


def test_an_unknown_rate_keeps_the_last_one_for_the_next_jump() -> None:
    run = Run(PolicyConfig(name="observe"))
    for rate in (0.001, None, math.nan, math.inf, 0.0):
        assert run.see(CALM, learning_rate=rate).commands == ()
    assert run.state.scheduled_rate == 0.001
    assert len(run.see(CALM, learning_rate=0.03).commands) == 1


def test_an_alarm_and_a_jump_are_one_request_with_the_risk_as_its_reason() -> None:
    run = Run(PolicyConfig(name="observe"))
    run.see(CALM, learning_rate=0.001)
    decision = run.see(WATCH, learning_rate=0.1)
    assert [action.reason[:10] for action in decision.commands] == ["risk 0.30:"]
    assert decision.phase == "alert"


# KSS by projection.

WIDE = (30.0, 1.5, 4.0)


def projecting(name: PolicyName = "kss", **fields: Any) -> Run:
    return Run(PolicyConfig(name=name), kss=KssConfig(**fields))


def answered(run: Run, outcome: Any = "applied", held: tuple[int, ...] = (), step: int | None = None) -> None:
    ack = Ack(
        run="job",
        incarnation="0" * 8,
        command_id="0" * 8,
        outcome=outcome,
        step=run.step if step is None else step,
        applied=Applied(held_layers=held),
    )
    run.state = ceilings_answered(run.state, ack)


def test_an_alarm_sets_ceilings_on_the_layers_above_their_calm_radius_and_two() -> None:
    run = projecting()
    run.see(CALM, steps=5, spectral_radii=(5.0, 1.2, 1.2))
    decision = run.see(HIGH, spectral_radii=WIDE)
    (action,) = [each for each in decision.commands if each.kind == "set_ceilings"]
    assert action.ceilings == pytest.approx({0: 0.5, 2: 0.5})
    assert action.changes_training
    assert not action.corrects
    assert action.reason.startswith(
        "risk 0.70: ceilings on what blocks 0 and 2 write: block 0 from spectral radius 30 to 5; "
    )
    state = run.state
    assert (state.phase, state.held_layers, state.acted_at, state.kss_on_at) == ("acting", (0, 2), 5, 5)
    assert state.risk_at_action == HIGH


def test_without_an_alarm_or_without_a_layer_above_tau_nothing_is_held() -> None:
    run = projecting()
    run.see(WATCH, steps=3, spectral_radii=WIDE)
    run.see(HIGH, steps=3, spectral_radii=(1.9, 2.0))
    run.see(HIGH, steps=3)  # an uninformative profile has no radii
    assert run.actions == []
    assert run.state.held_layers == ()


def test_ceilings_are_corrected_by_the_first_snapshot_that_shows_them() -> None:
    run = projecting()
    run.see(HIGH, spectral_radii=WIDE)
    assert not any(each.ceilings for each in run.see(HIGH, steps=4, spectral_radii=WIDE).commands)
    answered(run, held=(0, 2), step=7)
    assert run.see(HIGH, steps=3, spectral_radii=WIDE).commands == ()  # steps 5 to 7
    decision = run.see(HIGH, spectral_radii=(3.0, 2.5, 1.5))
    (correction,) = decision.commands
    assert correction.ceilings == pytest.approx({0: 0.5, 1: 1.0 / 1.5, 2: 1.5})
    assert correction.corrects
    assert not correction.changes_training
    assert run.state.held_layers == (0, 1, 2)
    assert len(run.actions) == 1
    assert len(run.state.action_times) == 1


def test_without_an_answer_the_next_ceilings_come_when_the_command_has_expired() -> None:
    run = projecting()
    run.see(HIGH, spectral_radii=WIDE)
    sent = run.step - 1
    while not any(each.ceilings for each in run.see(HIGH, spectral_radii=WIDE).commands):
        assert run.step < 200
    assert run.step - 1 == sent + run.config.expires_in_steps


@pytest.mark.parametrize("calm_steps", [50, 7])
def test_they_are_released_after_the_calm_steps(calm_steps: int) -> None:
    run = projecting(calm_steps=calm_steps)
    run.see(HIGH, spectral_radii=WIDE)
    answered(run, held=(0, 2))
    run.see(CALM, spectral_radii=(1.5, 1.5, 1.5))
    began = run.step - 1
    while not run.actions[1:]:
        answered(run, held=run.state.held_layers, step=run.step - 1)
        run.see(CALM, spectral_radii=(1.5, 1.5, 1.5))
        assert run.step < 200
    at, action = run.actions[1]
    assert at == began + calm_steps
    assert (action.kind, action.ceilings) == ("set_ceilings", {})
    assert action.reason == f"ceilings released: calm for {calm_steps} steps"
    assert (run.state.held_layers, run.state.kss_on_at) == ((), None)


def test_a_calm_run_under_ceilings_does_not_move_its_calm_radii() -> None:
    run = projecting()
    run.see(CALM, spectral_radii=(1.5, 1.5, 3.0))
    run.see(HIGH, spectral_radii=WIDE)
    answered(run, held=(0, 2))
    run.see(CALM, steps=5, spectral_radii=WIDE)
    assert run.state.calm_radii == (1.5, 1.5, 3.0)


@pytest.mark.parametrize(("loss", "barred"), [(1.1, False), (1.3, True)])
def test_a_loss_that_rises_under_ceilings_releases_and_bars_them(loss: float, barred: bool) -> None:
    run = projecting()
    run.see(HIGH, loss=1.0, spectral_radii=WIDE)
    answered(run, held=(0, 2))
    run.see(SEVERE, loss=loss, steps=40, spectral_radii=WIDE)
    assert run.state.kss_barred == barred
    assert (run.state.held_layers == ()) == barred
    if barred:
        assert "the loss rose from 1 to 1.3 under it" in run.actions[-1][1].reason
        run.see(SEVERE, loss=1.0, steps=40, spectral_radii=WIDE)
        assert len(run.actions) == 2


def test_a_spike_of_the_loss_under_ceilings_does_not_bar_them() -> None:
    """At a rate that is too high the loss has spikes without ceilings too."""
    run = projecting()
    run.see(HIGH, loss=1.0, spectral_radii=WIDE)
    answered(run, held=(0, 2))
    run.see(SEVERE, loss=1.0, steps=40, spectral_radii=WIDE)
    for _ in range(3):
        run.see(SEVERE, loss=9.0, steps=run.config.cooldown_steps - 1, spectral_radii=WIDE)
        run.see(SEVERE, loss=1.0, spectral_radii=WIDE)
    assert not run.state.kss_barred
    run.see(SEVERE, loss=9.0, steps=run.config.cooldown_steps, spectral_radii=WIDE)
    assert run.state.kss_barred


def test_a_refusal_for_good_bars_ceilings() -> None:
    run = projecting()
    run.see(HIGH, spectral_radii=WIDE)
    ack = Ack(
        run="job", incarnation="0" * 8, command_id="0" * 8, outcome="refused", step=1, permanent=True, applied=Applied()
    )
    run.state = kss_refused(run.state, ack)
    assert (run.state.kss_barred, run.state.held_layers, run.state.kss_on_at) == (True, (), None)
    run.see(HIGH, steps=100, spectral_radii=WIDE)
    assert len(run.actions) == 1


@pytest.mark.parametrize("outcome", ["refused", "failed", "expired"])
def test_other_answers_lead_to_another_command(outcome: str) -> None:
    run = projecting()
    run.see(HIGH, spectral_radii=WIDE)
    answered(run, outcome, step=3)
    assert (run.state.held_layers, run.state.phase, run.state.shown_from) == ((), "calm", 4)
    run.see(HIGH, steps=4, spectral_radii=WIDE)
    assert [step for step, _ in run.actions] == [0, 4]
    before = run.state
    answered(run, "duplicate")
    assert run.state is before


def test_beside_a_back_off_ceilings_follow_at_the_next_snapshot() -> None:
    run = projecting("kss+lr")
    run.see(HIGH, steps=3, spectral_radii=WIDE)
    assert [(step, action.kind) for step, action in run.actions] == [(0, "set_lr_scale"), (1, "set_ceilings")]
    assert run.state.acted_at == 0, "the effect is that of the back-off"


@pytest.mark.parametrize("name", ["auto", "lr", "observe"])
def test_other_policies_set_no_ceilings_and_keep_no_radii(name: PolicyName) -> None:
    run = projecting(name)
    run.see(CALM, steps=3, spectral_radii=(1.5, 1.5))
    run.see(HIGH, steps=30, spectral_radii=WIDE)
    assert "set_ceilings" not in {action.kind for _, action in run.actions}
    assert run.state.calm_radii == ()


def test_the_published_form_sets_no_ceilings() -> None:
    run = projecting(method="published")
    run.see(CALM, steps=3, spectral_radii=(1.5, 1.5))
    run.see(HIGH, spectral_radii=WIDE)
    assert [action.kind for _, action in run.actions] == ["set_kss"]
    assert run.state.calm_radii == ()


@pytest.mark.parametrize(
    ("layers", "words"),
    [(1, "block 0 writes"), (3, "blocks 0, 1 and 2 write"), (4, "blocks 0, 1, 2 and 3 write"), (5, "5 blocks write")],
)
def test_few_blocks_are_named(layers: int, words: str) -> None:
    run = projecting()
    run.see(HIGH, spectral_radii=(9.0,) * layers)
    assert f"ceilings on what {words}: block {layers - 1} from spectral radius 9 to 2" in run.actions[0][1].reason
