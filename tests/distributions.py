"""Wheel and source distribution, built offline from tracked files, and an environment with the agent's needs alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def tracked() -> set[str]:
    """Return the tracked files that exist, relative to the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in filter(None, listed.split("\0")) if (ROOT / name).is_file()}


def build(kind: Literal["wheel", "sdist"], source: Path, out: Path) -> Path:
    """Build a distribution of the tree `source` without a network, and return its path."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out / built.stdout.splitlines()[-1]


def copy_of_tracked(target: Path) -> Path:
    """Copy the tracked files, so that an untracked file cannot help, and return `target`."""
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    """Return the requirements of a wheel, those of its extras too."""
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    told = Parser().parsestr(wheel.read(metadata).decode())
    return [Requirement(line) for line in told.get_all("Requires-Dist", [])]


def closure(*names: str) -> set[str]:
    """Return the installed distributions that an install of `names` brings, without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            needs = map(Requirement, distribution(name).requires or ())
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def link_installed(names: set[str], site: Path) -> None:
    """Link the files of installed distributions into the directory `site`."""
    for name in names:
        there = distribution(name)
        tops = {file.parts[0] for file in there.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(str(there.locate_file(top)))
