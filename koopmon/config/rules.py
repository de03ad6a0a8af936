"""All tables in one object, and the rules between their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from koopmon.config.tables import (
    CadenceConfig,
    ControlConfig,
    GrafanaConfig,
    HttpConfig,
    KssConfig,
    LimitsConfig,
    ModelConfig,
    MonitorConfig,
    NotifyConfig,
    PolicyConfig,
    RiskConfig,
    SamplingConfig,
    Section,
    SecurityConfig,
    StoreConfig,
)
from koopmon.errors import ConfigError


class Config(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All tables."""

    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
    cadence: CadenceConfig = CadenceConfig()
    limits: LimitsConfig = LimitsConfig()
    control: ControlConfig = ControlConfig()
    security: SecurityConfig = SecurityConfig()
    http: HttpConfig = HttpConfig()
    grafana: GrafanaConfig = GrafanaConfig()
    notify: NotifyConfig = NotifyConfig()
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
                " insecure_plaintext_tcp disables keys on loopback as well"
            )


@dataclass(frozen=True, slots=True)
class Rule:
    """Relation between two keys: factor x low <= high, or < if `strict`. `low` and `high` are TABLE.KEY.

    `otherwise` describes the effect of a configuration that breaks the rule.
    """

    low: str
    high: str
    otherwise: str
    factor: float = 1.0
    strict: bool = False

    @property
    def condition(self) -> str:
        """Rule as a comparison of two keys."""
        times = "" if self.factor == 1.0 else f"{self.factor:g} x "
        return f"{times}{self.low} {'<' if self.strict else '<='} {self.high}"

    def check(self, config: Config) -> None:
        """Raise ConfigError if `config` breaks the rule. The message has both keys, their values and the rule."""
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
        "a run would count as vanished between two heartbeats",
        factor=3.0,
    ),
    Rule("monitor.max_header_bytes", "monitor.max_message_bytes", "a header could exceed the largest message"),
    Rule(
        "monitor.max_message_bytes",
        "monitor.max_pending_bytes",
        "one message could exceed the memory for all messages",
    ),
    Rule("risk.min_gap_steps", "risk.max_gap_steps", "the lower bound of the gap would exceed the upper one"),
    Rule("policy.release_risk", "policy.act_risk", "one snapshot would be high and calm at once", strict=True),
    Rule("policy.act_risk", "policy.severe_risk", "a risk would be severe before it is high"),
    Rule("policy.severe_factor", "policy.backoff_factor", "a severe risk would lower the rate by less"),
    Rule("policy.gentle_severe_factor", "policy.gentle_factor", "a severe risk would lower the rate by less"),
    Rule("policy.min_lr_scale", "policy.backoff_factor", "no back-off could lower the rate by that factor"),
    Rule("policy.min_lr_scale", "policy.gentle_factor", "no back-off could lower the rate by that factor"),
    Rule("policy.dense_every", "policy.dense_steps", "the dense cadence would end before its first snapshot"),
    Rule("policy.kss_ramp_steps", "policy.kss_hold_steps", "KSS would be turned off before it is fully on"),
    Rule("kss.svd_rank", "kss.num_samples", "a DMD has at most as many modes as tokens"),
)


def _number_at(config: Config, path: str) -> float:
    table, _, key = path.partition(".")
    number: float = getattr(getattr(config, table), key)
    return number
