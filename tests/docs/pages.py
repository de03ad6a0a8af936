"""Fenced blocks of the pages, their commands, and the reasons for commands that no test runs.

A block of commands is fenced as `sh` or without a language. `<!-- not run: REASON -->` on a line before it has the
reason that no test runs it. A separate test runs a block with a title. Any other block whose title is a file name is
that file, and is in the directory in which the commands of its page run.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs" / "quickstart.md"
PAGES = (
    QUICKSTART,
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page != QUICKSTART),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
)
"""Pages in the order of their tests. A command of an earlier page is not run again for a later page."""
FENCE = re.compile(r"^ *(?P<fence>`{3,})(?P<language>[\w+-]*)[ \t]*(?P<more>[^`]*)$")
REASON = re.compile(r"^ *<!-- not run: (?P<reason>.+?) -->$")
TITLE = re.compile(r'title="([^"]+)"')
SHELLS = ("", "sh", "bash", "shell", "console")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `line` is that of its fence, from 1."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    reason: str
    """Reason that the block is not run; empty if it is run."""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_file(self) -> bool:
        return "." in self.title and not self.is_shell

    @property
    def is_shell(self) -> bool:
        """True for a block of commands. A listing of files begins with a path and does not count."""
        words = self.text.split()
        return self.language in SHELLS and bool(words) and not (self.language == "" and "/" in words[0])


def blocks(page: Path) -> Iterator[Block]:
    """Return the fenced blocks of a page. Raises ValueError for an unclosed fence."""
    opened: tuple[int, re.Match[str], str] | None = None
    reason, kept = "", list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), start=1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, kept = (number, fence, reason), []
        elif opened is not None and fence and fence["fence"] == opened[1]["fence"] and not fence["language"]:
            begun, match, why = opened
            title = TITLE.search(match["more"])
            named = "" if title is None else title[1]
            yield Block(page, begun, match["language"], named, "\n".join(kept) + "\n", why)
            opened, reason = None, ""
        elif opened is not None:
            kept.append(line.removeprefix(" " * (len(opened[1][0]) - len(opened[1][0].lstrip()))))
        elif told := REASON.match(line):
            reason = told["reason"]
        elif line.strip():
            reason = ""
    if opened is not None:
        raise ValueError(f"{page}:{opened[0]}: this block is not closed")


def commands(block: Block) -> Iterator[str]:
    """Return the commands of a block, with continued lines, loops and here-documents in one piece."""
    gathered = ""
    for line in block.text.rstrip("\n").split("\n"):
        gathered = f"{gathered}\n{line}" if gathered else line
        if not re.sub(r"(^|\s)#.*", "", gathered).strip():
            gathered = ""
        elif not gathered.endswith("\\") and _is_whole(gathered):
            yield gathered
            gathered = ""
    if gathered:
        raise ValueError(f"{block.place}: no shell reads {gathered!r}; is it `text`?")


def _is_whole(command: str) -> bool:
    read = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, timeout=10, check=False)
    return read.returncode == 0 and not read.stderr  # a here-document without its end is only a warning
