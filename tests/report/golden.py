"""What the page of a study says and draws, part by part, as short digests.

    python -m tests.report.golden      writes `study_page.json` anew; look at the page first

Left out is what changes without a change of ours: plotly.js, plotly's own template, versions and
hashes of files (Provenance), compressed pictures, and digits beyond the ninth.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("study_page.json")
_DATA = re.compile(r'<script type="application/json" id="(.*?)-data">(.*?)</script>', re.DOTALL)


def digests(body: str) -> dict[str, str]:
    """Part of the page -> digest; `body` is a page without plotly.js."""
    parts: dict[str, Any] = {}
    for name, text in _DATA.findall(body):
        drawn = json.loads(text)
        drawn["layout"].pop("template", None)
        parts[name] = rounded(drawn)
    words = _DATA.sub("", body)
    words = re.sub(r"<(style|script|svg).*?</\1>", "", words, flags=re.DOTALL)
    words = words[: words.index('<section id="provenance">')]
    for part in re.split(r'(?=<section id=|<h2 id=")', words):
        name = re.match(r'<\w+ id="(\w+)"', part)
        parts[f"words {name[1] if name else 'head'}"] = " ".join(part.split())
    return {name: digest(part) for name, part in parts.items()}


def rounded(value: Any) -> Any:
    """All numbers of a JSON value to nine digits; 1.0 and 1 are the same."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        value = round(value, 9)
        return int(value) if value == int(value) else value
    return value


def digest(part: Any) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    from plotly.offline import get_plotlyjs

    from interp.report import write_report
    from tests.report.synthetic import write_folder

    with tempfile.TemporaryDirectory() as place:
        page = write_report(write_folder(Path(place) / "run")).read_text()
    FILE.write_text(json.dumps(digests(page.replace(get_plotlyjs(), "")), indent=1) + "\n")
    sys.stdout.write(f"wrote {FILE.name}\n")
