"""Each broken requirement fails its check with one line, while all other checks still report."""

from __future__ import annotations

import re

import pytest
import torch

from koopmon.conformance import BATTERY, checks
from tests.conformance.broken import CASES, KSS, Case
from tests.packages.echo.koopmon_echo.adapter import koopmon_example_models

(EXAMPLE,) = koopmon_example_models()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.adapter.__name__)
def test_a_broken_promise_is_found(case: Case) -> None:
    # The most expensive checks run only where they find something.
    made = [check for check in checks(case.adapter, EXAMPLE) if check.name in case.found or check.name not in KSS]
    outcomes = {check.name: check.run() for check in made}
    failed = {name for name, outcome in outcomes.items() if outcome.verdict == "failed"}
    assert failed == set(case.found), [outcome for outcome in outcomes.values() if outcome.verdict == "failed"]
    assert re.search(case.reason, outcomes[case.found[0]].detail), outcomes[case.found[0]].detail
    for outcome in outcomes.values():
        assert outcome.detail
        assert "\n" not in outcome.detail
        if outcome.verdict == "skipped":
            assert "needs" in outcome.detail, "what cannot be tried says what it lacks"


def test_every_check_finds_something() -> None:
    found = {name for case in CASES for name in case.found}
    assert set(BATTERY) - found == {"example"}, "which is tried with bad examples"
    assert len(CASES) >= 8
