"""The mutation run: which changes it makes, and that the tests of the decision core notice a sample of them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import pytest

from benchmarks.mutants.operators import mutants
from benchmarks.mutants.workers import _Task

ROOT = Path(__file__).parents[2]
SEED = 14


def changed(source: str) -> set[str]:
    """Each version of `source` with one mutant, as text."""
    source = textwrap.dedent(source)
    versions = set()
    for index in range(len(mutants(ast.parse(source)))):
        tree = ast.parse(source)
        mutants(tree)[index].apply()
        versions.add(ast.unparse(ast.fix_missing_locations(tree)))
    return versions


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("a < b", {"a <= b", "a >= b"}),
        ("a is None", {"a is not None"}),
        ("a not in b", {"a in b"}),
        ("f(3)", {"f(4)", "f(2)"}),
        ("f(64)", {"f(65)", "f(128)"}),
        ("f(0.5)", {"f(1.0)", "f(0.25)"}),
        ("f(1.0)", {"f(2.0)", "f(0.0)"}),
        ("f(True)", {"f(False)"}),
        ("f('calm')", {"f('mutant')"}),
        ("a and b", {"a or b"}),
        ("not a", {"a"}),
        ("-a", {"a"}),
        ("a + b", {"a - b"}),
        ("a // b", {"a * b"}),
        ("min(a, b)", {"max(a, b)"}),
        ("x.amax(y)", {"x.amin(y)"}),
        ("any(a)", {"all(a)"}),
        ("replace(s, a=b, c=d)", {"replace(s, c=d)", "replace(s, a=b)"}),
        ("[a for a in b if a > c]", {"[a for a in b if a >= c]", "[a for a in b if a <= c]"}),
    ],
)
def test_one_expression_has_these_mutants(code: str, expected: set[str]) -> None:
    assert changed(f"x = {code}") == {f"x = {other}" for other in expected}


@pytest.mark.parametrize(
    "code",
    [
        '"""Text with 3 < 4."""',
        "x: Annotated[int, Meta(ge=3)]",
        "assert a < b",
        "logger.warning('calm', 3 < 4)",
        "raise ValueError(3 < 4)",
        "x = f'{a < b}'",
        "f(reason='calm')",
        "from a import b",
        "x = 'two words'",
        "def f(a: Literal['calm']) -> Literal['calm']: pass",
        "@dataclass(frozen=True)\nclass A: pass",
    ],
)
def test_text_types_and_logging_have_none(code: str) -> None:
    expected = {"pass"} if code.startswith("raise") else {"pass"} if code.startswith("f(") else set()
    assert changed(code) == expected


def test_statements_are_left_out_and_returns_emptied() -> None:
    source = """
    def f():
        self.a = b
        c += d
        g()
        for _ in e:
            break
        return h
    """
    found = changed(source)
    plain = ast.unparse(ast.parse(textwrap.dedent(source)))
    for old, new in {
        "self.a = b": "pass",
        "c += d": "pass",
        "g()": "pass",
        "break": "continue",
        "return h": "return None",
    }.items():
        assert plain.replace(old, new) in found
    assert len(found) == 6, "and c -= d"


def test_conditions_are_negated() -> None:
    assert changed("if a:\n    x = b") == {"if not a:\n    x = b"}
    assert changed("x = b if a else c") == {"x = b if not a else c"}


def test_names_and_places_of_mutants() -> None:
    source = "A = 3\n\n\nclass B:\n    @property\n    def c(self):\n        return self.d + 1 + 1\n"
    found = mutants(ast.parse(source))
    assert len({mutant.name for mutant in found}) == len(found)
    at_import = [mutant for mutant in found if mutant.scope is None]
    assert [mutant.name for mutant in at_import] == ["module: 3 in A = 3 -> 4", "module: 3 in A = 3 -> 2"]
    assert {mutant.scope for mutant in found} == {None, ("B.c", 5)}
    assert {mutant.lines for mutant in found if mutant.scope} == {range(7, 8)}
    shifted = mutants(ast.parse("\n\n" + source))
    assert [mutant.name for mutant in shifted] == [mutant.name for mutant in found], "names survive other edits"


def test_a_test_that_takes_far_longer_than_without_the_mutant_is_overdue(tmp_path: Path) -> None:
    """Such a test waits for something that does not come. Its limit is 20 seconds and ten times its own duration."""
    (mutant,) = mutants(ast.parse("x = a < b"))[:1]
    task = _Task("m.py", mutant, ["a::test"], {"a::test": 1.0}, 9.0, lambda order, said: None)
    said = tmp_path / "killer-1"
    assert not task.overdue(said), "no test has begun"
    for name, ago, overdue in (("a::test", 25.0, False), ("a::test", 35.0, True), ("collection of a", 1e6, False)):
        said.write_text(name)
        os.utime(said, (time.time() - ago,) * 2)
        assert task.overdue(said) is overdue


def test_nine_in_ten_mutants_die_and_every_survivor_has_a_reason() -> None:
    """As recorded by `make mutants`."""
    modules = json.loads((ROOT / "benchmarks" / "results" / "mutants.json").read_text(encoding="utf-8"))["modules"]
    total = sum(of["mutants"] for of in modules.values())
    assert total > 1000
    assert sum(of["mutants"] * of["share_killed"] for of in modules.values()) >= 0.9 * total
    assert [(module, name) for module, of in modules.items() for name, why in of["survived"].items() if not why] == []


def test_every_reason_is_of_a_survivor() -> None:
    modules = json.loads((ROOT / "benchmarks" / "results" / "mutants.json").read_text(encoding="utf-8"))["modules"]
    reasons = tomllib.loads((ROOT / "benchmarks" / "mutants" / "survivors.toml").read_text(encoding="utf-8"))
    for module in reasons.keys() & modules.keys():
        for key in reasons[module]:
            assert any(name.startswith(key) for name in modules[module]["survived"]), f"{module}: {key}"


@pytest.mark.process
@pytest.mark.slow
def test_the_tests_notice_a_sample() -> None:
    """Mutants of the modules whose tests are quick: each dies or has a reason."""
    pytest.importorskip("scipy")
    command = [sys.executable, "-m", "benchmarks.mutants", "--jobs", "2", "--sample", "5", "--seed", str(SEED)]
    quick = ["policy/rate", "risk/online", "capture/schedule"]
    done = subprocess.run(
        [*command, "--only", *quick], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "mutants killed in" in done.stdout
