"""The kit itself: it reports invalid example models as such, and also finds faults of the agent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch
from torch import Tensor, nn

from koopmon.agent.capture.sampler import Sampler
from koopmon.agent.control.action import towards
from koopmon.agent.control.command_judge import CommandJudge, CommandResult
from koopmon.agent.control.kss.injection import KssInjection
from koopmon.agent.control.lr_backoff import LrBackoff
from koopmon.api import ArchitectureAdapter, ExampleModel, Stack
from koopmon.conformance import BATTERY, ConformanceError, checks
from koopmon.conformance.training import Training
from koopmon.errors import AdapterError
from koopmon.plugins import Selection
from koopmon.wire.messages import Command
from tests.packages.echo.koopmon_echo.adapter import EchoAdapter, build, koopmon_example_models, loss
from tests.packages.echo.koopmon_echo.model import Echo

(EXAMPLE,) = koopmon_example_models()
_one, _count = Echo(), iter(range(1000))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def made_of(build: Callable[[int], Any], loss: Any = loss) -> dict[str, Any]:
    return {str(check): check for check in checks(EchoAdapter, ExampleModel("bad", "echo", build, loss))}


def counting(seed: int) -> Any:
    model, batch = build(seed)
    nn.init.constant_(model.head.bias, float(next(_count)))  # type: ignore[union-attr, arg-type]
    return model, batch


BAD: list[tuple[Callable[[int], Any], Any, str]] = [
    (lambda seed: 3, loss, r"build\(0\) gives int, expected \(model, batch\)"),
    (lambda seed: 1 / 0, loss, "the example model raised ZeroDivisionError"),
    (lambda seed: (_one, build(seed)[1]), loss, "one and the same model twice"),
    (counting, loss, r"two models that differ in head\.bias"),
    (build, lambda model, batch: model(**batch), r"its loss is a float32 tensor of shape \(4, 12, 30\)"),
    (build, lambda model, batch: model(**batch).sum() * float("nan"), "its loss is nan"),
    (build, lambda model, batch: model(**batch).sum().detach(), "no gradient"),
]


@pytest.mark.parametrize(("build", "loss", "reason"), BAD)
def test_an_unsound_example_is_named_and_nothing_is_tried_with_it(build: Any, loss: Any, reason: str) -> None:
    battery = made_of(build, loss)
    with pytest.raises(ConformanceError, match=reason):
        battery["example"]()
    with pytest.raises(SkipTest, match="needs a sound example model"):
        battery["losses"]()
    assert battery["losses"].run().verdict == "skipped"


def test_too_few_tokens_say_so() -> None:
    small = made_of(lambda seed: (Echo(), {"tokens": torch.randint(30, (2, 8))}), lambda m, b: m(**b).square().mean())
    with pytest.raises(ConformanceError, match="has 16 tokens, expected at least 32"):
        small["shapes"]()


def test_a_loss_of_the_model_s_own_is_taken() -> None:
    plain = made_of(build, None)
    assert "bit-identical" in plain["losses"]()


def test_a_name_that_is_not_installed_lists_the_others() -> None:
    with pytest.raises(AdapterError, match=r"adapter = 'ecko': allowed are .*transformer"):
        checks("ecko", EXAMPLE)


def test_nothing_of_the_caller_s_is_changed() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for check in checks(EchoAdapter, EXAMPLE)[5:12]:
        check()
    assert torch.equal(before, torch.get_rng_state())


def test_checkpointing_repeats_the_blocks_with_their_hooks() -> None:
    bench = checks(EchoAdapter, EXAMPLE)[0].bench
    for checkpointing, calls in ((False, 1), (True, 2)):
        training, seen = Training(bench, checkpointing=checkpointing), []
        training.model.blocks[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))  # type: ignore[index, union-attr, operator]
        training.backward()
        assert len(seen) == calls


def doubled(self: KssInjection, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = GRADIENTS(self, x, y)
    return 2.0 * grads[0], grads[1]


def shifted(self: Sampler, point: int, state: Tensor) -> bool:
    return PUT(self, point, state.roll(1, 0))


def drawing(self: Sampler, point: int, state: Tensor) -> bool:
    torch.rand(())
    return PUT(self, point, state)


def timid(self: LrBackoff, update: Any, scale: float, factors: Any) -> None:
    SCALE(self, update, scale**0.5, factors)


def leaking(self: LrBackoff, update: Any, scale: float, factors: Any) -> None:
    for group in update.optimizer.param_groups:
        group["lr"] *= scale


GRADIENTS, PUT, SCALE = KssInjection._gradients, Sampler.put, LrBackoff._scale


@pytest.mark.parametrize(
    ("owner", "method", "fault", "check", "reason"),
    [
        (KssInjection, "_gradients", doubled, "kss-gradient", "differs from the explicit one"),
        (KssInjection, "_gradients", doubled, "kss-on-and-off", "differ from those of KSS in the loss"),
        (Sampler, "put", shifted, "taps-accumulation", "does not hold the states of the step's first microbatch"),
        (Sampler, "put", drawing, "losses", "the (loss|random state)"),
        (LrBackoff, "_scale", timid, "learning-rate", "not those of a rate that was scaled by hand"),
        (LrBackoff, "_scale", leaking, "learning-rate", "between steps the learning rates are"),
    ],
)
def test_a_fault_of_the_agent_is_found(
    owner: type, method: str, fault: Any, check: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, fault)
    battery = {str(each): each for each in checks(EchoAdapter, EXAMPLE)}
    with pytest.raises(ConformanceError, match=reason):
        battery[check]()


class ShieldingEcho(EchoAdapter):
    def shielded(self, stack: Stack) -> Sequence[nn.Module]:
        return [point.module.mix for point in stack.points]  # type: ignore[misc]


def deaf(model: nn.Module, selection: Selection) -> str:
    return ""


def stubborn(self: CommandJudge, command: Command, state: Any, step: int) -> Any:
    """Refuses KSS, allowed or not."""
    if command.kind == "set_kss":
        return None, CommandResult(command.id, "refused", step, "KSS would reach blocks.0.mix: through_shielded", True)
    return JUDGE(self, command, state, step)


def two_faced(self: CommandJudge, command: Command, state: Any, step: int) -> Any:
    """Says that it refuses, and obeys."""
    action = self._actions[command.kind]
    target = action.target(command, state, step)
    refused = CommandResult(command.id, "refused", step, self.capability(action).reason, permanent=True)
    return towards(state, action, target, step, 0), refused


def evasive(self: CommandJudge, command: Command, state: Any, step: int) -> Any:
    judged, outcome = JUDGE(self, command, state, step)
    return judged, replace(outcome, permanent=False)


def wordless(self: CommandJudge, command: Command, state: Any, step: int) -> Any:
    judged, outcome = JUDGE(self, command, state, step)
    return judged, replace(outcome, detail="no")


JUDGE = CommandJudge.judge


def test_what_is_shielded_is_kept_from_kss_and_steered_exactly_where_that_is_allowed() -> None:
    battery = {str(each): each for each in checks(ShieldingEcho, EXAMPLE)}
    assert battery["kss-shields"]() == "KSS is refused: 3 modules are shielded"
    assert "in float64" in battery["kss-gradient"]()


@pytest.mark.parametrize(
    ("where", "fault", "check", "reason"),
    [
        (
            "koopmon.agent.control.kss.action.kss_refusal",
            deaf,
            "kss-shields",
            "alpha 1.0 is in force, and blocks.0.mix is shielded",
        ),
        ("koopmon.agent.control.command_judge.CommandJudge.judge", two_faced, "kss-shields", "alpha 1.0 is in force"),
        (
            "koopmon.agent.control.command_judge.CommandJudge.judge",
            evasive,
            "kss-shields",
            "KSS is refused, expected to be refused",
        ),
        (
            "koopmon.agent.control.command_judge.CommandJudge.judge",
            wordless,
            "kss-shields",
            "lacks the shielded module .* not one line: 'no'",
        ),
        (
            "koopmon.agent.control.command_judge.CommandJudge.judge",
            stubborn,
            "kss-gradient",
            "a command is not applied: KSS would",
        ),
    ],
)
def test_a_shield_that_does_not_hold_is_found(
    where: str, fault: Any, check: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, fault)
    battery = {str(each): each for each in checks(ShieldingEcho, EXAMPLE)}
    with pytest.raises(ConformanceError, match=reason):
        battery[check]()


def test_the_kit_leaves_logging_to_its_user() -> None:
    assert logging.getLogger("koopmon.conformance").handlers == []


def test_the_page_tells_of_every_check_and_every_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "write-an-adapter.md").read_text(encoding="utf-8")
    for name in BATTERY:
        assert f"`{name}`" in page
    assert "`fixed_state = False`" in page
    for name in vars(ArchitectureAdapter):
        if not name.startswith("_") and name not in ("name", "measures", "fixed_state"):
            assert f"`{name}(" in page, name
