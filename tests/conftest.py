"""What every test may rely on: the `needs` marker, and hypothesis without deadlines, since no test asserts a speed."""

from __future__ import annotations

import os
import shutil

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("koopmon", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("koopmon")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose tool this machine lacks, or fail it when REQUIRE_ALL=1 says that nothing may lack."""
    for marker in item.iter_markers("needs"):
        (tool,) = marker.args
        if shutil.which(tool) is None:
            if os.environ.get("REQUIRE_ALL") == "1":
                pytest.fail(f"needs {tool}, which is not installed, and REQUIRE_ALL=1", pytrace=False)
            pytest.skip(f"needs {tool}, which is not installed")
