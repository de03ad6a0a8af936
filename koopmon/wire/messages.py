"""The typed, frozen messages of the protocol. PROTOCOL.md is normative; `codec` converts them to frames.

The types include the bounds: msgspec rejects values outside them while it decodes.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

PROTOCOL_VERSION = 10
MAX_STEP: Final = (1 << 53) - 1
"""The largest optimizer step: a double represents every integer up to this value."""
MAX_MODULUS: Final = 1000.0
"""Upper bound on the modulus at which KSS begins to act."""
MAX_RAMP_STEPS: Final = 100_000
MAX_AGE_STEPS: Final = 100_000
"""Largest age that a rewind may ask of a copy."""
MAX_CADENCE_STEPS: Final = 100_000
MAX_MIN_STRIDE: Final = 1024
"""Largest stride of snapshots that a busy monitor may ask for."""
MAX_HEARTBEAT_SECONDS: Final = 3600.0
MAX_LAYERS: Final = 4096
"""Maximum number of transitions of one model."""
MAX_HELD_LAYERS: Final = 32
"""Maximum number of layers under ceilings."""
MAX_CEILING_FACTOR: Final = 2.0
MAX_TEXT: Final = 512
"""Maximum number of characters of a reason or a detail."""
MAX_OBSERVABLES = 8
"""Maximum number of observable names in one shard."""
MAX_LOGGED = 32
"""Maximum number of names that a training logs besides the loss and the gradient's norm."""
MAX_OBSERVATIONS = 4096
"""Maximum number of observable values in one shard: names times transitions."""

RunName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/+-]*\Z")]
Identifier = Annotated[str, Meta(pattern=r"^[0-9a-f]{8,32}\Z")]
Rank = Annotated[int, Meta(ge=0, lt=1 << 20)]
Step = Annotated[int, Meta(ge=0, lt=MAX_STEP + 1)]
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
NumSenders = Annotated[int, Meta(ge=1, le=1024)]
LrScale = Annotated[float, Meta(gt=0.0, le=1.0)]
MAX_RATE: Final = 1e6
Rate = Annotated[float, Meta(gt=0.0, le=MAX_RATE)]
MAX_SHARES: Final = 32
"""Maximum number of parameter groups with a bound on their rate."""
LayerIndex = Annotated[int, Meta(ge=0, lt=MAX_LAYERS)]
CeilingFactor = Annotated[float, Meta(gt=0.0, le=MAX_CEILING_FACTOR)]
GroupIndex = Annotated[int, Meta(ge=0, lt=1 << 16)]
RampSteps = Annotated[int, Meta(ge=0, le=MAX_RAMP_STEPS)]
CadenceSteps = Annotated[int, Meta(ge=1, le=MAX_CADENCE_STEPS)]
MinStride = Annotated[int, Meta(ge=1, le=MAX_MIN_STRIDE)]
KssAlpha = Annotated[float, Meta(ge=0.0, le=1000.0)]
KssTemperature = Annotated[float, Meta(gt=0.0, le=1000.0)]
KssModulus = Annotated[float, Meta(gt=0.0, le=MAX_MODULUS)]
KssBeta = Annotated[float, Meta(ge=0.0, le=1000.0)]
KssSvdRank = Annotated[int, Meta(ge=1, le=512)]
KssSamples = Annotated[int, Meta(ge=4, le=65536)]
KssEvery = Annotated[int, Meta(ge=1, le=10000)]
LayerFraction = Annotated[float, Meta(gt=0.0, le=1.0)]
ShortText = Annotated[str, Meta(max_length=MAX_TEXT)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Word = Annotated[str, Meta(max_length=64)]
ObservableName = Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,40}\Z")]
ScalarName = ObservableName
"""A name that `agent.log` accepts. It is the value of a label in Prometheus."""
Observations = Annotated[list[float | None], Meta(max_length=MAX_OBSERVATIONS)]
DType = Literal["bfloat16", "float16", "float32"]
CommandKind = Literal["set_lr_scale", "set_kss", "set_ceilings", "set_cadence", "rewind", "stop", "checkpoint"]
AckOutcome = Literal["applied", "expired", "refused", "failed", "duplicate"]
ProbedState = Literal["running", "ended", "vanished"]
DropReason = Literal["monitor_away", "queue_full", "no_buffer", "budget", "not_finite", "incomplete"]
DROP_REASONS: Final[tuple[DropReason, ...]] = get_args(DropReason)


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Parent of every message. `run` names the job, `incarnation` one launch of it, `process_rank` the sender."""

    run: RunName
    incarnation: Identifier


class KssSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Koopman Spectral Shaping on the wire (docs/method.md, "Koopman Spectral Shaping"). `alpha` 0 means off."""

    alpha: KssAlpha = 0.0
    temperature: KssTemperature = 20.0
    tau_u: KssModulus = 1.05
    tau_l: Annotated[float, Meta(ge=0.0, le=MAX_MODULUS)] = 0.90
    gamma: Fraction = 0.4
    beta: KssBeta = 0.0
    svd_rank: KssSvdRank = 32
    num_samples: KssSamples = 128
    every: KssEvery = 1
    layer_fraction: LayerFraction = 1.0


class TrainingStep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scalars of the training at one optimizer step.

    Messages, snapshots, observations, rows and views hold one. Agent, assembler, history, metrics and JSON walk the
    fields. A field whose default is None is measured: None means unknown, and NaN and infinities are allowed.
    """

    step: Step
    """Number of optimizer steps done."""
    learning_rate: float | None = None
    """Largest learning rate over parameter groups, as the user's schedule set it, before koopmon's LR scale, and
    within the bounds on single groups."""
    loss: float | None = None
    """The loss of the step: the sum of the scalars that `backward()` was called on, or what the user's loop logs."""
    grad_norm: float | None = None
    """Norm of the gradients of the step's update, or what the user's loop logs."""
    lr_scale: LrScale = 1.0
    """koopmon's factor on the learning rate at this step: the rate in force is `learning_rate` x `lr_scale`. A cap on
    the peak rate is part of it."""
    kss_alpha: Annotated[float, Meta(ge=0.0)] = 0.0
    """Weight of KSS as published."""
    kss_held_layers: Annotated[float, Meta(ge=0.0, le=MAX_HELD_LAYERS)] = 0.0
    """Number of layers whose writing weights are under ceilings, which is KSS by projection."""
    update_rms: float | None = None
    """RMS over parameters of the gradient's norm over that of the root of its second moment, before the update."""
    log_partition: float | None = None
    """Mean log(sum(exp(logits))) of some tokens of the model's output, in nats."""


MEASURED: Final = tuple(field.name for field in msgspec.structs.fields(TrainingStep) if field.default is None)
"""Names of the measured fields of `TrainingStep`."""


class AtStep:
    """Base of the types that hold a `training: TrainingStep`."""

    __slots__ = ()
    training: TrainingStep

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self.training.step


class LoggedScalar(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The latest value that the user's loop logged under one name."""

    step: Step
    """Number of optimizer steps done when it was logged."""
    value: float
    """NaN and infinities are allowed."""


class Applied(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings in force in the training processes."""

    lr_scale: LrScale = 1.0
    """The commanded factor on the learning rate, without the effect of `max_rate`."""
    max_rate: Rate | None = None
    """The cap on the peak of the learning rate; None for no cap."""
    peak_rate: Rate | None = None
    """The largest scheduled rate under the cap so far: the scale is at most `max_rate` / `peak_rate`. None before the
    first update."""
    warmup_done: RampSteps = 0
    """Steps that are done of the warm-up under the cap, which takes `warmup_steps`. Both are 0 after it."""
    warmup_steps: RampSteps = 0
    rate_shares: Annotated[dict[GroupIndex, Rate], Meta(max_length=MAX_SHARES)] = {}
    """The bound on the rate of a parameter group, by the group's index over all optimizers: a multiple of the largest
    rate of the groups without one. A bound belongs to a cap."""
    kss: KssSettings = KssSettings()
    held_layers: Annotated[tuple[LayerIndex, ...], Meta(max_length=MAX_HELD_LAYERS)] = ()
    """Layers whose writing weights are under ceilings. A restarted launch begins without ceilings: its weights may be
    others."""

    def at_step(self, step: int) -> TrainingStep:
        """Return the scalars that are known at `step` without a measurement."""
        held = float(len(self.held_layers))
        return TrainingStep(step=step, lr_scale=self.lr_scale, kss_alpha=self.kss.alpha, kss_held_layers=held)


class Judgement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The monitor's assessment of the last snapshot that it analysed. Absent values are unknown."""

    step: Step
    risk: Fraction
    forecast: Fraction | None = None
    near_unit_mass: Fraction | None = None
    """Mean over the layers."""
    divergence_probability: Fraction | None = None
    decision: ShortText = ""
    """Reason for the policy's last action, or for one that it would have taken in another mode."""
    decision_step: Step | None = None
    """Optimizer step of the snapshot of this action."""


class Hello(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="hello"):
    """First message of every sending rank, repeated after each reconnection."""

    process_rank: Rank
    world_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    num_senders: NumSenders
    """Number of ranks that send shards of each snapshot."""
    adapter: Word
    num_layers: Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
    """Number of transitions of the whole model, when known; 0 before the first verified forward."""
    width: Annotated[int, Meta(ge=0, le=1 << 20)]
    acts: bool
    """False in watch-only mode, in which the agent refuses every command."""
    step: Step
    applied: Applied
    koopmon_version: Word
    torch_version: Word
    hostname: Annotated[str, Meta(max_length=255)] = ""
    pid: Count = 0
    thresholds: Annotated[dict[Word, float], Meta(max_length=32)] = msgspec.field(default_factory=dict)
    """The adapter's default `[risk]` overrides; the monitor's own configuration takes precedence."""
    rate_sized_steps: bool = False
    """True for Adam and similar optimizers: each step moves each weight by about the learning rate, whatever the
    gradient."""
    update_exponent: Annotated[float, Meta(ge=-1000.0, le=1000.0)] | None = None
    """Exponent k of ||update|| ~ ||state||^k over the stack, from this rank's first forward pass. Unknown before that
    pass and for blocks that do not change the state."""
    kss: KssSettings | None = None
    """The adapter's default KSS settings; the monitor's own configuration takes precedence."""
    rewinds: bool = False
    """True if this agent holds copies of the training's state and can return to them."""


class Welcome(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="welcome"):
    """The monitor's answer to `Hello`."""

    data_endpoint: Annotated[str, Meta(min_length=1, max_length=256)]
    heartbeat_seconds: Annotated[float, Meta(gt=0.0, le=MAX_HEARTBEAT_SECONDS)] = 1.0
    restore: Applied | None = None
    """Settings that an earlier incarnation of this run had applied; a new incarnation resumes with them."""


class Refused(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="refused"):
    """The monitor does not serve this peer; `reason` contains the remedy."""

    reason: ShortText


class Heartbeat(Message, AtStep, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="heartbeat"):
    """Periodic state of one sending rank. Absent scalars are unknown."""

    process_rank: Rank
    training: TrainingStep
    applied: Applied
    sent: Count = 0
    dropped: dict[DropReason, Count] = msgspec.field(default_factory=dict)
    taps_missing: Count = 0
    overhead_ratio: Annotated[float, Meta(ge=0.0)] = 0.0
    """Share of step time spent in koopmon's hooks since the last heartbeat."""
    step_seconds: Annotated[float, Meta(ge=0.0)] | None = None
    logged: Annotated[dict[ScalarName, LoggedScalar], Meta(max_length=MAX_LOGGED)] = msgspec.field(default_factory=dict)
    """Values of the user's loop by name, such as kl, entropy or reward."""
    control_ready: bool = True
    """False while the control group is down and the ranks cannot apply commands."""


class HeartbeatReply(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="heartbeat_reply"):
    """Liveness signal of the monitor. After several missing replies the agent treats the monitor as lost."""

    judgement: Judgement | None = None
    """The latest assessment, for display in the training process only."""
    min_stride: MinStride = 1
    """Least number of optimizer steps between snapshots that the monitor can judge. It is in force from the step
    `min_stride_from` on, so that all ranks change at one step. 1 leaves the agent's own cadence."""
    min_stride_from: Step = 0


class Rewind(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The copy of weights and optimizer state to return to: the newest one that meets both conditions."""

    max_rate: Rate
    """The learning rate in force was at most this when the copy was taken."""
    min_age_steps: Annotated[int, Meta(ge=0, le=MAX_AGE_STEPS)]
    """The copy is at least this many optimizer steps old, or from before the first step."""
    unless_finite: bool = False
    """True for a training that seems to be NaN: the agent refuses the rewind while its weights are finite."""


class Command(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="command"):
    """One change of the training run, which all ranks apply at the same optimizer step."""

    id: Identifier
    kind: CommandKind
    reason: ShortText
    expires_step: Step
    """Last optimizer step at which the ranks may apply the command."""
    lr_scale: LrScale | None = None
    """`set_lr_scale`: the factor on the learning rate of every parameter group."""
    max_rate: Rate | None = None
    """`set_lr_scale`: cap on the peak of the learning rate. While it is in force, the scale is at most `max_rate` / the
    largest scheduled rate since the cap was set. It keeps the shape of the schedule. None leaves a cap as it is."""
    warmup_steps: RampSteps = 0
    """`set_lr_scale` with `max_rate`: steps over which the capped rate rises linearly to its value."""
    kss: KssSettings | None = None
    """`set_kss`: the new settings."""
    ceilings: Annotated[dict[LayerIndex, CeilingFactor], Meta(max_length=MAX_HELD_LAYERS)] | None = None
    """`set_ceilings`: the layers whose writing weights are held from now on, each with its factor. The ceiling of a
    weight is its norm when the command comes in force, times the factor. Other layers are released."""
    corrects: bool = False
    """`set_ceilings`: True for a correction of ceilings in force, for display."""
    ramp_steps: RampSteps = 0
    """Number of steps over which the value in force moves to the new one: geometrically for the rate, linearly for
    alpha."""
    cadence_steps: CadenceSteps | None = None
    """`set_cadence`: number of optimizer steps between snapshots."""
    cadence_until_step: Step | None = None
    """`set_cadence`: last step of this cadence; afterwards the agent returns to its own."""
    rewind: Rewind | None = None
    """`rewind`: the copy to return to."""


class Ack(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ack"):
    """Rank 0's answer to a `Command`, after all ranks applied it or none did."""

    command_id: Identifier
    outcome: AckOutcome
    step: Step
    detail: ShortText = ""
    permanent: bool = False
    """True when the action was refused for the whole incarnation, as KSS that would reach modules which the model's
    family shields."""
    applied: Applied


class Goodbye(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="goodbye"):
    """The sender disconnects on purpose."""

    process_rank: Rank
    step: Step
    reason: ShortText = ""


class Probe(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="probe"):
    """A request for the monitor's identity and its knowledge of `run`. It changes no state in the monitor."""

    koopmon_version: Word = ""


class ProbeReply(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="probe_reply"):
    """The monitor's answer to a `Probe`."""

    koopmon_version: Word
    torch_version: Word
    time: Annotated[float, Meta(ge=0.0)]
    """Unix seconds, by the monitor's clock."""
    data_endpoint: Annotated[str, Meta(min_length=1, max_length=256)]
    run_state: ProbedState | None = None
    step: Step | None = None
    """Latest known optimizer step of the run."""
    refused: ShortText = ""
    """Reason why the monitor would refuse this peer's hello for the run, or refused the last one. Empty otherwise."""


class Shard(Message, AtStep, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="shard"):
    """One rank's part of a snapshot: the header of `num_points` raw tensor frames.

    Each frame has the shape (num_samples, width), row-major. Frame p holds the residual state at point `first_point +
    p`; the rows are the same tokens at every point. If the frames are `paired`, frames 2l and 2l+1 hold the input and
    the output of block l.
    """

    process_rank: Rank
    num_senders: NumSenders
    training: TrainingStep
    """At the forward pass that was tapped."""
    first_point: Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
    num_points: Annotated[int, Meta(ge=1, le=MAX_LAYERS + 1)]
    num_samples: Annotated[int, Meta(ge=1, le=1 << 20)]
    width: Annotated[int, Meta(ge=1, le=1 << 20)]
    dtype: DType
    last_stage: bool = True
    """False on every pipeline stage but the last."""
    masked: bool = False
    """True when a mask that the model received excluded padding tokens."""
    paired: bool = False
    """True if the model mixes between its blocks: a transition is from a block's input to its output."""
    observables: Annotated[dict[ObservableName, Observations], Meta(max_length=MAX_OBSERVABLES)] = msgspec.field(
        default_factory=dict
    )
    """Observables of the model's family by name: one value for each transition."""

    @property
    def num_layers(self) -> int:
        """Transitions among the frames."""
        return self.num_points // 2 if self.paired else self.num_points - 1

    @property
    def first_layer(self) -> int:
        """Depth index of the first transition."""
        return self.first_point // 2 if self.paired else self.first_point


AgentMessage = Hello | Heartbeat | Ack | Goodbye | Probe
MonitorMessage = Welcome | Refused | HeartbeatReply | Command | ProbeReply
AnyMessage = AgentMessage | MonitorMessage | Shard
