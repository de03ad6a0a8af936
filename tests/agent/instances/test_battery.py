"""Every case of every battery: the losses are those of the run alone, and what is said is true."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.agent.instances import (
    blindness,
    everyday,
    interruptions,
    loops,
    methods,
    published,
    states,
    surgery,
    traversals,
    users_objects,
    what_trains,
    written,
)
from tests.agent.instances.battery import Case
from tests.agent.instances.conftest import Outcome

MODULES = (
    blindness,
    everyday,
    interruptions,
    loops,
    methods,
    published,
    states,
    surgery,
    traversals,
    users_objects,
    what_trains,
    written,
)
CASES = [
    pytest.param(case, id=f"{module.__name__.rpartition('.')[2]}: {case.name}")
    for module in MODULES
    for case in module.battery.cases
]
CASES += [
    pytest.param(case, id=f"forks: {case.name}", marks=pytest.mark.process)
    for module in (interruptions, methods)
    for case in module.forks.cases
]


@pytest.mark.filterwarnings("ignore")  # the compilers and tracers have many of their own
@pytest.mark.parametrize("case", CASES)
def test_a_training_is_watched_or_told_and_never_changed(case: Case, observe: Callable[[Case], Outcome]) -> None:
    outcome = observe(case)
    assert outcome.watched == outcome.alone
    assert outcome.errors == 0
    if case.stack is None:
        assert not outcome.snapshots
    else:
        assert outcome.snapshots[case.stack] >= case.least, outcome.lines
        assert outcome.layers[case.stack] == case.layers
        assert outcome.last >= len(outcome.watched) - 3, outcome.lines
    assert len(outcome.lines) <= case.lines, outcome.lines
    assert not case.told or any(re.search(case.told, line) for line in outcome.lines), outcome.lines
