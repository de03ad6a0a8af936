"""`make prove` runs every benchmark that is a command, and no other file."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


def test_every_command_is_run_once_and_what_others_read_comes_first() -> None:
    told = subprocess.run(["make", "-n", "prove"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = re.search(r"for name in ([a-z_ ]+); do", told)
    assert found
    names = found[1].split()
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    packages = (ROOT / "benchmarks").glob("*/__main__.py")
    sources |= {path.parent.name: path.read_text(encoding="utf-8") for path in packages}
    assert re.search(r"benchmarks\.fuzz --target codec --executions 10000000\b", told)
    del sources["fuzz"]
    commands = [name for name, text in sources.items() if re.search(rf"`python -m benchmarks\.{name}\b", text)]
    assert sorted(names) == sorted(commands)
    assert names.index("norms") < names.index("early_warning") < names.index("fresh")
    assert names[-1] == "readme"
    assert "guarded_ranks" not in names, "which needs torchrun"
