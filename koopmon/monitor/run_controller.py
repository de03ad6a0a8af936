"""Controller of one run: risk state, policy state, and commands without an ack.

It uses neither sockets nor the store. The detector and the policy decide. The controller turns their actions into
commands with an id and an expiry. A command is resent until its ack arrives or a newer command of its kind replaces it.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from koopmon import policy
from koopmon.config import Config, KssConfig, PolicyConfig, merged
from koopmon.errors import ProtocolError, one_line
from koopmon.risk import initial_score, online_detector
from koopmon.risk.calibration import Example
from koopmon.wire.headers import encode_header
from koopmon.wire.messages import MAX_STEP, MAX_TEXT, Ack, Applied, Command, CommandKind, Hello, TrainingStep

if TYPE_CHECKING:
    from koopmon.risk.calibration import Calibrator
    from koopmon.spectral import SpectralProfile

logger = logging.getLogger(__name__)

RESEND_SECONDS = 1.0
TRAINING_KINDS = frozenset({"set_lr_scale", "set_kss"})
MAX_REPLACED = 64
"""Maximum number of replaced commands of one run that still wait for an ack."""
MAX_SETTLED = 256
"""Maximum number of settled commands of one run that are kept to identify late acks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """Assessment of one snapshot. `decision` is None when the policy was not called.

    `commands` are the commands of the decision; they replace the unanswered ones in `replaced`. `remarkable` is True if
    there are commands, the phase changed, or KSS is now barred. `unencodable` is the reason why a decision was dropped:
    one of its commands exceeds the protocol's bounds.
    """

    observation: online_detector.Observation
    risk: online_detector.OnlineRisk
    decision: policy.Decision | None
    commands: tuple[Command, ...] = ()
    replaced: tuple[Command, ...] = ()
    remarkable: bool = False
    unencodable: ProtocolError | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """Command that matches an ack.

    `first` is True if the command had no ack before, `counts` if no outcome of it was counted before.
    """

    kind: CommandKind
    first: bool
    counts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerCheckpoint:
    """State of a controller that a restarted monitor needs."""

    risk: online_detector.RiskState
    policy: policy.PolicyState
    initial: initial_score.InitialRisk | None


@dataclass(slots=True)
class _Waiting:
    """A command without an ack.

    A `replaced` command is not resent, and its ack does not change the policy.
    """

    command: Command
    offered_at: float
    sent: bool = False
    replaced: bool = False


@dataclass(slots=True)
class _Settled:
    kind: CommandKind
    answered: bool


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
        self._run, self._incarnation = hello.run, hello.incarnation
        self._config = config
        self._stood_down = False
        self.on_hello(hello)
        remembered = _restored(checkpoint)
        self._risk_state = remembered.risk
        self._policy_state = _in_force(remembered.policy, applied, hello.step)
        self._phase = self._policy_state.phase
        self._waiting: dict[str, _Waiting] = {}
        self._settled: OrderedDict[str, _Settled] = OrderedDict()
        self.initial = remembered.initial
        """The score at initialisation, from the first informative snapshot of the warm-up."""
        self._calibrator = calibrator
        self._num_layers = 0
        self._peak_rate = 0.0

    def on_hello(self, hello: Hello) -> None:
        """Read the run's properties from a hello: permission to act, and the adapter's defaults."""
        config = self._config
        self._adapter, self._width = hello.adapter, hello.width
        self._rate_sized_steps, self._update_exponent = hello.rate_sized_steps, hello.update_exponent
        self._risk_config = merged(config.risk, hello.thresholds, "thresholds")
        hints = {} if hello.kss is None else msgspec.structs.asdict(hello.kss)
        known = {name: value for name, value in hints.items() if name in config.kss.__struct_fields__}
        self._kss_config = merged(config.kss, known, "kss")
        self._may_send = hello.acts and not config.policy.dry_run and config.policy.name != "observe"

    @property
    def sends(self) -> bool:
        """True while commands are sent. Otherwise they are decided and recorded only."""
        return self._may_send and not self._stood_down

    def stand_down(self) -> None:
        """Send no further commands in this incarnation, because the monitor failed on one of them."""
        self._stood_down = True

    def record_initial_score(self, step: int, profile: SpectralProfile) -> None:
        """Set `initial` during the first steps of the run, from the first informative snapshot."""
        if (self.initial is None or not self.initial.informative) and step <= self._config.cadence.warmup_steps:
            self.initial = initial_score.initial_risk(profile)

    def is_alarming(self, risk: float) -> bool:
        """Return True if `risk` reaches the configured alarm threshold."""
        return risk >= self._config.policy.act_risk

    @property
    def divergence_probability(self) -> float | None:
        """Divergence probability at the highest learning rate so far.

        None without a calibrator for this kind of model, and for rates outside the calibrated range. Also None if the
        learning rate does not determine the size of the optimizer's steps.
        """
        exponent = self._update_exponent
        if self._calibrator is None or exponent is None or not self._peak_rate or not self._rate_sized_steps:
            return None
        if self._calibrator.adapter != self._adapter:
            return None
        example = Example(
            update_exponent=exponent,
            learning_rate=self._peak_rate,
            width=max(self._width, 1),
            num_layers=max(self._num_layers, 1),
        )
        return self._calibrator.probability(example) if self._calibrator.covers(example) else None

    def assess(
        self, now: float, training: TrainingStep, profile: SpectralProfile | None, *, step: int, decide: bool = True
    ) -> Assessment:
        """Assess one snapshot; a `profile` of None means that its states were not finite.

        `step` is the run's latest step. With `decide` False, as at shutdown, only the risk is assessed.
        """
        if training.learning_rate is not None and math.isfinite(training.learning_rate):
            self._peak_rate = max(self._peak_rate, training.learning_rate)
        self._num_layers = self._num_layers if profile is None else profile.num_layers
        observation = online_detector.observe(
            profile,
            training,
            width=self._width if self._rate_sized_steps and self._width else None,
            num_layers=self._num_layers,
            update_exponent=self._update_exponent,
            non_finite=profile is None,
        )
        risk_state, risk = online_detector.assess(self._risk_state, observation, self._risk_config)
        if not math.isfinite(risk.value):
            raise ArithmeticError(f"the risk at step {training.step} is {risk.value}: {risk.reason}")
        self._risk_state = risk_state
        if not decide:
            return Assessment(observation=observation, risk=risk, decision=None)
        before = self._policy_state
        decision = policy.decide(now, before, observation, risk, self._config.policy, self._kss_config)
        try:
            commands = tuple(self._command(action, max(step, training.step)) for action in decision.commands)
        except ProtocolError as error:
            # Keep the old policy state, so that the next alarm is decided again.
            return Assessment(observation=observation, risk=risk, decision=None, unencodable=error)
        self._policy_state = decision.state
        barred = decision.state.kss_barred and not before.kss_barred
        remarkable = bool(commands) or barred or decision.phase != self._phase
        self._phase = decision.phase
        return Assessment(
            observation=observation,
            risk=risk,
            decision=decision,
            commands=commands,
            replaced=self._expect(now, commands) if self.sends else (),
            remarkable=remarkable,
        )

    def acknowledge(self, now: float, ack: Ack) -> Answered | None:
        """Process an ack of rank 0; returns the matching command, None for an unknown id.

        The first ack settles a command. Agents repeat acks after a reconnection, and an ack may be forged.
        """
        waiting = self._waiting.pop(ack.command_id, None)
        if waiting is not None:
            self._mark_settled(waiting.command, answered=True)
            if not waiting.replaced:
                self._update_policy(now, waiting.command, ack)
            return Answered(waiting.command.kind, first=True, counts=True)
        settled = self._settled.get(ack.command_id)
        if settled is None:
            return None
        first, settled.answered = not settled.answered, True
        return Answered(settled.kind, first=first, counts=False)

    def due(self, now: float) -> list[Command]:
        """Return the commands to resend now; each is next due after RESEND_SECONDS."""
        due = [each for each in self._waiting.values() if not each.replaced and now - each.offered_at >= RESEND_SECONDS]
        for waiting in due:
            waiting.offered_at = now
        return [waiting.command for waiting in due]

    def sent(self, command: Command) -> bool:
        """Mark `command` as sent; True the first time."""
        waiting = self._waiting.get(command.id)
        first = waiting is not None and not waiting.sent
        if waiting is not None:
            waiting.sent = True
        return first

    def expire(self, now: float, step: int, applied: Applied) -> list[Command]:
        """Remove and return the commands without an ack past their expiry step.

        `applied` holds the values in force that the run last reported.
        """
        replaced = [waiting for waiting in self._waiting.values() if waiting.replaced]
        too_many = [waiting.command.id for waiting in replaced[: max(0, len(replaced) - MAX_REPLACED)]]
        # The ack may arrive after the heartbeat that carries the step.
        expired = [
            waiting
            for waiting in self._waiting.values()
            if waiting.command.id in too_many
            or (step > waiting.command.expires_step and now - waiting.offered_at >= RESEND_SECONDS)
        ]
        for waiting in expired:
            command = waiting.command
            del self._waiting[command.id]
            self._mark_settled(command, answered=False)
            if waiting.replaced:
                continue
            ack = Ack(
                run=self._run,
                incarnation=self._incarnation,
                command_id=command.id,
                outcome="expired",
                step=step,
                detail="no answer",
                applied=applied,
            )
            self._update_policy(now, command, ack)
        return [waiting.command for waiting in expired]

    @property
    def policy_state(self) -> policy.PolicyState:
        """Current state of the policy."""
        return self._policy_state

    @property
    def policy_config(self) -> PolicyConfig:
        return self._config.policy

    @property
    def kss_config(self) -> KssConfig:
        """KSS configuration with the adapter's hints in place of unchanged defaults."""
        return self._kss_config

    @property
    def has_pending(self) -> bool:
        """True while a command waits for its ack and is resent."""
        return any(not waiting.replaced for waiting in self._waiting.values())

    def checkpoint(self) -> bytes:
        """Encode the state that a later controller of this incarnation needs."""
        return msgspec.json.encode(
            ControllerCheckpoint(risk=self._risk_state, policy=self._policy_state, initial=self.initial)
        )

    def abandon(self) -> list[Command]:
        """Discard the waiting commands, for example at the end of the run, and return them."""
        commands = [waiting.command for waiting in self._waiting.values()]
        for command in commands:
            self._mark_settled(command, answered=False)
        self._waiting.clear()
        return commands

    def _command(self, action: policy.Action, step: int) -> Command:
        """Build and validate a command; the result can be encoded.

        Steps are clamped to the protocol's last one. Raises ProtocolError for any other value outside its bounds.
        """
        until = action.cadence_until_step
        command = Command(
            run=self._run,
            incarnation=self._incarnation,
            id=secrets.token_hex(8),
            kind=action.kind,
            reason=action.reason[:MAX_TEXT],
            expires_step=min(step + action.expires_in_steps, MAX_STEP),
            lr_scale=action.lr_scale,
            kss=action.kss,
            ramp_steps=action.ramp_steps,
            cadence_steps=action.cadence_steps,
            cadence_until_step=None if until is None else min(until, MAX_STEP),
        )
        encode_header(command)
        return command

    def _expect(self, now: float, commands: tuple[Command, ...]) -> tuple[Command, ...]:
        kinds = {command.kind for command in commands}
        replaced = [each for each in self._waiting.values() if each.command.kind in kinds and not each.replaced]
        for waiting in replaced:
            waiting.replaced = True
        for command in commands:
            self._waiting[command.id] = _Waiting(command, now)
        return tuple(waiting.command for waiting in replaced)

    def _update_policy(self, now: float, command: Command, ack: Ack) -> None:
        # The values in force do not describe a command that changes no training value.
        if command.kind == "set_kss" and ack.outcome == "refused" and ack.shielded:
            self._policy_state = policy.kss_shielded(self._policy_state, ack)
        elif command.kind in TRAINING_KINDS:
            self._policy_state = policy.acknowledge(now, self._policy_state, ack)

    def _mark_settled(self, command: Command, *, answered: bool) -> None:
        self._settled[command.id] = _Settled(command.kind, answered)
        while len(self._settled) > MAX_SETTLED:
            self._settled.popitem(last=False)


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
    if (state.lr_scale, state.kss) == (applied.lr_scale, applied.kss):
        return state
    shaping = applied.kss.alpha > 0
    return replace(
        state,
        phase="backed_off" if shaping or applied.lr_scale < 1 else "calm",
        lr_scale=applied.lr_scale,
        kss=applied.kss,
        kss_on_at=(step if state.kss_on_at is None else state.kss_on_at) if shaping else None,
    )
