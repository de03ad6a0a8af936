"""Configuration: frozen, validated, from TOML and the environment. Every field states its unit and what is allowed.

One file serves both sides: the agent reads `[model]`, `[sampling]`, `[cadence]`, `[limits]`, `[control]`; the monitor
reads `[monitor]`, `[http]`, `[grafana]`, `[store]`, `[risk]`, `[policy]` and `[kss]`, but for `through_shielded`, which
is the agent's; both read `[security]`. A file that names an unknown table or key, or a value outside its bounds, is
refused whole, and so are values that contradict each other (`RULES`).
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from koopmon.errors import ConfigError, one_line
from koopmon.wire.messages import (
    MAX_CADENCE_STEPS,
    MAX_HEARTBEAT_SECONDS,
    MAX_LAYERS,
    MAX_RAMP_STEPS,
    Hello,
    KssAlpha,
    KssBeta,
    KssEvery,
    KssModulus,
    KssSamples,
    KssSvdRank,
    KssTemperature,
    LayerFraction,
    NumSenders,
)

logger = logging.getLogger(__name__)

# Every number has bounds on both sides: infinity passes a bound on one side alone. Where a value ends up in a message,
# its bounds are those of the protocol.
MAX_STEPS: Final = 1_000_000
MAX_SECONDS: Final = 604_800.0
"""A week."""
MAX_FILE_BYTES: Final = 1 << 20
"""Of the file; the defaults take less than 10 kB."""
Steps = Annotated[int, Meta(ge=1, le=MAX_STEPS)]
RampSteps = Annotated[int, Meta(ge=1, le=MAX_RAMP_STEPS)]
Seconds = Annotated[float, Meta(ge=0.0, le=MAX_SECONDS)]
Ratio = Annotated[float, Meta(ge=0.0, le=1.0)]
Scale = Annotated[float, Meta(ge=1e-6, le=1e6)]
"""Divisor of a measured value."""
PolicyName = Literal["lr", "kss", "kss+lr", "observe"]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parent of every table."""


class ModelConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Location of the residual stream, for models in which discovery finds another one."""

    adapter: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    """Name of the architecture adapter, as `koopmon adapters` lists them; absent: the one that fits best."""
    stack: Annotated[str, Meta(min_length=1)] | None = None
    """Path in the model of the list of blocks to tap; absent: the chain that a forward pass shows."""


class SamplingConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which tokens a snapshot holds."""

    num_samples: Annotated[int, Meta(ge=16, le=65536)] = 512
    """N of one snapshot, shared evenly among the sending ranks."""
    max_senders: NumSenders = 8
    """Data-parallel ranks that send."""
    seed: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    """Seed of the token choice, which is a pure function of (seed, step, data-parallel rank, mask)."""


class CadenceConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cadence of snapshots, in optimizer steps. The agent measures its own time and stays within a budget."""

    warmup_steps: Steps = 200
    """Steps from the start during which the dense cadence holds."""
    dense_every: Steps = 1
    """Steps between snapshots in warm-up, and the least that the monitor may ask for."""
    calm_every: Steps = 10
    """Steps between snapshots when nothing is going on."""
    budget_ratio: Annotated[float, Meta(gt=0.0, le=0.5)] = 0.005
    """Long-run share of step time that koopmon may spend in the training thread."""
    initial_credit_seconds: Seconds = 5.0
    """Credit at the start, for the dense snapshots of the warm-up."""
    max_bytes_per_second: Annotated[float, Meta(ge=1.0, le=1e15)] = 50e6
    """Cap on what one rank sends."""


class LimitsConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Caps that the agent holds whatever the monitor says."""

    act: Literal["auto", "always", "never"] = "auto"
    """auto: act in proven layouts only; always: in untested ones too; never: watch-only."""
    min_lr_scale: Annotated[float, Meta(ge=0.05, le=1.0)] = 0.05
    """The least factor on the learning rate."""
    max_kss_alpha: KssAlpha = 30.0
    """The largest KSS weight."""
    max_kss_svd_rank: KssSvdRank = 64
    """The largest rank of its DMD, which it costs time at every step by..."""
    max_kss_samples: KssSamples = 1024
    """...and the most tokens."""
    max_actions_per_hour: Annotated[int, Meta(ge=0, le=100_000)] = 240
    """Commands that change training, per hour."""


class ControlConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The control channel and the group that applies commands on all ranks at one step."""

    timeout_seconds: Annotated[float, Meta(gt=0.0, le=600.0)] = 3.0
    """How long a rank may wait for the others before control is off."""
    monitor_lost_seconds: Annotated[float, Meta(gt=0.0, le=MAX_SECONDS)] = 10.0
    """Silence after which the monitor counts as lost, and the connection to it is made anew; at least 3 heartbeats."""
    on_monitor_lost: Literal["hold", "ramp"] = "hold"
    """hold: what is applied stays; ramp: go back to the user's own settings slowly."""
    ramp_back_steps: Steps = 200
    """Steps of that ramp."""


class SecurityConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By what agent and monitor know each other; docs/security.md. Secrets are never in here, only where they are."""

    keys: str = ""
    """Directory of the key files; empty: KOOPMON_KEYS, else koopmon/keys under XDG_CONFIG_HOME."""
    agent: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")] = "agent"
    """Name of the pair by which an agent makes itself known."""
    loopback: Literal["plain", "curve"] = "plain"
    """curve: keys on loopback tcp as well, which every user of the host reaches. On both sides, or on neither."""
    insecure_plaintext_tcp: bool = False
    """No keys on any tcp endpoint: whoever reaches it reads and commands the training. On both sides, or on neither."""


class HttpConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may read the monitor's pages, all but /healthz and /readyz. Secrets lie in files of mode 0600."""

    tls_certificate: str = ""
    """PEM file of the certificate and its chain; with `tls_key` the pages are https."""
    tls_key: str = ""
    """PEM file of its key."""
    token_file: str = ""
    """File with the bearer token that opens the pages; empty: KOOPMON_HTTP_TOKEN, else none does."""
    user: Annotated[str, Meta(max_length=128, pattern=r"^[^:\x00-\x1f]*\Z")] = ""
    """Name for basic authentication."""
    password_file: str = ""
    """File with that user's password; empty: KOOPMON_HTTP_PASSWORD."""
    max_streams: Annotated[int, Meta(ge=0, le=1000)] = 32
    """Open pages that hear of changes at once, on at most half of `[monitor] max_http_connections`; others ask now and
    then."""
    insecure_plaintext: bool = False
    """Serve other hosts without TLS and without a login: whoever reaches the port reads the pages."""


class GrafanaConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Grafana that is told of decisions, and that `koopmon grafana push` fills; docs/grafana-push.md."""

    url: Annotated[str, Meta(max_length=2048)] = ""
    """Its address, with the sub-path if it has one; empty: the monitor tells no Grafana."""
    token_file: str = ""
    """File, of mode 0600, with a service account's token; empty: KOOPMON_GRAFANA_TOKEN."""
    timeout_seconds: Annotated[float, Meta(gt=0.0, le=300.0)] = 5.0
    """How long one answer may take."""
    queue_length: Annotated[int, Meta(ge=1, le=100_000)] = 256
    """Annotations that may wait for a slow Grafana; then the oldest gives way."""


class MonitorConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The daemon's bounds."""

    max_runs: Annotated[int, Meta(ge=1, le=10_000)] = 64
    """Jobs watched at once; one more is refused."""
    max_peers: Annotated[int, Meta(ge=1, le=1 << 20)] = 16_384
    """Ranks of one job that may speak; one more is refused."""
    max_layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)] = MAX_LAYERS
    """Transitions of one model: a message with more frames than that needs is refused."""
    max_header_bytes: Annotated[int, Meta(ge=1 << 12, le=1 << 24)] = 1 << 16
    """Of any message but a snapshot's frames; the transport cuts whoever sends one that is longer."""
    max_message_bytes: Annotated[int, Meta(ge=1 << 16, le=1 << 40)] = 1 << 30
    """Of a snapshot's shard, all frames."""
    max_http_connections: Annotated[int, Meta(ge=4, le=10_000)] = 128
    """To the pages; with one more the oldest gives way."""
    max_pending_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 44)] = 2 << 30
    """Memory for shards that wait for their siblings."""
    assemble_timeout_seconds: Annotated[float, Meta(ge=0.01, le=3600.0)] = 5.0
    """How long a snapshot waits for missing shards; then what is there is profiled, or dropped when too little."""
    queue_length: Annotated[int, Meta(ge=1, le=10_000)] = 16
    """Snapshots that may wait for the engine; the oldest of the run with most gives way."""
    heartbeat_seconds: Annotated[float, Meta(ge=0.02, le=MAX_HEARTBEAT_SECONDS)] = 1.0
    """Time between two heartbeats of a rank; no agent sends them more often than every 0.02 s."""
    vanished_after_seconds: Annotated[float, Meta(gt=0.0, le=MAX_SECONDS)] = 60.0
    """Silence after which a run counts as vanished."""
    ended_series_seconds: Seconds = 300.0
    """How long a run's series stay after goodbye."""
    vanished_series_seconds: Seconds = 86_400.0
    """How long the timestamp and state of a vanished run stay."""
    svd_rank: Annotated[int, Meta(ge=2, le=512)] = 32
    """Rank of the online DMD."""
    calibrator: str = ""
    """File of a calibrator, as `koopmon calibrate` writes it; empty: no probability of divergence is exported."""


class StoreConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Contents and size of the history file. Decisions, commands and acks of a run that goes on are never deleted."""

    max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 47)] = 4 << 30
    """Size above which profiles, observations and heartbeats are deleted, the oldest first, those of runs that are
    over before those of runs that go on. Decisions stay."""
    max_age_days: Annotated[float, Meta(gt=0.0, le=36_500.0)] = 365.0
    """Age at which everything of a launch that is over is deleted, and the profiles and such of one that goes on."""
    retry_seconds: Annotated[float, Meta(gt=0.0, le=3600.0)] = 2.0
    """While a full or failing disk pauses recording: time between tries."""


class RiskConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The online detector; see koopmon.risk.online_detector. Scales are changes of log(update ratio) per optimizer
    step."""

    update_ratio_floor: Annotated[float, Meta(gt=0.0, le=10.0)] = 0.5
    """Added to the update ratio before the logarithm: growth below it counts little."""
    smoothing: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.4
    """Weight of the newest snapshot in each layer's running mean of its speed."""
    min_gap_steps: Steps = 2
    """Snapshots closer than this count as this far apart: sampling noise does not shrink with the gap."""
    max_gap_steps: Steps = 4
    """Snapshots further apart than this count as this far apart: an oscillation does not grow with the gap."""
    peak_scale: Scale = 0.41
    """Speed of the fastest layer between two snapshots at which the risk is one half."""
    speed_scale: Scale = 0.25
    """Likewise for the largest of the layers' running means."""
    restlessness_smoothing: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.1
    """Weight of the newest snapshot in the slow mean of the peak."""
    restlessness_scale: Scale = 0.36
    """That mean, in units of `peak_scale`, at which the risk is one half."""
    prior_slope: Annotated[float, Meta(ge=0.0, le=1000.0)] = 10.0
    """Log-odds of failure that the prior gains for each factor of ten on the learning rate in force. Only under
    optimizers whose steps are as long as the rate says (Adam's kin)."""
    critical_rate: Annotated[float, Meta(ge=1e-9, le=1e9)] = 1.0
    """Learning rate x width x transitions at which the prior is even for layers without normalisation. Of runs of 200
    steps half die at 1.8; longer ones, and those that learn more, die from 1 on."""
    normalized_critical_rate: Annotated[float, Meta(ge=1e-9, le=1e9)] = 0.5
    """Learning rate x width at which it is even for normalised layers (koopmon.risk.normalization). Runs with gradient
    clipping ended best at 0.2 to 0.4 and were ruined from 0.6 on (`benchmarks.proving_ground`)."""
    normalized_scale: Scale = 0.6
    """Unsteadiness of normalised layers that counts as 1. Theirs is taken after a median over three snapshots, which
    removes what one odd batch does to one snapshot. Healthy runs reached 0.54 at a fifth of the critical rate, ruined
    ones 0.57 (width 128) to 3.2 at and above it."""
    normalized_weight: Annotated[float, Meta(ge=0.0, le=20.0)] = 1.0
    """Largest log-odds, of either sign, by which the prior counts in the risk of normalised layers: large models train
    well at 0.3 to 1.6, so the evidence has to decide."""
    min_prior: Annotated[float, Meta(ge=-20.0, le=0.0)] = -6.0
    """Least log-odds of the prior: at -6 it takes 4.5 times the unsteadiness."""
    max_prior: Annotated[float, Meta(ge=0.0, le=20.0)] = 3.0
    """Largest log-odds of the prior: at 3 it takes half of the unsteadiness."""
    reliability_weight: Ratio = 0.0
    """How far unreliable modes weaken the evidence: 0 not at all, 1 in proportion to the share of reliable modes."""


class PolicyConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to act and how; see koopmon.policy."""

    name: PolicyName = "lr"
    """Back-off alone: beside it KSS saved no more runs, and those learned less (docs/evidence.md)."""
    dry_run: bool = False
    """Decide and record, but send nothing."""
    act_risk: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.4
    """Risk at or above which a snapshot counts as high."""
    severe_risk: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.8
    """Risk that acts at once, without confirmation, and by `severe_factor`."""
    release_risk: Ratio = 0.2
    """Risk below which a snapshot counts as calm."""
    confirm_snapshots: Annotated[int, Meta(ge=1, le=100)] = 1
    """High snapshots in a row before an action."""
    backoff_factor: Annotated[float, Meta(ge=0.05, lt=1.0)] = 0.5
    """Factor on the learning-rate scale at a back-off."""
    severe_factor: Annotated[float, Meta(ge=0.05, lt=1.0)] = 0.25
    """Factor at a severe risk."""
    landing_rate: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.5
    """Where the scheduled rate is known to be above the critical one (`[risk] critical_rate`), a back-off goes at least
    down to this times the critical one, and else by the gentle factors, which feel for a rate that is bearable."""
    normalized_landing_rate: Annotated[float, Meta(gt=0.0, le=100.0)] = 0.5
    """Likewise for normalised layers (`[risk] normalized_critical_rate`)."""
    gentle_factor: Annotated[float, Meta(ge=0.05, lt=1.0)] = 0.85
    """The back-off there."""
    gentle_severe_factor: Annotated[float, Meta(ge=0.05, lt=1.0)] = 0.6
    """Likewise at a severe risk."""
    min_lr_scale: Annotated[float, Meta(ge=0.05, le=1.0)] = 0.125
    """The scale below which the policy never goes."""
    cooldown_steps: Steps = 6
    """Steps after an action before the next of its kind: the time in which it must show an effect."""
    hold_steps: Steps = 200
    """Calm steps before the scale rises by one notch; twice as many after the second back-off, and so on."""
    rise_factor: Annotated[float, Meta(gt=1.0, le=4.0)] = 1.25
    """Factor by which the learning-rate scale rises at one return step."""
    ramp_steps: RampSteps = 20
    """Steps over which the scale rises by that factor."""
    kss_ramp_steps: RampSteps = 10
    """Steps over which KSS comes and goes."""
    kss_hold_steps: Steps = 20
    """Steps for which KSS accompanies a back-off, its coming included."""
    harm_ratio: Annotated[float, Meta(gt=1.0, le=1000.0)] = 1.2
    """KSS is barred when the logged loss exceeds this times its value when KSS came on."""
    dense_every: Annotated[int, Meta(ge=1, le=MAX_CADENCE_STEPS)] = 1
    """Cadence, in steps, asked for while the risk is not calm."""
    dense_steps: Steps = 60
    """Steps for which that cadence is asked."""
    max_actions_per_hour: Annotated[int, Meta(ge=0, le=100_000)] = 120
    """Commands that change one run's training, per hour."""
    expires_in_steps: Steps = 50
    """Steps after which an unapplied command is void."""


class KssConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Koopman Spectral Shaping as the policy turns it on (docs/method.md, "Koopman Spectral Shaping")."""

    alpha: KssAlpha = 0.15
    radius_margin: Annotated[float, Meta(ge=1.0, le=1000.0)] = 1.5
    """The unstable penalty starts at this times the run's own calm spectral radius, at most at modulus 1000."""
    min_tau_u: KssModulus = 1.05
    """...and never below this modulus (the paper's tau_u)."""
    temperature: KssTemperature = 20.0
    beta: KssBeta = 0.0
    """Weight of the near-unit target; 0 leaves the unstable penalty alone (docs/method.md)."""
    gamma: Ratio = 0.4
    svd_rank: KssSvdRank = 32
    """Rank of its DMD."""
    num_samples: KssSamples = 128
    every: KssEvery = 1
    layer_fraction: LayerFraction = 1.0
    through_shielded: bool = False
    """Let KSS act where its gradient reaches modules that the model's family shields, such as routers. The agent's."""


class Config(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything."""

    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
    cadence: CadenceConfig = CadenceConfig()
    limits: LimitsConfig = LimitsConfig()
    control: ControlConfig = ControlConfig()
    security: SecurityConfig = SecurityConfig()
    http: HttpConfig = HttpConfig()
    grafana: GrafanaConfig = GrafanaConfig()
    monitor: MonitorConfig = MonitorConfig()
    store: StoreConfig = StoreConfig()
    risk: RiskConfig = RiskConfig()
    policy: PolicyConfig = PolicyConfig()
    kss: KssConfig = KssConfig()

    def __post_init__(self) -> None:
        for rule in RULES:
            rule.check(self)
        if self.security.loopback == "curve" and self.security.insecure_plaintext_tcp:
            raise ConfigError(
                "security.loopback = 'curve', security.insecure_plaintext_tcp = True: expected one of the two:"
                " plaintext takes the keys from loopback as well"
            )


@dataclass(frozen=True, slots=True)
class Rule:
    """`factor` times the value at `low` is at most the value at `high`, and less where `strict`; both are TABLE.KEY.

    `otherwise` is what a configuration that breaks the rule would do.
    """

    low: str
    high: str
    otherwise: str
    factor: float = 1.0
    strict: bool = False

    @property
    def condition(self) -> str:
        """The rule as a comparison of two keys."""
        times = "" if self.factor == 1.0 else f"{self.factor:g} x "
        return f"{times}{self.low} {'<' if self.strict else '<='} {self.high}"

    def check(self, config: Config) -> None:
        """Raise ConfigError, with both keys, their values and what is allowed, unless `config` keeps to the rule."""
        low, high = _number_at(config, self.low), _number_at(config, self.high)
        if self.factor * low > high or (self.strict and self.factor * low == high):
            raise ConfigError(
                f"{self.low} = {low!r}, {self.high} = {high!r}: expected {self.condition}: {self.otherwise}"
            )


RULES: Final[tuple[Rule, ...]] = (
    Rule("cadence.dense_every", "cadence.calm_every", "the warm-up would have fewer snapshots than calm training"),
    Rule(
        "monitor.heartbeat_seconds",
        "monitor.vanished_after_seconds",
        "a run would vanish between two heartbeats",
        factor=3.0,
    ),
    Rule("monitor.max_header_bytes", "monitor.max_message_bytes", "a header of that size would fit into no message"),
    Rule(
        "monitor.max_message_bytes",
        "monitor.max_pending_bytes",
        "one message could take more memory than all may",
    ),
    Rule("risk.min_gap_steps", "risk.max_gap_steps", "the least gap would be longer than the longest"),
    Rule("policy.release_risk", "policy.act_risk", "one snapshot would be high and calm at once", strict=True),
    Rule("policy.act_risk", "policy.severe_risk", "a risk would be severe before it is high"),
    Rule("policy.severe_factor", "policy.backoff_factor", "a severe risk would lower the rate by less"),
    Rule("policy.gentle_severe_factor", "policy.gentle_factor", "a severe risk would lower the rate by less"),
    Rule("policy.min_lr_scale", "policy.backoff_factor", "no back-off could lower the rate by that factor"),
    Rule("policy.min_lr_scale", "policy.gentle_factor", "no back-off could lower the rate by that factor"),
    Rule("policy.dense_every", "policy.dense_steps", "the dense cadence would be over before its first snapshot"),
    Rule("policy.kss_ramp_steps", "policy.kss_hold_steps", "KSS would be turned off before it is fully on"),
    Rule("kss.svd_rank", "kss.num_samples", "a DMD has no more modes than tokens"),
)


def _number_at(config: Config, path: str) -> float:
    table, _, key = path.partition(".")
    number: float = getattr(getattr(config, table), key)
    return number


def _value_at(data: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(data, Mapping) or part not in data:
            return None
        data = data[part]
    return data


def from_mapping(data: Mapping[str, Any], *, source: str = "configuration") -> Config:
    """Validate nested tables. Raises ConfigError naming the field, the value and what is allowed."""
    try:
        return msgspec.convert(dict(data), Config, strict=True)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{source}: {error.__cause__}") from None
        message, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`")
        known, unknown = message.partition("Object contains unknown field ")[::2]
        if not known:
            raise ConfigError(f"{source}: {_unknown(one_line(field, 80), one_line(unknown.strip('`'), 80))}") from None
        if not field:
            raise ConfigError(f"{source}: {message}; allowed tables: {', '.join(Config.__struct_fields__)}") from None
        value, what = _shown(_value_at(data, field)), one_line(_expected(field, message))
        raise ConfigError(f"{source}: {one_line(field, 80)} = {value}: {what}") from None


def checked(config: Config) -> Config:
    """`config` again, made in Python and so not validated yet. Raises ConfigError."""
    return from_mapping(msgspec.to_builtins(config))


def _shown(value: Any) -> str:
    try:
        return one_line(repr(value))
    except ValueError:  # Python prints no integer of thousands of digits
        return "an integer of thousands of digits"


def _expected(field: str, message: str) -> str:
    """msgspec's message, with both bounds of a number added: msgspec names only the one that the value violates."""
    kind, bounds = _bounds(field)
    if not bounds:
        return message[0].lower() + message[1:]
    _, comma, got = message.partition(", got ")
    return f"expected `{kind}` {' and '.join(bounds)}{comma}{got}"


def _bounds(field: str) -> tuple[str, list[str]]:
    """Type and bounds of the number at TABLE.KEY; empty for what is none."""
    found = _types().get(field)
    if not isinstance(found, (msgspec.inspect.IntType, msgspec.inspect.FloatType)):
        return "", []
    signs = {">": found.gt, ">=": found.ge, "<": found.lt, "<=": found.le}
    kind = "int" if isinstance(found, msgspec.inspect.IntType) else "float"
    return kind, [f"{sign} {bound}" for sign, bound in signs.items() if bound is not None]


@functools.cache
def _types() -> dict[str, msgspec.inspect.Type]:
    """The type of each TABLE.KEY."""
    tables: Any = msgspec.inspect.type_info(Config)
    return {f"{table.name}.{field.name}": field.type for table in tables.fields for field in table.type.fields}


def _unknown(table: str, name: str) -> str:
    kind: Any = type(getattr(Config(), table)) if table else Config
    allowed = sorted(kind.__struct_fields__)
    near = difflib.get_close_matches(name, allowed, n=1)
    meant = f", did you mean {near[0]}?" if near else ""
    what, where = ("field", f"{table}.{name}") if table else ("table", name)
    return f"there is no {what} {where}{meant} (allowed: {', '.join(allowed)})"


def load(path: str | os.PathLike[str] | None = None, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read the TOML file at `path`, else the one that KOOPMON_CONFIG names, else the defaults; `overrides` win, table
    by table.

    Raises ConfigError when the file is missing or malformed.
    """
    path = path or os.environ.get("KOOPMON_CONFIG") or None
    data: dict[str, Any] = {}
    source = "configuration"
    if path is not None:
        source = str(path)
        try:
            data = tomllib.loads(read_file(Path(path)).decode("utf-8"))
        except OSError as error:
            raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
        except ValueError as error:  # not TOML, not UTF-8, or an integer of thousands of digits
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{source}: not valid TOML: {one_line(error)}") from None
        except RecursionError:
            raise ConfigError(f"{source}: not valid TOML: nested too deeply") from None
    for table, values in (overrides or {}).items():
        merged = data.get(table, {})
        data[table] = {**merged, **values} if isinstance(values, Mapping) and isinstance(merged, Mapping) else values
    return from_mapping(data, source=source)


def read_file(path: Path) -> bytes:
    """The content of a small file. Raises OSError, and ConfigError for a pipe, a device or a file that is too large."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(f"{path}: not a regular file: nothing is read from a directory, a pipe or a device")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes: at most {MAX_FILE_BYTES} are read")
    return content


S = TypeVar("S", bound=Section)


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


def with_hints(config: Config, hello: Hello) -> tuple[RiskConfig, KssConfig]:
    """Return the tables [risk] and [kss] for a run, with the hints of its adapter (see `merged`)."""
    hints = {} if hello.kss is None else msgspec.structs.asdict(hello.kss)
    known = {name: value for name, value in hints.items() if name in KssConfig.__struct_fields__}
    return merged(config.risk, hello.thresholds, "thresholds"), merged(config.kss, known, "kss")
