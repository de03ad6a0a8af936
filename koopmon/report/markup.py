"""HTML elements with escaped content: only `Markup` stays unescaped, and only `tag` creates it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from koopmon.errors import one_line
from koopmon.views.html import Markup

__all__ = ["Child", "Markup", "join", "tag"]

VOID = frozenset({"meta", "img", "source", "br", "link"})
MAX_TEXT = 2000
"""Maximum length of one text in characters; texts within the protocol's bounds are much shorter."""


Child = Markup | str | Iterable["Child"] | None


def tag(name: str, /, *children: Child, **attributes: str | None) -> Markup:
    """Build an element.

    Children that are not Markup are escaped as text; `class_` and `data_x` stand for `class` and `data-x`. A text may
    come from a peer: unprintable characters become "?".
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    given = "".join(f' {key}="{escape(value)}"' for key, value in named.items())
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Child) -> Markup:
    """Concatenate children without an enclosing element."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(escape(one_line(children, MAX_TEXT), quote=False))
    return Markup("".join(map(join, children)))
