"""Parser of HTML pages for tests."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "source", "br", "link", "hr", "input"}


class Reading(HTMLParser):
    """Parsed page. `tags` are (name, attributes) in order, `text` is the shown text. Raises for unclosed elements."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self._text: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == [], "something is not closed"
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self._text.append(data)
        if self.open and self.open[-1][0] == "h" and self.open[-1][1:].isdigit():
            level, words = self.headings[-1]
            self.headings[-1] = (level, words + data)

    def links(self) -> list[str | None]:
        return [attributes.get("href") for attributes in self.of("a")]

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
