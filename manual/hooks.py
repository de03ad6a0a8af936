"""Hooks of mkdocs: generated reference pages, files of the repository as pages, and stars in the navigation.

A page links to a file of the repository by a relative path out of docs/, as on a code host. The site has such files
below tree/. A page or a picture is copied; any other file is shown on a page of its own, and a directory on a page with
its files. PROTOCOL.md has its own page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from manual import command_line, configuration, python_api

ROOT = Path(__file__).resolve().parent.parent
DOCS, TREE = "docs/", "tree/"
LINK = re.compile(r"(\[[^\[\]]*\])\(([^)#\s]+)(#[^)\s]*)?\)")
PROTOCOL = "koopmon/wire/PROTOCOL.md"
GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/cli.md": command_line.page,
    "reference/configuration.md": configuration.page,
    "reference/python.md": python_api.page,
    "reference/protocol.md": lambda: (ROOT / PROTOCOL).read_text(encoding="utf-8"),
}
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml", ".sh": "sh"}
AS_IT_IS = (".md", ".png", ".svg", ".json", ".html")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace each star in the navigation by its matching pages, unless another entry matches a page better."""
    named = list(_named(config.nav))
    filled: dict[str, list[str]] = {entry: [] for entry in named if "*" in entry}
    for path in sorted(Path(config.docs_dir).rglob("*.md")):
        page = path.relative_to(config.docs_dir).as_posix()
        fitting = [star for star in filled if fnmatch(page, star) and page.count("/") == star.count("/")]
        if page not in named and fitting:
            filled[max(fitting, key=len)].append(page)
    config.nav = _expanded(config.nav, filled)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    for path in _linked():
        files.append(_from_tree(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert links between files to links between pages; a link to a file without a page becomes text."""
    here = page.file.src_uri
    if here in GENERATED:
        return markdown
    origin = here.removeprefix(TREE) if here.startswith(TREE) else f"{DOCS}{here}"

    def moved(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = _in_repository(origin, target)
        if path is None or (path.startswith(DOCS) and origin.startswith(DOCS)):
            return match[0]
        place = _place(path)
        if files.get_file_from_path(place) is None:
            return text.removeprefix("[").removesuffix("]")
        return f"{text}({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(moved, markdown)


def _named(entry: Any) -> Iterator[str]:
    """Return every page and star of a navigation."""
    if isinstance(entry, str):
        yield entry
    for below in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from _named(below)


def _expanded(entry: Any, filled: Mapping[str, Sequence[str]]) -> Any:
    """Return `entry` with its stars replaced by their pages."""
    if isinstance(entry, dict):
        return {title: _expanded(below, filled) for title, below in entry.items()}
    if not isinstance(entry, list):
        return entry
    found: list[Any] = []
    for below in entry:
        found += filled[below] if isinstance(below, str) and below in filled else [_expanded(below, filled)]
    return found


def _linked() -> list[str]:
    """Return the files and directories outside docs/ that pages link to."""
    found = set()
    for page in (ROOT / DOCS).rglob("*.md"):
        origin = page.relative_to(ROOT).as_posix()
        targets = (match[2] for match in LINK.finditer(page.read_text(encoding="utf-8")))
        found |= {path for target in targets if (path := _in_repository(origin, target)) and not path.startswith(DOCS)}
    return sorted(found - {PROTOCOL})


def _in_repository(origin: str, target: str) -> str | None:
    """Return the target of a link in the file `origin`, relative to the root; None if it is not in the repository."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    return None if "://" in target or path.startswith("..") or not (ROOT / path).exists() else path


def _place(path: str) -> str:
    """Return the path of a file of the repository in the site."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    if path == PROTOCOL:
        return "reference/protocol.md"
    return f"{TREE}{path}" if path.endswith(AS_IT_IS) else f"{TREE}{path}.md"


def _from_tree(path: str, config: MkDocsConfig) -> File:
    if path.endswith(AS_IT_IS):
        hidden = InclusionLevel.NOT_IN_NAV
        return File.generated(config, _place(path), abs_src_path=str(ROOT / path), inclusion=hidden)
    found = [ROOT / path] if (ROOT / path).is_file() else sorted((ROOT / path).rglob("*"))
    parts = [f"# `{path}`", ""]
    for each in (each for each in found if each.suffix in LANGUAGES or each == ROOT / path):
        language = LANGUAGES.get(each.suffix, "text")
        text = each.read_text(encoding="utf-8").rstrip("\n")
        parts += [f"## `{each.relative_to(ROOT).as_posix()}`", "", f"````{language}", text, "````", ""]
    return File.generated(config, _place(path), content="\n".join(parts), inclusion=InclusionLevel.NOT_IN_NAV)
