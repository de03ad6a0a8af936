"""Controller of one run: detector, policy, and the commands without an ack.

It uses neither sockets nor the store. The detector and the policy decide. The controller turns their actions into
commands with an id and an expiry.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import msgspec

from koopmon import policy
from koopmon.config import Config, with_hints
from koopmon.errors import ProtocolError, one_line
from koopmon.monitor.pending_commands import Answered, PendingCommands
from koopmon.risk import initial_score, online_detector
from koopmon.risk.calibration import Calibrator, Example
from koopmon.spectral import SpectralProfile
from koopmon.wire.headers import encode_header
from koopmon.wire.messages import MAX_STEP, MAX_TEXT, Ack, Applied, Command, Hello, Judgement, TrainingStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """Assessment of one snapshot. `decision` is None when the policy was not called.

    `commands` are the commands of the decision; they replace the unanswered ones in `replaced`. `remarkable` is True if
    there are commands, the phase changed, or KSS is now barred. `unencodable` is the reason why a decision was dropped:
    one of its commands exceeds the protocol's bounds.
    """

    observation: online_detector.Observation
    profile: SpectralProfile | None
    """None when the states were not finite."""
    risk: online_detector.OnlineRisk
    decision: policy.Decision | None = None
    commands: tuple[Command, ...] = ()
    replaced: tuple[Command, ...] = ()
    remarkable: bool = False
    unencodable: ProtocolError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerCheckpoint:
    """State of a controller that a restarted monitor needs."""

    risk: online_detector.RiskState
    policy: policy.PolicyState
    initial: initial_score.InitialRisk | None


class RunController:
    """The controller of one incarnation of one run.

    `applied` holds the values in force at the start. `checkpoint` is the recorded state of an earlier controller of
    this incarnation.
    """

    def __init__(
        self,
        config: Config,
        hello: Hello,
        applied: Applied,
        *,
        checkpoint: bytes | None = None,
        calibrator: Calibrator | None = None,
    ) -> None:
        self.config = config
        self._stood_down = False
        self.on_hello(hello)
        remembered = _restored(checkpoint)
        self._risk_state = remembered.risk
        self.policy_state = _in_force(remembered.policy, applied, hello.step)
        self._phase = self.policy_state.phase
        self.pending = PendingCommands()
        self.initial = remembered.initial
        """The score at initialisation, from the first informative snapshot of the warm-up."""
        self.judgement: Judgement | None = None
        """Judgement of the last assessed snapshot, which agents display."""
        self._calibrator = calibrator
        self._num_layers = 0
        self._rewound_at = -1
        self._peak_rate = 0.0

    def on_hello(self, hello: Hello) -> None:
        """Read the run's properties from a hello: permission to act, and the adapter's defaults."""
        self._hello = hello
        self._risk_config, self.kss_config = with_hints(self.config, hello)

    @property
    def sends(self) -> bool:
        """True while commands are sent. Otherwise they are decided and recorded only."""
        allowed = self._hello.acts and not self.config.policy.dry_run and self.config.policy.name != "observe"
        return allowed and not self._stood_down

    def stand_down(self) -> None:
        """Send no further commands in this incarnation, because the monitor failed on one of them."""
        self._stood_down = True

    @property
    def divergence_probability(self) -> float | None:
        """Divergence probability at the highest learning rate so far.

        None without a calibrator for this kind of model, and for rates outside the calibrated range. Also None if the
        learning rate does not determine the size of the optimizer's steps.
        """
        hello, calibrator = self._hello, self._calibrator
        if hello.update_exponent is None or not self._peak_rate or not hello.rate_sized_steps:
            return None
        if calibrator is None or calibrator.adapter != hello.adapter:
            return None
        example = Example(
            update_exponent=hello.update_exponent,
            learning_rate=self._peak_rate,
            width=max(hello.width, 1),
            num_layers=max(self._num_layers, 1),
        )
        return calibrator.probability(example) if calibrator.covers(example) else None

    def assess(
        self,
        now: float,
        training: TrainingStep,
        profile: SpectralProfile | None,
        *,
        step: int,
        decide: bool = True,
        attention_logits: Sequence[float | None] = (),
    ) -> Assessment:
        """Assess one snapshot; a `profile` of None means that its states were not finite.

        `step` is the run's latest step. `attention_logits` has the largest one of each layer, where it is known. With
        `decide` False, as at shutdown, only the risk is assessed.
        """
        observation = self._observe(training, profile, attention_logits)
        if training.step <= self._rewound_at:
            stale = online_detector.OnlineRisk(value=0.0, reason="the snapshot was taken before the rewind")
            return Assessment(observation=observation, profile=profile, risk=stale)
        risk_state, risk = online_detector.assess(self._risk_state, observation, self._risk_config)
        if not math.isfinite(risk.value):
            raise ArithmeticError(f"the risk at step {training.step} is {risk.value}: {risk.reason}")
        self._risk_state = risk_state
        assessment = Assessment(observation=observation, profile=profile, risk=risk)
        if decide:
            assessment = self._decide(now, assessment, max(step, training.step))
        self.judgement = self._judge(assessment)
        return assessment

    def _observe(
        self, training: TrainingStep, profile: SpectralProfile | None, attention_logits: Sequence[float | None]
    ) -> online_detector.Observation:
        hello, rate = self._hello, training.learning_rate
        if profile is not None:
            self._num_layers = profile.num_layers
            undecided = self.initial is None or not self.initial.informative
            if undecided and training.step <= self.config.cadence.warmup_steps:
                self.initial = initial_score.initial_risk(profile)
        if rate is not None and math.isfinite(rate):
            self._peak_rate = max(self._peak_rate, rate)
        return online_detector.observe(
            profile,
            training,
            width=hello.width if hello.rate_sized_steps and hello.width else None,
            num_layers=self._num_layers,
            update_exponent=hello.update_exponent,
            rewinds=hello.rewinds,
            non_finite=profile is None,
            attention_logits=attention_logits,
        )

    def _decide(self, now: float, assessment: Assessment, step: int) -> Assessment:
        """Add the decision of the policy and its commands, which expire relative to `step`."""
        before = self.policy_state
        decision = policy.decide(
            now, before, assessment.observation, assessment.risk, self.config.policy, self.kss_config
        )
        try:
            commands = tuple(self._command(action, step) for action in decision.commands)
        except ProtocolError as error:
            # Keep the old policy state, so that the next alarm is decided again.
            return replace(assessment, unencodable=error)
        self.policy_state = decision.state
        barred = decision.state.kss_barred and not before.kss_barred
        remarkable = bool(commands) or barred or decision.phase != self._phase
        self._phase = decision.phase
        replaced = tuple(self.pending.add(now, commands)) if self.sends else ()
        return replace(assessment, decision=decision, commands=commands, replaced=replaced, remarkable=remarkable)

    def acknowledge(self, ack: Ack) -> Answered | None:
        """Process an ack of rank 0; returns the matching command, None for an unknown id."""
        found = self.pending.acknowledge(ack.command_id)
        if found is None:
            return None
        answered, newest = found
        if newest is not None:
            self._update_policy(newest, ack)
        return answered

    def expire(self, now: float, step: int, applied: Applied) -> list[Command]:
        """Remove and return the commands without an ack past their expiry step.

        `applied` holds the values in force that the run last reported.
        """
        expired = self.pending.expire(now, step)
        for pending in expired:
            command = pending.command
            if not pending.replaced:
                ack = Ack(
                    run=command.run,
                    incarnation=command.incarnation,
                    command_id=command.id,
                    outcome="expired",
                    step=step,
                    detail="no answer",
                    applied=applied,
                )
                self._update_policy(command, ack)
        return [pending.command for pending in expired]

    def checkpoint(self) -> bytes:
        """Encode the state that a later controller of this incarnation needs."""
        return msgspec.json.encode(
            ControllerCheckpoint(risk=self._risk_state, policy=self.policy_state, initial=self.initial)
        )

    def _command(self, action: policy.Action, step: int) -> Command:
        """Build and validate a command; the result can be encoded.

        Steps are clamped to the protocol's last one. Raises ProtocolError for any other value outside its bounds.
        """
        values = {each.name: getattr(action, each.name) for each in fields(action) if each.name != "expires_in_steps"}
        until = action.cadence_until_step
        values["cadence_until_step"] = None if until is None else min(until, MAX_STEP)
        values["reason"] = action.reason[:MAX_TEXT]
        command = Command(
            run=self._hello.run,
            incarnation=self._hello.incarnation,
            id=secrets.token_hex(8),
            expires_step=min(step + action.expires_in_steps, MAX_STEP),
            **values,
        )
        encode_header(command)
        return command

    def _update_policy(self, command: Command, ack: Ack) -> None:
        # The values in force do not describe a command that changes no training value.
        if command.kind in ("set_kss", "set_ceilings") and ack.outcome == "refused" and ack.permanent:
            self.policy_state = policy.kss_refused(self.policy_state, ack)
        elif command.kind == "set_ceilings":
            self.policy_state = policy.ceilings_answered(self.policy_state, ack)
        elif command.kind == "rewind":
            self.policy_state = policy.rewound(self.policy_state, ack)
            if ack.outcome == "applied":
                # The layers jump: the detector restarts with the first snapshot after the return.
                self._risk_state, self._rewound_at = online_detector.RiskState(), ack.step
        elif command.kind == "stop":
            self.policy_state = policy.stop_answered(self.policy_state, ack)
        elif command.kind not in ("set_cadence", "checkpoint"):
            self.policy_state = policy.acknowledge(self.policy_state, ack)

    def _judge(self, assessment: Assessment) -> Judgement:
        """Build the judgement for display; it keeps the last remarkable decision."""
        profile, before, decision = assessment.profile, self.judgement, assessment.decision
        mass = profile.mean("near_unit_mass") if profile is not None and profile.informative else None
        said, at = ("", None) if before is None else (before.decision, before.decision_step)
        if decision is not None and assessment.remarkable:
            said, at = decision.reason[:MAX_TEXT], assessment.observation.step
        return Judgement(
            step=assessment.observation.step,
            risk=_share(assessment.risk.value) or 0.0,
            forecast=_share(assessment.risk.forecast),
            near_unit_mass=_share(mass),
            divergence_probability=_share(self.divergence_probability),
            decision=said,
            decision_step=at,
        )


def _share(value: float | None) -> float | None:
    """Clamp `value` to [0, 1]; None when it is unknown or not finite."""
    return None if value is None or not math.isfinite(value) else min(max(float(value), 0.0), 1.0)


def _restored(checkpoint: bytes | None) -> ControllerCheckpoint:
    """Decode the checkpoint of an earlier monitor; an empty one when the bytes are not valid."""
    if checkpoint is not None:
        try:
            return msgspec.json.decode(checkpoint, type=ControllerCheckpoint)
        except (msgspec.DecodeError, TypeError, ValueError, RecursionError) as error:
            logger.warning("checkpoint: what an earlier monitor remembered cannot be used: %s", one_line(error))
    return ControllerCheckpoint(risk=online_detector.RiskState(), policy=policy.PolicyState(), initial=None)


def _in_force(state: policy.PolicyState, applied: Applied, step: int) -> policy.PolicyState:
    """Update `state` with the values in force on the agents, where they differ from the commanded ones."""
    names = ("lr_scale", "max_rate", "kss", "held_layers")
    if all(getattr(state, name) == getattr(applied, name) for name in names):
        return state
    shaping = applied.kss.alpha > 0 or bool(applied.held_layers)
    return replace(
        state,
        phase="backed_off" if shaping or applied.lr_scale < 1 or applied.max_rate is not None else "calm",
        lr_scale=applied.lr_scale,
        max_rate=applied.max_rate,
        kss=applied.kss,
        held_layers=applied.held_layers,
        kss_on_at=(step if state.kss_on_at is None else state.kss_on_at) if shaping else None,
    )
