"""Loading of plugins. A faulty one is skipped without an effect on others."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from torch import nn

import koopmon
from koopmon import plugin_calls
from koopmon.api import ArchitectureAdapter, Point, Stack
from koopmon.plugin_calls import say_once
from koopmon.plugin_loading import GROUP
from koopmon.plugins import PluginManager, adapters, example_models, original, plugin_manager, select


class Fixed(ArchitectureAdapter):
    """Adapter that claims every model alike; its only stack is the model's children."""

    def __init__(self, name: str, claim: int) -> None:
        self.name = name  # type: ignore[misc]
        self.claim = claim

    def specificity(self, model: nn.Module) -> int:
        return self.claim

    def stacks(self, model: nn.Module) -> list[Stack]:
        points = tuple(Point(name, child, layer) for layer, (name, child) in enumerate(model.named_children()))
        return [Stack("children", points)] if points else []


class Offers:
    """Plugin."""

    def __init__(self, *offered: object) -> None:
        self.offered = offered

    @koopmon.hookimpl
    def koopmon_architecture_adapters(self) -> list[object]:
        return list(self.offered)


class Raises:
    @koopmon.hookimpl
    def koopmon_architecture_adapters(self) -> list[object]:
        raise RuntimeError("no luck\nand more")


class Misspelt:
    @koopmon.hookimpl
    def koopmon_architecture_adaptors(self) -> list[object]:
        return []


def manager_of(**registered: object) -> PluginManager:
    manager = PluginManager()
    for name, plugin in registered.items():
        manager.register(plugin, name=name)
    return manager


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    say_once.cache_clear()


def test_built_in_adapters_enter_through_the_entry_point() -> None:
    manager = plugin_manager()
    named = {entry.name for entry in entry_points(group=GROUP)}
    assert "transformer" in named
    assert {name for name, _ in manager.list_name_plugin()} == named
    assert manager.failures == {}
    assert type(adapters(manager)["transformer"]).__module__ == "koopmon_adapters.transformer"


def test_each_manager_is_its_own() -> None:
    plugin_manager().register(Offers(Fixed("mine", 1)), name="mine")
    assert "mine" not in adapters()


def test_a_plugin_s_adapter_is_offered_and_chosen(model: nn.Module) -> None:
    manager = plugin_manager()
    mine = Fixed("mine", 30)
    manager.register(Offers(mine), name="mine")
    assert list(adapters(manager)) == sorted(["mine", *adapters()])
    selection = select(model, manager=manager)
    assert original(selection.adapter) is mine
    assert [stack.name for stack in selection.candidates] == ["children"]
    assert selection.flags == frozenset()


def test_the_highest_specificity_wins(model: nn.Module) -> None:
    manager = manager_of(a=Offers(Fixed("low", 1), Fixed("high", 20)), b=Offers(Fixed("middle", 10)))
    assert select(model, manager=manager).adapter.name == "high"
    assert select(model, adapter="low", manager=manager).adapter.name == "low"


def test_a_tie_goes_to_the_first_name_and_says_so_once(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    manager = manager_of(a=Offers(Fixed("two", 20)), b=Offers(Fixed("one", 20)), c=Offers(Fixed("low", 1)))
    assert [select(model, manager=manager).adapter.name for _ in range(2)] == ["one", "one"]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "koopmon: adapter 'one' of plugin b is used for Sequential; adapter 'two' of plugin a claims it with equal "
        "specificity 20: [model] adapter = 'two' takes that one"
    ]
    assert select(model, adapter="two", manager=manager).adapter.name == "two"


def test_an_unknown_name_lists_the_allowed_ones(model: nn.Module) -> None:
    with pytest.raises(
        koopmon.AdapterError, match=r"adapter = 'transfromer': allowed are kan, mamba, moe, transformer"
    ):
        select(model, adapter="transfromer")


def test_an_instance_is_taken_as_it_is(model: nn.Module) -> None:
    mine = Fixed("mine", 0)
    assert select(model, adapter=mine).adapter is mine


def test_nothing_fits_lists_what_was_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(koopmon.DiscoveryError) as caught:
        select(model)
    assert "no adapter (" in str(caught.value)
    assert "the model itself (2 x Linear, ReLU: single layers, no blocks)" in str(caught.value)
    with pytest.raises(koopmon.DiscoveryError, match="no list of modules"):
        select(nn.Linear(2, 2))
    with pytest.raises(koopmon.DiscoveryError, match="adapter 'mine' finds no stack of blocks in Linear"):
        select(nn.Linear(2, 2), adapter=Fixed("mine", 1))


def test_what_was_seen_stays_one_short_line() -> None:
    model = nn.ModuleDict({f"part{index}": nn.ModuleList([nn.Linear(2, 2)]) for index in range(100)})
    with pytest.raises(koopmon.DiscoveryError) as caught:
        select(model)
    assert "\n" not in str(caught.value)
    assert "and 85 more" in str(caught.value)


def test_an_unknown_stack_lists_the_allowed_ones(model: nn.Module) -> None:
    with pytest.raises(koopmon.DiscoveryError, match=r"stack = 'layers': .* it has children, the model itself"):
        select(model, adapter=Fixed("mine", 1), stack="layers")


def test_any_container_can_be_named_a_stack(model: nn.Module) -> None:
    selection = select(model, adapter="transformer", stack="")
    assert [point.module for stack in selection.candidates for point in stack.points] == list(model)


def test_one_name_from_two_plugins_is_the_first_ones(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Fixed("same", 1), Fixed("same", 1)
    manager = manager_of(second=Offers(second, Fixed("other", 1)), first=Offers(first))
    known = adapters(manager)
    assert list(known) == ["other", "same"]
    assert original(known["same"]) is first
    assert manager.left_out == {("second", "same"): "its name is taken by plugin first"}
    assert [record.getMessage() for record in caplog.records] == [
        "koopmon: plugin second: adapter 'same' is left out: its name is taken by plugin first"
    ]


def test_a_misspelt_hook_is_caught() -> None:
    with pytest.raises(koopmon.AdapterError, match=r"plugin bad: .*koopmon_architecture_adaptors"):
        adapters(manager_of(bad=Misspelt()))


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (Raises(), "raised RuntimeError: no luck"),
        (Offers("transformer"), "gives 'transformer', which is not an instance of ArchitectureAdapter"),
        (Offers(Fixed("", 1)), "gives a Fixed whose name is '', allowed are 1 to 64 characters"),
        (Offers(Fixed("a\nb", 1)), "gives a Fixed whose name is 'a\\nb', allowed are 1 to 64 characters"),
    ],
)
def test_a_plugin_that_fails_is_left_out(
    plugin: object, reason: str, caplog: pytest.LogCaptureFixture, model: nn.Module
) -> None:
    manager = manager_of(bad=plugin, good=Offers(Fixed("good", 1)))
    assert list(adapters(manager)) == ["good"]
    assert manager.failures == {"bad": f"koopmon_architecture_adapters() {reason}"}
    assert select(model, manager=manager).adapter.name == "good"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"koopmon: plugin bad is skipped: {manager.failures['bad']}"
    ]


class BadClaim(Fixed):
    def specificity(self, model: nn.Module) -> int:
        raise ZeroDivisionError("oops")


def test_an_adapter_that_cannot_claim_does_not_stop_the_others(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    manager = manager_of(a=Offers(BadClaim("bad", 1), Fixed("good", 1)))
    assert select(model, manager=manager).adapter.name == "good"
    assert "bad" in caplog.text


BROKEN = {
    "absent": ("import a_package_that_is_not_there", "No module named 'a_package_that_is_not_there'"),
    "exits": ("raise SystemError('told you')", "SystemError: told you"),
    "misspelt": (
        "import koopmon\n@koopmon.hookimpl\ndef koopmon_architecture_adaptors():\n    return []",
        "koopmon_architecture_adaptors",
    ),
    "undecorated": ("def koopmon_architecture_adapters():\n    return []", "found no hook"),
}


@pytest.mark.process
def test_broken_installed_plugins_are_skipped_logged_once_and_listed(tmp_path: Path) -> None:
    """A real distribution on the path of a real process."""
    for name, (source, _) in BROKEN.items():
        (tmp_path / f"plugin_{name}.py").write_text(source)
    metadata = tmp_path / "their_plugins-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugins\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[koopmon.adapters]\n" + "".join(f"{name} = plugin_{name}\n" for name in BROKEN)
    )
    script = textwrap.dedent("""
        import json, logging, sys
        sys.path.insert(0, sys.argv[1])
        logging.basicConfig(format="%(message)s")
        from koopmon.plugins import adapters, plugin_manager
        managers = [plugin_manager(), plugin_manager()]
        assert "transformer" in adapters(managers[0])
        print(json.dumps(managers[1].failures))
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    failures = json.loads(done.stdout)
    logged = done.stderr.splitlines()
    assert list(failures) == list(BROKEN)
    assert len(logged) == len(BROKEN)
    for line, (name, (_, expected)) in zip(logged, BROKEN.items(), strict=True):
        assert expected in failures[name]
        assert line == f"koopmon: plugin {name} (their-plugins 1.0) is skipped: {failures[name]}"


@pytest.mark.process
@pytest.mark.parametrize(
    ("groups", "lines"),
    [
        (["koopmon.adapters"], 0),
        (["koopmon"], 1),
        (["koopmon.adapters", "koopmon"], 0),  # a package for both versions of koopmon
    ],
)
def test_the_former_entry_point_group_is_read_with_a_line(tmp_path: Path, groups: list[str], lines: int) -> None:
    (tmp_path / "theirs.py").write_text(
        "import koopmon\n@koopmon.hookimpl\ndef koopmon_architecture_adapters(): return []"
    )
    metadata = tmp_path / "theirs-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text("".join(f"[{group}]\ntheirs = theirs\n" for group in groups))
    script = textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[1])
        from koopmon.plugins import plugin_manager
        for manager in (plugin_manager(), plugin_manager()):
            assert [name for name, _ in manager.list_name_plugin()].count("theirs") == 1
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    line = "koopmon: theirs 1.2: its entry-point group 'koopmon' is deprecated: rename it to 'koopmon.adapters'"
    assert done.stderr.splitlines() == [line] * lines


class Examples:
    def __init__(self, *offered: object) -> None:
        self.offered = offered

    @koopmon.hookimpl
    def koopmon_example_models(self) -> list[object]:
        return list(self.offered)


def test_example_models_of_all_plugins_are_gathered_and_a_bad_offer_is_left_out(model: nn.Module) -> None:
    mine = koopmon.ExampleModel("small", "mine", lambda seed: (model, seed))
    manager = manager_of(good=Examples(mine), bad=Examples("a model"), other=Offers(Fixed("mine", 1)))
    assert example_models(manager) == [mine]
    assert manager.failures == {"bad": "koopmon_example_models() gives 'a model', which is not an ExampleModel"}
    assert list(adapters(manager)) == ["mine"]


def test_every_hook_has_the_project_s_prefix_and_a_sentence() -> None:
    from koopmon import hookspecs

    hooks = [value for value in vars(hookspecs).values() if hasattr(value, "koopmon_spec")]
    assert hooks
    for hook in hooks:
        assert hook.__name__.startswith("koopmon_")
        assert hook.__doc__
        assert hook.__name__ in Path(__file__).read_text(), "a hook without a test"


def test_logger_is_the_module_s() -> None:
    assert plugin_calls.logger is logging.getLogger("koopmon.plugins")
