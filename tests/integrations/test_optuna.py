"""A real Optuna study that prunes diverging configurations before their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import optuna
import torch
from torch import nn

from benchmarks.models import Decoder
from koopmon.errors import CalibrationError, ConfigError
from koopmon.integrations.optuna import forecast, prune_by_initial_risk

CALIBRATOR = Path(__file__).parents[2] / "benchmarks" / "results" / "calibrator.json"
TOKENS = torch.randint(256, (16, 32), generator=torch.Generator().manual_seed(0))
SAFE, DEADLY = 1e-4, 3e-2


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def decoder(norm: Any = "none") -> nn.Module:
    return Decoder(norm, width=64, num_layers=4)


def test_a_study_trains_what_is_likely_to_live_and_nothing_else() -> None:
    trained: list[tuple[str, float]] = []

    def objective(trial: optuna.trial.Trial) -> float:
        norm = trial.suggest_categorical("norm", ["none", "pre"])
        rate = trial.suggest_float("lr", SAFE, DEADLY, log=True)
        prune_by_initial_risk(trial, decoder(norm), TOKENS, learning_rate=rate, calibrator=CALIBRATOR)
        trained.append((norm, rate))
        return rate

    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"norm": ["none", "pre"], "lr": [SAFE, DEADLY]}))
    study.optimize(objective, n_trials=4)
    states = {(t.params["norm"], t.params["lr"]): t.state.name for t in study.trials}
    assert states == {
        ("none", SAFE): "COMPLETE",
        ("none", DEADLY): "PRUNED",
        ("pre", SAFE): "COMPLETE",
        ("pre", DEADLY): "COMPLETE",
    }
    assert len(trained) == 3
    for trial in study.trials:
        assert 0.0 < trial.user_attrs["koopmon:near_unit_mass"] <= 1.0
        assert (trial.user_attrs["koopmon:divergence_probability"] > 0.5) == (trial.state.name == "PRUNED")
    (pruned,) = (trial for trial in study.trials if trial.state.name == "PRUNED")
    assert pruned.user_attrs["koopmon:reason"].startswith("diverges with probability 1.00, more than 0.5")


def test_the_score_alone_prunes_only_where_a_bound_is_given_for_it() -> None:
    trial = optuna.trial.FixedTrial({})
    with pytest.raises(optuna.TrialPruned, match=r"near-unit mass 1\.00 is above 0\.5"):
        prune_by_initial_risk(trial, decoder(), TOKENS, max_near_unit_mass=0.5)
    found = prune_by_initial_risk(
        trial, decoder(), TOKENS, learning_rate=SAFE, calibrator=CALIBRATOR, max_probability=0.9
    )
    assert found.near_unit_mass > 0.5, "and yet it is no reason by itself"


def test_a_rate_beyond_all_that_was_tried_is_as_bad_as_the_highest_at_least() -> None:
    highest, beyond = (
        forecast(decoder(), TOKENS, learning_rate=rate, calibrator=CALIBRATOR).divergence_probability
        for rate in (17.28 / (64 * 4), 10.0)
    )
    assert highest == pytest.approx(beyond)
    assert highest > 0.9


def test_a_model_of_which_nothing_is_known_is_not_pruned() -> None:
    trial = optuna.trial.FixedTrial({})
    few = TOKENS[:1, :3]
    found = prune_by_initial_risk(trial, decoder(), few, max_near_unit_mass=0.1)
    assert found.near_unit_mass is None
    assert trial.user_attrs["koopmon:reason"]


def test_profiling_leaves_the_model_and_chance_as_they_were() -> None:
    model = decoder()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    forecast(model, TOKENS, learning_rate=SAFE, calibrator=CALIBRATOR)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "no criterion"),
        ({"calibrator": CALIBRATOR}, "go together"),
        ({"learning_rate": 0.1, "max_near_unit_mass": 0.5}, "go together"),
        ({"calibrator": CALIBRATOR, "learning_rate": 0.1, "max_probability": 1.5}, r"max_probability = 1\.5"),
    ],
)
def test_arguments_that_decide_nothing_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prune_by_initial_risk(optuna.trial.FixedTrial({}), decoder(), TOKENS, **arguments)


def test_a_calibrator_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.json"):
        forecast(decoder(), TOKENS, learning_rate=0.1, calibrator=tmp_path / "nowhere.json")
    other = tmp_path / "moe.json"
    other.write_text(CALIBRATOR.read_text().replace('"transformer"', '"moe"'))
    with pytest.raises(CalibrationError, match="calibrator is for moe; this model's adapter is transformer"):
        forecast(decoder(), TOKENS, learning_rate=0.1, calibrator=other)
