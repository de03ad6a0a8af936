"""HTML and SVG elements with automatic escaping: a plain string is text, only `Markup` is markup."""

from __future__ import annotations

from html import escape
from typing import TypeAlias

VOID = frozenset({"meta", "link", "img", "br", "input"})


class Markup(str):
    """Text that is already markup and is not escaped again."""

    __slots__ = ()


Child: TypeAlias = "str | int | None"


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """Build one element. Children that are not Markup are escaped; None is skipped.

    In attribute names "_" becomes "-", and a trailing one is dropped (`class_`). None and False omit an attribute, True
    writes it without a value.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{escape(str(value))}"')
    if name in VOID:
        return Markup(f"<{' '.join(words)}>")
    return Markup(f"<{' '.join(words)}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    return Markup("".join(_text(child) for child in children if child is not None))


def _text(child: str | int) -> str:
    return child if isinstance(child, Markup) else escape(str(child))
