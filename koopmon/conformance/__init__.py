"""The conformance kit: does an architecture adapter keep what koopmon builds on?

`checks(adapter, example)` gives the checks to run, on the command line with `koopmon adapters check`, or in a test::

    @pytest.mark.parametrize("check", checks(MyAdapter, EXAMPLE), ids=str)
    def test_conformance(check):
        check()

Each trains the example model for a few steps with koopmon's own agent, and without it where both are compared.
"""

from koopmon.conformance.check_selection import check_settings
from koopmon.conformance.checks import BATTERY, Check, checks
from koopmon.conformance.result import CheckResult, CheckStatus, ConformanceError

__all__ = ["BATTERY", "Check", "CheckResult", "CheckStatus", "ConformanceError", "check_settings", "checks"]
