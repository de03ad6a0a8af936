"""The site builds without a warning, loads nothing from other servers, and has every page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("zensical")
pytestmark = pytest.mark.process

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
GENERATED = {"reference/cli.html", "reference/configuration.html", "reference/python.html", "reference/protocol.html"}
ELSEWHERE = re.compile(r"""(?:src|href|srcset)=["']?((?:https?:)?//[^"' >]+)|url\(["']?((?:https?:)?//[^"')]+)""")
IMAGE = re.compile(r'<img [^>]*src="([^"]+)"')


def build(site: Path, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manual.site", str(site)],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = build(directory)
    assert done.returncode == 0, done.stdout
    return directory


@pytest.fixture(scope="module")
def html(site: Path) -> Mapping[str, str]:
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_every_page_is_in_the_site_and_its_navigation(html: Mapping[str, str]) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages | GENERATED <= html.keys()
    others = (pages | GENERATED) - {"index.html"}
    assert {page for page in others if f'href="./{page}"' not in html["index.html"]} == set()


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
        elif not path.name.startswith(".") and path.name not in ("site", "build"):
            (directory / path.name).symlink_to(path)
    path = directory / "docs" / page
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return build(directory / "site", directory)


@pytest.mark.slow
def test_a_new_recipe_needs_no_line_in_the_navigation(tmp_path: Path) -> None:
    done = with_a_page(tmp_path, "recipes/mine.md", "# Mine\n")
    assert done.returncode == 0, done.stdout
    assert 'href="./recipes/mine.html"' in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        {"nowhere.md": "page does not exist", "security.md#nowhere": "anchor does not exist"},
        {
            "../nowhere.py": "mine.html: ../nowhere.py is not in the site",
            "nowhere.png": "mine.html: nowhere.png is not in the site",
        },
    ],
    ids=["found by Zensical", "found in the site"],
)
def test_a_broken_link_fails_the_build(broken: Mapping[str, str], tmp_path: Path) -> None:
    done = with_a_page(tmp_path, "mine.md", "\n".join(["# Mine", *(f"[x]({link})" for link in broken)]))
    assert done.returncode == 1
    for complaint in broken.values():
        assert complaint in done.stdout
    assert not (tmp_path / "site").exists()


def test_a_page_outside_of_the_navigation_fails_the_build(tmp_path: Path) -> None:
    done = with_a_page(tmp_path, "concepts/mine.md", "# A\n")
    assert done.returncode == 1
    assert "docs/concepts/mine.md is not in the navigation" in done.stdout


@pytest.mark.needs("chromium")
def test_the_search_finds_a_word_without_another_server(site: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_api.sync_playwright() as playwright:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        page = browser.new_page()
        requested: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(f"{address}index.html")
        field = page.get_by_role("combobox", name="Search")
        for _ in range(60):  # the button works once the page's scripts have run
            page.locator(".md-search__button").click()
            page.wait_for_timeout(500)
            if field.is_visible():
                break
        field.wait_for()
        page.keyboard.type("pseudospectral")
        page.locator("a", has_text="Method").first.wait_for()
        browser.close()
        server.shutdown()
    assert any(url.endswith("search.json") for url in requested)
    assert {url for url in requested if not url.startswith((address, "data:", "blob:"))} == set()
