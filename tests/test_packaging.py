"""The wheel contains the needed files and no others, and a plain install imports without an extra."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

import koopmon
from tests.distributions import build, closure, copy_of_tracked, requirements, tracked

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_tracked(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(build("wheel", source, tmp_path_factory.mktemp("wheel"))) as archive:
        yield archive


@pytest.mark.process
def test_the_source_distribution_is_complete(source: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """It has every tracked file, and its wheel is that of the repository."""
    with tarfile.open(build("sdist", source, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.glob("koopmon-*/")
    held = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    assert tracked() - held == set()
    assert {name for name in held - tracked() if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}
    with zipfile.ZipFile(build("wheel", tree, tmp_path)) as rebuilt:
        names = set(wheel.namelist())
        assert set(rebuilt.namelist()) == names
        differ = [name for name in names if rebuilt.read(name) != wheel.read(name)]
        assert [name for name in differ if not name.endswith("/RECORD")] == []


@pytest.mark.process
def test_the_wheel_holds_both_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in (
        "koopmon/__init__.py",
        "koopmon/__main__.py",
        "koopmon/py.typed",
        "koopmon/cli/run.py",
        "koopmon/demo/train.py",
        "koopmon/wire/PROTOCOL.md",
        "koopmon/grafana/dashboards/koopmon-run.json",
        "koopmon/grafana/pages/alerts.md",
        "koopmon/monitor/http/static/icon.svg",
        "koopmon/monitor/http/static/live.css",
        "koopmon/monitor/http/static/live.js",
        "koopmon/telemetry/alerts.yml",
        "koopmon/risk/calibrator.json",
        "koopmon/agent/_autoload/sitecustomize.py",
        "koopmon_adapters/__init__.py",
        "koopmon_adapters/kan.py",
        "koopmon_adapters/mamba.py",
        "koopmon_adapters/moe.py",
        "koopmon_adapters/transformer.py",
        "koopmon_adapters/py.typed",
    ):
        assert name in names, name
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.process
def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"koopmon", "koopmon_adapters"}
    for name in wheel.namelist():
        assert "sitecustomize" not in name or name == "koopmon/agent/_autoload/sitecustomize.py", name


@pytest.mark.process
def test_every_file_of_the_tree_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    """Modules, templates, style sheets."""
    tracked = subprocess.run(
        ["git", "ls-files", "koopmon", "plugins"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = {name.removeprefix("plugins/") for name in tracked.stdout.splitlines() if (ROOT / name).is_file()}
    assert modules <= set(wheel.namelist())


@pytest.mark.process
def test_entry_points_and_requirements(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(entry_points).decode()
    assert "[console_scripts]\nkoopmon = koopmon.cli:main" in text
    assert "[koopmon.adapters]\nkan = koopmon_adapters.kan\nmamba = koopmon_adapters.mamba\n" in text
    assert "\ntransformer = koopmon_adapters.transformer\n" in text
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    told = Parser().parsestr(wheel.read(metadata).decode())
    assert told["Version"] == koopmon.__version__
    assert told["Requires-Python"] == ">=3.11"
    pinned = [each for each in requirements(wheel) if any(spec.operator == "==" for spec in each.specifier)]
    assert pinned == [], "pins belong to constraints.txt"


@pytest.mark.process
def test_the_agent_adds_at_most_five_packages_beside_torch(wheel: zipfile.ZipFile) -> None:
    plain = {each.name for each in requirements(wheel) if each.marker is None}
    assert plain == {"numpy", "msgspec", "pyzmq", "pluggy"}
    assert len(closure(*plain) - closure("torch")) + 1 <= 5


def test_the_extras_have_bounds_where_a_next_version_may_break_them() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    bounded = {line.split(">")[0] for line in (*extras["monitor"], *extras["otlp"]) if "<" in line}
    assert bounded >= {"uvicorn", "starlette", "typer", "prometheus-client", "opentelemetry-sdk"}
    assert any(line.startswith("torch>=") for line in extras["monitor"])


def test_every_direct_dependency_is_pinned_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [line for extra in extras.values() for line in extra]
    names = {line.split(">")[0].split("[")[0].strip() for line in wanted} - {"koopmon"}
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    assert names <= set(pins)
    assert pins["torch"] == "2.13.0"


def test_every_dependency_has_its_reason() -> None:
    project, _, _ = (ROOT / "pyproject.toml").read_text().partition("[project.urls]")
    _, _, lists = project.partition("\ndependencies = [")
    lines = re.findall(r'^  "[a-z].*$', lists, re.MULTILINE)
    assert len(lines) > 50
    assert [line for line in lines if "# " not in line] == []


EXTRAS = (
    "matplotlib",
    "grafana_client",
    "transformers",
    "lightning",
    "tensorboard",
    "wandb",
    "optuna",
    "scipy",
    "pydmd",
    "hypothesis",
    "httpx",
    "x_transformers",
    "mambapy",
    "kan",
    "sklearn",
    "pandas",
    "pyarrow",
    "polars",
    "duckdb",
)


@pytest.mark.process
def test_a_plain_install_imports_without_any_extra() -> None:
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(name + " is an extra", name=name)
sys.meta_path.insert(0, Absent())
import importlib, pkgutil
import koopmon, koopmon.errors, koopmon_adapters
count = 0
for package in (koopmon, koopmon_adapters):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name == "koopmon.__main__":
            continue
        try:
            importlib.import_module(module.name)
        except koopmon.errors.MissingExtraError:
            # It belongs to a library with its own trainer; the import of this file selects it.
            assert module.name.startswith("koopmon.integrations."), module.name
        count += 1
print(count)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


@pytest.mark.process
def test_importing_koopmon_is_light() -> None:
    code = "import koopmon, sys; print([name for name in ('torch', 'numpy', 'zmq') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
