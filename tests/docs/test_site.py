"""The site builds without a warning, loads nothing from other servers, and has every page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.process

GENERATED = {"reference/cli.html", "reference/configuration.html", "reference/python.html", "reference/protocol.html"}
ELSEWHERE = re.compile(r"""(?:src|href|srcset)=["']?((?:https?:)?//[^"' >]+)|url\(["']?((?:https?:)?//[^"')]+)""")
IMAGE = re.compile(r'<img [^>]*src="([^"]+)"')


def build(site: Path, *options: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site), *options],
        cwd=directory,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'plugins'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the warnings of mkdocs."""
    doing = ("INFO    -  Cleaning site", "INFO    -  Building documentation", "INFO    -  Documentation built")
    return [line for line in done.stderr.split("\n") if line and not line.startswith(doing)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = build(directory)
    assert (done.returncode, complaints(done)) == (0, []), done.stderr
    return directory


@pytest.fixture(scope="module")
def html(site: Path) -> Mapping[str, str]:
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_every_page_is_in_the_site_and_its_navigation(html: Mapping[str, str]) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages | GENERATED <= html.keys()
    assert {page for page in pages | GENERATED if f'href="{page}"' not in html["index.html"]} == set()


def test_the_site_needs_no_network(site: Path, html: Mapping[str, str]) -> None:
    loaded = {path: set(ELSEWHERE.findall(re.sub(r"<a .*?>", "", text))) for path, text in html.items()}
    assert {path: found for path, found in loaded.items() if found} == {}
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not ELSEWHERE.search(styles)
    for path, text in html.items():
        for image in IMAGE.findall(text):
            assert (site / path).parent.joinpath(image).is_file(), f"{path} shows {image}"


def test_linked_files_of_the_repository_are_in_the_site(html: Mapping[str, str]) -> None:
    assert "class</span><span" in html["tree/tests/packages/echo.html"].replace(" ", "")
    assert 'src="tree/benchmarks/results/reliability.png"' in html["evidence.html"]
    assert "The koopmon protocol, version" in html["reference/protocol.html"]


def with_a_page(directory: Path, page: str, text: str) -> subprocess.CompletedProcess[str]:
    """Build a copy of the site's sources with an additional page."""
    for path in ROOT.iterdir():
        if path.name in ("docs", "manual"):
            shutil.copytree(path, directory / path.name)
        elif not path.name.startswith(".") and path.name != "site":
            (directory / path.name).symlink_to(path)
    path = directory / "docs" / page
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return build(directory / "site", directory=directory)


def test_a_new_recipe_needs_no_line_in_the_navigation(tmp_path: Path) -> None:
    done = with_a_page(tmp_path, "recipes/mine.md", "# Mine\n")
    assert (done.returncode, complaints(done)) == (0, []), done.stderr
    assert 'href="recipes/mine.html"' in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


def test_broken_links_fail_the_build(tmp_path: Path) -> None:
    done = with_a_page(tmp_path, "mine.md", "# A\n[x](nowhere.md) [y](security.md#nowhere) [z](../nowhere.py)\n")
    assert done.returncode == 1
    for link in ("'nowhere.md'", "'security.md#nowhere'", "'../nowhere.py'"):
        assert link in done.stderr
