"""Common parts of the monitor's pages: head, header, footer, small elements."""

from __future__ import annotations

import time
from collections.abc import Sequence
from urllib.parse import quote

from koopmon.views.html import Child, Markup, join, tag

STATES = {"running": "●", "ended": "■", "vanished": "▲", "recorded": "○"}
FOOTER = (
    ("metrics", "metrics"),
    ("alerts", "alerts"),
    ("api/v1/runs", "JSON"),
    ("healthz", "health"),
    ("readyz", "readiness"),
)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def page(root: str, title: str, main: Child, *, events: str = "", crumbs: Child = None) -> str:
    """Return a whole document.

    `root` is the relative path from this page to the monitor's address, such as "" or "../". `events` is the address of
    the event stream with the page's changes.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("title", title),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href=f"{root}static/icon.svg", type="image/svg+xml"),
        tag("link", rel="stylesheet", href=f"{root}static/live.css"),
        tag("script", type="module", src=f"{root}static/live.js") if events else None,
    )
    brand = tag("a", tag("span", "◉", aria_hidden="true"), " koopmon", href=root or "./")
    body = tag(
        "body",
        tag("a", "Skip to content", href="#main", class_="skip"),
        tag(
            "header",
            tag("p", brand, class_="brand"),
            tag("nav", crumbs, aria_label="Breadcrumb") if crumbs else None,
            _connection() if events else None,
        ),
        tag(
            "main",
            _hint() if events else None,
            main,
            id="main",
            tabindex="-1",
            data_events=f"{root}{events}" if events else None,
        ),
        tag(
            "footer",
            tag("nav", *(tag("a", words, href=f"{root}{href}") for href, words in FOOTER), aria_label="Other pages"),
            tag("p", "This page only reads."),
        ),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en")


def root_of(raw_path: bytes) -> str:
    """Return the relative path from a page to the monitor's address.

    It depends only on the number of slashes in the page's path, so it is correct behind any proxy.
    """
    return "../" * (raw_path.count(b"/") - 1)


def run_address(root: str, name: str) -> str:
    return f"{root}runs/{quote(name, safe='')}"


def state(name: str) -> Markup:
    sign = tag("span", STATES.get(name, "?"), aria_hidden="true")
    return tag("span", sign, f" {name}", class_=f"state {name}")


def moment(at: float, now: float) -> Markup:
    """Element with the time since `at`, which a script updates. Times are Unix seconds."""
    if not at:
        return Markup("–")
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    return tag("time", ago(now - at), datetime=stamp)


def ago(seconds: float) -> str:
    for size, unit in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago" if seconds >= 2 else "now"


def table(identity: str, caption: str, heads: Sequence[str], rows: Sequence[Sequence[Child]]) -> Markup:
    """Table that scrolls in its own region if it is too wide, also by keyboard; the first cell is the row header."""
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    inner = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads))),
        tag("tbody", *body),
    )
    return tag("div", inner, class_="scroll", id=identity, role="region", aria_label=caption, tabindex=0)


def card(identity: str, heading: str, *children: Child, kind: str = "") -> Markup:
    """Section of a page, which a script replaces when it changes."""
    return tag(
        "section",
        tag("h2", heading, id=f"{identity}-heading"),
        *children,
        id=identity,
        class_=f"card {kind}".strip(),
        data_live=True,
        aria_labelledby=f"{identity}-heading",
    )


def details(identity: str, summary: str, *children: Child) -> Markup:
    return tag("details", tag("summary", summary, id=f"{identity}-summary"), *children, id=identity)


def facts(pairs: Sequence[tuple[str, Child]]) -> Markup:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts")


def message(root: str, title: str, *paragraphs: Child) -> str:
    """Page with one message."""
    words = join(tag("h1", title), *(tag("div", each) for each in paragraphs))
    back = tag("p", tag("a", "All runs", href=root or "./"))
    return page(root, f"{title} · koopmon", tag("section", words, back, class_="card", aria_label=title))


def _connection() -> Markup:
    return tag(
        "div",
        tag("span", "not live, ", tag("a", "load again", href=""), id="connection", class_="connection"),
        tag("p", role="status", aria_live="polite", id="news", class_="unseen"),
    )


def _hint() -> Markup:
    words = ("Without JavaScript this page is complete and stands still. ", tag("a", "Load it again", href=""))
    return tag("noscript", tag("p", *words, " to see what is new.", class_="hint"))
