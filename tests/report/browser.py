"""A page of one file in a real browser."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest


def check_in_browser(directory: Path, document: str) -> None:
    """Check that the page is accessible and fits its window, in two widths and two colour schemes."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    playwright = pytest.importorskip("playwright.sync_api")
    path = directory / "page.html"
    path.write_text(document, encoding="utf-8")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width, scheme in itertools.product((375, 1600), ("light", "dark")):
            # axe runs by a script, which the page forbids.
            view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
            view.goto(path.as_uri())
            for summary in view.locator("summary").all():
                summary.click()
            found = axe.run(view)
            assert found.violations_count == 0, found.generate_report()
            assert view.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
            cut = "[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth + 1)"
            assert width == 1600 or view.evaluate(f"{cut}.map(each => each.id)") == []
            view.close()
        browser.close()
