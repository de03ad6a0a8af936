"""HTML in which everything is escaped by how it is made: only `Markup` passes as it is, and only `tag` makes it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from koopmon.errors import one_line
from koopmon.views.html import Markup

__all__ = ["Child", "Markup", "join", "tag"]

VOID = frozenset({"meta", "img", "source", "br", "link"})
MAX_TEXT = 2000
"""Characters of one text: what a peer may send is far shorter."""


Child = Markup | str | Iterable["Child"] | None


def tag(name: str, /, *children: Child, **attributes: str | None) -> Markup:
    """An element. Children that are not Markup are texts; `class_` and `data_x` stand for `class` and `data-x`.

    A text may come from a peer: what does not print shows as "?".
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    given = "".join(f' {key}="{escape(value)}"' for key, value in named.items())
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Child) -> Markup:
    """Children one after another, without an element around them."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(escape(one_line(children, MAX_TEXT), quote=False))
    return Markup("".join(map(join, children)))
