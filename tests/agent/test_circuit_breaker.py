"""Circuit breaker: the first exception ends the guarded code, is logged once, and never reaches the loop."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from koopmon.agent.circuit_breaker import CircuitBreaker


class Owner:
    """Owner of a breaker that records the reason for its trip."""

    def __init__(self, *, fails: bool = False) -> None:
        self.reasons: list[str] = []
        self.fails = fails
        self.breaker = CircuitBreaker("the part", self.on_trip)

    def on_trip(self, reason: str) -> None:
        self.reasons.append(reason)
        if self.fails:
            raise OSError("no way to stop")


def broken(*args: object) -> None:
    raise RuntimeError("out of order\nbadly")


def test_the_first_exception_is_the_last(caplog: pytest.LogCaptureFixture) -> None:
    owner, calls = Owner(), []
    fine, faulty = owner.breaker.hook(lambda *args: calls.append(args) or "changed"), owner.breaker.hook(broken)
    assert fine(1, 2) == "changed"
    assert faulty(1) is None
    assert (owner.breaker.tripped, owner.breaker.num_errors) == (True, 1)
    assert owner.reasons == [owner.breaker.reason] == ["broken: RuntimeError: out of order badly"]
    assert fine(3) is None
    assert calls == [(1, 2)]
    owner.breaker.trip("later", ValueError("another"))
    assert (owner.breaker.num_errors, owner.breaker.reason) == (2, "broken: RuntimeError: out of order badly")
    (line,) = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    assert line == "koopmon: the part is off, training goes on: broken: RuntimeError: out of order badly"


def test_an_exception_while_it_stands_down_is_only_counted() -> None:
    owner = Owner(fails=True)
    owner.breaker.hook(broken)()
    assert (owner.breaker.num_errors, len(owner.reasons)) == (2, 1)


def test_a_breaker_does_not_keep_its_owner_alive() -> None:
    owner = Owner()
    breaker, alive = owner.breaker, weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None
    breaker.hook(broken)()
    assert breaker.tripped


def test_a_copy_of_a_hooked_module_has_a_hook_that_does_nothing() -> None:
    module, calls = nn.Linear(2, 2), []
    hook = CircuitBreaker("the part").hook(lambda *args: calls.append(1))
    module.register_forward_hook(hook)
    for twin in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert twin(module, (), None) is None
    assert b"koopmon" not in pickle.dumps(hook)
    twin = copy.deepcopy(module)
    twin(module.weight)
    assert calls == []
    module(module.weight)
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("run", ["traced", "vmap", "fake"])
def test_an_exception_in_a_foreign_forward_does_not_trip(run: str) -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    breaker = CircuitBreaker("the part")
    module.register_forward_hook(breaker.hook(broken))
    if run == "traced":
        torch.jit.trace(lambda x: module(x), torch.ones(1, 2), check_trace=False)
    elif run == "vmap":
        torch.func.vmap(module)(torch.ones(3, 2))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            module(torch.ones(1, 2))
    assert not breaker.tripped
    module(torch.ones(1, 2))
    assert breaker.tripped
