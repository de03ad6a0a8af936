"""The `needs` marker: skipped with its reason, failed under REQUIRE_ALL=1, run where the tool is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import pytest

@pytest.mark.needs({tool!r})
def test_it():
    pass
"""


@pytest.mark.parametrize(
    ("tool", "require_all", "outcome"),
    [
        ("no-such-tool", "", "1 skipped"),
        ("no-such-tool", "1", "1 error"),
        ("sh", "1", "1 passed"),
    ],
)
def test_needs_marker(tmp_path: Path, tool: str, require_all: str, outcome: str) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(SCRIPT.format(tool=tool))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = needs(tool)\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(tmp_path)],
        env={**os.environ, "REQUIRE_ALL": require_all},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout
    assert ("needs no-such-tool" in done.stdout) == (tool == "no-such-tool")
