"""pytest as in an install of `.[test]`: `python -m tests.plain_install [arguments of pytest]`.

Imports fail for modules that such an install would not have. It has koopmon's dependencies, those of the extra `test`,
and their dependencies, by the metadata of the installed distributions.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
THERE = {"koopmon", "koopmon_adapters", "pip", *sys.stdlib_module_names}


def brought() -> set[str]:
    """Return the distributions that `.[test]` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    waiting = [Requirement(line) for line in (*project["dependencies"], *extras["monitor"], *extras["test"])]
    found: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        extras = wanted.extras or {""}
        name = canonicalize_name(wanted.name)
        if (
            name in found
            or name == "koopmon"
            or not any(wanted.marker is None or wanted.marker.evaluate({"extra": e}) for e in extras)
        ):
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
    """Return top-level modules that are installed here and missing there."""
    there = brought()
    return frozenset(
        module
        for module, owners in packages_distributions().items()
        if module not in THERE and not any(canonicalize_name(owner) in there for owner in owners)
    )


class Hiding:
    """Finder of sys.meta_path that does not find some modules."""

    def __init__(self, finder: Any, modules: frozenset[str]) -> None:
        self._finder, self._modules = finder, modules

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in self._modules else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def main(words: Sequence[str]) -> int:
    modules = absent()
    sys.meta_path[:] = [Hiding(finder, modules) for finder in sys.meta_path]  # type: ignore[misc]
    for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
        del sys.modules[name]
    print(f"hidden: {len(modules)} modules, such as {', '.join(sorted(modules & {'httpx', 'scipy', 'matplotlib'}))}")
    return int(pytest.main(list(words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
