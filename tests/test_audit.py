"""`make audit`: its handling of the results of pip-audit, and of their absence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parent.parent / ".ci" / "audit.py"
FINE = {"name": "numpy", "version": "2.4", "vulns": []}
SKIPPED = {"name": "torch", "skip_reason": "not found"}
OPEN = {"name": "rich", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}


def audit(directory: Path, answer: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Create the script beside a pip-audit with the output `answer`."""
    (directory / "pip_audit.py").write_text(f"import sys\nprint({answer!r})\nprint('no route', file=sys.stderr)\n")
    environment = {**os.environ, "PYTHONPATH": str(directory), **environ}
    return subprocess.run(
        [sys.executable, "-S", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("dependencies", "status", "says"),
    [
        ([FINE], 0, "1 pinned dependencies checked, 0 findings\n"),
        ([FINE, SKIPPED], 0, "0 findings; not in the database: torch"),
        ([FINE, OPEN], 1, "rich 1: CVE-1, fixed in: 2"),
    ],
)
def test_findings_are_told_and_fail(tmp_path: Path, dependencies: list[Any], status: int, says: str) -> None:
    done = audit(tmp_path, json.dumps({"dependencies": dependencies, "fixes": []}))
    assert done.returncode == status, done.stderr
    assert says in done.stdout


@pytest.mark.parametrize("answer", ["", json.dumps({"dependencies": [SKIPPED]})])
def test_where_nothing_can_be_checked_it_says_so(tmp_path: Path, answer: str) -> None:
    for required, status in (("0", 0), ("1", 1)):
        done = audit(tmp_path, answer, REQUIRE_ALL=required)
        assert done.returncode == status
        assert "no dependency was checked" in done.stderr
        assert done.stdout == ""
