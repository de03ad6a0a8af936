"""Controller of one run: from assessments to commands and their outcomes, with the real policy."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from koopmon import policy
from koopmon.config import Config, KssConfig, PolicyConfig, RiskConfig, from_mapping, hints, merged
from koopmon.errors import ProtocolError
from koopmon.logs import LogLimit
from koopmon.monitor.pending_commands import RESEND_SECONDS, Answered
from koopmon.monitor.run_controller import Assessment, RunController
from koopmon.risk.calibration import Calibrator, Example, fit
from koopmon.risk.online_detector import OnlineRisk, RiskState
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.wire.messages import MAX_STEP, MAX_TEXT, Ack, Applied, Command, Hello, KssSettings, TrainingStep
from tests import factories

RUN, INCARNATION = "job", "aaaaaaaa"


def hello(**fields: Any) -> Hello:
    return factories.hello(RUN, INCARNATION, **{"num_layers": 2, **fields})


def sample(step: int, **fields: Any) -> TrainingStep:
    scalars = {"learning_rate": 0.1, "loss": 2.0, "grad_norm": 1.0, "lr_scale": 1.0, "kss_alpha": 0.0}
    return TrainingStep(step=step, **{**scalars, **fields})


PUBLISHED = KssConfig(method="published")


def make_guard(config: Config | None = None, *, applied: Applied | None = None, **fields: Any) -> RunController:
    return RunController(config or Config(), hello(**fields), applied or Applied())


def calm_profile(seed: int = 0) -> SpectralProfile:
    generator = torch.Generator().manual_seed(seed)
    return profile_states(torch.cumsum(torch.randn((3, 64, 8), generator=generator), dim=0), svd_rank=4, kreiss="never")


def explode(controller: RunController, step: int = 10, *, now: float = 0.0, latest: int | None = None) -> Assessment:
    """The second of two snapshots with a high risk, with states that are not finite: the policy backs off."""
    controller.policy_state = replace(controller.policy_state, high_streak=1)
    return controller.assess(now, sample(step), None, step=step if latest is None else latest)


def ack(command: Command, outcome: Any = "applied", applied: Applied | None = None) -> Ack:
    return Ack(
        run=RUN,
        incarnation=INCARNATION,
        command_id=command.id,
        outcome=outcome,
        step=12,
        applied=applied or Applied(),
    )


def cuts(assessment: Assessment) -> list[Command]:
    return [command for command in assessment.commands if command.kind == "set_lr_scale"]


def test_a_calm_snapshot_brings_no_command() -> None:
    controller = make_guard()
    assessment = controller.assess(0.0, sample(1), calm_profile(), step=1)
    assert (assessment.commands, assessment.remarkable, bool(controller.pending)) == ((), False, False)
    assert assessment.decision is not None
    assert assessment.decision.reason


def test_a_danger_becomes_commands_with_id_and_expiry() -> None:
    controller = make_guard()
    assessment = explode(controller, step=10, latest=14)
    (cut,) = cuts(assessment)
    assert assessment.remarkable
    assert assessment.risk.value == 1.0
    assert (cut.run, cut.incarnation) == (RUN, INCARNATION)
    assert cut.lr_scale is not None
    assert 0.0 < cut.lr_scale < 1.0
    assert cut.expires_step == 14 + Config().policy.expires_in_steps, "counted from the run's latest step"
    assert len({command.id for command in assessment.commands}) == len(assessment.commands)
    assert bool(controller.pending)


def test_a_long_reason_is_cut_to_the_bound_of_the_protocol() -> None:
    action = policy.Action(kind="set_lr_scale", reason="x" * (MAX_TEXT + 1), lr_scale=0.5)
    assert make_guard()._command(action, 3).reason == "x" * MAX_TEXT


def test_an_unanswered_command_is_offered_again_with_the_same_id_until_it_expires() -> None:
    controller = make_guard()
    (cut,) = cuts(explode(controller, step=10))
    assert controller.pending.due(RESEND_SECONDS / 2) == []
    assert cut.id in [command.id for command in controller.pending.due(RESEND_SECONDS)]
    assert controller.pending.due(RESEND_SECONDS * 1.5) == []
    assert controller.expire(9.0, cut.expires_step, Applied()) == []
    assert controller.expire(RESEND_SECONDS * 1.5, 1000, Applied()) == [], "the answer may be on its way"
    assert cut.id in [command.id for command in controller.expire(9.0, 1000, Applied())]
    assert controller.pending.due(99.0) == []
    assert not bool(controller.pending)


def test_what_was_given_up_did_not_happen() -> None:
    """After a back-off that was not applied, the next one starts from the settings in force."""
    controller = make_guard()
    (first,) = cuts(explode(controller, step=10))
    controller.expire(9.0, 1000, Applied())
    (second,) = cuts(explode(controller, step=1001, now=10.0))
    assert second.lr_scale == first.lr_scale


@pytest.mark.parametrize("outcome", ["applied", "duplicate"])
def test_an_applied_cut_is_built_upon(outcome: str) -> None:
    controller = make_guard()
    (first,) = cuts(explode(controller, step=10))
    assert first.lr_scale is not None
    answered = controller.acknowledge(ack(first, outcome, Applied(lr_scale=first.lr_scale)))
    assert answered == Answered("set_lr_scale", first=True, counts=True)
    (second,) = cuts(explode(controller, step=100, now=10.0))
    assert second.lr_scale is not None
    assert second.lr_scale < first.lr_scale


@pytest.mark.parametrize("outcome", ["refused", "failed", "expired"])
def test_a_refused_cut_is_not(outcome: str) -> None:
    controller = make_guard()
    (first,) = cuts(explode(controller, step=10))
    controller.acknowledge(ack(first, outcome, Applied()))
    (second,) = cuts(explode(controller, step=100, now=10.0))
    assert second.lr_scale == first.lr_scale


@pytest.mark.parametrize("permanent", [True, False])
def test_only_a_permanent_refusal_bars_kss(permanent: bool) -> None:
    """A refusal for another reason, such as the agent's own hourly limit, may not repeat."""
    alarming = PolicyConfig(name="kss", act_risk=1e-9, severe_risk=1.0, release_risk=0.0, cooldown_steps=1)
    controller, asked = make_guard(Config(policy=alarming, kss=PUBLISHED)), []
    for step in range(1, 200):
        assessment = controller.assess(float(step), sample(step), calm_profile(step), step=step)
        for command in assessment.commands:
            outcome = "refused" if command.kind == "set_kss" else "applied"
            asked += [command] * (command.kind == "set_kss")
            answer = msgspec.structs.replace(ack(command, outcome), permanent=permanent and outcome == "refused")
            controller.acknowledge(answer)
        if len(asked) == 3:
            break
    assert len(asked) == (1 if permanent else 3)


def test_answers_to_settled_and_unknown_commands() -> None:
    controller = make_guard()
    (cut,) = cuts(explode(controller))
    assert controller.acknowledge(ack(cut)) == Answered("set_lr_scale", first=True, counts=True)
    for again in ("duplicate", "failed", "applied"):
        assert controller.acknowledge(ack(cut, again)) == Answered("set_lr_scale", first=False, counts=False)
    stranger = Ack(run=RUN, incarnation=INCARNATION, command_id="f" * 8, outcome="applied", step=1, applied=Applied())
    assert controller.acknowledge(stranger) is None


def test_a_newer_command_of_a_kind_replaces_the_unanswered_one() -> None:
    controller = make_guard()
    (first,) = cuts(explode(controller, step=10))
    assessment = explode(controller, step=100, now=1.0)
    (second,) = cuts(assessment)
    assert first.id in [command.id for command in assessment.replaced]
    offered = [command.id for command in controller.pending.due(50.0)]
    assert second.id in offered
    assert first.id not in offered


def test_an_answer_to_a_cadence_command_does_not_touch_the_policy() -> None:
    controller = make_guard()
    assessment = explode(controller, step=10)
    (first,) = cuts(assessment)
    (cadence,) = [command for command in assessment.commands if command.kind == "set_cadence"]
    controller.acknowledge(ack(cadence, "refused", Applied()))
    controller.acknowledge(ack(first, "applied", Applied(lr_scale=first.lr_scale or 1.0)))
    (second,) = cuts(explode(controller, step=100, now=10.0))
    assert second.lr_scale is not None
    assert second.lr_scale < (first.lr_scale or 1.0)


@pytest.mark.parametrize(
    ("config", "acts"),
    [
        (Config(policy=PolicyConfig(dry_run=True)), True),
        (Config(policy=PolicyConfig(name="observe")), True),
        (Config(), False),
    ],
)
def test_who_only_watches_sends_nothing(config: Config, acts: bool) -> None:
    controller = make_guard(config, acts=acts)
    assert not controller.sends
    assessment = explode(controller)
    assert assessment.commands
    assert not bool(controller.pending)
    assert controller.pending.due(99.0) == []


def test_a_later_hello_tells_that_the_run_can_be_acted_on() -> None:
    controller = make_guard(acts=False)
    controller.on_hello(hello(acts=True))
    assert controller.sends


def test_shutting_down_assesses_and_decides_nothing() -> None:
    controller = make_guard()
    assessment = controller.assess(0.0, sample(10), None, step=10, decide=False)
    assert (assessment.decision, assessment.commands, assessment.risk.value) == (None, (), 1.0)


def test_a_guard_goes_on_from_the_memory_of_another() -> None:
    controller = make_guard()
    for step in range(1, 6):
        profile = calm_profile(step)
        controller.assess(0.0, sample(step), profile, step=step)
    (cut,) = cuts(explode(controller, step=10))
    held = Applied(lr_scale=cut.lr_scale or 1.0)
    memory = controller.checkpoint()
    heir = RunController(Config(), hello(step=11, applied=held), held, checkpoint=memory)
    assert heir.checkpoint() == memory
    assert heir.initial is not None
    (second,) = cuts(explode(heir, step=100, now=10.0))
    assert second.lr_scale is not None
    assert second.lr_scale < held.lr_scale


def test_what_is_in_force_outweighs_memory(caplog: pytest.LogCaptureFixture) -> None:
    controller = make_guard()
    (cut,) = cuts(explode(controller, step=10))
    heir = RunController(Config(), hello(step=11), Applied(), checkpoint=controller.checkpoint())
    (again,) = cuts(explode(heir, step=100, now=10.0))
    assert again.lr_scale == cut.lr_scale, "the cut had not reached the run"
    with caplog.at_level(logging.WARNING):
        RunController(Config(), hello(), Applied(), checkpoint=b'{"risk": "of another version"}')
    assert "cannot be used" in caplog.text


def test_a_restored_run_is_brought_back_when_it_is_calm() -> None:
    """A new incarnation with a back-off and KSS from its predecessor returns to the user's own settings."""
    applied = Applied(lr_scale=0.25, kss=KssSettings(alpha=0.1))
    controller = make_guard(applied=applied)
    last: dict[str, Command] = {}
    profile = calm_profile()
    for step in range(1, 10_000, 20):
        assessment = controller.assess(float(step), sample(step, lr_scale=0.25), profile, step=step)
        for command in assessment.commands:
            last[command.kind] = command
            controller.acknowledge(ack(command))
    assert last["set_lr_scale"].lr_scale == 1.0
    assert last["set_kss"].kss == KssSettings()


def test_the_initial_score_comes_from_the_first_informative_snapshot_of_the_warm_up() -> None:
    controller = make_guard()
    controller.assess(1.0, sample(1), profile_states(torch.zeros((3, 64, 8)), svd_rank=4), step=1)
    assert controller.initial is not None
    assert controller.initial.score is None
    controller.assess(2.0, sample(2), calm_profile(2), step=2)
    first = controller.initial
    assert first.informative
    controller.assess(3.0, sample(3), calm_profile(3), step=3)
    assert controller.initial is first
    late, last = make_guard(), Config().cadence.warmup_steps
    late.assess(1.0, sample(last + 1), calm_profile(), step=last + 1)
    assert late.initial is None
    late.assess(2.0, sample(last), calm_profile(), step=last + 1)
    assert late.initial is not None


def test_hints_fill_defaults_and_nothing_else(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "_ignored", LogLimit())  # other tests may have logged within the minute
    config = RiskConfig(smoothing=0.5)
    with caplog.at_level(logging.WARNING):
        filled = merged(
            config, {"smoothing": 0.9, "peak_scale": 2.0, "speed_scale": -1.0, "invented": 1.0}, "thresholds"
        )
    assert (filled.smoothing, filled.peak_scale) == (0.5, 2.0)
    assert filled.speed_scale == RiskConfig().speed_scale
    assert "invented" in caplog.text
    assert "speed_scale" in caplog.text


def test_adapter_defaults_reach_the_commands_unless_the_monitor_says_otherwise() -> None:
    hint = KssSettings(alpha=0.7, num_samples=64)
    for configured, expected in ((None, 0.7), (0.05, 0.05)):
        tables: dict[str, Any] = {"policy": {"name": "kss"}}
        tables["kss"] = {"method": "published"} | ({} if configured is None else {"alpha": configured})
        controller = make_guard(from_mapping(tables), kss=hint)
        controller.on_hello(hello(kss=hint))
        assert controller.kss_config.alpha == expected
        assert controller.kss_config.num_samples == 64


def calibrator(**settings: Any) -> Calibrator:
    examples = [
        Example(
            update_exponent=0.1 * (i % 10),
            learning_rate=10 ** (-4 + i / 20),
            width=8,
            num_layers=2,
            diverged=i > 30,
        )
        for i in range(60)
    ]
    return fit(examples, **settings)


def test_divergence_probability_is_that_of_the_highest_rate_so_far() -> None:
    controller = RunController(
        Config(), hello(rate_sized_steps=True, update_exponent=0.4), Applied(), calibrator=calibrator()
    )
    assert controller.divergence_probability is None, "nothing is known yet"
    profile = calm_profile()
    told = []
    for step, rate in enumerate((0.0001, 0.01, 0.001)):
        controller.assess(0.0, sample(step, learning_rate=rate), profile, step=step)
        told.append(controller.divergence_probability)
    expected = Example(update_exponent=0.4, learning_rate=0.01, width=8, num_layers=2)
    assert told[0] is not None
    assert told[0] < told[1] == told[2] == calibrator().probability(expected)


def test_the_rate_counts_only_where_it_tells_how_long_the_steps_are() -> None:
    for sized, expected in ((True, 8), (False, None)):
        controller = RunController(
            Config(), hello(rate_sized_steps=sized, update_exponent=0.4), Applied(), calibrator=calibrator()
        )
        assessment = controller.assess(0.0, sample(0, learning_rate=0.01), calm_profile(), step=0)
        assert assessment.observation.width == expected
        assert (controller.divergence_probability is not None) == sized


def test_a_calibrator_of_another_kind_says_nothing() -> None:
    controller = RunController(
        Config(), hello(rate_sized_steps=True, update_exponent=0.4), Applied(), calibrator=calibrator(adapter="moe")
    )
    controller.assess(0.0, sample(0), calm_profile(), step=0)
    assert controller.divergence_probability is None


# What a snapshot is reduced to


def test_an_observation_has_the_scalars_of_the_sample_and_of_the_hello() -> None:
    controller = make_guard(rate_sized_steps=True, update_exponent=0.3, width=8)
    training = sample(7, learning_rate=0.2, loss=3.0, grad_norm=4.0, lr_scale=0.5, kss_alpha=0.1)
    seen = controller.assess(0.0, training, calm_profile(), step=9).observation
    assert seen.training == training
    assert (seen.width, seen.num_layers, seen.update_exponent) == (8, 2, 0.3)
    assert seen.informative
    blind = controller.assess(0.0, sample(8), None, step=9).observation
    assert (blind.non_finite, blind.num_layers) == (True, 2), "the depth is remembered"


def test_a_width_of_zero_is_unknown() -> None:
    controller = make_guard(rate_sized_steps=True, width=0)
    assert controller.assess(0.0, sample(1), calm_profile(), step=1).observation.width is None


@pytest.mark.parametrize("rate", [None, float("nan"), float("inf")])
def test_a_rate_that_is_not_finite_is_no_highest_rate(rate: float | None) -> None:
    controller = RunController(
        Config(), hello(rate_sized_steps=True, update_exponent=0.4), Applied(), calibrator=calibrator()
    )
    controller.assess(0.0, sample(0, learning_rate=rate), calm_profile(), step=0)
    assert controller.divergence_probability is None
    controller.assess(0.0, sample(1, learning_rate=0.01), calm_profile(), step=1)
    before = controller.divergence_probability
    controller.assess(0.0, sample(2, learning_rate=rate), calm_profile(), step=2)
    assert controller.divergence_probability == before is not None


def test_beyond_the_calibrated_rates_nothing_is_said() -> None:
    controller = RunController(
        Config(), hello(rate_sized_steps=True, update_exponent=0.4), Applied(), calibrator=calibrator()
    )
    controller.assess(0.0, sample(0, learning_rate=1e3), calm_profile(), step=0)
    assert controller.divergence_probability is None


@pytest.mark.parametrize("fields", [{"update_exponent": None}, {"rate_sized_steps": False}])
def test_without_a_feature_nothing_is_said(fields: dict[str, Any]) -> None:
    known = {"rate_sized_steps": True, "update_exponent": 0.4, **fields}
    controller = RunController(Config(), hello(**known), Applied(), calibrator=calibrator())
    controller.assess(0.0, sample(0, learning_rate=0.01), calm_profile(), step=0)
    assert controller.divergence_probability is None


def test_without_a_calibrator_nothing_is_said() -> None:
    controller = make_guard(rate_sized_steps=True, update_exponent=0.4)
    controller.assess(0.0, sample(0, learning_rate=0.01), calm_profile(), step=0)
    assert controller.divergence_probability is None


def test_a_model_of_unknown_size_counts_as_one_wide_and_one_deep() -> None:
    tiny = calibrator()
    controller = RunController(
        Config(), hello(rate_sized_steps=True, update_exponent=0.4, width=0), Applied(), calibrator=tiny
    )
    controller.assess(0.0, sample(0, learning_rate=0.01), None, step=0)
    expected = Example(update_exponent=0.4, learning_rate=0.01, width=1, num_layers=1)
    assert controller.divergence_probability == tiny.probability(expected)


# What becomes of a decision


def test_a_decision_is_remarkable_once() -> None:
    controller = make_guard()
    assert explode(controller, step=10).remarkable
    assert not explode(controller, step=11).remarkable, "nothing was sent and the phase is the same"
    calm = [controller.assess(0.0, sample(step), calm_profile(step), step=step) for step in range(12, 20)]
    phases = [each.decision.phase for each in calm if each.decision is not None]
    changed = [phase != before for phase, before in zip(phases, ["acting", *phases], strict=False)]
    assert [bool(each.remarkable) for each in calm] == [
        change or bool(each.commands) for change, each in zip(changed, calm, strict=True)
    ]
    assert any(changed)


def test_a_bar_on_kss_is_remarkable() -> None:
    """The radius of a calm run exceeds the bound of a message: no command, and no other phase."""
    controller = make_guard(Config(policy=PolicyConfig(name="kss"), kss=PUBLISHED))
    controller.policy_state = replace(controller.policy_state, calm_radius=2000.0, phase="alert", dense_until=60)
    controller._phase = "alert"
    alarm = PolicyConfig(name="kss", act_risk=1e-12, severe_risk=1e-9, release_risk=0.0)
    controller.config = replace_policy(alarm)
    for step in (1, 2, 3):
        found = controller.assess(0.0, sample(step), calm_profile(step), step=step)
        if found.decision is not None and found.decision.state.kss_barred:
            break
    assert found.remarkable
    assert not cuts(found)


def replace_policy(policy: PolicyConfig) -> Config:
    return Config(policy=policy)


def test_commands_expire_from_the_later_of_both_steps() -> None:
    for latest, expected in ((5, 10), (10, 10), (30, 30)):
        (cut,) = cuts(explode(make_guard(), step=10, latest=latest))
        assert cut.expires_step == expected + Config().policy.expires_in_steps


def test_a_command_has_the_values_of_its_action() -> None:
    controller = make_guard(Config(policy=PolicyConfig(dense_every=3, dense_steps=40)))
    assessment = explode(controller, step=10)
    (cadence,) = [command for command in assessment.commands if command.kind == "set_cadence"]
    assert (cadence.cadence_steps, cadence.cadence_until_step, cadence.expires_step) == (3, 50, 50)
    (cut,) = cuts(assessment)
    assert assessment.decision is not None
    (action,) = [each for each in assessment.decision.commands if each.kind == "set_lr_scale"]
    assert (cut.lr_scale, cut.ramp_steps, cut.kss) == (action.lr_scale, action.ramp_steps, action.kss)
    assert cut.reason == action.reason
    assert (cut.cadence_steps, cut.cadence_until_step) == (None, None)


def test_steps_of_commands_stay_within_the_protocol() -> None:
    assessment = explode(make_guard(), step=MAX_STEP - 1)
    assert {command.expires_step for command in assessment.commands} == {MAX_STEP}
    assert {command.cadence_until_step for command in assessment.commands} == {None, MAX_STEP}


def test_a_command_beyond_the_protocol_leaves_the_policy_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = make_guard()

    def refuse(command: Command) -> bytes:
        raise ProtocolError("refused", "too large")

    monkeypatch.setattr("koopmon.monitor.run_controller.encode_header", refuse)
    before = controller.policy_state = replace(controller.policy_state, high_streak=1)
    assessment = explode(controller, step=10)
    assert isinstance(assessment.unencodable, ProtocolError)
    assert (assessment.decision, assessment.commands, controller.policy_state) == (None, (), before)
    assert not controller.pending
    monkeypatch.undo()
    assert cuts(explode(controller, step=11)), "the next alarm is decided again"


def test_a_risk_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = make_guard()
    controller.assess(0.0, sample(1), calm_profile(), step=1)
    before = controller.checkpoint()
    nonsense = RiskState(), OnlineRisk(value=float("nan"), reason="r")
    monkeypatch.setattr("koopmon.risk.online_detector.assess", lambda *_: nonsense)
    with pytest.raises(ArithmeticError, match="step 3"):
        controller.assess(0.0, sample(3), calm_profile(), step=3)
    assert controller.checkpoint() == before


def test_who_stood_down_sends_nothing_more() -> None:
    controller = make_guard()
    assert controller.sends
    controller.stand_down()
    assert not controller.sends
    controller.on_hello(hello())
    assert not controller.sends, "for this incarnation"
    assert explode(controller).commands
    assert not controller.pending


def test_an_expired_command_leaves_the_values_in_force() -> None:
    controller = make_guard(applied=Applied(lr_scale=0.5))
    explode(controller, step=10)
    assert controller.policy_state.lr_scale < 0.5
    controller.expire(9.0, 1000, Applied(lr_scale=0.5))
    assert (controller.policy_state.lr_scale, controller.policy_state.acted_at) == (0.5, None)


def test_the_expiry_of_a_replaced_command_does_not_touch_the_policy() -> None:
    controller = make_guard()
    (first,) = cuts(explode(controller, step=10))
    (second,) = cuts(explode(controller, step=40, now=1.0))
    assert first.expires_step < 70 < second.expires_step
    before = controller.policy_state
    assert first.id in [command.id for command in controller.expire(9.0, 70, Applied())]
    assert controller.policy_state == before


# What agents display


def test_the_judgement_is_that_of_the_last_snapshot_and_keeps_the_last_remarkable_decision() -> None:
    controller = make_guard()
    assert controller.judgement is None
    profile = calm_profile()
    controller.assess(0.0, sample(1), profile, step=1)
    calm = controller.judgement
    assert calm is not None
    assert (calm.step, calm.risk, calm.decision, calm.decision_step) == (1, 0.0, "", None)
    assert calm.near_unit_mass == profile.mean("near_unit_mass")
    assessment = explode(controller, step=10)
    assert assessment.decision is not None
    alarm = controller.judgement
    assert alarm is not None
    assert (alarm.step, alarm.risk, alarm.forecast, alarm.near_unit_mass) == (10, 1.0, 1.0, None)
    assert (alarm.decision, alarm.decision_step) == (assessment.decision.reason, 10)
    later = controller.assess(0.0, sample(11), calm_profile(), step=11)
    assert not later.remarkable
    after = controller.judgement
    assert after is not None
    assert (after.step, after.decision, after.decision_step) == (11, alarm.decision, 10)


def test_a_profile_that_is_not_informative_has_no_near_unit_mass_to_show() -> None:
    controller = make_guard()
    controller.assess(0.0, sample(1), profile_states(torch.zeros((3, 64, 8)), svd_rank=4), step=1)
    assert controller.judgement is not None
    assert controller.judgement.near_unit_mass is None


def test_the_divergence_probability_is_shown() -> None:
    controller = RunController(
        Config(), hello(rate_sized_steps=True, update_exponent=0.4), Applied(), calibrator=calibrator()
    )
    controller.assess(0.0, sample(0, learning_rate=0.01), calm_profile(), step=0)
    assert controller.judgement is not None
    assert controller.judgement.divergence_probability == controller.divergence_probability is not None


# What a new controller takes over


@pytest.mark.parametrize(
    ("applied", "phase", "kss_on_at"),
    [
        (Applied(lr_scale=0.5), "backed_off", None),
        (Applied(kss=KssSettings(alpha=0.1)), "backed_off", 33),
        (Applied(lr_scale=0.5, kss=KssSettings(alpha=0.1)), "backed_off", 33),
        (Applied(), "calm", None),
    ],
)
def test_values_in_force_at_the_start_are_taken_over(applied: Applied, phase: str, kss_on_at: int | None) -> None:
    state = make_guard(applied=applied, step=33).policy_state
    assert (state.phase, state.kss_on_at) == (phase, kss_on_at)
    assert (state.lr_scale, state.kss) == (applied.lr_scale, applied.kss)


def test_kss_that_a_checkpoint_knows_keeps_its_step() -> None:
    controller = make_guard(applied=Applied(kss=KssSettings(alpha=0.1)), step=5)
    heir = RunController(
        Config(), hello(step=40), Applied(kss=KssSettings(alpha=0.2)), checkpoint=controller.checkpoint()
    )
    assert (heir.policy_state.kss_on_at, heir.policy_state.kss.alpha) == (5, 0.2)
    gone = RunController(Config(), hello(step=40), Applied(), checkpoint=controller.checkpoint())
    assert (gone.policy_state.kss_on_at, gone.policy_state.phase) == (None, "calm")


@pytest.mark.parametrize("damaged", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"risk": {}}'])
def test_a_damaged_checkpoint_is_no_checkpoint(damaged: bytes) -> None:
    fresh = make_guard().checkpoint()
    assert RunController(Config(), hello(), Applied(), checkpoint=damaged).checkpoint() == fresh


def normalised_guard(**fields: Any) -> RunController:
    return make_guard(update_exponent=0.0, width=64, rate_sized_steps=True, **{"rewinds": True, **fields})


def rewound(controller: RunController, step: int = 12, outcome: str = "applied") -> tuple[Command, Command]:
    """A rewind of the controller's run, acknowledged at `step`: the cap and the rewind."""
    alarm = explode(controller, step=10)
    cap, back = (command for command in alarm.commands if command.kind != "set_cadence")
    controller.acknowledge(ack(cap, applied=Applied(max_rate=cap.max_rate)))
    controller.acknowledge(msgspec.structs.replace(ack(back, outcome), step=step))
    return cap, back


def test_a_rewind_is_a_cap_and_a_return() -> None:
    controller = normalised_guard()
    cap, back = rewound(controller)
    assert (cap.kind, back.kind) == ("set_lr_scale", "rewind")
    assert cap.max_rate is not None
    assert cap.max_rate < 0.1
    assert back.rewind is not None
    assert back.rewind.max_rate == cap.max_rate
    assert controller.policy_state.max_rate == cap.max_rate


def test_an_agent_without_copies_is_asked_for_no_return() -> None:
    alarm = explode(normalised_guard(rewinds=False))
    assert "rewind" not in [command.kind for command in alarm.commands]
    assert cuts(alarm)


def test_snapshots_from_before_the_return_do_not_count() -> None:
    controller = normalised_guard()
    rewound(controller, step=30)
    for step in range(11, 31):
        late = controller.assess(2.0, sample(step), None, step=40)
        assert (late.risk.value, late.commands, late.decision) == (0.0, (), None)
    again = [controller.assess(2.0, sample(step), None, step=40) for step in (37, 38)][-1]
    assert again.risk.value == 1.0
    assert "rewind" in [command.kind for command in again.commands]


def test_after_a_return_the_detector_starts_anew() -> None:
    """The layers jump by the return itself, which is no sign of danger."""
    controller, fresh = normalised_guard(), normalised_guard()
    for step in range(5):
        controller.assess(0.0, sample(step, learning_rate=1e-4), calm_profile(step), step=step)
    rewound(controller)
    for step in (20, 21, 22):
        found = controller.assess(2.0, sample(step, learning_rate=1e-4), calm_profile(step), step=step)
        expected = fresh.assess(2.0, sample(step, learning_rate=1e-4), calm_profile(step), step=step)
        assert found.risk == expected.risk


def test_a_return_that_was_refused_changes_nothing_but_the_wait() -> None:
    controller = normalised_guard()
    rewound(controller, outcome="refused")
    assert not controller.policy_state.rewinding
    found = controller.assess(2.0, sample(11), None, step=11)
    assert found.risk.value == 1.0, "snapshots count from the next one on"


def test_the_cap_in_force_at_the_start_is_the_policy_s() -> None:
    controller = make_guard(applied=Applied(max_rate=0.02))
    assert (controller.policy_state.max_rate, controller.policy_state.phase) == (0.02, "backed_off")


@pytest.mark.parametrize(("mass", "shown"), [(-0.5, 0.0), (0.25, 0.25), (1.5, 1.0)])
def test_what_agents_display_is_within_the_bounds_of_a_message(mass: float, shown: float) -> None:
    profile = calm_profile()
    layers = tuple(replace(layer, near_unit_mass=mass) for layer in profile.layers)
    controller = make_guard()
    controller.assess(0.0, sample(1), replace(profile, layers=layers), step=1)
    assert controller.judgement is not None
    assert controller.judgement.near_unit_mass == shown


def test_a_command_has_an_id_that_nobody_guesses() -> None:
    ids = [command.id for command in explode(make_guard()).commands]
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in ids)


def test_the_depth_of_a_model_without_a_profile_is_unknown() -> None:
    assert explode(make_guard()).observation.num_layers == 0


def test_a_refused_kss_is_not_in_force() -> None:
    controller = make_guard(
        Config(policy=PolicyConfig(name="kss", act_risk=1e-9, severe_risk=1.0, release_risk=0.0), kss=PUBLISHED)
    )
    asked: list[Command] = []
    for step in range(1, 50):
        assessment = controller.assess(float(step), sample(step), calm_profile(step), step=step)
        asked += [command for command in assessment.commands if command.kind == "set_kss"]
        if asked:
            break
    assert controller.policy_state.kss.alpha > 0
    controller.acknowledge(ack(asked[0], "refused"))
    assert controller.policy_state.kss.alpha == 0


def test_an_assessment_without_a_decision_is_not_remarkable() -> None:
    assert not make_guard().assess(0.0, sample(10), None, step=10, decide=False).remarkable


STOPS = from_mapping(
    {
        "policy": {"name": "kss", "stop": True, "stop_snapshots": 1, "stop_steps": 1, "checkpoint": True},
        "kss": {"method": "published", "alpha": 0},
    }
)


def stop_of(controller: RunController, step: int) -> list[Command]:
    """See one more ruined snapshot; return the commands to stop."""
    broken = controller.assess(float(step), sample(step, loss=float("nan")), None, step=step)
    return [command for command in broken.commands if command.kind == "stop"]


def test_a_stop_is_decided_again_only_if_it_was_not_applied() -> None:
    controller = make_guard(STOPS)
    assert stop_of(controller, 10) == []
    (stop,) = stop_of(controller, 11)
    assert (stop.reason, stop.expires_step) == ("stop: the states and the loss are not finite, for 1 steps", 61)
    controller.acknowledge(ack(stop, "failed", Applied(lr_scale=0.5)))
    assert controller.policy_state.lr_scale == 1.0, "a stop says nothing about the values in force"
    assert stop_of(controller, 12) == []
    (stop,) = stop_of(controller, 13)
    controller.acknowledge(ack(stop))
    assert controller.policy_state.stopping
    assert [stop_of(controller, step) for step in (14, 15)] == [[], []]


def test_a_stop_without_an_answer_is_decided_again() -> None:
    controller = make_guard(STOPS)
    stop_of(controller, 10)
    (stop,) = stop_of(controller, 11)
    assert stop in controller.expire(1000.0, 1000, Applied())
    assert not controller.policy_state.stopping


def test_the_answer_to_a_checkpoint_changes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = make_guard(STOPS)
    state = controller.policy_state
    request = policy.Action(kind="checkpoint", reason="r")
    decision = policy.Decision(state=state, commands=(request,), reason="r")
    monkeypatch.setattr(policy, "decide", lambda *_: decision)
    assessment = controller.assess(0.0, sample(1), calm_profile(), step=1)
    (checkpoint,) = assessment.commands
    assert (checkpoint.kind, assessment.remarkable) == ("checkpoint", True)
    controller.acknowledge(ack(checkpoint, "failed", Applied(lr_scale=0.5)))
    assert controller.policy_state == state
