"""Untrusted texts on a page: escaped, printable, of bounded length; formats of numbers and times."""

from __future__ import annotations

import math

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from koopmon.views import html
from koopmon.views.html import MAX_TEXT, ago, count, decimal, macro, moment, number, percent, span, templates

HOSTILE = "\"><script>'&{{7*7}}\u202e\x07\n"


def rendered(template: str, **values: object) -> str:
    return templates("koopmon.views").from_string(template).render(values)


def test_a_text_is_escaped_printable_and_short() -> None:
    assert rendered("{{ text }}", text=HOSTILE) == "&#34;&gt;&lt;script&gt;&#39;&amp;{{7*7}}???"
    assert rendered('<a title="{{ text }}">', text='"') == '<a title="&#34;">'
    assert rendered("{{ text }}", text="x" * (MAX_TEXT + 1)) == "x" * (MAX_TEXT - 3) + "..."
    assert rendered("{{ text }}{{ nothing }}", text=Markup("<b>\x07</b>"), nothing=None) == "<b>\x07</b>"


def test_filters_do_not_make_text_safe() -> None:
    for name in ("capitalize", "lower", "replace('_', ' ')", "string", "quote"):
        assert "<" not in rendered(f"{{{{ text | {name} }}}}", text="<x_y>")
    assert rendered("{{ text | quote }}", text="team/a b") == "team%2Fa%20b"


def test_a_misspelt_name_fails() -> None:
    with pytest.raises(UndefinedError):
        rendered("{{ typo }}")


def test_macros_escape_their_arguments() -> None:
    legend = macro("charts.html", "depth_legend", first=HOSTILE, last="1", depths=1)
    assert "<script>" not in legend
    assert "&lt;script&gt;" in legend


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (number(None), "–"),
        (number(math.nan), "–"),
        (number(0.123456), "0.123"),
        (number(1234567.0, 4), "1.235e+06"),
        (decimal(0.255), "0.26"),
        (decimal(None), "–"),
        (count(1234567), "1,234,567"),
        (count(None), "–"),
        (percent(0.01234), "1.2%"),
        (percent(None), "–"),
        (span(59.0), "59 s"),
        (span(60.0), "1 min"),
        (span(7200.0), "2 h"),
        (span(3 * 86_400.0), "3 d"),
        (span(-1.0), "0 s"),
        (ago(1.9), "now"),
        (ago(2.0), "2 s ago"),
        (moment(0.0), "1970-01-01 00:00:00 UTC"),
        (moment(1e300), "–"),
        (moment(math.nan), "–"),
    ],
)
def test_numbers_and_times(found: str, expected: str) -> None:
    assert found == expected


def test_every_template_compiles() -> None:
    for package in ("koopmon.views", "koopmon.monitor.http", "koopmon.report"):
        environment = html.templates(package)
        if package.endswith("http"):
            import koopmon.monitor.http.pages  # noqa: F401 - adds its filters
        names = environment.list_templates(extensions=["html"])
        assert "macros.html" in names
        for name in names:
            environment.get_template(name)
