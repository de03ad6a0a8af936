"""Commands of the pages: each one is run, or has a reason. koopmon commands that are not run are parsed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, QUICKSTART, ROOT, Block, blocks, commands
from tests.docs.reader import SEARCH_PATH, Reader
from tests.docs.spelling import koopmon_words, parse, words_of

PLACEHOLDER = re.compile(r"(?:^|[ /@])[A-Z][A-Z_]{2,}\b(?!=)|(?:^| )\.\.\.|example\.(?:org|com)")
BUILT_IN = ("export", "cd")
TOOLS = ("curl",)
REASONS = {
    "make": "a target of the Makefile, checked by `make -n`",
    "pip": "needs a network",
    "git": "changes a repository",
    "scp": "needs another host",
    "ssh": "needs another host",
    "sudo": "needs root",
    "apt-get": "needs root and a network",
    "systemctl": "needs a running systemd",
    "journalctl": "needs a running systemd",
    "kubectl": "needs a cluster",
    "helm": "needs a cluster",
    "docker": "needs a running Docker",
    "docker-compose": "needs a running Docker",
    "podman": "needs containers",
    "sbatch": "needs Slurm",
    "srun": "needs Slurm",
    "python -m benchmarks": "a campaign; tests/benchmarks runs a slice of each",
    "koopmon demo": "minutes; tests/test_demo.py runs a slice",
    "koopmon grafana push": "needs a Grafana; tests/grafana has a small one",
    "koopmon run -- accelerate launch --multi_gpu": "needs two GPUs",
    "koopmon run -- srun": "needs Slurm",
    "koopmon monitor --grafana-url": "needs a Grafana; tests/grafana has a small one",
}
"""Reasons for commands that are not run on any page, by their first words."""
SHELL = [block for page in PAGES for block in blocks(page) if block.is_shell]


def plain(command: str) -> str:
    """Return a command without variables, comments and line breaks."""
    return " ".join(words_of(command))


FIRST = {plain(command): block for block in reversed(SHELL) for command in commands(block)}
"""First block with each command."""


def reason(block: Block, command: str) -> str:
    """Return the reason that a command is not run; empty if it is. A command of an earlier page is run there."""
    words = plain(command)
    starts = (why for start, why in REASONS.items() if words == start or words.startswith((f"{start} ", f"{start}.")))
    if why := block.reason or next(starts, ""):
        return why
    if block.title:
        return "run by a separate test, by its title"
    if PLACEHOLDER.search(words):
        return "it has a placeholder"
    first = FIRST[words]
    return f"run in {first.place}" if first.page != block.page and not first.reason else ""


def due(page: Path) -> list[str]:
    """Return the commands of a page that are run, in order. Monitors of earlier pages run here too."""
    told = [(command, reason(block, command)) for block in SHELL if block.page == page for command in commands(block)]
    is_monitor = "koopmon monitor"
    if all(why for _, why in told):
        return []
    return [command for command, why in told if not why or (why.startswith("run in") and is_monitor in command)]


def _tools(page: Path) -> list[pytest.MarkDecorator]:
    """Return marks for the tools that a page needs and a machine may lack."""
    return [pytest.mark.needs(tool) for tool in TOOLS if any(words_of(each)[0] == tool for each in due(page))]


DUE = [pytest.param(page, id=page.name, marks=_tools(page)) for page in PAGES if due(page)]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reading = Reader(tmp_path)
    yield reading
    reading.close()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("page", DUE)
def test_the_commands_of_a_page_succeed(page: Path, reader: Reader) -> None:
    reader.files_of(QUICKSTART, page)
    for command in due(page):
        reader.type(command)


@pytest.mark.process
@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_that_are_not_run_parse(block: Block) -> None:
    for command in commands(block):
        if not reason(block, command):
            program = words_of(command)[0]
            found = program in (*BUILT_IN, *TOOLS) or shutil.which(program, path=SEARCH_PATH)
            assert found, f"{block.place}: {program} is not installed: add a reason"
        words = koopmon_words(command)
        if words is not None:
            parse(words)
        elif command.startswith("make "):
            target = [word for word in words_of(command) if "=" not in word]
            done = subprocess.run(["make", "-n", *target[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_a_block_with_a_title_has_a_test_of_its_own() -> None:
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path.parent != Path(__file__).parent]
    sources = "".join(path.read_text(encoding="utf-8") for path in tests)
    for block in (block for block in SHELL if block.title):
        folder = block.page.relative_to(ROOT / "docs").parent.name
        assert block.page.name in sources or (folder and f'"{folder}"' in sources), f"{block.place}: who runs it?"


def test_a_reason_is_a_sentence_and_belongs_to_a_block() -> None:
    for page in PAGES:
        told = [block.reason for block in blocks(page) if block.reason]
        written = page.read_text(encoding="utf-8").count("<!-- not run")
        assert written == len(told), f"{page.name}: a reason without a block"
        assert all(len(each) > 10 for each in told)


@pytest.mark.process
def test_the_pages_are_read(tmp_path: Path) -> None:
    assert {"README.md", "CONTRIBUTING.md", "quickstart.md"} <= {block.page.name for block in SHELL}
    page = tmp_path / "page.md"
    page.write_text("```sh\na \\\n  b   # c\nfor x in 1 2; do\n  echo $x\ndone\n# nothing\ncat <<X\ny\nX\n```\n")
    (block,) = blocks(page)
    assert list(commands(block)) == ["a \\\n  b   # c", "for x in 1 2; do\n  echo $x\ndone", "cat <<X\ny\nX"]
    page.write_text("<!-- not run: it is no good -->\n```sh\na\n```\n\n```text\nb\n```\n```\nkoopmon/x  y\n```\n")
    assert [(block.reason, block.is_shell) for block in blocks(page)] == [
        ("it is no good", True),
        ("", False),
        ("", False),
    ]


@pytest.mark.process
def test_a_command_that_fails_is_noticed(reader: Reader) -> None:
    with pytest.raises(AssertionError, match="ended with status 3"):
        reader.type("exit 3")
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "--polciy", "lr", "--", "true"])
