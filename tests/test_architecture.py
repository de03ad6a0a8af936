"""Architecture rules: allowed imports between packages, and restricted uses.

The tests read every import in koopmon/ and plugins/, also inside functions, behind TYPE_CHECKING and by
`import_module`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import koopmon

HOUSE = Path(__file__).parent.parent
SOURCES = sorted(path.relative_to(HOUSE) for part in ("koopmon", "plugins") for path in (HOUSE / part).rglob("*.py"))

ROOMS = {
    "errors": "",
    "files": "errors",
    "logs": "errors",
    "deadline": "",
    "http_client": "deadline",
    "numbers": "",
    "no_gradients": "",
    "spectral": "errors numbers",
    "wire": "errors files",
    "config": "errors logs wire",  # a value that becomes part of a message has the bounds of the message
    "run_names": "errors wire",
    "risk": "errors numbers config spectral wire",
    "policy": "errors config risk wire",
    "history": "errors files logs config spectral wire",
    "telemetry": "errors numbers config spectral risk wire",
    "offline": "errors config spectral risk policy history",
    "views": "errors config spectral risk policy wire history telemetry",
    "planes": "",
    "api": "errors planes",
    "hookspecs": "errors api",
    "block_finder": "errors api",
    "state_position": "api",
    "observed_states": "spectral",
    "traversals": "api observed_states state_position",
    "lineage": "",
    "walk": "api",
    "candidate_trace": "api state_position lineage traversals",
    "chain_verifier": (
        "errors api block_finder planes state_position spectral observed_states lineage traversals candidate_trace"
    ),
    "token_sampling": "errors",
    "observables": "errors numbers no_gradients api",
    "process_state": "errors",
    "plugin_calls": "errors logs process_state",
    "guarded_adapter": "errors api observables plugin_calls",
    "plugin_loading": "errors api hookspecs plugin_calls",
    "plugins": "errors api hookspecs block_finder guarded_adapter plugin_calls plugin_loading",
    "discovery": "errors api block_finder chain_verifier plugins",
    "profiling": (
        "errors api block_finder state_position chain_verifier walk plugins discovery token_sampling observables "
        "spectral"
    ),
    "rate_probe": "errors api config discovery profiling risk spectral token_sampling wire",
    "agent": (
        "errors logs run_names config spectral wire api hookspecs block_finder planes state_position candidate_trace "
        "chain_verifier walk token_sampling observables plugins discovery process_state files no_gradients"
    ),
    "conformance": "errors config spectral wire api chain_verifier token_sampling observables plugins discovery agent",
    "grafana": "errors config telemetry files deadline http_client",
    "notify": "errors config files deadline http_client",
    "monitor": (
        "errors logs numbers deadline http_client config spectral risk wire policy files history telemetry grafana "
        "notify views"
    ),
    "integrations": "errors logs config agent profiling spectral risk",  # the last three for Optuna
    "plots": "errors spectral risk",
    "report": "errors numbers config spectral risk history views",
    "doctor": "errors config http_client wire api plugins discovery agent",
    "demo": "errors config spectral risk plots history views",
    "cli": "*",
    "__main__": "cli",
    "__init__": "*",  # by name and lazily: see test_imports_stay_light
}
"""Allowed imports of each package of koopmon from koopmon. Imports point downwards; a new package needs a line here."""

ALONE = {
    "zmq": tuple(f"koopmon/wire/{name}.py" for name in ("transport", "client", "server", "sockets", "curve")),
    "grafana_client": "koopmon/grafana/push.py",
    "yaml": ("koopmon/grafana/", "koopmon/monitor/http/web_config.py"),
    "opentelemetry": "koopmon/monitor/otlp.py",
    "bcrypt": "koopmon/monitor/http/web_config.py",
    "niquests": "koopmon/grafana/push.py",
    "prometheus_client": ("koopmon/telemetry/", "koopmon/monitor/"),
    "sqlite3": "koopmon/history/",
    "starlette": "koopmon/monitor/http/",
    "uvicorn": "koopmon/monitor/http/",
    "matplotlib": "koopmon/plots.py",
    "jinja2": "koopmon/views/html.py",
    "typer": "koopmon/cli/",
    "pyarrow": "koopmon/cli/table_writers.py",
}
"""Modules with a restricted use, and the files that may use them."""

THIRD_PARTY = {
    "spectral": {"torch"},
    "risk": {"torch", "msgspec"},
    "api": {"torch"},
    "block_finder": {"torch"},
    "errors": set(),
}
"""Packages that may import only these besides the standard library."""

MODEL_LIBRARIES = {"transformers", "mambapy", "kan"}
"""Packages that a plugin may import late, inside the function that builds an example model only."""

BANNED = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
DRAWERS = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
LOGGING_SETUP = {
    "basicConfig",
    "dictConfig",
    "fileConfig",
    "addHandler",
    "removeHandler",
    "captureWarnings",
    "setLevel",
}


def imports(source: str, module: str) -> Iterator[str]:
    """Return the full names of the imports of a module; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                if level:
                    parents = module.split(".")[:-level]
                    origin = ".".join([*parents, origin] if origin else parents)
                yield from (f"{origin}.{alias.name}" for alias in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function).split(".")[-1] in ("import_module", "__import__"):
                    yield name


def imports_within_functions(source: str, module: str) -> Iterator[str]:
    """Return the full names of imports inside functions that are not also outside."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = {name for node in functions for name in imports(ast.unparse(node), module)}
    functions_out = [ast.unparse(node) for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    yield from inner - set(imports("\n".join(functions_out), module))


def home(name: str) -> str | None:
    """Return the package of koopmon with a full name; None for koopmon itself and its version."""
    _, _, rest = name.partition(".")
    rest = koopmon._HOMES.get(rest, f"koopmon.{rest}").partition(".")[2]
    room = rest.split(".")[0]
    return None if room in ("", "__version__") else room


def violations(path: Path, source: str) -> list[str]:
    """Return the violations of one file in words; `path` is relative to the repository."""
    module = ".".join(path.with_suffix("").parts)
    is_plugin = path.parts[0] == "plugins"
    room = "" if is_plugin else path.with_suffix("").parts[1]
    found = [f"a drawer named {part}" for part in path.with_suffix("").parts if part.lstrip("_") in DRAWERS]
    allowed = ROOMS.get(room)
    if not is_plugin and allowed is None:
        return [*found, f"room {room!r} is not in the plan"]
    late = set(imports_within_functions(source, module)) if is_plugin else set()
    for name in imports(source, module):
        top = name.split(".")[0]
        if top in BANNED:
            found.append(f"imports {top}: nothing is unpickled here")
        if top in ALONE and not path.as_posix().startswith(ALONE[top]):  # a tuple: any of them
            found.append(f"imports {top}, which is for {ALONE[top]} alone")
        if is_plugin:
            public = top == "koopmon" and name.partition(".")[2] in ("", *koopmon.__all__)
            example = top in MODEL_LIBRARIES and name in late
            if not public and not example and top != "torch" and top not in sys.stdlib_module_names:
                found.append(f"a plugin imports {name}, which is neither a public name of koopmon, nor torch")
            continue
        if top == "koopmon":
            target = home(name)
            if target not in (None, room) and allowed != "*" and target not in (allowed or "").split():
                found.append(f"{room} imports {name}: not down the arrows")
        elif room in THIRD_PARTY and top not in THIRD_PARTY[room] and top not in sys.stdlib_module_names:
            found.append(f"{room} imports {name}")
        if path.as_posix() == "koopmon/wire/codec.py" and name.startswith("koopmon.wire.sockets"):
            found.append("the codec knows of sockets")
    if room != "cli":
        calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        names = {function.attr for function in calls if isinstance(function, ast.Attribute)}
        found += [f"calls {name}: only the command line configures logging" for name in sorted(names & LOGGING_SETUP)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_file_keeps_to_the_plan(path: Path) -> None:
    assert violations(path, (HOUSE / path).read_text(encoding="utf-8")) == []


def test_all_rooms_are_read() -> None:
    assert {"agent", "monitor", "spectral", "wire"} <= {path.parts[1] for path in SOURCES}
    assert any(path.parts[:2] == ("plugins", "koopmon_adapters") for path in SOURCES)


def test_the_plan_has_no_circles() -> None:
    seen: set[str] = set()
    for room, below in ROOMS.items():
        assert below == "*" or set(below.split()) <= seen, f"{room} stands below what it imports"
        seen.add(room)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("koopmon/agent/x.py", "from koopmon.monitor import daemon"),
        ("koopmon/agent/x.py", "def f():\n    import koopmon.monitor.daemon"),
        ("koopmon/agent/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..monitor import daemon"),
        ("koopmon/agent/x.py", "from importlib import import_module\nimport_module('koopmon.monitor.daemon')"),
        ("koopmon/agent/x.py", "from koopmon import profile"),
        ("koopmon/agent/x.py", "from koopmon.risk import initial_risk"),
        ("koopmon/monitor/x.py", "from koopmon.agent.attach import attach"),
        ("koopmon/monitor/x.py", "from koopmon import attach"),
        ("koopmon/monitor/x.py", "from koopmon.api import Stack"),
        ("koopmon/monitor/x.py", "from koopmon.discovery import discover"),
        ("koopmon/monitor/x.py", "import zmq"),
        ("koopmon/wire/codec.py", "import zmq"),
        ("koopmon/wire/codec.py", "from koopmon.wire.sockets import check_endpoint"),
        ("koopmon/wire/codec.py", "from .sockets import check_endpoint"),
        ("koopmon/wire/codec.py", "from . import sockets"),
        ("koopmon/wire/keys.py", "from zmq.auth import create_certificates"),
        ("koopmon/wire/buffer_pool.py", "import koopmon.config"),
        ("koopmon/spectral/x.py", "import numpy"),
        ("koopmon/spectral/x.py", "from koopmon.config import Config"),
        ("koopmon/risk/x.py", "from koopmon.history.reader import HistoryReader"),
        ("koopmon/report.py", "import grafana_client"),
        ("koopmon/agent/x.py", "import prometheus_client"),
        ("koopmon/agent/x.py", "import pickle"),
        ("koopmon/agent/x.py", "import logging\nlogging.basicConfig()"),
        ("koopmon/agent/x.py", "import logging\nlogging.getLogger('koopmon').setLevel(10)"),
        ("koopmon/monitor/x.py", "import logging.config\nlogging.config.dictConfig({})"),
        ("koopmon/monitor/utils.py", ""),
        ("koopmon/helpers/x.py", ""),
        ("koopmon/agent/_common.py", ""),
        ("koopmon/attic/x.py", ""),
        ("plugins/koopmon_adapters/x.py", "from koopmon.api import Stack"),
        ("plugins/koopmon_adapters/x.py", "import koopmon.api"),
        ("plugins/koopmon_adapters/x.py", "from koopmon_adapters.transformer import TransformerAdapter"),
        ("plugins/koopmon_adapters/x.py", "from .transformer import TransformerAdapter"),
        ("plugins/koopmon_adapters/x.py", "import transformers"),
        ("plugins/koopmon_adapters/x.py", "import transformers\ndef build():\n    import transformers"),
        ("plugins/koopmon_adapters/x.py", "if True:\n    import transformers"),
        ("plugins/koopmon_adapters/x.py", "class A:\n    import transformers"),
        ("plugins/koopmon_adapters/x.py", "def build():\n    import numpy"),
        ("plugins/koopmon_adapters/x.py", "import numpy"),
    ],
)
def test_a_breach_is_seen(path: str, source: str) -> None:
    assert violations(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("koopmon/agent/x.py", "from koopmon import __version__, attach\nfrom koopmon.wire.sockets import DataSender"),
        ("koopmon/monitor/x.py", "from ..wire import codec\nimport logging\nlogging.getLogger(__name__).info('x')"),
        ("koopmon/cli/x.py", "import logging\nfrom koopmon import agent, monitor\nlogging.basicConfig()"),
        ("plugins/koopmon_adapters/x.py", "import torch\nfrom koopmon import ArchitectureAdapter, hookimpl"),
        ("plugins/koopmon_adapters/x.py", "def build():\n    from transformers import LlamaConfig"),
        ("koopmon/wire/sockets.py", "import zmq"),
        ("koopmon/wire/curve.py", "import zmq"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


LIGHT = """
import sys
def check(module, *absent):
    __import__(module)
    loaded = [name for name in absent if name in sys.modules]
    assert not loaded, f"import {module} loads {loaded}"
heavy = "torch", "numpy", "zmq", "msgspec", "prometheus_client", "starlette", "uvicorn", "matplotlib", "transformers"
check("koopmon", *heavy)
check("koopmon.wire.endpoints", *heavy)
check("koopmon.wire.auth_policy", "torch", "numpy", "zmq")
check("koopmon.wire.messages", "torch", "numpy", "zmq")
check("koopmon.cli", "torch", "zmq", "matplotlib", "transformers")
check("koopmon.history.reader", "torch", "numpy", "zmq")
check("koopmon.offline.replay", "torch", "numpy", "zmq")
check("koopmon.report.run_report", "torch", "zmq")
check("koopmon.grafana.push", "torch", "zmq", "grafana_client", "niquests")
check("koopmon.spectral", "zmq", "koopmon.wire.codec", "koopmon.agent.attach")
check("koopmon.wire.codec", "zmq")
check("koopmon.agent.attach", "koopmon.monitor.daemon", "starlette", "uvicorn", "matplotlib", "transformers")
check("koopmon.monitor.daemon", "grafana_client", "niquests", "httpx", "matplotlib")
"""


LIGHT_LAUNCHER = """
import sys, koopmon.cli.run, koopmon.wire.probe
assert "torch" not in sys.modules, "a launcher that asks for a monitor loads torch"
"""


@pytest.mark.process
@pytest.mark.parametrize("script", [LIGHT, LIGHT_LAUNCHER], ids=["library", "launcher"])
def test_imports_stay_light(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_docstring_begins_with_a_relative_clause() -> None:
    """A summary line is an imperative or a noun phrase, and does not start with "What"."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{path}: {text.splitlines()[0]}"
        for path in SOURCES
        for node in ast.walk(ast.parse((HOUSE / path).read_text(encoding="utf-8")))
        if isinstance(node, kinds) and (text := ast.get_docstring(node) or "")
        if text.split()[0] in ("What", "Whether", "Where", "How", "That")
    ]
    assert SOURCES
    assert found == []


FACTORIES = re.compile("arange|as_tensor|asarray|empty|eye|full|linspace|ones|rand|randint|randn|randperm|tensor|zeros")
BESIDE_A_TRAINING = [path for path in SOURCES if path.parts[0] == "koopmon" and path.parts[1] != "demo"]


@pytest.mark.parametrize("path", BESIDE_A_TRAINING, ids=str)
def test_a_tensor_has_a_device_of_its_own(path: Path) -> None:
    """Without one it lies on the user's default device: `torch.set_default_device` may be "cuda" or "meta"."""
    for node in ast.walk(ast.parse((HOUSE / path).read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if FACTORIES.fullmatch(name):
                named = {keyword.arg for keyword in node.keywords}
                assert named & {"device", None}, f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_no_two_classes_share_a_name() -> None:
    names: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse((HOUSE / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(str(path))
    assert len(names) > 100
    twice = {name for name, paths in names.items() if len(paths) > 1}
    assert twice == {"KoopmonCallback"}, "one for each trainer, and a script imports one of them"
