"""Bounds of the configuration: every number has two, within those of the protocol, and keys are consistent.

The tests find all keys automatically, so they cover new keys.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect as inspect
import pytest

from koopmon.agent.comms.control_channel import MIN_HEARTBEAT_SECONDS
from koopmon.config import (
    MAX_FILE_BYTES,
    MAX_STEPS,
    RULES,
    Config,
    KssConfig,
    MonitorConfig,
    PolicyConfig,
    RiskConfig,
    Rule,
    checked,
    from_mapping,
    load,
)
from koopmon.errors import ConfigError
from koopmon.monitor.registry import LAST_STEP
from koopmon.wire.headers import WireLimits
from koopmon.wire.messages import (
    MAX_STEP,
    Applied,
    Command,
    HeartbeatReply,
    Hello,
    Judgement,
    KssSettings,
    Rewind,
    Shard,
    Welcome,
)

Number = inspect.IntType | inspect.FloatType


def fields(struct: type[msgspec.Struct]) -> dict[str, Number]:
    """Return the numbers of a struct by name, including optional ones."""
    kind: Any = inspect.type_info(struct)
    found: dict[str, Number] = {}
    for field in kind.fields:
        for each in field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,):
            if isinstance(each, Number):
                found[field.name] = each
    return found


TABLES: dict[str, type[msgspec.Struct]] = {name: type(getattr(Config(), name)) for name in Config.__struct_fields__}
KEYS = {f"{table}.{name}": kind for table, struct in TABLES.items() for name, kind in fields(struct).items()}


def lowest(kind: Number) -> float:
    bound = kind.gt if kind.ge is None else kind.ge
    return -math.inf if bound is None else bound


def highest(kind: Number) -> float:
    bound = kind.lt if kind.le is None else kind.le
    return math.inf if bound is None else bound


def test_the_tables_are_found() -> None:
    assert len(TABLES) == 14
    assert len(KEYS) > 70
    assert {"policy.act_risk", "kss.every", "monitor.max_message_bytes", "sampling.seed"} <= KEYS.keys()


@pytest.mark.parametrize("key", KEYS)
def test_every_number_has_finite_bounds_on_both_sides(key: str) -> None:
    low, high = lowest(KEYS[key]), highest(KEYS[key])
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low < high < 2**63, "what a bound is compared with fits the transport and the store"


STRANGE = ("inf", "-inf", "nan", "1e400", "-1e400", str(2**63), str(-(2**63)), str(2**64), "1" + "0" * 400)


@pytest.mark.parametrize("key", KEYS)
def test_what_no_number_may_be_is_refused_by_one_line(key: str, tmp_path: Path) -> None:
    table, _, name = key.partition(".")
    path = tmp_path / "k.toml"
    for strange in STRANGE:
        path.write_text(f"[{table}]\n{name} = {strange}\n")
        with pytest.raises(ConfigError) as caught:
            load(path)
        text = str(caught.value)
        assert text.startswith(f"{path}: {key} = {strange[:8].replace('1e400', 'inf')}"), text
        allowed = text.partition(": expected ")[2]
        assert re.match(r"`(int|float)` >=? \S+ and <=? \S+(, got `float`)?\Z", allowed), text
        assert text.isprintable()


@pytest.mark.parametrize("key", KEYS)
def test_both_bounds_are_taken_and_what_is_beyond_is_not(key: str) -> None:
    table, _, name = key.partition(".")
    kind = KEYS[key]
    whole = isinstance(kind, inspect.IntType)
    within = TABLES[table]
    for bound, side, is_open in ((lowest(kind), -1, kind.ge is None), (highest(kind), 1, kind.le is None)):
        beyond = bound + side if whole else math.nextafter(bound, side * math.inf)
        inside = bound if not is_open else bound - side if whole else math.nextafter(bound, -side * math.inf)
        assert getattr(msgspec.convert({name: inside}, within), name) == inside
        for refused in (beyond, bound) if is_open else (beyond,):
            with pytest.raises(ConfigError, match=re.escape(key)):
                from_mapping({table: {name: refused}})


def test_integers_of_thousands_of_digits_are_refused_from_python_too() -> None:
    with pytest.raises(ConfigError, match=r"kss\.every = an integer of thousands of digits: expected `int` >= 1"):
        from_mapping({"kss": {"every": 10**5000}})


# Key of the configuration, and the number of a message that its value becomes or bounds.
SENT: dict[str, tuple[type[msgspec.Struct], str]] = {
    **{f"kss.{name}": (KssSettings, name) for name in fields(KssConfig) if name in fields(KssSettings)},
    "kss.min_tau_u": (KssSettings, "tau_u"),
    "limits.max_kss_alpha": (KssSettings, "alpha"),
    "limits.max_kss_svd_rank": (KssSettings, "svd_rank"),
    "limits.max_kss_samples": (KssSettings, "num_samples"),
    "limits.min_lr_scale": (Applied, "lr_scale"),
    "policy.min_lr_scale": (Command, "lr_scale"),
    "policy.ramp_steps": (Command, "ramp_steps"),
    "policy.kss_ramp_steps": (Command, "ramp_steps"),
    "policy.rewind_warmup_steps": (Command, "warmup_steps"),
    "policy.rewind_age_steps": (Rewind, "min_age_steps"),
    "policy.dense_every": (Command, "cadence_steps"),
    "policy.expires_in_steps": (Command, "expires_step"),
    "policy.dense_steps": (Command, "cadence_until_step"),
    "monitor.heartbeat_seconds": (Welcome, "heartbeat_seconds"),
    "monitor.max_layers": (Hello, "num_layers"),
    "monitor.max_peers": (Hello, "world_size"),
    "sampling.max_senders": (Hello, "num_senders"),
    "sampling.num_samples": (Shard, "num_samples"),
}
COMPUTED = {
    "tau_l": "never set",
    "max_rate": "clamped: koopmon.policy",
    "step": "a peer's own",
    "decision_step": "a peer's own",
    "risk": "clamped: koopmon.monitor.run_controller",
    "forecast": "clamped",
    "near_unit_mass": "clamped",
    "divergence_probability": "clamped",
    "min_stride": "clamped: koopmon.monitor.pacing",
    "min_stride_from": "clamped: koopmon.monitor.service",
}
"""Numbers in messages of the monitor that come from no key."""


@pytest.mark.parametrize("key", SENT)
def test_no_key_exceeds_the_number_of_the_message_that_it_becomes(key: str) -> None:
    struct, name = SENT[key]
    ours, theirs = KEYS[key], fields(struct)[name]
    assert lowest(theirs) < lowest(ours) or (lowest(theirs) == lowest(ours) and (theirs.gt is None or ours.ge is None))
    assert highest(ours) < highest(theirs) or (highest(ours) == highest(theirs) and theirs.lt is None)


def test_every_number_that_the_monitor_sends_is_compared() -> None:
    compared = {(struct, name) for struct, name in SENT.values()}
    for struct in (Command, Rewind, KssSettings, Welcome, HeartbeatReply, Judgement):
        for name in fields(struct):
            assert (struct, name) in compared or name in COMPUTED, f"{struct.__name__}.{name}"


def test_every_key_of_kss_and_of_the_steps_of_policy_is_compared() -> None:
    own = {
        "kss.radius_margin",
        "kss.min_tau",
        "kss.calm_steps",
        "policy.cooldown_steps",
        "policy.hold_steps",
        "policy.kss_hold_steps",
        "policy.stop_steps",
    }
    wanted = {key for key in KEYS if key.startswith("kss.") or (key.startswith("policy.") and key.endswith("_steps"))}
    assert wanted - own <= SENT.keys()


def test_every_step_that_is_answered_leaves_room_for_the_answer() -> None:
    assert LAST_STEP + MAX_STEPS == MAX_STEP
    assert highest(KEYS["policy.expires_in_steps"]) <= MAX_STEPS
    assert highest(KEYS["policy.dense_steps"]) <= MAX_STEPS


def test_what_the_receivers_take_is_within_the_configuration() -> None:
    limits = WireLimits()
    assert limits.max_message_bytes == MonitorConfig().max_message_bytes
    assert limits.max_header_bytes == MonitorConfig().max_header_bytes
    assert lowest(KEYS["monitor.heartbeat_seconds"]) == MIN_HEARTBEAT_SECONDS, "no agent beats more often"


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "cadence.dense_every <= cadence.calm_every": {"cadence": {"dense_every": 11}},
    "3 x monitor.heartbeat_seconds <= monitor.vanished_after_seconds": {"monitor": {"vanished_after_seconds": 2.9}},
    "monitor.max_header_bytes <= monitor.max_message_bytes": {
        "monitor": {"max_header_bytes": 70_000, "max_message_bytes": 66_000}
    },
    "monitor.max_message_bytes <= monitor.max_pending_bytes": {"monitor": {"max_pending_bytes": 1 << 20}},
    "risk.min_gap_steps <= risk.max_gap_steps": {"risk": {"max_gap_steps": 1}},
    "policy.release_risk < policy.act_risk": {"policy": {"release_risk": 0.4}},
    "policy.act_risk <= policy.severe_risk": {"policy": {"act_risk": 0.9, "severe_risk": 0.8}},
    "policy.severe_factor <= policy.backoff_factor": {"policy": {"severe_factor": 0.6}},
    "policy.gentle_severe_factor <= policy.gentle_factor": {"policy": {"gentle_factor": 0.55}},
    "policy.min_lr_scale <= policy.backoff_factor": {"policy": {"min_lr_scale": 1.0}},
    "policy.min_lr_scale <= policy.gentle_factor": {
        "policy": {"min_lr_scale": 0.5, "gentle_factor": 0.4, "gentle_severe_factor": 0.3}
    },
    "policy.dense_every <= policy.dense_steps": {"policy": {"dense_every": 61}},
    "policy.kss_ramp_steps <= policy.kss_hold_steps": {"policy": {"kss_hold_steps": 9}},
    "kss.svd_rank <= kss.num_samples": {"kss": {"svd_rank": 129}},
}


def test_every_rule_has_its_contradiction() -> None:
    assert CONTRADICTIONS.keys() == {rule.condition for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.condition)
def test_keys_that_contradict_each_other_are_refused_by_one_line(rule: Rule, tmp_path: Path) -> None:
    tables = CONTRADICTIONS[rule.condition]
    path = tmp_path / "k.toml"
    path.write_text(
        "".join(f"[{t}]\n" + "".join(f"{k} = {v}\n" for k, v in values.items()) for t, values in tables.items())
    )
    with pytest.raises(ConfigError) as caught:
        load(path)
    text = str(caught.value)
    assert f": expected {rule.condition}: {rule.otherwise}" in text
    for key in (rule.low, rule.high):
        table, _, name = key.partition(".")
        value = tables.get(table, {}).get(name, getattr(getattr(Config(), table), name))
        assert f"{key} = {value!r}" in text, "also a default that the file does not name"
    assert text.isprintable()
    assert text.startswith(f"{path}: ")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.condition)
def test_a_rule_allows_what_lies_at_its_edge(rule: Rule) -> None:
    """The higher key has the smallest value that the lower one's default allows."""
    low_table, _, low = rule.low.partition(".")
    table, _, name = rule.high.partition(".")
    kind = KEYS[rule.high]
    edge = rule.factor * getattr(getattr(Config(), low_table), low)
    edge = math.nextafter(edge, math.inf) if rule.strict else edge
    config = msgspec.convert(
        {table: {name: type(getattr(TABLES[table](), name))(max(edge, lowest(kind)))}}, dict[str, dict[str, Any]]
    )
    if rule.high == "policy.gentle_factor":
        config["policy"]["gentle_severe_factor"] = min(0.6, config["policy"][name])
    if rule.high == "policy.backoff_factor":
        config["policy"]["severe_factor"] = min(0.25, config["policy"][name])
    assert isinstance(from_mapping(config), Config)


def test_the_bounds_of_the_prior_are_rules_of_their_own() -> None:
    assert highest(KEYS["risk.min_prior"]) <= 0.0 <= lowest(KEYS["risk.max_prior"])


def test_keys_that_contradict_each_other_without_a_number() -> None:
    both = {"loopback": "curve", "insecure_plaintext_tcp": True}
    with pytest.raises(ConfigError, match=r"security\.loopback = 'curve', security\.insecure_plaintext_tcp = True"):
        from_mapping({"security": both})


def test_a_configuration_made_in_python_is_refused_alike() -> None:
    with pytest.raises(ConfigError, match=r"policy\.release_risk = 0\.5, policy\.act_risk = 0\.4"):
        Config(policy=PolicyConfig(release_risk=0.5))
    with pytest.raises(ConfigError, match=r"risk\.normalized_weight = inf: expected `float` >= 0\.0 and <= 20\.0"):
        checked(Config(risk=RiskConfig(normalized_weight=math.inf)))
    assert checked(Config()) == Config()


def kinds_of_file(tmp_path: Path) -> Iterator[tuple[str, str]]:
    os.mkfifo(tmp_path / "fifo")
    yield str(tmp_path / "fifo"), "not a regular file"
    yield "/dev/zero", "not a regular file"
    yield "/dev/null", "not a regular file"
    yield str(tmp_path), "not a regular file"
    huge = tmp_path / "huge.toml"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    yield str(huge), f"{1 << 40} bytes: the limit is {MAX_FILE_BYTES} bytes"
    (tmp_path / "link").symlink_to(huge)
    yield str(tmp_path / "link"), f"{1 << 40} bytes: the limit is {MAX_FILE_BYTES} bytes"
    text = tmp_path / "text.toml"
    text.write_bytes(b"\xff")
    yield str(text), "not valid TOML"


@pytest.mark.timeout(60)
def test_a_file_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    for path, says in kinds_of_file(tmp_path):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert says in str(caught.value)
        assert str(caught.value).isprintable()


def test_a_link_to_a_file_and_a_file_in_memory_are_read(tmp_path: Path) -> None:
    (tmp_path / "k.toml").write_text("[policy]\nact_risk = 0.5\n")
    (tmp_path / "link").symlink_to(tmp_path / "k.toml")
    assert load(tmp_path / "link").policy.act_risk == 0.5
    memory = os.memfd_create("k")
    try:
        os.write(memory, b"[policy]\nact_risk = 0.5\n")
        assert load(f"/proc/self/fd/{memory}").policy.act_risk == 0.5
    finally:
        os.close(memory)
