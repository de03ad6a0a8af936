"""Conformance checks of the adapter, one test for each."""

import pytest
from koopmon_echo.adapter import EchoAdapter, koopmon_example_models

from koopmon.conformance import Check, checks

EXAMPLES = koopmon_example_models()


@pytest.mark.parametrize("check", [check for each in EXAMPLES for check in checks(EchoAdapter, each)], ids=str)
def test_conformance(check: Check) -> None:
    check()
