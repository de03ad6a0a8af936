"""The conformance kit: tests whether an architecture adapter meets koopmon's requirements.

`checks(adapter, example)` returns the checks. Run them with `koopmon adapters check`, or in a test::

    @pytest.mark.parametrize("check", checks(MyAdapter, EXAMPLE), ids=str)
    def test_conformance(check):
        check()

Each check trains the example model for a few steps with koopmon's own agent. Some compare this with a training without
the agent.
"""

from koopmon.conformance.check_selection import check_settings
from koopmon.conformance.checks import BATTERY, Check, checks
from koopmon.conformance.result import CheckResult, CheckStatus, ConformanceError

__all__ = ["BATTERY", "Check", "CheckResult", "CheckStatus", "ConformanceError", "check_settings", "checks"]
