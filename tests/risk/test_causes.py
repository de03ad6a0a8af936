"""Causes from local signals: their bounds, their words, and the table that the page shares."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from koopmon import policy
from koopmon.config import Config, KssConfig, RiskConfig
from koopmon.risk import causes
from koopmon.risk.causes import CAUSES, MIN_UPDATES, NUM_UPDATES, find, remember
from koopmon.risk.online_detector import Observation, OnlineRisk, RiskState, assess, observe
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.wire.messages import CommandKind, TrainingStep
from tests import factories

STEADY = (1.0,) * MIN_UPDATES
PAGE = Path(__file__).parents[2] / "docs" / "method.md"


def seen(**fields: Any) -> Observation:
    return factories.observation(100, **fields)


@pytest.mark.parametrize(
    ("fields", "before", "words"),
    [
        ({"max_attention_logit": 2000.4, "max_attention_layer": 3}, (), "attention logits of layer 3 reached 2,000"),
        ({"max_attention_logit": 999.0, "max_attention_layer": 3}, (), ""),
        ({"max_attention_logit": math.nan, "max_attention_layer": 3}, (), ""),
        ({"spectral_radii": (110.0, 2.0)}, (), "block 0 takes over the stream: radius 110"),
        ({"spectral_radii": (1.0, 21.9, 110.0)}, (), "block 2 takes over the stream: radius 110"),
        ({"spectral_radii": (110.0, 1.0, 30.0)}, (), ""),
        ({"spectral_radii": (49.0, 1.0)}, (), ""),
        ({"spectral_radii": (110.0,)}, (), ""),  # a stack of one block
        ({"update_rms": 40.0}, STEADY, "update RMS 40 times its median"),
        ({"update_rms": 9.9}, STEADY, ""),
        ({"update_rms": 40.0}, STEADY[1:], ""),
        ({"update_rms": 40.0}, (0.0,) * MIN_UPDATES, ""),
        ({"update_rms": math.nan}, STEADY, ""),
        ({"log_partition": -250.0}, (), "output logits drift: log-partition -250"),
        ({"log_partition": 99.0}, (), ""),
        ({"log_partition": math.nan}, (), ""),
        ({}, STEADY, ""),
    ],
)
def test_each_signal_has_a_bound_and_words(fields: dict[str, Any], before: tuple[float, ...], words: str) -> None:
    assert "; ".join(find(seen(**fields), before).values()) == words


@pytest.mark.parametrize("huge", [1e300, math.inf])
def test_any_number_has_words(huge: float) -> None:
    known = {"max_attention_logit": huge, "spectral_radii": (1.0, huge)}
    assert len(find(seen(**known, update_rms=huge, log_partition=huge), STEADY)) == 4


def test_the_memory_is_bounded_and_holds_finite_values() -> None:
    kept: tuple[float, ...] = ()
    for value in (None, math.nan, math.inf, -1.0, *range(100)):
        kept = remember(kept, value)
    assert kept == tuple(range(100 - NUM_UPDATES, 100))


def test_a_spike_is_compared_with_the_snapshots_before_it() -> None:
    state, reasons = RiskState(), []
    for step in range(12):
        value = 40.0 if step == 10 else 1.0
        state, risk = assess(
            state, factories.observation(step, update_ratios=(1.0, 1.0), update_rms=value), RiskConfig()
        )
        reasons.append(risk.causes)
    assert [step for step, found in enumerate(reasons) if found] == [10]


ALARM = {
    "update_ratios": (1.0,),
    "max_attention_logit": 2000.0,
    "max_attention_layer": 3,
    "max_spectral_radius": 110.0,
    "spectral_radii": (110.0, 2.0),
}
WORDS = "attention logits of layer 3 reached 2,000; block 0 takes over the stream: radius 110; "


@pytest.mark.parametrize("named", [True, False])
def test_a_cause_changes_the_reason_and_nothing_else(named: bool) -> None:
    """The same jump of the update ratio, with and without the signals."""
    signals = {name: value for name, value in ALARM.items() if name != "update_ratios"} if named else {}
    signals.setdefault("max_spectral_radius", 110.0)  # KSS uses it
    state, standing, config = RiskState(), policy.PolicyState(), Config()
    decided = []
    for step, ratio in enumerate((1.0, 1.0, 60.0, 1.0, 60.0, 1.0)):
        found = factories.observation(step, **signals, update_ratios=(ratio,), learning_rate=0.01, loss=2.0)
        state, risk = assess(state, found, config.risk)
        decision = policy.decide(float(step), standing, found, risk, config.policy, KssConfig())
        standing = decision.state
        decided += [
            (step, risk.value, each.kind, each.lr_scale, each.max_rate, each.reason) for each in decision.commands
        ]
        assert risk.reason.startswith(WORDS) == named
    acted = [row for row in decided if row[2] == "set_lr_scale"]
    assert [row[:5] for row in acted] == [(2, acted[0][1], "set_lr_scale", 0.25, None)]
    assert (WORDS in acted[0][5]) == named
    assert "learning rate x 0.25" in acted[0][5]


def test_states_that_are_not_finite_keep_their_reason_and_get_the_cause() -> None:
    broken = factories.observation(
        3, informative=False, non_finite=True, max_attention_logit=7e4, max_attention_layer=1
    )
    _, risk = assess(RiskState(), broken, RiskConfig())
    assert risk == OnlineRisk(
        value=1.0,
        forecast=1.0,
        causes=("attention",),
        reason="attention logits of layer 1 reached 70,000; the residual stream is not finite",
    )


def test_the_page_has_the_table() -> None:
    assert causes.table() in PAGE.read_text("utf-8")


def test_names_differ_and_texts_are_one_line() -> None:
    assert len({each.name for each in CAUSES}) == len(CAUSES)
    for each in CAUSES:
        for text in (each.title, each.signal, each.action, each.effect, each.next):
            assert text
            assert "|" not in text
            assert "\n" not in text


def test_the_kinds_of_commands_are_those_that_the_table_was_written_for() -> None:
    """A new action needs a look at the table."""
    known = {"set_lr_scale", "set_kss", "set_ceilings", "set_cadence", "rewind", "stop", "checkpoint"}
    assert set(get_args(CommandKind)) == known


def test_an_observation_has_the_layer_of_the_largest_logit_and_the_radii() -> None:
    radii = (1.0, 7.0, 5.0, 3.0)
    generator = torch.Generator().manual_seed(0)
    measured = profile_states(torch.randn((5, 80, 3), generator=generator), kreiss="never")
    layers = [replace(layer, spectral_radius=radius) for layer, radius in zip(measured.layers, radii, strict=True)]
    profile = SpectralProfile(layers=tuple(layers))
    found = observe(profile, TrainingStep(step=1), attention_logits=(None, 2.0, 9.0, 4.0))
    assert (found.max_attention_layer, found.max_attention_logit) == (2, 9.0)
    assert (found.spectral_radii, found.max_spectral_radius) == (radii, 7.0)
    alone = observe(SpectralProfile(layers=tuple(layers[:1])), TrainingStep(step=1), attention_logits=(None,))
    assert (alone.max_attention_layer, alone.max_attention_logit, alone.spectral_radii) == (None, None, (1.0,))
