"""`docs/remote.md` says what is: its scripts run, its tables are what the code says.

`INTERP_WRITE_DOCS=1 python -m pytest tests/remote/test_docs.py` writes the table of hooks anew.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from interp import errors
from interp.families import FAMILIES
from interp.families.base import Block, Tower
from interp.rehearsal import faults, options
from interp.remote import errors as remote_errors
from interp.remote.limits import Limits
from interp.stock import INSTEAD, PACKED, SCALED, SCORES
from tests.rehearsal.serving import TINY, Starting
from tests.test_hooks_page import table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "remote.md"
TEXT = PAGE.read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
FLAT = " ".join(TEXT.split())
URL = "http://127.0.0.1:5001"

#: what the last script's process says of each `keep=`: bytes down, with float16 too
MEASURE = """
import json
half = MLLM.load("tiny", remote={url!r}, transfer="float16")
forms = {{"all": None, '"tokens"': "tokens", "last position": lambda state, hook: state[:, -1], "verdicts": bank}}
found = {{}}
for name, keep in forms.items():
    for one in (model, half):
        one.run(x, read=where, logits=False, keep=keep)
        found.setdefault(name, []).append(one.host.last.down)
found["rounding"] = half.host.traffic.rounding
print("measured", json.dumps(found))
"""  # noqa: E501


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    """What the page's scripts print, run in order as one script against a server."""
    starting = Starting(TINY, "--name", "tiny")
    try:
        server = starting.ready()
        script = "".join(SCRIPTS).replace(URL, server.url)
        script = script.replace('"results/tiny/', f'"{ROOT}/results/tiny/')
        path = tmp_path_factory.mktemp("docs") / "script.py"
        path.write_text(script + MEASURE.format(url=server.url))
        ran = subprocess.run(
            [sys.executable, str(path)],
            capture_output=True,
            text=True,
            cwd=path.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NDIF_API_KEY": server.key},
        )
    finally:
        starting.stop()
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_scripts_run_as_written(said):
    assert "Run(5 states, logits [10, 113, 36], 0 receipts; 1 request" in said
    assert "torch.Size([5, 10, 36]) 1\n" in said  # five passes, one request
    assert "open  changed" in said  # the receipts of the job that was picked up


def test_bytes_are_those_of_the_table(said):
    found = json.loads(said.partition("measured ")[2])
    rounding = found.pop("rounding")
    written = {
        name: [int(cell.replace(",", "")) for cell in cells]
        for name, *cells in rows(part("bytes", "bytes"))
    }
    assert written.keys() == found.keys()
    for name, sizes in found.items():
        assert written[name] == pytest.approx(sizes, rel=0.1), name
    assert f"Rounding to float16 was {rounding:.0e}".replace("e-0", "e-") in TEXT


def test_hooks_of_a_stock_model():
    def told(hooks: str, *cells: str) -> list[str]:
        return [hooks, *cells]

    lines = [told("`attn.hook_attn_scores`", "no", "no", SCORES)]
    for hook, instead in INSTEAD.items():
        of_norms = " of norms" if hook in ("hook_scale", "hook_normalized") else ""
        lines.append(told(f"`{hook}`{of_norms}", "yes", "no", instead))
    packed = towers(lambda tower: tower.packed)
    closed = ", ".join(f"`attn.hook_{part}`" for part in ("rot_q", "rot_k", "mask", "pattern"))
    lines.append(told(f"{closed} in {packed}", "no", "no", PACKED))
    scaled = towers(lambda tower: any(block.attn_scale for block in blocks(tower)))
    instead = f"{SCALED.partition('; ')[0]}; take the difference of the streams around it"
    lines.append(told(f"`hook_attn_out`, `hook_mlp_out` in {scaled}", "no", "no", instead))
    lines.append(told("all others", "yes", "yes", ""))
    made = table(["hook", "read", "edit", "instead"], lines)
    start, end = "stock.py, held by tests/remote/test_docs.py -->\n", "<!-- end of stock -->"
    before, rest = TEXT.split(start)
    new = f"{before}{start}{made}\n{end}{rest.partition(end)[2]}"
    if os.environ.get("INTERP_WRITE_DOCS"):
        PAGE.write_text(new)
        return
    assert new == TEXT, "INTERP_WRITE_DOCS=1 writes the table anew"


def test_the_table_of_hooks_is_what_a_stock_model_does():
    """By the model's own word: which hooks it has, and which of them it lets be edited."""
    from interp import MLLM

    model = MLLM.load("tiny", remote="local")
    every = MLLM.load("tiny").hooks.names
    closed = [line for line in rows(part("stock", "stock")) if " in " not in line[0]]
    reads = {name for line in closed if line[1] == "no" for name in hooks_of(line, every)}
    edits = {name for line in closed if line[2] == "no" for name in hooks_of(line, every)}
    assert set(every) - set(model.hooks.names) == reads
    refused = set()
    for name in model.hooks.names:
        try:
            model.require([name], edited=True)
        except errors.UnknownHook:
            refused.add(name)
    assert refused == edits - reads
    assert model.host.traffic.requests == 0


def test_every_option_of_the_server_is_told(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--help"])
    there = set(re.findall(r"--[a-z-]*[a-z]", capsys.readouterr().out)) - {"--help"}
    told = {
        name
        for line in rows(part("option | what", None))
        for name in re.findall(r"`(--[a-z-]+)`", line[0])
    }
    assert told == there


def test_every_fault_is_told():
    told = [
        re.match(r"[a-z0-9-]+", one)[0]
        for line in rows(part("fault | what", None))
        for one in re.findall(r"`([^`]+)`", line[0])
    ]
    assert set(told) == {"delay", "drop-after", *faults.COUNTED}


def test_every_error_is_told():
    told = {
        name
        for line in rows(part("error | what", None))
        for name in re.findall(r"`([A-Z]\w+)`", line[0])
    }
    there = {
        name
        for name, kind in inspect.getmembers(remote_errors, inspect.isclass)
        if kind.__module__ == remote_errors.__name__ and name != "RemoteError"
    }
    assert there <= told
    assert all(hasattr(errors, name) for name in told - there)


def test_the_limits_told_are_those_there_are():
    limits = Limits()
    assert (limits.attempts, limits.patience) == (6, 600)
    assert "Six tries a step, and ten minutes without any news" in FLAT
    assert (limits.first_wait, limits.max_wait) == (0.5, 30)
    assert "Waits double from half a second to 30 s" in FLAT
    assert options.parse(["MODEL"]).keep == 3600
    assert "the rehearsal server: an hour" in FLAT


def test_links_lead_somewhere():
    headings = [
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", TEXT, re.M)
    ]
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        path, _, anchor = link.partition("#")
        assert not path or (PAGE.parent / path).exists(), link
        assert not anchor or anchor in headings, link


def part(start: str, end: str | None) -> str:
    """The page between two markers, or the table that begins with these columns."""
    if end is None:
        return re.search(rf"^\| {re.escape(start)}.*?(?=\n\n)", TEXT, re.S | re.M)[0]
    return re.search(rf"<!-- {start}:[^\n]*-->\n(.*?)<!-- end of {end} -->", TEXT, re.S)[1]


def rows(markdown: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    lines = [line.strip("|").split("|") for line in markdown.strip().splitlines()]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def hooks_of(line: list[str], names: list[str]) -> set[str]:
    """The hooks that a line of the table is about."""
    endings = tuple("." + name for name in re.findall(r"`([\w.]+)`", line[0]))
    return {name for name in names if name.endswith(endings)}


def blocks(tower: Tower) -> list[Block]:
    """The blocks that a tower may have."""
    return [tower.block] if isinstance(tower.block, Block) else list(tower.block.values())


def towers(chosen) -> str:
    """The towers of families that are so, in words."""
    for family in FAMILIES:
        assert not chosen(family.language), "the page tells of vision towers only"
    return ", ".join(f.name for f in FAMILIES if chosen(f.vision)) + " (vision tower)"
