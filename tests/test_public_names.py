"""What `import koopmon` gives, and what it must not cost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import koopmon


def test_import_is_light() -> None:
    """In a process of its own: neither the package nor its directory listing imports what is heavy."""
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
