"""The site: `python -m manual.site [DIRECTORY]` builds it into `site/` or DIRECTORY, without a network.

Zensical builds one directory of Markdown and has no hooks. This module makes that directory: the pages of docs/, the
generated reference, and the files of the repository that pages link to. A page links to such a file by a
relative path out of docs/, as on a code host. The site has these files below tree/: a page or a picture is copied, any
other file is shown on a page of its own, and a directory on a page with its files. PROTOCOL.md has its own page.

A warning of Zensical fails the build, and so does a link to a page, a file or an anchor that the site does not have.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

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


def main(words: Sequence[str]) -> int:
    """Build the site and return the exit status: 1 after a warning or with a broken link."""
    site = Path(words[0]) if words else ROOT / "site"
    with TemporaryDirectory() as directory:
        staged = Path(directory)
        stage(staged)
        command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
        done = subprocess.run(command, cwd=staged, env=os.environ | {"NO_COLOR": "1"}, check=False)
        broken = [] if done.returncode else list(broken_links(staged / "site"))
        for each in broken:
            sys.stderr.write(f"{each}\n")
        if done.returncode or broken:
            return 1
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(staged / "site", site)
    return 0


def stage(directory: Path) -> None:
    """Write the pages and the configuration for Zensical into an empty directory."""
    shutil.copytree(ROOT / DOCS, directory / DOCS)
    linked = _linked()
    places = {_place(path) for path in linked} | {*GENERATED}
    pages = {f"{DOCS}{place}": make() for place, make in GENERATED.items()}
    for path in linked:
        place = directory / DOCS / _place(path)
        if path.endswith(AS_IT_IS) and not path.endswith(".md"):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, place)
        else:
            text = (ROOT / path).read_text(encoding="utf-8") if path.endswith(".md") else _shown(path)
            pages[f"{DOCS}{_place(path)}"] = _with_moved_links(text, path, places)
    for page in (ROOT / DOCS).rglob("*.md"):
        name = page.relative_to(ROOT).as_posix()
        pages[name] = _with_moved_links(page.read_text(encoding="utf-8"), name, places)
    for name, text in pages.items():
        place = directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings["nav"] = navigation(settings["nav"])
    (directory / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def navigation(nav: Any) -> Any:
    """Return the navigation with each star replaced by its pages. A page goes to the entry that matches it best.

    Raises ValueError for a page of docs/ that no entry matches.
    """
    named = list(_named(nav))
    filled: dict[str, list[str]] = {entry: [] for entry in named if "*" in entry}
    for path in sorted((ROOT / DOCS).rglob("*.md")):
        page = path.relative_to(ROOT / DOCS).as_posix()
        fitting = [star for star in filled if fnmatch(page, star) and page.count("/") == star.count("/")]
        if page not in named:
            if not fitting:
                raise ValueError(f"docs/{page} is not in the navigation: add it to mkdocs.yml")
            filled[max(fitting, key=len)].append(page)
    return _expanded(nav, filled)


def broken_links(site: Path) -> Iterator[str]:
    """Return each link and each image of the site whose file or anchor does not exist."""
    found = {path.relative_to(site).as_posix(): _Page(path) for path in site.rglob("*.html")}
    for name, page in found.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or name == "404.html":
                continue
            path = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            )
            if not (site / path).is_file():
                yield f"{name}: {target} is not in the site"
            elif parts.fragment and path in found and unquote(parts.fragment) not in found[path].anchors:
                yield f"{name}: {target} has no such anchor"


class _Page(HTMLParser):
    """Links, images and anchors of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := told.get(key))}
        target = told.get("href" if tag in ("a", "link") else "src")
        if target and not target.startswith("data:"):
            self.targets.add(target)


def _with_moved_links(markdown: str, origin: str, places: set[str]) -> str:
    """Convert links between files to links between pages; a link to a file without a page becomes text."""
    here = _place(origin)

    def moved(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = _in_repository(origin, target)
        if path is None or (path.startswith(DOCS) and origin.startswith(DOCS)):
            return match[0]
        place = _place(path)
        if place not in places and not (ROOT / DOCS / place).is_file():
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
    """Return the path of a file of the repository below the directory of the pages."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    if path == PROTOCOL:
        return "reference/protocol.md"
    return f"{TREE}{path}" if path.endswith(AS_IT_IS) else f"{TREE}{path}.md"


def _shown(path: str) -> str:
    """Return a page with the text of a file, or of the files of a directory."""
    found = [ROOT / path] if (ROOT / path).is_file() else sorted((ROOT / path).rglob("*"))
    parts = [f"# `{path}`", ""]
    for each in (each for each in found if each.suffix in LANGUAGES or each == ROOT / path):
        language = LANGUAGES.get(each.suffix, "text")
        text = each.read_text(encoding="utf-8").rstrip("\n")
        parts += [f"## `{each.relative_to(ROOT).as_posix()}`", "", f"````{language}", text, "````", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
