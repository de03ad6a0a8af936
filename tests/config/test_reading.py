"""Configuration files: valid values, and the one-line error for an invalid one."""

from __future__ import annotations

from pathlib import Path

import pytest

from koopmon.config import Config, RiskConfig, from_mapping, load, merged
from koopmon.errors import ConfigError


def test_an_empty_mapping_is_the_defaults() -> None:
    assert from_mapping({}) == Config()


def test_a_file_changes_what_it_names_and_overrides_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "koopmon.toml"
    path.write_text('[policy]\nname = "lr"\nact_risk = 0.3\n')
    config = load(path, overrides={"policy": {"name": "observe"}})
    assert (config.policy.name, config.policy.act_risk) == ("observe", 0.3)
    assert config.risk == Config().risk
    monkeypatch.setenv("KOOPMON_CONFIG", str(path))
    assert load().policy.name == "lr"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"policy": {"act_risk": 2.0}}, r"policy\.act_risk = 2\.0: expected `float` > 0\.0 and < 1\.0"),
        ({"policy": {"act_risk": "high"}}, r"policy\.act_risk = 'high': expected `float` > 0\.0 and < 1\.0, got `str`"),
        ({"policy": {"name": "panic"}}, r"policy\.name = 'panic'"),
        ({"policy": 3}, r"policy = 3: expected `object`"),
        ({"policy": {"act_riks": 0.2}}, r"no field policy\.act_riks, did you mean act_risk\? \(allowed: .*act_risk, "),
        ({"policy": {"zzz": 0.2}}, r"no field policy\.zzz \(allowed: act_risk, "),
        ({"polcy": {}}, r"no table polcy, did you mean policy\? \(allowed: cadence, "),
    ],
)
def test_what_does_not_fit_is_named_with_its_value_and_what_is_allowed(data: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        from_mapping(data, source="koopmon.toml")
    assert str(caught.value).startswith("koopmon.toml: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_or_parsed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read: No such file"):
        load(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[policy\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load(broken)


@pytest.mark.parametrize(
    ("given", "thresholds"),
    [
        ({"act_risk": 0.01}, (0.005, 0.01, 0.8)),
        ({"act_risk": 0.2}, (0.1, 0.2, 0.8)),
        ({"act_risk": 0.4}, (0.2, 0.4, 0.8)),
        ({"act_risk": 0.9}, (0.2, 0.9, 0.9)),
        ({"act_risk": 0.01, "release_risk": 0.002, "severe_risk": 0.02}, (0.002, 0.01, 0.02)),
    ],
)
def test_defaults_of_the_other_thresholds_follow_a_given_one(
    given: dict[str, float], thresholds: tuple[float, ...]
) -> None:
    policy = from_mapping({"policy": given}).policy
    assert (policy.release_risk, policy.act_risk, policy.severe_risk) == pytest.approx(thresholds)


def test_thresholds_that_contradict_each_other_are_refused_where_both_are_given() -> None:
    with pytest.raises(ConfigError, match=r"policy\.release_risk < policy\.act_risk"):
        from_mapping({"policy": {"act_risk": 0.1, "release_risk": 0.2}})
    with pytest.raises(ConfigError, match=r"policy\.act_risk = 2"):
        from_mapping({"policy": {"act_risk": 2}})


def test_a_hint_that_every_hello_repeats_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        merged(RiskConfig(), {"no_such_key": 1.0, "prior_slope": -1e9}, "a source of this test")
    assert len(caplog.records) == 2


def test_a_variable_of_the_environment_is_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "k.toml"
    file.write_text("[policy]\nact_risk = 0.5\nhold_steps = 7\n")
    for name, value in {
        "POLICY__ACT_RISK": "0.6",
        "POLICY__STOP": "true",
        "POLICY__NAME": "lr",
        "MODEL__STACK": "transformer.h",
        "MODEL__ADAPTER": "12",
        "LIMITS__MAX_REWINDS": "3",
        "LIMITS__REWIND_MAX_BYTES": "",
        "RUN": "a__b",
    }.items():
        monkeypatch.setenv(f"KOOPMON_{name}", value)
    config = load(file, overrides={"policy": {"name": "kss"}})
    policy = config.policy
    assert (policy.act_risk, policy.hold_steps, policy.stop, policy.name) == (0.6, 7, True, "kss")
    assert (config.model.stack, config.limits.max_rewinds) == ("transformer.h", 3)
    assert config.limits.rewind_max_bytes == Config().limits.rewind_max_bytes


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KOOPMON_POLICY__ACT_RISK", "2", "policy.act_risk = 2"),
        ("KOOPMON_POLICY__ACT_RISK", "high", "policy.act_risk = 'high'"),
        ("KOOPMON_POLICY__ACT_RISC", "0.5", "did you mean act_risk?"),
        ("KOOPMON_POLICEY__ACT_RISK", "0.5", "there is no table policey"),
        ("KOOPMON_POLICY__ACT_RISK", "[[[", "policy.act_risk"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        load()
    assert said in str(refused.value)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)
