"""Where results may lie, whose line an error names, and what the status line shows."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
from rich.console import Console

import interp
from interp.errors import EditHadNoEffect, EmptyRow
from interp.remote.address import Address, address
from interp.remote.errors import JobFailed, UntrustedHost
from interp.remote.progress import StatusLine, Update, size
from interp.remote.replies import failure, own_line, result_url, unpack
from tests.remote.scripted import packed

NDIF = Address("https://api.ndif.us", ndif=True, loopback=False)
HERE = address("http://127.0.0.1:5001")
LAB = address("https://ndif.lab.org", allow_host=["ndif.lab.org", "store.lab.org"])


@pytest.mark.parametrize(
    ("at", "url", "full"),
    [
        (HERE, "/results/a?x=1", "http://127.0.0.1:5001/results/a?x=1"),
        (HERE, "http://localhost:5001/results/a", None),
        (NDIF, "https://bucket.s3.example.com/a?Signature=b", None),
        (LAB, "https://ndif.lab.org/a", None),
        (LAB, "https://store.lab.org/a", None),
    ],
)
def test_where_a_result_may_lie(at, url, full):
    assert result_url(at, url, "j") == (full or url)


@pytest.mark.parametrize(
    ("at", "url"),
    [
        (HERE, "http://127.0.0.1:5002/a"),
        (HERE, "https://bucket.s3.example.com/a"),
        (HERE, "//example.com/a"),
        (NDIF, "http://bucket.s3.example.com/a"),
        (LAB, "https://bucket.s3.example.com/a"),
        (LAB, "http://ndif.lab.org/a"),
        (LAB, "https://ndif.lab.org.example.com/a"),
        (LAB, "https://ndif.lab.org@example.com/a"),
    ],
)
def test_where_it_may_not(at, url):
    with pytest.raises(UntrustedHost):
        result_url(at, url, "j")


def test_the_users_line_is_the_last_that_is_theirs():
    library = Path(interp.__file__).parent / "execution.py"
    text = f'''Traceback (most recent call last):
  File "/home/me/first.py", line 3, in main
    look(model)
  File "<ipython-input-7>", line 2, in look
    z = f(x)
        ^^^^
  File "{library}", line 80, in run
    step()
  File "/env/lib/python3.11/site-packages/torch/x.py", line 9
    raise RuntimeError("shapes")
RuntimeError: shapes'''
    assert own_line(text) == "<ipython-input-7>:2 in look: z = f(x)"
    assert own_line("RuntimeError: no frames") == ""
    assert own_line(f'  File "{library}", line 80, in run\n    step()') == ""
    assert own_line('  File "/me/a.py", line 1, in <module>\nE: x') == "/me/a.py:1 in <module>"


def test_a_failure_can_be_pickled_and_says_all():
    error = failure("Traceback\nValueError: x", "j", "here")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert isinstance(again, JobFailed)
    assert (again.job, again.remote_traceback) == ("j", "Traceback\nValueError: x")
    assert str(again) == "job j failed on here:\nTraceback\nValueError: x"
    assert "gave no reason" in str(failure("  ", "j", "here"))


@pytest.mark.parametrize(
    ("line", "cls"),
    [
        ("ValueError: not so", ValueError),
        ("KeyError: 'a'", KeyError),
        ("torch.cuda.OutOfMemoryError: much", RuntimeError),
        ("EditHadNoEffect: 'x' changes nothing", EditHadNoEffect),
        ("interp.errors.EmptyRow: a query", EmptyRow),
        ("SystemExit: 3", RuntimeError),
    ],
)
def test_a_failure_is_also_what_was_raised_there(line, cls):
    """So that `except ValueError` goes on working."""
    error = failure(f"Traceback (most recent call last):\n  File ...\n{line}", "j", "here")
    assert isinstance(error, cls)
    assert isinstance(error, JobFailed)
    assert not isinstance(error, SystemExit)
    assert line in str(error)
    assert error.job == "j"
    assert isinstance(pickle.loads(pickle.dumps(error)), cls)  # noqa: S301


def test_unpacking_holds_its_bound_to_the_byte():
    import zstandard

    content = packed(x=list(range(1000)))
    n = len(zstandard.ZstdDecompressor().decompressobj().decompress(content))
    assert unpack(content, "j", n)["x"][-1] == 999
    with pytest.raises(Exception, match="unpacks to more than"):
        unpack(content, "j", n - 1)


def update(status, description="", **numbers):
    return Update("j1", status, description, 2.0, numbers.get("up", 61_400), 0)


def shown(*updates, terminal, verbose=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    with StatusLine(verbose=verbose, console=console) as line:
        for one in updates:
            line(one)
    return console.file.getvalue()


def test_the_status_line():
    steps = [update("QUEUED", "Position 2 [of] 3"), update("LOG", "a [print]"), update("COMPLETED")]
    assert shown(*steps, terminal=False) == "a [print]\n"
    drawn = shown(*steps, terminal=True)
    assert "QUEUED  Position 2 [of] 3  2 s  job j1  up 61.4 kB" in drawn
    assert drawn.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in drawn  # the cursor is back
    told = shown(steps[0], steps[0], steps[2], terminal=False, verbose=True)
    assert [line.split()[0] for line in told.splitlines()] == ["QUEUED", "COMPLETED"]


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 bytes"), (999, "999 bytes"), (999_700, "1 MB"), (5 * 10**15, "5e+03 TB")]
)
def test_sizes(n, text):
    assert size(n) == text
