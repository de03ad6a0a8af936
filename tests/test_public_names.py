"""Public names of `import koopmon`, and its import time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import koopmon

ROOT = Path(__file__).parents[1]


@pytest.mark.process
def test_import_is_light() -> None:
    """In another process: neither the package nor its directory listing imports heavy modules."""
    script = (
        "import sys, json, koopmon; dir(koopmon); koopmon.__version__; koopmon.KoopmonError; "
        "print(json.dumps([name for name in ('torch', 'numpy', 'zmq', 'pluggy', 'msgspec') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("name", koopmon.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(koopmon, name) is not None
    assert name in dir(koopmon)


def test_lazy_names_are_all_public() -> None:
    assert set(koopmon._HOMES) | {"__version__"} == set(koopmon.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = koopmon.atach


def test_the_version_is_the_distribution_s() -> None:
    from importlib.metadata import version

    assert koopmon.__version__ == version("koopmon")


def test_the_version_stands_in_one_place() -> None:
    """`koopmon.__version__` is the only source of the version.

    The distribution and other files agree with it, and no module reads the metadata of an installed distribution.
    """
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in pyproject["project"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "koopmon.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == koopmon.__version__
    shown = set(re.findall(r"koopmon (\d+\.\d+\.\d+)", (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")))
    assert shown == {koopmon.__version__}
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "koopmon").rglob("*.py")}
    assert [path.name for path, text in sources.items() if f'"{koopmon.__version__}"' in text] == ["__init__.py"]
    # The doctor's script reads it in the interpreter of the job, which may be another one.
    asking = [path.name for path, text in sources.items() if 'version("koopmon")' in text]
    assert asking in ([], ["machine.py"], ["environment.py"])
