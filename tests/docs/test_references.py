"""References in files of the repository to documents, sections and files: each one must resolve."""

from __future__ import annotations

import posixpath
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT

TRACKED = frozenset(
    name
    for name in subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    if name and (ROOT / name).is_file()
)
TEXTS = sorted(
    name
    for name in TRACKED
    if not name.startswith(("benchmarks/results/", "benchmarks/fuzz/corpus/"))
    and not name.endswith((".png", ".gz", ".svg", ".golden"))
)
GENERATED = frozenset(re.findall(r'"(reference/\w+\.md)"', (ROOT / "manual" / "site.py").read_text(encoding="utf-8")))
"""Pages that the site generates from the code."""
EXAMPLES = frozenset(
    {
        "tests/docs/test_references.py",  # the cases below
        "tests/docs/test_site.py",  # links that are broken on purpose
        "tests/docs/test_commands.py",  # pages that a test writes
        "tests/test_front_door.py",  # files that a test writes
    }
)
"""Files with broken references on purpose."""
PAGES_HERE = frozenset(name for name in {*TRACKED, *GENERATED} if name.endswith(".md"))

NUMBERED = re.compile(r"\b([A-Z][A-Z_]{3,})(?:\.md)?(?: of [A-Z]+)?[,:]? (?:sections?|eqs?\.|chapters?) ?\d")
"""Name of a document in capitals, with a section or an equation."""
PAGE = re.compile(r"(?<![\w/.*}-])((?:\.{1,2}/)*[\w-]+(?:/[\w.-]+)*\.md)\b")
SECTION = re.compile(r'\b(docs/[\w/-]+\.md), "([^"\n]+)"')
PATH = re.compile(r"`((?:koopmon|plugins|benchmarks|tests|docs|deploy|grafana|manual)/[\w./-]+\.\w+)`")
"""Path of a file of the repository in a page."""
EXTERNAL = {
    "https://arxiv.org/abs/1504.05477",
    "https://arxiv.org/abs/2111.14889",
    "https://arxiv.org/abs/2602.22988",
    "https://keepachangelog.com/en/1.1.0/",
    "https://monitoring.mixins.dev",
    "https://prometheus.io/docs/prometheus/latest/configuration/https/",
    "https://semver.org/spec/v2.0.0.html",
}
"""Links of the pages to other sites. No test fetches them: open a new one before you add it here."""
LINK = re.compile(r"(?<!!)\[[^\[\]]*\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


def complaints(name: str, text: str) -> Iterator[str]:
    """Return the broken references of one file."""
    stems = {posixpath.splitext(posixpath.basename(path))[0] for path in TRACKED}
    for match in NUMBERED.finditer(text):
        if match[1] not in stems:
            yield f"{name}: {match[0]!r} refers to a document {match[1]} that is not here"
    for match in PAGE.finditer(text):
        if not _is_here(name, match[1]) and not any(f"/{path}".endswith(f"/{match[1]}") for path in PAGES_HERE):
            yield f"{name}: {match[1]} is not here"
    for match in SECTION.finditer(text):
        path = ROOT / match[1]
        if path.is_file() and not re.search(rf"^#+ {re.escape(match[2])}$", path.read_text(encoding="utf-8"), re.M):
            yield f"{name}: {match[1]} has no section {match[2]!r}"
    for match in PATH.finditer(text) if name.endswith(".md") else ():
        if not (ROOT / match[1]).exists():
            yield f"{name}: {match[1]} is not here"
    for match in LINK.finditer(text) if name.endswith(".md") else ():
        if ":" not in match[1] and not _is_here(name, match[1]):
            yield f"{name}: the link to {match[1]} leads nowhere"


def _is_here(origin: str, target: str) -> bool:
    """Return True if `target` exists, relative to the root or the file `origin`, or is a generated page."""
    near = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    pages = posixpath.normpath(posixpath.join("docs", target))
    if any((ROOT / path).exists() for path in (target, near, pages) if not path.startswith("..")):
        return True
    return near.removeprefix("docs/") in GENERATED or target in GENERATED


@pytest.mark.parametrize("name", TEXTS)
def test_every_reference_resolves(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8", errors="replace")
    assert name in EXAMPLES or list(complaints(name, text)) == []


def test_the_links_to_other_sites_are_listed() -> None:
    pages = [name for name in TEXTS if name.endswith(".md") and not name.startswith("tests/")]
    links = {
        match[1]
        for name in pages
        for match in LINK.finditer((ROOT / name).read_text(encoding="utf-8"))
        if ":" in match[1]
    }
    assert links == EXTERNAL


@pytest.mark.parametrize(
    "text",
    [
        "The rule of divergence (THEORY section 4).",
        "THEORY sections 4 to 6",
        "in whitened coordinates (THEORY of RKSP, eqs. 5-13 and 29)",
        "on the wire (THEORY: eqs. 14-15)",
        "see docs/theory.md",
        "see THEORY.md",
        'see docs/method.md, "Astrology"',
        "`koopmon/theory.py` computes it",
        "[the theory](theory.md)",
        "[the source](../koopmon/theory.py#L1)",
    ],
)
def test_a_broken_reference_is_found(text: str) -> None:
    assert list(complaints("docs/page.md", text))


@pytest.mark.parametrize(
    "text",
    [
        'docs/method.md, "Whitened DMD"',
        "[evidence](evidence.md) and [its code](../koopmon/risk/online_detector.py), koopmon/wire/PROTOCOL.md",
        "[reference](reference/cli.md), [elsewhere](https://example.org/page.md)",
        "HTTP status 404, NaN section",
    ],
)
def test_a_valid_reference_passes(text: str) -> None:
    assert list(complaints("docs/page.md", text)) == []
