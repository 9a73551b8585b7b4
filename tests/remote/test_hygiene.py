"""A planted key appears nowhere: not in any output, log, warning, repr or traceback.

Every way for a run to end is played, with all logging on, websocket-client's tracing on, a server
that quotes the key in each of its answers, and tracebacks that print local variables.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings

import pytest
import websocket
from rich.console import Console
from rich.traceback import Traceback

from interp.remote.address import address
from interp.remote.jobs import Job
from interp.remote.keys import Key, find_key
from interp.remote.limits import Limits
from interp.remote.progress import StatusLine
from interp.remote.ready import require_ready, status
from interp.remote.transport import Transport
from tests.remote.scripted import (
    COMPLETED_BY_URL,
    CUT,
    JOB,
    KEY,
    MODEL,
    Scripted,
    done,
    frame,
    packed,
    playing,
)

QUOTED = f"you sent {KEY} and I tell everybody"
FAILED = f'Traceback\n  File "/me/a.py", line 1, in f\n    g()\nValueError: {QUOTED}'


def interrupt(update):
    if update.status == "RUNNING":
        raise KeyboardInterrupt


RUNS = {
    "success": Scripted(frames=[frame("LOG", QUOTED), frame("QUEUED", QUOTED), done(x=1)]),
    "busy": Scripted(posts=[(503, QUOTED)]),
    "wrong key": Scripted(posts=[(401, QUOTED)]),
    "refused": Scripted(posts=[(400, QUOTED)]),
    "moved": Scripted(posts=[(307, QUOTED, {"location": f"http://x/{KEY}"})]),
    "not hosted": Scripted(posts=[(404, QUOTED)], deployments={}),
    "no websocket": Scripted(subscribes=[(401, QUOTED)]),
    "failed": Scripted(frames=[frame("ERROR", FAILED)]),
    "died": Scripted(frames=[frame("ERROR", QUOTED)]),
    "dropped": Scripted(frames=[CUT], polls=[CUT, (500, QUOTED), COMPLETED_BY_URL]),
    "lost": Scripted(posts=[CUT]),
    "no status": Scripted(frames=[CUT], polls=[f'"{QUOTED}"']),
    "gone": Scripted(frames=[COMPLETED_BY_URL], downloads=[(404, QUOTED)]),
    "elsewhere": Scripted(frames=[frame("COMPLETED", data="http://127.0.0.1:1/x")]),
    "damaged": Scripted(frames=[COMPLETED_BY_URL], downloads=[packed(x=1)[:-20]]),
    "stopped": Scripted(),
}


def everything_shown(error):
    """An error as plain, chained and with the local variables of all frames."""
    console = Console(file=io.StringIO(), width=300)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next  # this file's own variables hold what the server will say
    error = error.with_traceback(trace)
    console.print(
        Traceback.from_exception(
            type(error),
            error,
            trace,
            show_locals=True,
            locals_max_string=None,
            locals_max_length=None,
        )
    )
    plain = "".join(traceback.format_exception(error))
    with_locals = traceback.TracebackException.from_exception(error, capture_locals=True)
    return console.file.getvalue() + plain + "".join(with_locals.format()) + repr(error)


@contextlib.contextmanager
def all_logs():
    """All that is logged, at every level, by everybody."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(1)
    websocket.enableTrace(True, handler)
    try:
        yield text
    finally:
        websocket.enableTrace(False)
        root.setLevel(before)
        root.removeHandler(handler)


@pytest.mark.parametrize("name", RUNS)
def test_the_key_is_nowhere(name, capfd, monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    script = RUNS[name]
    quick = Limits(attempts=3, first_wait=0.001, max_wait=0.001, grace=0.05, answer=5.0)
    shown = []
    with playing(script), all_logs() as logs, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        at = address(script.url)
        line = interrupt if name == "stopped" else StatusLine(verbose=True)
        sender = Transport(at, find_key(at), limits=quick, progress=line)
        calls = [
            lambda: sender.run(MODEL, {}, b"blob"),
            lambda: sender.wait(JOB) if name != "stopped" else None,
            lambda: Job(JOB, at, quick).status(),
            lambda: status(script.url),
            lambda: require_ready(at, Key(KEY), "lab/nose"),
        ]
        for call in calls:
            try:
                shown.append(repr(call()))
                shown.append(str(status(script.url)))
            except BaseException as error:
                shown.append(everything_shown(error))
        shown += [repr(sender), repr(Job(JOB, at)), repr(quick), repr(at)]
    out, err = capfd.readouterr()
    carried = [h for h in script.headers if h.get("ndif-api-key") == KEY]
    assert carried, "the key was never used, so this shows nothing"
    assert "request header" in logs.getvalue(), "the websocket's requests were not logged"
    for where, text in {
        "stdout": out,
        "stderr": err,
        "logs": logs.getvalue(),
        "warnings": " ".join(str(w.message) for w in warned),
        "shown": "\n".join(shown),
    }.items():
        assert KEY not in text, f"the key is in {where}: {_around(text)}"


def test_the_search_finds_a_key_where_there_is_one():
    """`Key` in a frame's variables is hidden, its headers would not be."""
    hidden = exec_in_another_file("key = Key(KEY)")
    assert KEY not in everything_shown(hidden)
    leaks = exec_in_another_file("headers = Key(KEY).headers()")
    assert KEY in everything_shown(leaks)


def exec_in_another_file(line):
    """The error of a function that does `line` and fails."""
    scope = {"Key": Key, "KEY": KEY}
    exec(compile(f"def f():\n    {line}\n    1 / 0", "elsewhere.py", "exec"), scope)
    with pytest.raises(ZeroDivisionError) as caught:
        scope["f"]()
    return caught.value


def _around(text):
    at = text.find(KEY)
    return text[max(0, at - 300) : at + 100]
