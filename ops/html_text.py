"""The text of an HTML page, by the standard library's parser: it forgives, and it never executes or loads."""

from html.parser import HTMLParser

# Elements whose content is no prose, and those that stand on lines of their own.
_HIDDEN = frozenset({"script", "style", "template", "noscript", "svg", "math", "nav", "iframe", "object"})
# fmt: off
_BLOCKS = frozenset({
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "fieldset", "figcaption", "figure",
    "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "option", "p", "pre",
    "section", "table", "td", "th", "tr", "ul",
})
# fmt: on


class _TextParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title: list[str] = []
        self._hidden: str | None = None  # the hidden element that we are in,
        self._depth = 0  # and how often it is open
        self._in_title = False
        self._in_pre = False

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if self._hidden is not None:
            self._depth += tag == self._hidden
        elif tag in _HIDDEN:
            self._hidden, self._depth = tag, 1
        elif tag == "title":
            self._in_title = True
        else:
            self._in_pre |= tag == "pre"
            self._break(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if self._hidden is None:  # `<svg/>` hides nothing
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden is not None:
            self._depth -= tag == self._hidden
            if self._depth == 0:
                self._hidden = None
        elif tag == "title":
            self._in_title = False
        else:
            self._in_pre &= tag != "pre"
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden is not None:
            return
        if self._in_title:
            self.title.append(data)
        else:
            self.parts.append(data if self._in_pre else data.replace("\n", " "))

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """As browsers do: `<![whatever` is a comment. The parser of older Pythons raises AssertionError."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def _break(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n")


def html_text(page: str) -> tuple[str, str | None]:
    """The text of `page`, a line a block, and its title where it has one."""
    parser = _TextParser()
    parser.feed(page)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    title = " ".join("".join(parser.title).split())
    return "\n".join(line for line in lines if line), title or None
