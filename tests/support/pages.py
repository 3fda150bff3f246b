"""Read a report's page in tests."""

import json
from html.parser import HTMLParser

_VOID = {"meta", "br", "wbr", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """The tables of a page by the id of their section, its data, its texts and its elements."""

    def __init__(self, folder):
        super().__init__()
        self.tables, self.data, self.texts, self.tags = {}, {}, [], []
        self._section, self._open = "", []
        self.feed((folder / "report.html").read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in _VOID:
            self._open.append((tag, attributes))
        if tag == "section":
            self._section = attributes.get("id", "")
        elif tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._section][-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        within = [tag for tag, _ in self._open]
        if within[-1:] == ["script"]:
            if self._open[-1][1].get("id") == "data":
                self.data = json.loads(data, parse_constant=_refuse)
            return
        self.texts.append(data)
        if "td" in within or "th" in within:
            self.tables[self._section][-1][-1] += data.strip("\n")

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON")
