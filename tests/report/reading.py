"""Reading a page back: its tags, and the data of its figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from plotly.offline import get_plotlyjs

from interp.report import write_report
from tests.report import probed


class Tags(HTMLParser):
    """Tags with their attributes, and the text inside <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.style = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        self.style += data if self._in_style else ""


def drawn(body: str, name: str) -> dict:
    found = re.search(rf'<script type="application/json" id="{name}-data">(.*?)</script>', body)
    assert found, f"no data for {name}"
    return json.loads(found[1])


def assert_nothing_is_fetched(body: str) -> None:
    """That a page (without plotly.js, whose source names addresses) refers to nothing outside."""
    page = Tags(body)
    assert not [tag for tag, _ in page.tags if tag in {"link", "iframe", "img", "base", "object"}]
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "data", "action"):
            address = attributes.get(key)
            assert address is None or address.startswith(("#", "data:image/")), (tag, address)
    assert "http" not in page.style
    assert "@import" not in page.style
    assert "url(" not in page.style
    assert not re.search(r"https?://", re.sub(r'"[^"]*"', "", body))


def named(body: str, figure: str) -> dict:
    """Traces with a name, by name; of panels, by (name, x axis)."""
    traces = [t for t in drawn(body, figure)["data"] if "name" in t]
    return {(t["name"], t.get("xaxis", "x")): t for t in traces}


def probe_page(path: Path, frames: dict | None = None, told: dict | None = None) -> str:
    """The page of a made-up probe run, without plotly.js."""
    found = write_report(probed.write_folder(path, frames, told)).read_text()
    return found.replace(get_plotlyjs(), "")
