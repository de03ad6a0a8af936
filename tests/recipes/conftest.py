"""Recipes run as they are on their pages: the tests extract code from the Markdown."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.conftest import environment

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(page: str) -> dict[str, str]:
    """Return the code of a page under docs/recipes by title."""
    return dict(_BLOCK.findall((ROOT / "docs" / "recipes" / page).read_text(encoding="utf-8")))


def launching(directory: Path, **more: str) -> dict[str, str]:
    """Return the environment of a user with the programs of this Python and files in `directory`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return environment(
        PATH=path, XDG_STATE_HOME=str(directory / "state"), HF_HOME=str(directory / "hf"), TMPDIR="/tmp", **more
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Any]:
    """Write a page's files and run its command `run`; return its output and koopmon's summary."""

    def run(page: str) -> tuple[str, dict[str, Any]]:
        found = blocks(page)
        for title, code in found.items():
            if title.endswith(".py"):
                (tmp_path / title).write_text(code)
        words = shlex.split(found["run"])
        assert words[:3] == ["koopmon", "run", "--"], "each of these is started under koopmon run"
        command = [
            sys.executable,
            "-m",
            "koopmon",
            "run",
            "--summary",
            str(tmp_path / "summary.json"),
            "--",
            *words[3:],
        ]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=launching(tmp_path),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
        return done.stdout + done.stderr, json.loads((tmp_path / "summary.json").read_text())

    return run
