"""Jinja2 environment of the pages: autoescape, filters for numbers and times, and a clean-up of untrusted text."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from koopmon.errors import one_line

MAX_TEXT = 2000
"""Maximum length of one text in characters; texts within the protocol's bounds are much shorter."""


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits; a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def decimal(value: float | None) -> str:
    """Format a risk or another value from 0 to 1; a dash for None."""
    return "–" if value is None else f"{value:.2f}"


def count(value: int | None) -> str:
    """Format an integer with separators of thousands; a dash for None."""
    return "–" if value is None else f"{value:,}"


def percent(ratio: float | None, digits: int = 2) -> str:
    """Format a ratio in percent with `digits` significant digits; a dash for None."""
    return "–" if ratio is None else f"{100 * ratio:.{digits}g}%"


def span(seconds: float) -> str:
    """Format a duration in its largest unit."""
    for size, unit in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


def ago(seconds: float) -> str:
    """Format the time since an event; static/live.js has the same rule."""
    return f"{span(seconds)} ago" if seconds >= 2 else "now"


def moment(at: float, form: str = "%Y-%m-%d %H:%M:%S UTC") -> str:
    """Format a Unix time in UTC; a dash for a time that no calendar holds."""
    try:
        return time.strftime(form, time.gmtime(at))
    except (OverflowError, OSError, ValueError):
        return "–"


def _text(value: object) -> object:
    """Replace unprintable characters of a text, which may come from a peer, by "?", and shorten it."""
    if value is None:
        return ""
    if not isinstance(value, str) or isinstance(value, Markup) or (value.isprintable() and len(value) <= MAX_TEXT):
        return value
    return one_line(value, MAX_TEXT)


def _labelled(cells: Markup, heads: Sequence[str | Sequence[str]]) -> Markup:
    """Add the title of its column and its role to each cell of a row. Texts in cells are escaped."""
    titles = iter(head if isinstance(head, str) else head[0] for head in heads)

    def label(match: re.Match[str]) -> str:
        role = "rowheader" if match[1] == "th" else "cell"
        return f'{match[0]} role="{role}" data-label="{escape(next(titles))}"'

    return Markup(re.sub(r"<(td|th)\b", label, cells))  # noqa: S704 - escaped


@functools.cache
def templates(package: str) -> Environment:
    """Environment with the templates of `package` and those of this package."""
    places = dict.fromkeys((package, __package__))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(place) for place in places if place]),
        autoescape=True,
        finalize=_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in (number, decimal, count, percent, span, ago, moment)}
    environment.filters["quote"] = functools.partial(quote, safe="")
    environment.filters["numeric"] = lambda title: (title, "n")
    environment.filters["labelled"] = _labelled
    return environment


def render(package: str, template: str, /, **values: Any) -> Markup:
    """Render a template of `package`."""
    return Markup(templates(package).get_template(template).render(values))  # noqa: S704 - autoescape is on


def macro(template: str, name: str, /, **values: Any) -> Markup:
    """Call a macro of one of this package's templates."""
    module = templates(str(__package__)).get_template(template).module
    return Markup(getattr(module, name)(**values))  # noqa: S704 - autoescape is on
