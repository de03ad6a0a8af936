"""Configuration: frozen, validated tables from TOML and the environment. Each field has a unit and bounds.

Agent and monitor can share one file. The agent reads `[model]`, `[sampling]`, `[cadence]`, `[limits]`, `[control]` and
the key `through_shielded` of `[kss]`. The monitor reads `[monitor]`, `[http]`, `[grafana]`, `[notify]`, `[store]`,
`[risk]`, `[policy]` and the other keys of `[kss]`. Both read `[security]`. An unknown table or key, a value outside its
bounds, or values that contradict each other (`RULES`) make the whole file invalid.
"""

from __future__ import annotations

from koopmon.config.hints import merged, with_hints
from koopmon.config.reading import MAX_FILE_BYTES, checked, from_mapping, load, read_file
from koopmon.config.rules import RULES, Config, Rule
from koopmon.config.tables import (
    MAX_SECONDS,
    MAX_STEPS,
    NOTIFY_EVENTS,
    CadenceConfig,
    ControlConfig,
    GrafanaConfig,
    HttpConfig,
    KssConfig,
    LimitsConfig,
    MailConfig,
    ModelConfig,
    MonitorConfig,
    NotifyConfig,
    NotifyEvent,
    PolicyConfig,
    PolicyName,
    RiskConfig,
    SamplingConfig,
    Section,
    SecurityConfig,
    StoreConfig,
    WebhookConfig,
)

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_SECONDS",
    "MAX_STEPS",
    "NOTIFY_EVENTS",
    "RULES",
    "CadenceConfig",
    "Config",
    "ControlConfig",
    "GrafanaConfig",
    "HttpConfig",
    "KssConfig",
    "LimitsConfig",
    "MailConfig",
    "ModelConfig",
    "MonitorConfig",
    "NotifyConfig",
    "NotifyEvent",
    "PolicyConfig",
    "PolicyName",
    "RiskConfig",
    "Rule",
    "SamplingConfig",
    "Section",
    "SecurityConfig",
    "StoreConfig",
    "WebhookConfig",
    "checked",
    "from_mapping",
    "load",
    "merged",
    "read_file",
    "with_hints",
]
