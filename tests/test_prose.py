"""Plain English in code, messages and pages: no archaic words, metaphors or personification.

The patterns come from the review of the first version. A match is not always wrong, but a plain sentence avoids all of
them. Code spans and quoted code are ignored.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PATTERNS = {
    "metaphor": r"\b(?:lurch\w*|restless|unrest|seismograph)\b|(?<![\w.\"'/])brak(?:e|es|ed|ing)\b(?![\w.])",
    "archaic word": r"\b(?:in vain|likewise|of whose|by whom|of whom|anew|whoever|now and then|beforehand"
    r"|for want of|in the midst of|in the place of|at last|so many \w+ as|gives? way|gave way)\b",
    "personification": r"\b(?:hears?|heard) (?:of|from)\b|\bspeaks?\b|\bspoken\b|\btells\b|\bis told\b"
    r"|\b(?:is|are) asked\b|\b(?:monitor|agent|koopmon|policy|detector|store|server|version) (?:knows?|sees|says)\b"
    r"|\bguests?\b|\bstrangers?\b|'s kin\b",
    "clause in place of a noun": r"(?:^|[.:;] )(?:What|Whether) (?![^.?]*\?)",
}
FIRST_WORDS = {
    "What",
    "Whether",
    "Where",
    "How",
    "That",
    "Which",
    "Who",
    "Whose",
    "Why",
    "Of",
    "By",
    "Likewise",
    "But",
    "So",
}
"""First words of docstrings that are a clause, or the second half of another sentence."""
NOT_YET: set[str] = set()
"""Files that still have such sentences. Remove a file from this set when it is rewritten; the goal is an empty set."""
GENERATED = re.compile(r"<!-- results: .*?<!-- end of results -->|^```.*?^```|<!--.*?-->", re.DOTALL | re.MULTILINE)
MAX_WORDS = 40
"""Most words of a sentence in a page. The goal is 25."""
CODE = re.compile(r"`[^`\n]*`")


def tracked(*patterns: str) -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(name for name in done.stdout.split("\n") if name and (ROOT / name).is_file())


PYTHON = tracked("koopmon/*.py", "plugins/*.py", "manual/*.py", "benchmarks/*.py")
TESTS = [name for name in tracked("tests/*.py") if name != "tests/test_prose.py"]
TABLES = tracked("koopmon/*.yml")
PAGES = tracked(
    "docs/*.md", "koopmon/*.md", "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "mkdocs.yml"
)


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Return docstrings, comments and string constants of several words, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(" ") >= 2:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def table_texts(source: str) -> Iterator[tuple[int, str]]:
    """Return the unfolded scalars and the blocks of comments of a YAML file, with their lines."""
    for event in yaml.parse(source):
        if isinstance(event, yaml.ScalarEvent):
            yield event.start_mark.line + 1, event.value
    for match in re.finditer(r"(?:^ *#.*\n)+", source, re.MULTILINE):
        yield source.count("\n", 0, match.start()) + 1, re.sub(r"\s*^ *# ?", " ", match[0], flags=re.MULTILINE).strip()


def lines(page: str) -> Iterator[tuple[int, str]]:
    """Return the lines of a page without code blocks, comments and generated results."""
    plain = GENERATED.sub(lambda match: "\n" * match[0].count("\n"), page)
    yield from enumerate(plain.split("\n"), start=1)


def complaints(text: str) -> Iterator[str]:
    """Return the name of each pattern that `text` matches, with the matched words."""
    plain = CODE.sub("``", text)
    for name, pattern in PATTERNS.items():
        for match in re.finditer(pattern, plain):
            yield f"{name}: {' '.join(match[0].split())[:60]!r}"


def sentences(page: str) -> Iterator[str]:
    """Return the sentences of paragraphs and of list items; a colon and a semicolon end one too."""
    plain = CODE.sub("code", re.sub(r"\]\([^)]*\)", "]", GENERATED.sub("", page)))
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*#|]|\d+\.) )", plain):
        if not paragraph.lstrip().startswith(("|", "#")):
            yield from re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split()))


def first_words(source: str) -> Iterator[str]:
    """Return the start of each docstring, also of a field or a constant, that begins with one of FIRST_WORDS."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            words = node.value.value.split() or [""]
            if words[0] in FIRST_WORDS or words[0].startswith(("...", "…")):
                yield f"{node.lineno}: {' '.join(words[:8])!r}"


@pytest.mark.parametrize("name", [name for name in (*PYTHON, *TESTS) if name not in NOT_YET])
def test_the_code_is_in_plain_english(name: str) -> None:
    source = (ROOT / name).read_text(encoding="utf-8")
    found = [f"{line}: {each}" for line, text in texts(source) for each in complaints(text)]
    assert found + list(first_words(source)) == []


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_in_plain_english(name: str) -> None:
    source = (ROOT / name).read_text(encoding="utf-8")
    assert [f"{line}: {each}" for line, text in table_texts(source) for each in complaints(text)] == []


def test_the_table_of_alerts_is_read() -> None:
    assert "koopmon/telemetry/alerts.yml" in TABLES


def test_a_folded_sentence_of_a_table_is_refused() -> None:
    source = "# The layer gives\n# way.\nmeans: >-\n  Likewise the block speaks\n  in vain.\n"
    found = [(line, list(complaints(text))) for line, text in table_texts(source)]
    assert found == [
        (3, []),
        (3, ["archaic word: 'in vain'", "personification: 'speaks'"]),
        (1, ["archaic word: 'gives way'"]),
    ]


@pytest.mark.parametrize("name", [name for name in PAGES if name not in NOT_YET])
def test_the_pages_are_in_plain_english(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert [f"{line}: {each}" for line, text in lines(page) for each in complaints(text)] == []


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith(("docs/", "README", "CONTRIBUTING"))])
def test_no_sentence_of_a_page_is_too_long(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert [f"{len(each.split())} words: {each}" for each in sentences(page) if len(each.split()) > MAX_WORDS] == []


def test_a_long_sentence_is_found() -> None:
    long = "word " * 20 + "`code with spaces` and\n" + "word " * 20
    page = f"# Title\n\nA short one. {long}.\n\n- {long}: {long}\n\n| {long} |\n\n```sh\n{long}\n```\n"
    assert [len(each.split()) for each in sentences(page) if len(each.split()) > MAX_WORDS] == [43, 44, 42]


def test_the_files_that_are_not_done_exist() -> None:
    assert {*PYTHON, *TESTS, *PAGES} >= NOT_YET


@pytest.mark.parametrize(
    "text",
    [
        "Before a divergence single layers lurch.",
        "Likewise at a severe risk: likewise",
        "Last optimizer step heard of.",
        "The thread that speaks to the monitor was ended",
        "The monitor knows no run of this name",
        "whoever reaches it reads the pages",
        "What is known beforehand, with the loss.",
        "an applied brake has its effect",
    ],
)
def test_a_sentence_of_the_first_version_is_refused(text: str) -> None:
    assert list(complaints(text))


@pytest.mark.parametrize(
    "text",
    [
        "Update exponent `brake` of the file, measured by `benchmarks.brake`.",
        "Training continues without koopmon.",
        "How long is the queue?",
        "Names that an engineer who knows PyTorch would guess",
    ],
)
def test_a_plain_sentence_passes(text: str) -> None:
    assert list(complaints(text)) == []


def test_the_second_half_of_a_sentence_is_refused() -> None:
    assert list(first_words('class A:\n    rank: int\n    """...and the most tokens."""\n'))
    assert list(first_words('def f():\n    """Whether it is."""\n'))
    assert not list(first_words('def f():\n    """Return the rank."""\n'))
