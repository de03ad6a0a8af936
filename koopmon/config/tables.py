"""Tables of the configuration: keys with defaults, units and bounds."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from msgspec import Meta, Struct

from koopmon.wire.messages import (
    MAX_CADENCE_STEPS,
    MAX_HEARTBEAT_SECONDS,
    MAX_LAYERS,
    MAX_RAMP_STEPS,
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

# Every number has a lower and an upper bound, because infinity passes a single bound. A value that is sent in a message
# has the bounds of the protocol.
MAX_STEPS: Final = 1_000_000
MAX_SECONDS: Final = 604_800.0
"""A week."""
Steps = Annotated[int, Meta(ge=1, le=MAX_STEPS)]
RampSteps = Annotated[int, Meta(ge=1, le=MAX_RAMP_STEPS)]
Seconds = Annotated[float, Meta(ge=0.0, le=MAX_SECONDS)]
Ratio = Annotated[float, Meta(ge=0.0, le=1.0)]
Scale = Annotated[float, Meta(ge=1e-6, le=1e6)]
"""Divisor of a measured value."""
PolicyName = Literal["auto", "lr", "kss", "kss+lr", "observe"]
NotifyEvent = Literal["alarm", "action", "return", "end", "lost"]
NOTIFY_EVENTS: Final[tuple[NotifyEvent, ...]] = get_args(NotifyEvent)
MailAddress = Annotated[str, Meta(max_length=254, pattern=r"^[A-Za-z0-9.!#$%&'*+/=?^_{|}~-]+@[A-Za-z0-9.-]+\Z")]
"""An address without blanks, commas and line breaks."""


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the tables."""


class ModelConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Location of the residual stream, for models in which discovery selects the wrong stack."""

    adapter: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    """Name of the architecture adapter, from the list of `koopmon adapters`. Absent: the adapter with the best fit."""
    stack: Annotated[str, Meta(min_length=1)] | None = None
    """Path in the model of the list of blocks to tap. Absent: the chain that a forward pass verifies."""


class SamplingConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Choice of the tokens in a snapshot."""

    num_samples: Annotated[int, Meta(ge=16, le=65536)] = 512
    """Number of tokens N in one snapshot. The sending ranks share it evenly."""
    max_senders: NumSenders = 8
    """Largest number of data-parallel ranks that send snapshots."""
    seed: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    """Seed of the token choice. The choice is a pure function of seed, step, data-parallel rank and mask."""


class CadenceConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cadence of snapshots. The agent measures its own time and stays within a budget."""

    warmup_steps: Steps = 200
    """Length of the warm-up, in optimizer steps. The warm-up has the dense cadence."""
    dense_every: Steps = 1
    """Steps between snapshots in the warm-up. It is also the smallest number that the monitor can request."""
    calm_every: Steps = 10
    """Steps between snapshots after the warm-up, while the run is calm."""
    budget_ratio: Annotated[float, Meta(gt=0.0, le=0.5)] = 0.0015
    """Largest long-run share of the step time for snapshots, those of the sending thread included. Hooks and exchanges
    add to it."""
    initial_credit_seconds: Seconds = 5.0
    """Time for snapshots on top of the budget. One half is for the start, the other for what the monitor requests. The
    copies for rewinds have half of it in addition."""
    max_bytes_per_second: Annotated[float, Meta(ge=1.0, le=1e15)] = 50e6
    """Largest rate at which one rank sends snapshots."""


class LimitsConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits that the agent enforces on every command of the monitor."""

    act: Literal["auto", "always", "never"] = "auto"
    """`auto` acts in proven parallel layouts only. `always` acts in untested layouts as well. `never` only watches."""
    min_lr_scale: Annotated[float, Meta(ge=0.05, le=1.0)] = 0.05
    """Lower bound on the factor on the learning rate."""
    max_kss_alpha: KssAlpha = 30.0
    """Upper bound on the weight of KSS."""
    min_ceiling_factor: Annotated[float, Meta(ge=0.05, le=1.0)] = 0.25
    """Lower bound on the factor of one command on the norms of a layer's writing weights, in KSS by projection."""
    max_kss_svd_rank: KssSvdRank = 64
    """Upper bound on the rank of the DMD of KSS. The rank adds time to every step under KSS."""
    max_kss_samples: KssSamples = 1024
    """Upper bound on the tokens of the DMD of KSS. The tokens add time to every step under KSS."""
    max_actions_per_hour: Annotated[int, Meta(ge=0, le=100_000)] = 240
    """Largest number of commands per hour that change the training."""
    max_rewinds: Annotated[int, Meta(ge=0, le=100_000)] = 8
    """Largest number of rewinds in one launch. 0 refuses all and keeps no copies."""
    rewind_max_bytes: Annotated[int, Meta(ge=0, le=1 << 47)] = 4 << 30
    """Memory of this process for the copies to which a rewind returns. Three copies of weights and optimizer state must
    fit. 0 keeps no copies."""


class ControlConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Control channel, and the group of ranks that applies each command at one step."""

    timeout_seconds: Annotated[float, Meta(gt=0.0, le=600.0)] = 3.0
    """Longest time that a rank waits for the others. After it, control is off until all ranks have joined again."""
    monitor_lost_seconds: Annotated[float, Meta(gt=0.0, le=MAX_SECONDS)] = 10.0
    """Time without a reply after which the monitor counts as lost and the agent reconnects. At least 3 heartbeats."""
    on_monitor_lost: Literal["hold", "ramp"] = "hold"
    """Reaction to a lost monitor. `hold` keeps the settings in force. `ramp` returns slowly to the user's settings."""
    ramp_back_steps: Steps = 200
    """Length of the return to the user's settings under `on_monitor_lost = "ramp"`, in steps."""


class SecurityConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Authentication between agent and monitor (docs/security.md). The table holds paths of secrets, never secrets."""

    keys: str = ""
    """Directory of the key files. Empty: the value of KOOPMON_KEYS, else koopmon/keys under XDG_CONFIG_HOME."""
    agent: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")] = "agent"
    """Name of the key pair with which an agent authenticates."""
    loopback: Literal["plain", "curve"] = "plain"
    """`curve` requires keys on loopback tcp as well, which every user of the host can reach. Agent and monitor must
    have the same value."""
    insecure_plaintext_tcp: bool = False
    """Use no keys on any tcp endpoint. Anyone who can reach the endpoint can then read and command the training. Agent
    and monitor must have the same value."""


class HttpConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Access to the monitor's pages except /healthz and /readyz. Secrets are in files of mode 0600."""

    tls_certificate: str = ""
    """PEM file of the certificate and its chain. With `tls_key`, the pages use https."""
    tls_key: str = ""
    """PEM file of the private key of `tls_certificate`."""
    token_file: str = ""
    """File with the bearer token for the pages. Empty: the value of KOOPMON_HTTP_TOKEN, else no token is valid."""
    user: Annotated[str, Meta(max_length=128, pattern=r"^[^:\x00-\x1f]*\Z")] = ""
    """User name for basic authentication."""
    password_file: str = ""
    """File with the password of `user`. Empty: the value of KOOPMON_HTTP_PASSWORD."""
    web_config: str = ""
    """File `web.config.yml` of exporter-toolkit with TLS, client certificates and users. It replaces the keys above."""
    max_streams: Annotated[int, Meta(ge=0, le=1000)] = 32
    """Largest number of open pages that receive changes as a stream of events. Streams use at most half of `[monitor]
    max_http_connections`. Further pages poll."""
    hosts: tuple[Annotated[str, Meta(min_length=1, max_length=253)], ...] = ()
    """Further host names of the pages on loopback, such as that of a reverse proxy. Without a login, a request on
    loopback must name localhost, a loopback address or one of these. Otherwise any web page could read the pages
    through a name of its own that leads to this host (DNS rebinding)."""
    insecure_plaintext: bool = False
    """Serve other hosts without TLS and without a login. Anyone who can reach the port can then read the pages."""


class GrafanaConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Grafana for annotations of decisions and for `koopmon grafana push` (docs/grafana-push.md)."""

    url: Annotated[str, Meta(max_length=2048)] = ""
    """Address of Grafana, with its sub-path if any. Empty: the monitor posts no annotations."""
    token_file: str = ""
    """File of mode 0600 with the token of a service account. Empty: the value of KOOPMON_GRAFANA_TOKEN."""
    timeout_seconds: Annotated[float, Meta(gt=0.0, le=300.0)] = 5.0
    """Time limit of one request."""
    queue_length: Annotated[int, Meta(ge=1, le=100_000)] = 256
    """Largest number of annotations that wait for a slow Grafana. Above it, the oldest is dropped."""


class WebhookConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Webhook that receives notifications by POST. Its address is a secret: no log line contains more than the host."""

    url: str = ""
    """Address, http or https. Empty: the line in `url_file`."""
    url_file: str = ""
    """File of mode 0600 with the address. Empty: the value of KOOPMON_NOTIFY_WEBHOOK."""
    format: Literal["slack", "json"] = "slack"
    """`slack` for Slack, Mattermost and Discord's `/slack` address. `json` for any other receiver."""
    token_file: str = ""
    """File of mode 0600 with a bearer token for the receiver. Empty: no token."""
    events: Annotated[tuple[NotifyEvent, ...], Meta(min_length=1)] = NOTIFY_EVENTS
    """Events that it receives."""


class MailConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mail server and recipients of notifications."""

    server: Annotated[str, Meta(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:-]+\Z")]
    """Host name or address of the mail server."""
    port: Annotated[int, Meta(ge=1, le=65535)] = 587
    """Port of the mail server."""
    security: Literal["starttls", "tls", "none"] = "starttls"
    """`starttls` and `tls` check the certificate of the server. `none` sends in clear, and allows no user."""
    user: Annotated[str, Meta(max_length=254, pattern=r"^[ -~]*\Z")] = ""
    """User name at the mail server. Empty: no login."""
    password_file: str = ""
    """File of mode 0600 with the password of `user`. Empty: the value of KOOPMON_NOTIFY_PASSWORD."""
    sender: MailAddress
    """Address of the sender."""
    to: Annotated[tuple[MailAddress, ...], Meta(min_length=1, max_length=50)]
    """Addresses of the recipients."""
    events: Annotated[tuple[NotifyEvent, ...], Meta(min_length=1)] = NOTIFY_EVENTS
    """Events that they receive."""


class NotifyConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Notifications of the monitor by webhook and e-mail (docs/notifications.md)."""

    url: Annotated[str, Meta(max_length=2048)] = ""
    """Address of the monitor's pages for the links in notifications. Empty: the address of `--http`."""
    max_per_hour: Annotated[int, Meta(ge=1, le=1000)] = 6
    """Largest number of notifications of one kind about one run in an hour. One line summarises further ones."""
    timeout_seconds: Annotated[float, Meta(gt=0.0, le=300.0)] = 10.0
    """Time limit of one attempt. A failed attempt is repeated 3 times, within 31 seconds."""
    queue_length: Annotated[int, Meta(ge=1, le=10_000)] = 64
    """Largest number of notifications that wait for one target. Above it, the oldest is dropped."""
    webhooks: Annotated[tuple[WebhookConfig, ...], Meta(max_length=16)] = ()
    """Webhooks, each a table `[[notify.webhooks]]`."""
    mail: Annotated[tuple[MailConfig, ...], Meta(max_length=16)] = ()
    """Mail servers, each a table `[[notify.mail]]`."""


class MonitorConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits and timeouts of the monitor."""

    max_runs: Annotated[int, Meta(ge=1, le=10_000)] = 64
    """Largest number of runs at one time. Further runs are refused, unless an ended run can go, or one without a
    snapshot of a peer that has more runs."""
    max_peers: Annotated[int, Meta(ge=1, le=1 << 20)] = 16_384
    """Largest number of connected ranks of one run. Further ranks are refused."""
    max_layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)] = MAX_LAYERS
    """Largest number of transitions of one model, or half of it if the model mixes between its blocks. Messages with
    more frames than this needs are refused."""
    max_header_bytes: Annotated[int, Meta(ge=1 << 12, le=1 << 24)] = 1 << 16
    """Largest control message or snapshot header. A control message of more than twice this size closes the
    connection."""
    max_message_bytes: Annotated[int, Meta(ge=1 << 16, le=1 << 40)] = 1 << 30
    """Largest shard of a snapshot, all frames together."""
    max_http_connections: Annotated[int, Meta(ge=4, le=10_000)] = 128
    """Largest number of connections to the pages. A further connection closes the oldest one."""
    max_pending_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 44)] = 2 << 30
    """Memory for incomplete snapshots, and as much again for snapshots that wait for the engine."""
    max_memory_bytes: Annotated[int, Meta(ge=0, le=1 << 50)] = 0
    """Resident memory above which the monitor closes all connections; agents connect again. 0: half of what the monitor
    leaves of the memory of the container or host, beside what it uses at its start."""
    assemble_timeout_seconds: Annotated[float, Meta(ge=0.01, le=3600.0)] = 5.0
    """Longest time that a snapshot waits for missing shards. The monitor then profiles the shards that it has, or drops
    the snapshot if they are too few."""
    queue_length: Annotated[int, Meta(ge=1, le=10_000)] = 64
    """Largest number of snapshots that wait for the engine, at most two of each run. Above it, a snapshot of the run
    that has used the most computing time is dropped."""
    heartbeat_seconds: Annotated[float, Meta(ge=0.02, le=MAX_HEARTBEAT_SECONDS)] = 1.0
    """Time between two heartbeats of a rank, in seconds. If a run has more than 100 sending ranks,
    all but rank 0 have a longer time, at most a third of `vanished_after_seconds`, so that about 100 send in this
    time."""
    vanished_after_seconds: Annotated[float, Meta(gt=0.0, le=MAX_SECONDS)] = 60.0
    """Time without a message after which a run counts as vanished."""
    ended_series_seconds: Seconds = 300.0
    """Time for which the metrics of an ended run stay."""
    vanished_series_seconds: Seconds = 86_400.0
    """Time for which the state of a vanished run and the time of its last snapshot stay in the metrics."""
    svd_rank: Annotated[int, Meta(ge=2, le=512)] = 32
    """Rank of the DMD of snapshots."""
    calibrator: str = ""
    """Calibrator file from `koopmon calibrate`. Empty: no probability of divergence is exported."""
    trainer_status: bool = False
    """Report step, loss, learning rate, risk and LR scale to Kubeflow Trainer, as `status.trainerStatus` of the
    TrainJob whose pod runs the monitor. Each report replaces those of others, such as a trainer's own."""


class StoreConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size and age of the history file. Decisions, commands and acknowledgements of active runs are never deleted."""

    max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 47)] = 4 << 30
    """Size above which profiles, observations and heartbeats are deleted. Finished runs come before active ones, and
    old records before new ones. Decisions stay."""
    max_age_days: Annotated[float, Meta(gt=0.0, le=36_500.0)] = 365.0
    """Age at which all records of a finished launch are deleted. Of an active launch, profiles, observations and
    heartbeats are deleted."""
    retry_seconds: Annotated[float, Meta(gt=0.0, le=3600.0)] = 2.0
    """Time between attempts to write while a full or failing disk pauses recording."""


class RiskConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Online detector (docs/method.md, "Online detector"). The speed of a layer is |change of log(update ratio +
    floor)| per optimizer step."""

    update_ratio_floor: Annotated[float, Meta(gt=0.0, le=10.0)] = 0.5
    """Floor that is added to the update ratio before the logarithm. Growth below the floor counts little."""
    smoothing: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.4
    """Weight of the newest snapshot in the running mean of each layer's speed."""
    min_gap_steps: Steps = 2
    """Lower bound on the gap between two snapshots when a speed is computed. Sampling noise does not shrink with
    the gap."""
    max_gap_steps: Steps = 4
    """Upper bound on the gap between two snapshots when a speed is computed. An oscillation does not grow with the
    gap."""
    peak_scale: Scale = 0.41
    """Peak, the speed of the fastest layer between two snapshots, that counts as 1."""
    speed_scale: Scale = 0.25
    """Largest running mean of the layers' speeds that counts as 1."""
    restlessness_smoothing: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.1
    """Weight of the newest snapshot in the slow running mean of the peak."""
    restlessness_scale: Scale = 0.36
    """Slow running mean of the peak that counts as 1, in units of `peak_scale`."""
    prior_slope: Annotated[float, Meta(ge=0.0, le=1000.0)] = 10.0
    """Log-odds of failure that each factor of ten on the learning rate adds to the prior. It applies to optimizers
    whose step length follows from the learning rate alone, such as Adam."""
    critical_rate: Annotated[float, Meta(ge=1e-9, le=1e9)] = 1.0
    """Learning rate x width x transitions at which the prior is even for layers without normalisation. Half of the
    runs of 200 steps diverge at 1.8. Longer runs diverge from 1 on."""
    normalized_critical_rate: Annotated[float, Meta(ge=1e-9, le=1e9)] = 0.5
    """Learning rate x width at which the prior is even for normalised layers. Runs with gradient clipping reached the
    lowest loss at 0.2 to 0.4 and were ruined from 0.6 on (`benchmarks.proving_ground`)."""
    normalized_scale: Scale = 0.6
    """Unsteadiness of normalised layers that counts as 1. A median over three snapshots comes first and removes the
    effect of one unusual batch. Healthy runs reached 0.54 at a fifth of the critical rate. Ruined runs reached 0.57
    (width 128) to 3.2 at and above it."""
    normalized_weight: Annotated[float, Meta(ge=0.0, le=20.0)] = 1.0
    """Bound on the prior in the risk of normalised layers, in log-odds of either sign. Large models train well at
    learning rate x width from 0.3 to 1.6, so the prior decides little."""
    min_prior: Annotated[float, Meta(ge=-20.0, le=0.0)] = -6.0
    """Lower bound on the log-odds of the prior. At -6, a risk of one half needs 4.5 times the unsteadiness."""
    max_prior: Annotated[float, Meta(ge=0.0, le=20.0)] = 3.0
    """Upper bound on the log-odds of the prior. At 3, a risk of one half needs half of the unsteadiness."""
    reliability_weight: Ratio = 0.0
    """Effect of unreliable modes on the unsteadiness. 0 ignores them. 1 multiplies the unsteadiness by the share of
    reliable modes."""


class PolicyConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Policy: thresholds and sizes of its actions (docs/method.md, "Policy")."""

    name: PolicyName = "auto"
    """Actions of the policy. `auto` backs off the learning rate, and for normalised layers it caps the rate and goes
    back to an earlier copy of the weights; `lr` only backs off; `kss+lr` adds KSS to that; `kss` uses KSS alone;
    `observe` only watches. With KSS added, no more runs were saved and they learned less (docs/evidence.md)."""
    dry_run: bool = False
    """Decide and record, but send no command."""
    act_risk: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.4
    """Risk at or above which a snapshot counts as high."""
    severe_risk: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.8
    """Risk at or above which the policy acts without confirmation and uses `severe_factor`. If only `act_risk` is
    given and it is higher, it replaces this default."""
    release_risk: Ratio = 0.2
    """Risk below which a snapshot counts as calm. If only `act_risk` is given and it is not higher, half of it replaces
    this default."""
    confirm_snapshots: Annotated[int, Meta(ge=1, le=100)] = 1
    """Number of consecutive snapshots with a high risk before an action."""
    backoff_factor: Annotated[float, Meta(ge=0.05, lt=1.0)] = 0.5
    """Factor on the learning-rate scale at a back-off, below the critical rate or without a known rate."""
    severe_factor: Annotated[float, Meta(ge=0.05, lt=1.0)] = 0.25
    """Factor that replaces `backoff_factor` when the risk is severe."""
    landing_rate: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.5
    """Target of a back-off from above the critical rate (`[risk] critical_rate`), as a multiple of that rate. The new
    rate is this target, or lower by the gentle factors."""
    normalized_landing_rate: Annotated[float, Meta(gt=0.0, le=100.0)] = 0.5
    """Value of `landing_rate` for normalised layers, as a multiple of `[risk] normalized_critical_rate`."""
    gentle_factor: Annotated[float, Meta(ge=0.05, lt=1.0)] = 0.85
    """Factor on the learning-rate scale at a back-off from above the critical rate."""
    gentle_severe_factor: Annotated[float, Meta(ge=0.05, lt=1.0)] = 0.6
    """Factor that replaces `gentle_factor` when the risk is severe."""
    min_lr_scale: Annotated[float, Meta(ge=0.05, le=1.0)] = 0.125
    """Lower bound on the learning-rate scale of the policy."""
    max_rewinds: Annotated[int, Meta(ge=0, le=1000)] = 5
    """Largest number of rewinds of one run."""
    rewind_factor: Annotated[float, Meta(ge=0.05, lt=1.0)] = 0.6
    """Largest ratio of the cap at a rewind to the rate in force, and to the last cap."""
    rewind_age_steps: Annotated[int, Meta(ge=0, le=100_000)] = 8
    """Smallest age of the copy that a rewind goes back to. A younger one may already be damaged."""
    rewind_warmup_steps: RampSteps = 50
    """Steps over which the learning rate rises to the cap after a rewind."""
    cooldown_steps: Steps = 6
    """Steps between two actions of one kind. An action must show its effect within this time."""
    hold_steps: Steps = 200
    """Calm steps before the learning-rate scale rises by `rise_factor`. The number is multiplied by the number of
    back-offs."""
    rise_factor: Annotated[float, Meta(gt=1.0, le=4.0)] = 1.25
    """Factor by which the learning-rate scale rises after a calm period."""
    ramp_steps: RampSteps = 20
    """Steps over which the learning-rate scale rises by `rise_factor`."""
    kss_ramp_steps: RampSteps = 10
    """Steps over which the weight of KSS rises at the start and falls at the end."""
    kss_hold_steps: Steps = 20
    """Steps for which KSS stays on, including the rise of its weight."""
    harm_ratio: Annotated[float, Meta(gt=1.0, le=1000.0)] = 1.2
    """Ratio of the loss to its value at the start of KSS above which KSS stays off for the rest of the run."""
    stop: bool = False
    """Request the end of a ruined training (`agent.should_stop`; docs/method.md, "Stop"). The policy `observe` requests
    nothing."""
    stop_snapshots: Annotated[int, Meta(ge=1, le=10_000)] = 5
    """Number of consecutive snapshots that must show the ruin before a stop."""
    stop_steps: Steps = 100
    """Steps for which these snapshots must show the ruin before a stop."""
    stop_loss_ratio: Annotated[float, Meta(gt=1.0, le=1000.0)] = 2.0
    """Smallest ratio of the loss to the first loss of the launch at which a run with finite numbers counts as
    ruined."""
    checkpoint: bool = False
    """Request one checkpoint at each alarm (`agent.should_checkpoint`) while the states and the loss are finite. The
    trainer callbacks follow it, and its checkpoint counts in the trainer's limit of kept checkpoints."""
    dense_every: Annotated[int, Meta(ge=1, le=MAX_CADENCE_STEPS)] = 1
    """Steps between snapshots that the policy requests while the run is not calm."""
    dense_steps: Steps = 60
    """Steps for which one request for dense snapshots is valid."""
    max_actions_per_hour: Annotated[int, Meta(ge=0, le=100_000)] = 120
    """Largest number of commands per hour that change the training of one run."""
    expires_in_steps: Steps = 50
    """Steps after which a command expires if no rank has applied it."""


class KssConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of Koopman Spectral Shaping (KSS) when the policy turns it on (docs/method.md, "Koopman Spectral
    Shaping")."""

    method: Literal["projection", "published"] = "projection"
    """`projection` sets ceilings on the norms of the weights with which a layer writes into the residual stream;
    `published` adds the KSS loss, to which all other settings but `min_tau` and `calm_steps` belong."""
    min_tau: Annotated[float, Meta(gt=1.0, le=1000.0)] = 2.0
    """Lower bound on the spectral radius that a ceiling leads to: it is the layer's own radius while calm, if that is
    larger."""
    calm_steps: Steps = 50
    """Calm steps after which the ceilings are released."""
    alpha: KssAlpha = 0.15
    """Weight of the KSS loss."""
    radius_margin: Annotated[float, Meta(ge=1.0, le=1000.0)] = 1.5
    """Threshold tau_u of the unstable penalty, as a multiple of the run's spectral radius while calm. tau_u is at most
    1000."""
    min_tau_u: KssModulus = 1.05
    """Lower bound on the threshold tau_u of the unstable penalty: the value of the paper."""
    temperature: KssTemperature = 20.0
    """Steepness T of the sigmoids at the thresholds."""
    beta: KssBeta = 0.0
    """Weight of the near-unit target. With 0 the loss is the unstable penalty alone."""
    gamma: Ratio = 0.4
    """Target of the near-unit mass."""
    svd_rank: KssSvdRank = 32
    """Rank of the DMD of KSS."""
    num_samples: KssSamples = 128
    """Number of tokens in the DMD of KSS."""
    every: KssEvery = 1
    """Steps from one step with the KSS loss to the next."""
    layer_fraction: LayerFraction = 1.0
    """Share of the layers in the KSS loss. Each step draws its layers."""
    through_shielded: bool = False
    """Allow KSS where its gradient reaches modules that the model's adapter shields, such as routers. The agent reads
    this key."""
