"""pytest as in an install of `.[test]`: `python -m tests.plain_install [words for pytest]`.

Nothing can be imported that such an install would not bring: koopmon's own dependencies, those of the extra `test`, and
what these need in turn, by the metadata of what is installed here.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
THERE = {"koopmon", "koopmon_adapters", "pip", *sys.stdlib_module_names}


def brought() -> set[str]:
    """Names of the distributions that `.[test]` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["test"])]
    found: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        extras = wanted.extras or {""}
        name = canonicalize_name(wanted.name)
        if name in found or not any(wanted.marker is None or wanted.marker.evaluate({"extra": e}) for e in extras):
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        for line in needs:
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                need.marker = None
                waiting.append(need)
    return found


def absent() -> frozenset[str]:
    """Top-level modules that are installed here and would not be there."""
    there = brought()
    return frozenset(
        module
        for module, owners in packages_distributions().items()
        if module not in THERE and not any(canonicalize_name(owner) in there for owner in owners)
    )


class Absent:
    """Finds nothing, loudly: the first finder on sys.meta_path."""

    def __init__(self, modules: frozenset[str]) -> None:
        self.modules = modules

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        if name.partition(".")[0] in self.modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(words: Sequence[str]) -> int:
    modules = absent()
    early = modules & {name.partition(".")[0] for name in sys.modules}
    sys.meta_path.insert(0, Absent(modules))  # type: ignore[arg-type]
    for name in [name for name in sys.modules if name.partition(".")[0] in early]:
        del sys.modules[name]
    print(f"hidden: {len(modules)} modules, such as {', '.join(sorted(modules & {'httpx', 'scipy', 'matplotlib'}))}")
    assert find_spec("torch")
    return int(pytest.main(list(words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
