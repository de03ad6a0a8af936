"""What guards one run: its risk state and policy state, and the commands that wait for their answer.

Knows neither sockets nor the store. The detector and the policy judge; here their actions become commands with an id
and an expiry, are offered again until they are answered, and never once a newer one of their kind has replaced them.
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
from koopmon.monitor.sample import Sample
from koopmon.risk import initial_score, online_detector
from koopmon.risk.calibration import Example
from koopmon.wire.headers import encode_header
from koopmon.wire.messages import MAX_STEP, MAX_TEXT, Ack, Applied, Command, CommandKind, Hello

if TYPE_CHECKING:
    from koopmon.risk.calibration import Calibrator
    from koopmon.spectral import SpectralProfile

logger = logging.getLogger(__name__)

RESEND_SECONDS = 1.0
TRAINING_KINDS = frozenset({"set_lr_scale", "set_kss"})
MAX_REPLACED = 64
"""Commands of one run that a newer one has replaced, and whose answer may yet come."""
MAX_SETTLED = 256
"""Commands of one run that are remembered after they are settled, so that a late answer is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """How one snapshot was judged. `decision` is None when the policy was not asked.

    `commands` follow from it and have taken the place of the unanswered ones in `replaced`. `remarkable` is True when
    there are commands, the phase changed or KSS is barred from now on. `unencodable` is why a decision was dropped: one
    of its commands is outside the protocol's bounds.
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
    """What an ack answers. `first`: the command had no answer before. `counts`: nothing was counted as its outcome."""

    kind: CommandKind
    first: bool
    counts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerCheckpoint:
    """What a controller must not forget when the monitor restarts."""

    risk: online_detector.RiskState
    policy: policy.PolicyState
    initial: initial_score.InitialRisk | None


@dataclass(slots=True)
class _Waiting:
    """A command without an answer. A `replaced` one is not offered again, and its answer does not change the policy."""

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

    `applied` is what is in force in it when the controller begins, `checkpoint` what an earlier controller of it had
    put down.
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
        """Take what a hello says of the run: whether it can be acted on, and its adapter's defaults."""
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
        """False: commands are decided and recorded, and stay here."""
        return self._may_send and not self._stood_down

    def stand_down(self) -> None:
        """Only watch from now on, as long as this incarnation lasts: the monitor failed on one of its commands."""
        self._stood_down = True

    def record_initial_score(self, step: int, profile: SpectralProfile) -> None:
        """Set `initial` while the run is young and no snapshot was informative yet."""
        if (self.initial is None or not self.initial.informative) and step <= self._config.cadence.warmup_steps:
            self.initial = initial_score.initial_risk(profile)

    def is_alarming(self, risk: float) -> bool:
        """Whether a risk counts as high by the configuration."""
        return risk >= self._config.policy.act_risk

    @property
    def divergence_probability(self) -> float | None:
        """At the highest learning rate seen so far; None without a calibrator for this run's kind of model, where the
        rate does not tell how long the optimizer's steps are, or where none as high was tried."""
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
        self, now: float, sample: Sample, profile: SpectralProfile | None, *, step: int, decide: bool = True
    ) -> Assessment:
        """Judge one snapshot; a `profile` of None means that its states were not finite. `step` is the run's latest.

        With `decide` False, as when the monitor shuts down, the risk is assessed and nothing follows from it.
        """
        if sample.learning_rate is not None and math.isfinite(sample.learning_rate):
            self._peak_rate = max(self._peak_rate, sample.learning_rate)
        self._num_layers = self._num_layers if profile is None else profile.num_layers
        observation = online_detector.observe(
            profile,
            step=sample.step,
            learning_rate=sample.learning_rate,
            width=self._width if self._rate_sized_steps and self._width else None,
            num_layers=self._num_layers,
            update_exponent=self._update_exponent,
            loss=sample.loss,
            grad_norm=sample.grad_norm,
            lr_scale=sample.lr_scale,
            kss_alpha=sample.kss_alpha,
            non_finite=profile is None,
        )
        risk_state, risk = online_detector.assess(self._risk_state, observation, self._risk_config)
        if not math.isfinite(risk.value):
            raise ArithmeticError(f"the risk at step {sample.step} is {risk.value}: {risk.reason}")
        self._risk_state = risk_state
        if not decide:
            return Assessment(observation=observation, risk=risk, decision=None)
        before = self._policy_state
        decision = policy.decide(now, before, observation, risk, self._config.policy, self._kss_config)
        try:
            commands = tuple(self._command(action, max(step, sample.step)) for action in decision.commands)
        except ProtocolError as error:
            # The policy's state stays as it was, so that the next alarm is decided anew.
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
        """Take rank 0's answer; returns what it answers, None when that is none of ours.

        The first answer settles a command. Agents repeat an answer after a reconnection, and may lie.
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
        """The commands to offer again now; from then on they are due in another RESEND_SECONDS."""
        due = [each for each in self._waiting.values() if not each.replaced and now - each.offered_at >= RESEND_SECONDS]
        for waiting in due:
            waiting.offered_at = now
        return [waiting.command for waiting in due]

    def sent(self, command: Command) -> bool:
        """Note that `command` has left; returns whether it is the first time."""
        waiting = self._waiting.get(command.id)
        first = waiting is not None and not waiting.sent
        if waiting is not None:
            waiting.sent = True
        return first

    def expire(self, now: float, step: int, applied: Applied) -> list[Command]:
        """The commands whose expiry the run has passed without an answer; `applied` is what it says is in force."""
        replaced = [waiting for waiting in self._waiting.values() if waiting.replaced]
        too_many = [waiting.command.id for waiting in replaced[: max(0, len(replaced) - MAX_REPLACED)]]
        # The answer may be on its way behind the heartbeat that told the step.
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
        """Where the policy stands."""
        return self._policy_state

    @property
    def policy_config(self) -> PolicyConfig:
        return self._config.policy

    @property
    def kss_config(self) -> KssConfig:
        """With the adapter's hints where the user left the defaults."""
        return self._kss_config

    @property
    def has_pending(self) -> bool:
        """Whether some command waits for its answer, and is offered until it comes."""
        return any(not waiting.replaced for waiting in self._waiting.values())

    def checkpoint(self) -> bytes:
        """What a controller of this incarnation needs to go on where this one stands."""
        return msgspec.json.encode(
            ControllerCheckpoint(risk=self._risk_state, policy=self._policy_state, initial=self.initial)
        )

    def abandon(self) -> list[Command]:
        """Forget what waits for an answer, as when the run is over; returns it."""
        commands = [waiting.command for waiting in self._waiting.values()]
        for command in commands:
            self._mark_settled(command, answered=False)
        self._waiting.clear()
        return commands

    def _command(self, action: policy.Action, step: int) -> Command:
        """Make every command that the monitor sends; what is returned can be encoded.

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
        # What is in force says nothing about a command that is not to change it.
        if command.kind == "set_kss" and ack.outcome == "refused" and ack.shielded:
            self._policy_state = policy.kss_shielded(self._policy_state, ack)
        elif command.kind in TRAINING_KINDS:
            self._policy_state = policy.acknowledge(now, self._policy_state, ack)

    def _mark_settled(self, command: Command, *, answered: bool) -> None:
        self._settled[command.id] = _Settled(command.kind, answered)
        while len(self._settled) > MAX_SETTLED:
            self._settled.popitem(last=False)


def _restored(checkpoint: bytes | None) -> ControllerCheckpoint:
    """The checkpoint that an earlier monitor recorded; an empty one when the recorded bytes are not valid."""
    if checkpoint is not None:
        try:
            return msgspec.json.decode(checkpoint, type=ControllerCheckpoint)
        except (msgspec.DecodeError, TypeError, ValueError, RecursionError) as error:
            logger.warning("checkpoint: what an earlier monitor remembered cannot be used: %s", one_line(error))
    return ControllerCheckpoint(risk=online_detector.RiskState(), policy=policy.PolicyState(), initial=None)


def _in_force(state: policy.PolicyState, applied: Applied, step: int) -> policy.PolicyState:
    """`state` with what the agents say is in force, where it differs from what was commanded."""
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
