"""Installed plugins that misbehave: none ends, delays or changes the program beside it."""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import invalidate_caches
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import koopmon
from koopmon import plugin_calls
from koopmon.errors import KoopmonError, PluginError, came_from_signal
from koopmon.plugins import adapters, example_models, plugin_manager, select
from koopmon.profiling import capture_states

Install = Callable[..., str]
"""install(source, name of the distribution): the name of the module."""
numbers = itertools.count()
ADAPTER = """
import time, sys, itertools, koopmon, torch
from koopmon import ArchitectureAdapter, Observable, block_lists, hookimpl

class Theirs(ArchitectureAdapter):
    name = "theirs"

    def specificity(self, model):
        return 50

    def stacks(self, model):
        return [each.stack(residual=True) for each in block_lists(model)]

{methods}
@hookimpl
def koopmon_architecture_adapters():
    {hook}
"""
FOREVER = "while True:\n    pass"


def adapter(methods: str = "", hook: str = "return [Theirs()]") -> str:
    """Return the source of a plugin with one adapter that claims every model; `methods` go into its class."""
    return ADAPTER.format(methods=textwrap.indent(methods, "    "), hook=hook)


def method(name: str, body: str) -> str:
    return f"def {name}(self, *args):\n{textwrap.indent(body, '    ')}\n"


def write(site: Path, source: str, name: str = "theirs", module: str = "theirs_plugin") -> None:
    """Create a distribution with one module, as pip would leave it in `site`."""
    (site / f"{module}.py").write_text(source)
    info = site / f"{name}-1.2.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[koopmon.adapters]\n{name} = {module}\n")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install plugins for this process until the end of the test."""
    names = []
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(source: str, name: str = "theirs") -> str:
        # A thread of an earlier test may still import its plugin.
        names.append(f"theirs_{next(numbers)}")
        write(tmp_path, source, name, names[-1])
        invalidate_caches()
        return names[-1]

    yield put
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_calls.say_once.cache_clear()
    plugin_calls._overdue.clear()
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_calls, "SECONDS", 0.3)


@pytest.fixture
def model() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


IMPORTS = {
    "exit": ("import sys; sys.exit(7)", "called sys.exit(7)"),
    "interrupt": ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    "generator-exit": ("raise GeneratorExit", "raised GeneratorExit"),
    "group": ("raise BaseExceptionGroup('all', [SystemExit(1)])", "raised BaseExceptionGroup: all (1 sub-exception)"),
    "argparse": (
        "import argparse; parser = argparse.ArgumentParser(); parser.add_argument('--theirs'); parser.parse_args()",
        "called sys.exit(2)",
    ),
    "missing": ("import not_there_at_all", "raised ModuleNotFoundError: No module named 'not_there_at_all'"),
    "syntax": ("def (", "raised SyntaxError: invalid syntax (theirs"),
    "escapes": ("raise ValueError('\\x1b[31mred\\nand more')", "raised ValueError: ?[31mred"),
    "handler": ("import signal; signal.signal(2, lambda *_: None)", "raised ValueError: signal only works in main"),
    "message": (
        "class Error(Exception):\n    def __str__(self):\n        raise SystemExit(4)\nraise Error",
        "raised Error",
    ),
    "warning": ("import warnings; warnings.warn('old')", "raised UserWarning: old"),  # pytest turns them into errors
    "relative": ("from . import nothing", "raised ImportError"),
}


@pytest.mark.parametrize(("source", "what"), IMPORTS.values(), ids=IMPORTS)
def test_an_import_that_fails_in_any_way_skips_that_plugin_alone(
    source: str,
    what: str,
    install: Install,
    model: nn.Module,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.1"])
    install(source)
    manager = plugin_manager()
    assert list(manager.failures) == ["theirs"]
    assert manager.failures["theirs"].startswith(f"its import {what}")
    assert select(model, manager=manager).adapter.name == "transformer"
    plugin_manager()
    assert said(caplog) == [f"koopmon: plugin theirs (theirs 1.2) is skipped: {manager.failures['theirs']}"]


HOOKS = {
    "exit": ("sys.exit(9)", "called sys.exit(9)"),
    "exit-in-generator": ("yield Theirs(); sys.exit()", "called sys.exit(None)"),
    "interrupt": ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    "nothing": ("return None", "raised TypeError: 'NoneType' object is not iterable"),
    "class": ("return [Theirs]", "gives <class 'theirs_"),
    "long-name": ("Theirs.name = 'x' * 65; return [Theirs()]", "gives a Theirs whose name is 'xxx"),
    "measures": ("Theirs.measures = {'A B': ''}; return [Theirs()]", "gives adapter 'theirs', which cannot be used"),
}


@pytest.mark.parametrize(("hook", "what"), HOOKS.values(), ids=HOOKS)
def test_a_hook_that_fails_in_any_way_skips_that_plugin_alone(
    hook: str, what: str, install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    install(adapter(hook=hook))
    manager = plugin_manager()
    assert list(adapters(manager)) == ["kan", "mamba", "moe", "transformer"]
    assert manager.failures["theirs"].startswith(f"koopmon_architecture_adapters() {what}")
    assert select(model, manager=manager).adapter.name == "transformer"
    assert len(said(caplog)) == 1


def test_example_models_are_asked_for_in_the_same_way(install: Install) -> None:
    install("import koopmon, sys\n@koopmon.hookimpl\ndef koopmon_example_models():\n    sys.exit(1)\n")
    manager = plugin_manager()
    assert "torch-encoder" in [example.name for example in example_models(manager)]
    assert manager.failures == {"theirs": "koopmon_example_models() called sys.exit(1)"}


SLOW = {
    "import": (f"import time; time.sleep(20)\n{adapter()}", "its import"),
    "import-spins": (f"{FOREVER}\n{adapter()}", "its import"),
    "hook": (adapter(hook="time.sleep(20)"), "koopmon_architecture_adapters()"),
    "generator": (
        adapter(hook="yield from (Theirs() for _ in iter(int, 1) if False)"),
        "koopmon_architecture_adapters()",
    ),
    "specificity": (adapter(method("specificity", FOREVER)), "specificity() of its adapter 'theirs'"),
    "specificity-catches": (
        adapter(
            method(
                "specificity", "while True:\n    try:\n        time.sleep(0.01)\n    except Exception:\n        pass"
            )
        ),
        "specificity() of its adapter 'theirs'",
    ),
    "stacks": (
        adapter(method("stacks", "return (None for _ in iter(int, 1) if False)")),
        "stacks() of its adapter 'theirs'",
    ),
    "flags": (adapter(method("flags", "time.sleep(20)")), "flags() of its adapter 'theirs'"),
}


# The exception that ends a thread may hit a destructor, which ignores it with a warning. It is raised again.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("source", "what"), SLOW.values(), ids=SLOW)
def test_a_plugin_that_takes_too_long_is_left_behind(
    source: str, what: str, install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    install(source)
    before = plugin_calls.threading.enumerate()
    chosen = select(model)
    assert chosen.adapter.name == ("theirs" if "flags" in what else "transformer")
    assert any(f"{what} was not over when the 0.3 s of this plugin were" in line for line in said(caplog))
    began = time.monotonic()
    assert select(model).adapter.name == "transformer", "it is not tried again in this process"
    assert time.monotonic() - began < 0.3
    left = [each for each in plugin_calls.threading.enumerate() if isinstance(each, plugin_calls._Work)]
    new = [each for each in left if each not in before]
    assert len(new) == ("sleep(20)" in source), "what can be ended does not run beside the training"
    assert all(each.daemon for each in new)


@pytest.mark.parametrize(
    "source",
    [
        adapter(hook="yield from (Theirs() for _ in itertools.count())"),
        adapter(hook="return itertools.repeat(Theirs())"),
        adapter(method("stacks", "return itertools.repeat(1)")),
        adapter(method("flags", "return itertools.repeat('a')")),
    ],
    ids=["generator", "endless in C", "stacks", "flags"],
)
def test_an_endless_result_does_not_fill_the_memory(
    source: str, install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    install(source)
    assert select(model).adapter.name == ("theirs" if "'a'" in source else "transformer")
    assert any("gives more than 10000 items" in line for line in said(caplog))


@pytest.mark.usefixtures("hurried")
def test_each_rank_says_that_a_plugin_was_late_for_it(
    install: Install, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    install("raise ValueError", name="raises")
    install("import time; time.sleep(5)")
    plugin_manager()
    (line,) = said(caplog)
    assert line.startswith("koopmon: rank 3: plugin theirs (theirs 1.2): its import was not over")


@pytest.mark.usefixtures("hurried")
def test_the_time_of_a_plugin_is_that_of_all_its_calls(install: Install, model: nn.Module) -> None:
    naps = "".join(method(name, f"time.sleep(0.2); return {what}") for name, what in [("specificity", 50)])
    install(f"import time; time.sleep(0.2)\n{adapter(naps)}")
    assert select(model).adapter.name == "transformer"
    assert plugin_calls._overdue


@pytest.mark.usefixtures("hurried")
def test_an_import_of_another_package_is_not_cut_in_half(install: Install, tmp_path: Path) -> None:
    (tmp_path / "slow_library.py").write_text(
        "import sys, time\nsys.slow_begun = getattr(sys, 'slow_begun', 0) + 1\n"
        "for _ in range(100):\n    time.sleep(0.01)\nwhole = True\n"
    )
    install(f"import slow_library\n{adapter()}")
    manager = plugin_manager()
    assert "was not over" in manager.failures["theirs"]
    began = time.monotonic()
    import slow_library  # type: ignore[import-not-found]  # waits for the thread that imports it

    assert slow_library.whole
    assert vars(sys).pop("slow_begun") == 1
    assert time.monotonic() - began < 10
    del sys.modules["slow_library"]


CLAIMS = {
    "nan": "float('nan')",
    "inf": "float('inf')",
    "huge": "10 ** 9",
    "beyond": "101",
    "negative": "-1",
    "text": "'20'",
    "bool": "True",
    "float": "20.0",
    "numpy": "__import__('numpy').int64(20)",
    "none": "None",
    "tensor": "torch.tensor(50)",
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_specificity_that_is_no_integer_in_bounds_is_refused(
    claim: str, install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    install(adapter(method("specificity", f"return {claim}")))
    assert select(model).adapter.name == "transformer"
    (line,) = said(caplog)
    shown = repr(eval(claim))  # the quoted part of the line
    assert line == (
        f"koopmon: plugin theirs (theirs 1.2): specificity() of its adapter 'theirs' gives {shown}, "
        "allowed are integers from 0 to 100; the adapter is left out"
    )


BROKEN = {
    "specificity-exits": (method("specificity", "sys.exit(3)"), "called sys.exit(3)"),
    "specificity-interrupts": (method("specificity", "raise KeyboardInterrupt"), "raised KeyboardInterrupt"),
    "stacks-exits": (method("stacks", "sys.exit(3)"), "called sys.exit(3)"),
    "stacks-none": (method("stacks", "return None"), "raised TypeError"),
    "stacks-empty": (method("stacks", "return []"), "finds no stack of blocks"),
    "stacks-strings": (method("stacks", "return ['layers']"), "gives 'layers', expected a Stack"),
    "stacks-no-points": (method("stacks", "return [koopmon.Stack('a', ())]"), "whose points are not layers"),
    "stacks-of-others": (
        method("stacks", "return [koopmon.Stack('a', (koopmon.Point('b', torch.nn.Linear(1, 1), 0),))]"),
        "no module of the model",
    ),
}


@pytest.mark.parametrize(("methods", "what"), BROKEN.values(), ids=BROKEN)
def test_an_adapter_that_fails_on_a_model_leaves_it_to_the_next(
    methods: str, what: str, install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    install(adapter(methods))
    assert select(model).adapter.name == "transformer"
    line = said(caplog)[-1]
    assert "plugin theirs (theirs 1.2)" in line
    assert what in line
    with pytest.raises(KoopmonError, match="theirs"):
        select(model, adapter="theirs" if "stacks" in methods else "nothing")


FORWARD = {
    "exits": (method("block_output", "sys.exit(3)"), "block_output() of its adapter 'theirs' called sys.exit(3)"),
    "interrupts": (method("block_input", "raise KeyboardInterrupt"), "raised KeyboardInterrupt"),
    "text": (method("block_input", "return 'state'"), "gives a str, expected a tensor or None"),
    "no-chain": (method("block_output", "return args[1] + 1"), "is not the input of"),
}


@pytest.mark.parametrize(("methods", "what"), FORWARD.values(), ids=FORWARD)
def test_a_forward_pass_that_fails_or_shows_no_chain_is_made_again_without_that_adapter(
    methods: str, what: str, install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    install(adapter(methods))
    batch = torch.randn(4, 12, 16)
    assert koopmon.discover(model, batch).adapter.name == "transformer"
    assert capture_states(model, batch).discovery.adapter.name == "transformer"
    assert what in said(caplog)[-1]
    with pytest.raises(KoopmonError, match="theirs"):
        koopmon.discover(model, batch, adapter="theirs")


def test_a_more_specific_adapter_wins_and_the_line_says_whose_it_is(
    install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    module = install(adapter())
    found = koopmon.discover(model, torch.randn(4, 12, 16))
    assert type(found.adapter).__module__ == module, "what a user gets is the plugin's own object"
    assert said(caplog) == [
        "koopmon: adapter 'theirs' of plugin theirs (theirs 1.2) is used for TransformerEncoder with specificity 50, "
        "in place of koopmon's own 'transformer' with 10"
    ]


def test_an_equal_claim_leaves_the_model_to_koopmon_s_own_adapter(
    install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    install(adapter("name = 'aaa'\n" + method("specificity", "return 10")))
    assert select(model).adapter.name == "transformer"
    (line,) = said(caplog)
    assert "adapter 'transformer' is used for TransformerEncoder; adapter 'aaa' of plugin theirs (theirs 1.2)" in line
    assert "equal specificity 10" in line


def test_a_taken_name_leaves_the_name_to_koopmon_s_own_adapter(
    install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    install(adapter("name = 'transformer'\n"), name="a_first_name")
    manager = plugin_manager()
    assert type(adapters(manager)["transformer"]).__module__ == "koopmon_adapters.transformer"
    chosen = select(model, manager=manager).adapter
    assert type(chosen) is type(adapters(manager)["transformer"])
    assert manager.left_out == {
        ("a_first_name", "transformer"): f"its name is taken by plugin transformer (koopmon {koopmon.__version__})"
    }
    (line,) = said(caplog)
    assert line.startswith("koopmon: plugin a_first_name (a_first_name 1.2): adapter 'transformer' is left out")


def test_an_entry_point_of_a_built_in_name_displaces_nothing(install: Install, tmp_path: Path) -> None:
    module = install(adapter())
    (tmp_path / "theirs-1.2.dist-info" / "entry_points.txt").write_text(f"[koopmon.adapters]\ntransformer = {module}\n")
    manager = plugin_manager()
    assert sorted(adapters(manager)) == ["kan", "mamba", "moe", "theirs", "transformer"]
    assert type(adapters(manager)["transformer"]).__module__ == "koopmon_adapters.transformer"
    assert manager.calls(f"transformer of {module}").distribution == "theirs 1.2"


def test_a_damaged_list_of_entry_points_is_that_distribution_s_own_trouble(
    install: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(adapter(), name="whole")
    install(adapter(), name="damaged")
    (tmp_path / "damaged-1.2.dist-info" / "entry_points.txt").write_text("[koopmon.adapters]\nthis is no entry point\n")
    assert list(adapters()) == ["kan", "mamba", "moe", "theirs", "transformer"]
    assert said(caplog)[0].startswith("koopmon: the entry points of damaged 1.2 cannot be read")


CHANGES = {
    "torch-seed": ("torch.manual_seed(1)", "torch's random state"),
    "torch-draws": ("torch.rand(3)", "torch's random state"),
    "python-seed": ("__import__('random').seed(1)", "Python's random state"),
    "numpy-seed": ("__import__('numpy').random.seed(1)", "NumPy's random state"),
    "dtype": ("torch.set_default_dtype(torch.float64)", "the default dtype"),
    "threads": ("torch.set_num_threads(torch.get_num_threads() + 3)", "the number of threads"),
    "determinism": ("torch.use_deterministic_algorithms(True)", "the use of deterministic algorithms"),
    "anomaly": ("torch.autograd.set_detect_anomaly(True)", "anomaly detection"),
    "precision": ("torch.set_float32_matmul_precision('medium')", "float32 precision"),
    "directory": ("__import__('os').chdir('/')", "the working directory"),
    "warnings": (
        "__import__('warnings').filterwarnings('error', 'never said')",
        "which warnings are errors",
    ),
    "module-hook": (
        "torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 2)",
        "the hooks of all modules",
    ),
    "parameter-hook": (
        "torch.nn.modules.module.register_module_parameter_registration_hook(lambda *args: None)",
        "the hooks of all modules",
    ),
    "optimizer-hook": (
        "__import__('sys').modules['torch.optim.optimizer'].register_optimizer_step_pre_hook(lambda *args: None)",
        "the hooks of all optimizers",
    ),
    "recursion": ("__import__('sys').setrecursionlimit(500)", "the recursion limit"),
    "logging": ("__import__('logging').disable(20)", "the level of the log"),
    "paths": ("__import__('sys').path.clear()", "sys.path"),
    "own-path": ("__import__('sys').path.append('/of/a/plugin')", ""),
    "grad-mode": ("torch.set_grad_enabled(False)", ""),
    "inference-mode": ("torch.inference_mode(True).__enter__()", ""),
    "device": ("torch.set_default_device('meta')", ""),
    "autocast": ("torch.set_autocast_enabled('cpu', True)", ""),
}


HOOKS_OF_ALL = [
    table
    for module in ("torch.nn.modules.module", "torch.optim.optimizer")
    for name, table in vars(sys.modules[module]).items()
    if name.startswith("_global_") and isinstance(table, dict)
]


def everything() -> list[object]:
    """Return the state that determines the numbers of a training; draws no random number."""
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [each.tolist() if hasattr(each, "tolist") else each for each in np.random.get_state()],
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_deterministic_debug_mode(),
        torch.is_anomaly_enabled(),
        torch.get_float32_matmul_precision(),
        os.getcwd(),
        [list(each) for each in HOOKS_OF_ALL],
        sys.getrecursionlimit(),
        logging.root.manager.disable,
        [path for path in sys.path if path != "/of/a/plugin"],
        [each for each in warnings.filters if each[0] == "error"],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.empty(1).device,
        torch.is_autocast_enabled("cpu"),
    ]


@pytest.mark.parametrize("place", ["import", "hook", "specificity", "observables"])
@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_what_decides_a_training_s_numbers_is_put_back(
    change: str, name: str, place: str, install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    source = {
        "import": f"{adapter()}\n{change}\n",
        "hook": adapter(hook=f"{change}; return [Theirs()]"),
        "specificity": adapter(method("specificity", f"{change}\nreturn 50")),
        "observables": adapter(method("observables", f"{change}\nreturn []")),
    }[place]
    install(source)
    # An earlier test may have left the very states that the plugin sets.
    random.seed(20261129)
    np.random.seed(20261129)
    before = everything()
    selection = select(model)
    for family in selection.families:
        family.observables(selection.candidates[0])
    assert everything() == before
    assert selection.adapter.name == "theirs"
    lines = [line for line in said(caplog) if "koopmon has put it back" in line]
    assert len(lines) == bool(name)
    assert all(f"changed {name}" in line and "plugin theirs (theirs 1.2)" in line for line in lines)
    fresh = {}
    plugin_calls.threading.Thread(target=lambda: fresh.update(threads=torch.get_num_threads())).start()
    for _ in itertools.takewhile(lambda _: not fresh, range(100)):
        time.sleep(0.01)
    assert fresh == {"threads": torch.get_num_threads()}, "of threads that begin later, too"


def test_what_a_plugin_prints_does_not_mix_with_the_job_s_output(
    install: Install, capfd: pytest.CaptureFixture[str], model: nn.Module
) -> None:
    install(f"print('from import')\n{adapter(method('specificity', 'print(1 + 1)'), 'print(3); return [Theirs()]')}")
    select(model)
    out, err = capfd.readouterr()
    assert out == ""
    assert "from import" in err


def test_what_koopmon_can_do_without_is_left_out(
    install: Install, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("flags", "observables", "update_exponent", "thresholds", "kss_settings")
    install(adapter("".join(method(name, "sys.exit(1)") for name in (*names, "shielded"))))
    chosen = select(model)
    stack = chosen.candidates[0]
    assert chosen.flags == frozenset()
    assert list(chosen.adapter.observables(stack)) == []
    assert chosen.adapter.update_exponent(stack) is None
    assert chosen.adapter.thresholds() == chosen.adapter.kss_settings() == {}
    with pytest.raises(PluginError):
        chosen.adapter.shielded(stack)
    assert select(model).flags == frozenset()
    lines = [line for line in said(caplog) if line.endswith("is left out")]
    assert len(lines) == len(names)


@pytest.mark.parametrize("value", ["{'a': float('nan')}", "{'a': '1'}", "{'a': True}", "[1]", "{'x' * 65: 1.0}"])
def test_settings_that_are_no_finite_numbers_are_left_out(value: str, install: Install, model: nn.Module) -> None:
    install(adapter(method("thresholds", f"return {value}") + method("kss_settings", f"return {value}")))
    chosen = select(model).adapter
    assert chosen.thresholds() == chosen.kss_settings() == {}


def test_a_reading_that_fails_leaves_the_others(install: Install, model: nn.Module) -> None:
    reading = "return [Observable('mine', 0, args[0].points[0].module, lambda *_: {})]"
    for value in ("sys.exit(1)", "'text'", "torch.ones(2)"):
        plugin = install(adapter("measures = {'mine': 'Nothing.'}\n" + method("observables", reading.format(value))))
        chosen = select(model)
        (observable,) = chosen.adapter.observables(chosen.candidates[0])
        assert observable.read(observable.module, (), {}, None) is None
        sys.modules.pop(plugin)


def test_grad_mode_is_kept_in_the_forward_pass(install: Install, model: nn.Module) -> None:
    install(adapter(method("block_output", "torch.set_grad_enabled(False); return args[1]")))
    chosen = select(model)
    module = chosen.candidates[0].points[0].module
    assert chosen.adapter.block_output(module, torch.ones(1)) is not None
    assert torch.is_grad_enabled()


def test_a_plugin_that_asks_koopmon_for_plugins_does_not_wait_for_itself(install: Install, model: nn.Module) -> None:
    hook = "select(torch.nn.Sequential(torch.nn.Linear(2, 2))) if False else adapters(); return [Theirs()]"
    source = adapter(hook=hook).replace("import time", "from koopmon.plugins import adapters, select\nimport time", 1)
    install(source.replace("adapters();", "example_models();").replace("import adapters,", "import example_models,"))
    assert select(model).adapter.name == "theirs"


# Signals of the user.

HANGS = """
import os, sys, time
open({marker!r}, "w").close()
{wait}
"""
SCRIPT = """
import signal, sys
sys.path.insert(0, sys.argv[1])
{handler}
from koopmon.plugins import plugin_manager
try:
    plugin_manager()
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(23)
print("not reached")
"""


@pytest.mark.parametrize("wait", ["time.sleep(60)", "while True: pass"])
@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "handler", "status", "out"),
    [
        # A shell starts background jobs with SIGINT ignored, and a child inherits that.
        (signal.SIGINT, "signal.signal(signal.SIGINT, signal.default_int_handler)", 23, "interrupted\n"),
        (signal.SIGTERM, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))", 5, ""),
    ],
    ids=["ctrl-c", "handler"],
)
def test_a_signal_of_the_user_s_ends_what_waits_for_a_plugin(
    wait: str, number: signal.Signals, handler: str, status: int, out: str, tmp_path: Path
) -> None:
    marker = tmp_path / "begun"
    write(tmp_path, HANGS.format(marker=str(marker), wait=wait))
    script = SCRIPT.format(handler=handler)
    job = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    sent = time.monotonic()
    job.send_signal(number)
    output, errors = job.communicate(timeout=60)
    assert (job.returncode, output) == (status, out), errors
    assert time.monotonic() - sent < plugin_calls.SECONDS, "it did not wait for the plugin"


ENDS = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from koopmon import plugin_calls
plugin_calls.SECONDS = 0.3
from koopmon.plugins import adapters
assert "transformer" in adapters()
print("trained", flush=True)
sys.exit(17)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    "wait",
    [
        "time.sleep(3600)",
        "import torch\nwhile True:\n    try:\n        torch.ones(300, 300) @ torch.ones(300, 300)\n    except: pass",
        "import threading\nthreading.Thread(target=time.sleep, args=(3600,)).start(); time.sleep(3600)",
    ],
    ids=["sleeps", "computes", "starts-threads"],
)
def test_a_thread_that_was_left_behind_does_not_hold_up_the_end(wait: str, tmp_path: Path) -> None:
    write(tmp_path, f"import time\n{wait}\n")
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (17, "trained\n"), done.stderr
    assert done.stderr.count("\n") == 1


def raised(function: Callable[[], object]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def interrupt() -> None:
    raise KeyboardInterrupt


def through_handler(number: signal.Signals, handler: object) -> Callable[[], None]:
    def strike() -> None:
        before = signal.signal(number, handler)  # type: ignore[arg-type]
        try:
            signal.raise_signal(number)
            for _ in range(100):
                pass
        finally:
            signal.signal(number, before)

    return strike


class Handler:
    def __call__(self, number: int, frame: object) -> None:
        self.finish(3)

    def finish(self, status: int) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        sys.exit(status)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (interrupt, False),
        (lambda: sys.exit(1), False),
        (lambda: [][0], False),
        (lambda: exec("import sys\nraise SystemExit(3)"), False),
        (through_handler(signal.SIGINT, signal.default_int_handler), True),
        (through_handler(signal.SIGTERM, signal.default_int_handler), True),
        (through_handler(signal.SIGUSR1, lambda *_: sys.exit(2)), True),
        (through_handler(signal.SIGUSR1, lambda number, frame: interrupt()), True),
        (through_handler(signal.SIGUSR1, Handler()), True),
        (through_handler(signal.SIGUSR1, lambda number, frame: {}["timeout"]), True),
    ],
)
def test_what_a_signal_raised_is_told_from_what_code_raised(function: Callable[[], object], expected: bool) -> None:
    assert came_from_signal(raised(function)) is expected
