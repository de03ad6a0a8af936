"""What guards one run: its risk state and policy state, and the commands that wait for their answer.

Knows neither sockets nor the store. The detector and the policy judge; here their actions become commands with an id
and an expiry, are offered again until they are answered, and never once a newer one of their kind has replaced them.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from koopmon.config import Config, KssConfig, PolicyConfig, Section
from koopmon.monitor import policy
from koopmon.monitor.sample import Sample
from koopmon.risk import initial, online
from koopmon.risk.calibration import Example
from koopmon.wire.messages import Ack, Applied, Command, CommandKind, Hello

if TYPE_CHECKING:
    from koopmon.risk.calibration import Calibrator
    from koopmon.spectral import SpectralProfile

logger = logging.getLogger(__name__)

RESEND_SECONDS = 1.0
TRAINING_KINDS = frozenset({"set_lr_scale", "set_kss"})
MAX_SETTLED = 256
"""Commands of one run that are remembered after they are settled, so that a late answer is known."""

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How one snapshot was judged. `decision` is None when the policy was not asked.

    `commands` follow from it and have taken the place of the unanswered ones in `replaced`. `remarkable` is True when
    there are commands or the phase changed.
    """

    observation: online.Observation
    risk: online.OnlineRisk
    decision: policy.Decision | None
    commands: tuple[Command, ...]
    replaced: tuple[Command, ...]
    remarkable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a guard must not forget when the monitor restarts."""

    risk: online.RiskState
    policy: policy.PolicyState
    initial: initial.InitialRisk | None


@dataclass(slots=True)
class _Waiting:
    command: Command
    sent_at: float


class Guard:
    """The guard of one incarnation of one run.

    `applied` is what is in force in it when the guard begins, `memory` what an earlier guard of it had put down.
    """

    def __init__(
        self,
        config: Config,
        hello: Hello,
        applied: Applied,
        *,
        memory: bytes | None = None,
        calibrator: Calibrator | None = None,
    ) -> None:
        self._run, self._incarnation = hello.run, hello.incarnation
        self._config = config
        self.describe(hello)
        remembered = _recall(memory)
        self._risk_state = remembered.risk
        self._policy_state = _in_force(remembered.policy, applied, hello.step)
        self._phase = self._policy_state.phase
        self._waiting: dict[str, _Waiting] = {}
        self._settled: OrderedDict[str, CommandKind] = OrderedDict()
        self.initial = remembered.initial
        """The score at initialisation, from the first informative snapshot of the warm-up."""
        self._calibrator = calibrator
        self._num_layers = 0
        self._peak_rate = 0.0

    def describe(self, hello: Hello) -> None:
        """Take what a hello says of the run: whether it can be acted on, and its adapter's defaults."""
        config = self._config
        self._adapter, self._width = hello.adapter, hello.width
        self._rate_sized_steps, self._update_exponent = hello.rate_sized_steps, hello.update_exponent
        self._risk_config = merged(config.risk, hello.thresholds, "thresholds")
        hints = {} if hello.kss is None else msgspec.structs.asdict(hello.kss)
        known = {name: value for name, value in hints.items() if name in config.kss.__struct_fields__}
        self._kss_config = merged(config.kss, known, "kss")
        self.sends = hello.acts and not config.policy.dry_run and config.policy.name != "observe"
        """False: commands are decided and recorded, and stay here."""

    def score_initially(self, step: int, profile: SpectralProfile) -> None:
        """Set `initial` while the run is young and no snapshot was informative yet."""
        if (self.initial is None or not self.initial.informative) and step <= self._config.cadence.warmup_steps:
            self.initial = initial.initial_risk(profile)

    def alarming(self, risk: float) -> bool:
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

    def judge(
        self, now: float, sample: Sample, profile: SpectralProfile | None, *, step: int, decide: bool = True
    ) -> Verdict:
        """Judge one snapshot; a `profile` of None means that its states were not finite. `step` is the run's latest.

        With `decide` False, as when the monitor shuts down, the risk is assessed and nothing follows from it.
        """
        self._peak_rate = max(self._peak_rate, sample.learning_rate or 0.0)
        self._num_layers = self._num_layers if profile is None else profile.num_layers
        observation = online.observe(
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
        self._risk_state, risk = online.assess(self._risk_state, observation, self._risk_config)
        if not decide:
            return Verdict(
                observation=observation, risk=risk, decision=None, commands=(), replaced=(), remarkable=False
            )
        decision = policy.decide(now, self._policy_state, observation, risk, self._config.policy, self._kss_config)
        self._policy_state = decision.state
        commands = tuple(self._command(action, max(step, sample.step)) for action in decision.commands)
        remarkable = bool(commands) or decision.phase != self._phase
        self._phase = decision.phase
        return Verdict(
            observation=observation,
            risk=risk,
            decision=decision,
            commands=commands,
            replaced=self._expect(now, commands) if self.sends else (),
            remarkable=remarkable,
        )

    def acknowledge(self, now: float, ack: Ack) -> CommandKind | None:
        """Take rank 0's answer; returns the kind of the command it answers, None when that is none of ours."""
        waiting = self._waiting.pop(ack.command_id, None)
        if waiting is None:
            return self._settled.get(ack.command_id)
        self._settle(waiting.command)
        self._inform(now, waiting.command, ack)
        return waiting.command.kind

    def due(self, now: float) -> list[Command]:
        """The commands to offer again now; from then on they are due in another RESEND_SECONDS."""
        due = [waiting for waiting in self._waiting.values() if now - waiting.sent_at >= RESEND_SECONDS]
        for waiting in due:
            waiting.sent_at = now
        return [waiting.command for waiting in due]

    def give_up(self, now: float, step: int, applied: Applied) -> list[Command]:
        """The commands whose expiry the run has passed without an answer; `applied` is what it says is in force."""
        # The answer may be on its way behind the heartbeat that told the step.
        expired = [
            waiting.command
            for waiting in self._waiting.values()
            if step > waiting.command.expires_step and now - waiting.sent_at >= RESEND_SECONDS
        ]
        for command in expired:
            del self._waiting[command.id]
            self._settle(command)
            ack = Ack(
                run=self._run,
                incarnation=self._incarnation,
                command_id=command.id,
                outcome="expired",
                step=step,
                detail="no answer",
                applied=applied,
            )
            self._inform(now, command, ack)
        return expired

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
    def waiting(self) -> bool:
        """Whether some command waits for its answer."""
        return bool(self._waiting)

    def memory(self) -> bytes:
        """What a guard of this incarnation needs to go on where this one stands."""
        return msgspec.json.encode(Memory(risk=self._risk_state, policy=self._policy_state, initial=self.initial))

    def abandon(self) -> list[Command]:
        """Forget what waits for an answer, as when the run is over; returns it."""
        commands = [waiting.command for waiting in self._waiting.values()]
        self._waiting.clear()
        return commands

    def _command(self, action: policy.Action, step: int) -> Command:
        return Command(
            run=self._run,
            incarnation=self._incarnation,
            id=secrets.token_hex(8),
            kind=action.kind,
            reason=action.reason[:512],
            expires_step=step + action.expires_in_steps,
            lr_scale=action.lr_scale,
            kss=action.kss,
            ramp_steps=action.ramp_steps,
            cadence_steps=action.cadence_steps,
            cadence_until_step=action.cadence_until_step,
        )

    def _expect(self, now: float, commands: tuple[Command, ...]) -> tuple[Command, ...]:
        kinds = {command.kind for command in commands}
        replaced = tuple(waiting.command for waiting in self._waiting.values() if waiting.command.kind in kinds)
        for command in replaced:
            del self._waiting[command.id]
            self._settle(command)
        for command in commands:
            self._waiting[command.id] = _Waiting(command, now)
        return replaced

    def _inform(self, now: float, command: Command, ack: Ack) -> None:
        # What is in force says nothing about a command that is not to change it.
        if command.kind == "set_kss" and ack.outcome == "refused" and ack.shielded:
            self._policy_state = policy.kss_shielded(self._policy_state, ack)
        elif command.kind in TRAINING_KINDS:
            self._policy_state = policy.acknowledge(now, self._policy_state, ack)

    def _settle(self, command: Command) -> None:
        self._settled[command.id] = command.kind
        while len(self._settled) > MAX_SETTLED:
            self._settled.popitem(last=False)


def merged(section: S, hints: Mapping[str, Any], source: str) -> S:
    """`section` with an adapter's `hints` in the fields that the user left at their defaults.

    Hints that name no field or are out of bounds are left out, with a log line.
    """
    defaults = type(section)()
    for name, value in hints.items():
        if name not in section.__struct_fields__:
            logger.warning("hello: %s names %r, which this version does not know", source, name)
        elif getattr(section, name) == getattr(defaults, name):
            try:
                values = {**msgspec.structs.asdict(section), name: value}
                section = msgspec.convert(values, type(section))
            except msgspec.ValidationError as error:
                logger.warning("hello: %s has %s = %r: %s", source, name, value, error)
    return section


def _recall(memory: bytes | None) -> Memory:
    if memory is not None:
        try:
            return msgspec.json.decode(memory, type=Memory)
        except msgspec.DecodeError as error:
            logger.warning("guard: what an earlier monitor remembered cannot be used: %s", error)
    return Memory(risk=online.RiskState(), policy=policy.PolicyState(), initial=None)


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
