"""A job's way to a server and back, over every fault of the way; nothing is sent twice.

Against a scripted server (`scripted.py`) on a real socket. Waits between tries are on a clock of
the test's own, so that none is really waited for.
"""

from __future__ import annotations

import _thread
import dataclasses
import itertools
import random
import socket
import threading

import pytest
import torch

from interp.remote.address import address
from interp.remote.errors import (
    BadReply,
    GaveUp,
    Interrupted,
    JobFailed,
    NoKey,
    NotHosted,
    PerhapsReceived,
    Refused,
    TooLarge,
    UnknownJob,
    Unreachable,
    UntrustedHost,
    VersionsDiffer,
    WrongKey,
)
from interp.remote.jobs import Job
from interp.remote.keys import Key
from interp.remote.limits import Backoff, Limits, poll_wait
from interp.remote.transport import Transport
from tests.remote.scripted import (
    COMPLETED_BY_URL,
    CUT,
    FREEZE,
    JOB,
    KEY,
    LATE,
    MODEL,
    RECEIVED,
    Scripted,
    deployment,
    done,
    frame,
    packed,
    playing,
)

BLOB = b"payload" * 100
THREE = torch.arange(3)


class Clock:
    """Time passes only when somebody sleeps."""

    def __init__(self):
        self.now, self.sleeps = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds


def limits(**options):
    clock = Clock()
    quick = {"attempts": 4, "grace": 0.2, "quiet": 5.0, "answer": 5.0}
    return Limits(**{**quick, **options}, clock=clock, sleep=clock.sleep, random=random.Random(0))


def transport(script, key=KEY, *, progress=None, **options):
    at = address(script.url)
    return Transport(at, Key(key) if key else None, limits=limits(**options), progress=progress)


def run(script, **options):
    return transport(script, **options).run(MODEL, {"attn_implementation": "eager"}, BLOB)


def test_a_job_comes_back_with_its_bytes_counted():
    updates = []
    script = Scripted(frames=[frame("QUEUED", "Position 2 of 3"), frame("LOG", "hello"), done(x=7)])
    with playing(script):
        reply = run(script, progress=updates.append)
    assert reply.result == {"x": 7}
    assert (reply.job, script.seen) == (JOB, ["subscribe", "POST"])
    assert reply.up == len(script.bodies[0]) > len(BLOB)
    frames = [x if isinstance(x, bytes) else x.encode() for x in script.frames]
    sent = len('{"session_id": "session-1"}') + len(RECEIVED) + sum(map(len, frames))
    assert sent <= reply.down <= sent + 10 * len(frames)  # with the frames' own headers
    words = [(u.status, u.description) for u in updates]
    assert ("QUEUED", "Position 2 of 3") in words
    assert ("LOG", "hello") in words
    assert words[-1][0] == "COMPLETED"
    assert updates[-1].job == JOB


def test_the_request_is_nnsights():
    script = Scripted()
    with playing(script):
        run(script)
    body, headers = script.bodies[0], script.headers[1]
    assert b'"session_id":"session-1"' in body
    assert b'"compress":true' in body
    assert b'"attn_implementation":"eager"' in body
    assert b'name="blob"; filename="request"' in body
    assert BLOB in body
    assert headers["ndif-api-key"] == KEY
    assert headers["nnsight-version"].startswith("0.8")
    assert float(headers["ndif-timestamp"]) > 0
    assert headers["python-version"].startswith("3.")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_not_now_is_tried_again(status):
    script = Scripted(posts=[(status, "busy"), (status, "busy"), RECEIVED])
    with playing(script):
        assert torch.equal(run(script).result["x"], THREE)
    assert (script.count("POST"), script.count("subscribe")) == (3, 1)


def test_it_waits_as_long_as_the_server_asks_and_longer_each_time():
    script = Scripted(posts=[(429, "full", {"retry-after": "17"}), (503, ""), RECEIVED])
    with playing(script):
        sender = transport(script)
        sender.run(MODEL, {}, BLOB)
    first, second = sender.limits.sleep.__self__.sleeps
    assert first == 17
    assert 0.5 <= second <= 1.0


def test_it_gives_up_with_words():
    script = Scripted(posts=[(503, "down for repairs")])
    with playing(script), pytest.raises(Unreachable, match=r"4 times.*HTTP 503: down for repairs"):
        run(script)
    assert script.count("POST") == 4


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    nobody = Scripted(url=f"http://127.0.0.1:{port}")
    with pytest.raises(Unreachable, match=r"4 times.*interp status"):
        run(nobody)
    with pytest.raises(Unreachable, match="ConnectError"):
        run(nobody, watch=False)


def test_a_lost_answer_is_told_by_the_websocket():
    script = Scripted(posts=[LATE], frames=[RECEIVED, frame("RUNNING"), done(x=1)])
    with playing(script):
        assert run(script, grace=20.0).result == {"x": 1}
    assert script.count("POST") == 1


def test_a_gateways_answer_may_be_wrong_about_the_job():
    script = Scripted(posts=[(504, "timed out")], frames=[RECEIVED, done(x=1)])
    script.turn = _taking(script, script.turn)
    with playing(script):
        sender = transport(script, grace=20.0)
        assert sender.run(MODEL, {}, BLOB).result == {"x": 1}
    assert script.count("POST") == 1
    assert sender.limits.sleep.__self__.sleeps == []  # it listened before it thought of more


def _taking(script, turn):
    """The job is taken even though the answer is an error."""

    def wrapped(what, answers):
        if what == "POST":
            script.taken.set()
        return turn(what, answers)

    return wrapped


def test_a_lost_answer_that_nothing_tells_of_is_not_sent_again():
    script = Scripted(posts=[CUT])
    with playing(script), pytest.raises(PerhapsReceived, match="not sent again"):
        run(script)
    assert script.count("POST") == 1
    with playing(Scripted(posts=[CUT])) as script, pytest.raises(PerhapsReceived):
        transport(script).submit(MODEL, {}, BLOB)
    assert script.count("POST") == 1


def test_a_body_that_never_left_is_sent_again():
    """The server hangs up while the body is still on its way: it cannot have been run."""
    taken = []
    big = bytes(32 << 20)  # more than a socket buffers

    def serve(listener):
        for _ in range(4):
            connection, _ = listener.accept()
            connection.recv(1 << 10)
            taken.append(1)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        sender = Transport(address(url), None, limits=limits(watch=False))
        with pytest.raises(Unreachable, match="perhaps more than it takes"):
            sender.run(MODEL, {}, big)
        thread.join(10)
    assert len(taken) == 4


@pytest.mark.parametrize("n_frames", [0, 1, 2])
def test_a_dropped_websocket_is_followed_by_asking(n_frames):
    frames = [*[frame("QUEUED"), frame("RUNNING")][:n_frames], CUT]
    script = Scripted(
        frames=frames,
        polls=[(404, "unknown yet"), frame("RUNNING"), (503, "busy"), CUT, COMPLETED_BY_URL],
        downloads=[packed(x=5)],
    )
    with playing(script):
        assert run(script).result == {"x": 5}
    assert (script.count("POST"), script.count("poll")) == (1, 5)


def test_a_silent_websocket_is_checked():
    """The last frame never comes, but the server, asked, has the result."""
    never = threading.Event()
    script = Scripted(frames=[never], downloads=[packed(x=5)])
    with playing(script):
        assert run(script, quiet=0.05).result == {"x": 5}
        never.set()
    assert script.count("POST") == 1


def test_silence_is_borne_while_the_websocket_lives():
    """As NDIF may do: jobs of a session cannot be asked for, and nothing is said for long."""
    goes_on = threading.Event()
    script = Scripted(frames=[goes_on, done(x=1)], polls=[(404, "unknown")])
    turn, now = script.turn, itertools.count()

    def after_some_questions(what, answers):
        if what == "poll" and script.count("poll") == 12:
            goes_on.set()
        return turn(what, answers)

    script.turn = after_some_questions
    with playing(script):
        sender = transport(script, quiet=0.05, patience=15.0)
        # every look at the clock is a second: far more than 15 go by in all
        sender.limits = dataclasses.replace(sender.limits, clock=lambda: float(next(now)))
        assert sender.run(MODEL, {}, BLOB).result == {"x": 1}
    assert script.count("poll") >= 12
    assert next(now) > 30


def test_a_websocket_without_a_sign_of_life_is_given_up():
    """No frame, no answer to pings: the connection is gone, and nobody said so."""
    updates = []
    script = Scripted(frames=[FREEZE], polls=[(404, "")] * 4 + [COMPLETED_BY_URL])
    with playing(script):
        assert torch.equal(run(script, quiet=0.2, progress=updates.append).result["x"], THREE)
    assert "it gave no sign of life" in str([u.description for u in updates])
    assert script.count("POST") == 1


def test_without_a_websocket():
    script = Scripted(polls=[frame("RUNNING"), COMPLETED_BY_URL])
    with playing(script):
        assert torch.equal(run(script, watch=False).result["x"], THREE)
    assert script.count("subscribe") == 0
    assert b'"session_id":""' in script.bodies[0]


def test_garbage_on_the_websocket_is_like_a_drop():
    script = Scripted(frames=[b"\x80\x04garbage"], downloads=[packed(x=5)])
    with playing(script):
        assert run(script).result == {"x": 5}


def test_frames_of_other_jobs_are_not_ours():
    other = frame("ERROR", "not yours").replace(JOB, "job-2")
    script = Scripted(frames=[other, done(x=1)])
    with playing(script):
        assert run(script).result == {"x": 1}


TRACEBACK = """Traceback (most recent call last):
  File "/home/me/study.py", line 12, in look
    z = model.nope.output
  File "/env/lib/python3.11/site-packages/nnsight/envoy.py", line 5, in __getattr__
    raise AttributeError(name)
AttributeError: nope"""


@pytest.mark.parametrize("how", ["frame", "poll", "answer"])
def test_an_error_in_the_job_is_shown_with_the_users_line_and_not_repeated(how):
    error = frame("ERROR", TRACEBACK)
    script = {
        "frame": Scripted(frames=[frame("RUNNING"), error]),
        "poll": Scripted(frames=[CUT], polls=[error]),
        "answer": Scripted(posts=[error]),
    }[how]
    with playing(script), pytest.raises(JobFailed, match="AttributeError: nope") as caught:
        run(script)
    assert caught.value.remote_traceback == TRACEBACK
    assert caught.value.job == JOB
    assert str(caught.value).endswith("/home/me/study.py:12 in look: z = model.nope.output")
    assert script.count("POST") == 1


def test_a_workers_death_is_not_run_again_by_itself():
    script = Scripted(frames=[frame("ERROR", "the worker died (signal 9)")])
    with playing(script), pytest.raises(JobFailed, match=r"worker died(.|\n)*run it again"):
        run(script)
    assert script.count("POST") == 1


def test_a_model_that_is_not_there_may_be_told_late():
    script = Scripted(
        frames=[frame("ERROR", "no such deployment")], deployments={"a": deployment("lab/other")}
    )
    with playing(script), pytest.raises(NotHosted, match=r"no such deployment.*lab/other"):
        run(script)


@pytest.mark.parametrize(
    ("post", "error", "words"),
    [
        ((401, "wrong"), WrongKey, "NDIF_API_KEY"),
        ((403, "not yours"), WrongKey, "does not allow this.*not yours"),
        ((413, "8 MB at most"), TooLarge, r"700 bytes.*8 MB at most"),
        ((422, [{"loc": ["data"], "msg": "bad"}]), Refused, "HTTP 422.*bad"),
        ((400, "nnsight version 0.7"), VersionsDiffer, r"nnsight version 0\.7"),
        ((404, "Not Found"), Refused, "HTTP 404"),
        ((307, "", {"location": "https://elsewhere.org"}), Refused, "elsewhere.org.*not followed"),
        ((418, "teapot"), Refused, "418.*teapot"),
    ],
)
def test_a_no_is_final(post, error, words):
    script = Scripted(posts=[post])
    with playing(script), pytest.raises(error, match=words):
        run(script)
    assert script.count("POST") == 1


def test_a_model_that_is_not_hosted_names_those_that_are():
    script = Scripted(posts=[(404, "unknown")], deployments={"a": deployment("lab/other")})
    with playing(script), pytest.raises(NotHosted, match="does not have lab/eyes; it has: lab/oth"):
        run(script)


def test_versions_that_differ_come_with_the_command():
    there = {"python_version": "2.7.1", "packages": {"nnsight": "0.7.2", "transformers": "5.0.0"}}
    script = Scripted(posts=[(400, "client version is incompatible")], env=there)
    with playing(script), pytest.raises(VersionsDiffer) as caught:
        run(script)
    assert 'pip install "nnsight==0.7.2" "transformers==5.0.0"' in str(caught.value)
    assert "Python 2.7" in str(caught.value)


@pytest.mark.parametrize(("key", "error"), [(None, NoKey), ("another-key", WrongKey)])
def test_a_websocket_that_wants_another_key(key, error):
    script = Scripted(subscribes=[(401, "no")])
    with playing(script), pytest.raises(error, match="NDIF_API_KEY"):
        run(script, key=key)
    assert script.seen == ["subscribe"]


def test_a_busy_websocket_is_tried_again_and_a_missing_one_is_not():
    script = Scripted(subscribes=[(503, "starting"), None])
    with playing(script):
        run(script)
    assert script.count("subscribe") == 2
    script = Scripted(subscribes=[(404, "nope")])
    with playing(script), pytest.raises(Refused, match=r"websocket.*watch=False"):
        run(script)
    assert script.count("subscribe") == 1


def test_a_download_is_repeated():
    script = Scripted(frames=[COMPLETED_BY_URL], downloads=[(503, "x"), CUT, packed(x=5)])
    with playing(script):
        assert run(script).result == {"x": 5}
    assert (script.count("download"), script.count("POST")) == (3, 1)
    download = [h for h in script.headers if "ndif-api-key" not in h]
    assert len(download) == 3  # whoever stores results does not get the key


def test_a_result_that_is_gone():
    script = Scripted(frames=[COMPLETED_BY_URL], downloads=[(404, "dropped")])
    with playing(script), pytest.raises(UnknownJob, match="dropped"):
        run(script)


@pytest.mark.parametrize(
    "url",
    ["https://evil.example.org/r", "http://127.0.0.1:1/r", "https://127.0.0.1/r", "file:///x"],
)
def test_results_are_not_fetched_from_elsewhere(url):
    script = Scripted(frames=[frame("COMPLETED", data=url)])
    with playing(script), pytest.raises(UntrustedHost, match="unpickled"):
        run(script)


def test_a_result_is_bounded():
    bomb = packed(x=torch.zeros(1 << 20))  # 4 MB, a few hundred bytes as sent
    assert len(bomb) < 10_000
    by_frame = Scripted(frames=[done(x=torch.zeros(1 << 20))])
    by_url = Scripted(frames=[COMPLETED_BY_URL], downloads=[bomb])
    for script in (by_frame, by_url):
        with playing(script), pytest.raises(TooLarge, match=r"unpacks to more than 100 kB"):
            run(script, result=100_000)
    long = Scripted(frames=[COMPLETED_BY_URL], downloads=[bytes(200_000)])
    with playing(long), pytest.raises(TooLarge, match=r"more than 100 kB"):
        run(long, result=100_000)


@pytest.mark.parametrize("content", [b"", b"no zstd", packed(x=1)[:-30]])
def test_a_damaged_result(content):
    script = Scripted(frames=[COMPLETED_BY_URL], downloads=[content])
    with playing(script), pytest.raises(BadReply):
        run(script)


def test_done_without_a_result():
    script = Scripted(frames=[frame("COMPLETED")])
    with playing(script), pytest.raises(BadReply, match="sent no result"):
        run(script)


def test_patience_ends_without_news_and_names_the_job():
    script = Scripted(frames=[CUT], polls=[(503, "restarting")])
    with playing(script), pytest.raises(GaveUp, match=r'pick_up\("job-1", model.run') as caught:
        run(script, patience=60.0)
    assert caught.value.job == JOB
    assert "restarting" in str(caught.value)
    assert script.count("POST") == 1


def test_news_keeps_patience_up_and_longest_ends_it():
    """Hours of RUNNING are fine, unless somebody said how long at most."""
    running = [frame("RUNNING")] * 200
    script = Scripted(polls=[*running, COMPLETED_BY_URL])
    with playing(script):
        sender = transport(script, watch=False, patience=10.0)
        sender.run(MODEL, {}, BLOB)
    assert sum(sender.limits.sleep.__self__.sleeps) > 100
    script = Scripted(polls=[frame("RUNNING")])
    with playing(script), pytest.raises(GaveUp):
        run(script, watch=False, longest=30.0)


def test_a_job_that_nobody_knows():
    script = Scripted(polls=[(404, "who?")])
    with playing(script), pytest.raises(UnknownJob, match="does not know job nope"):
        transport(script).wait("nope")


def test_a_job_that_is_left_and_picked_up():
    script = Scripted(polls=[(404, "not yet"), frame("QUEUED", "Position 1"), COMPLETED_BY_URL])
    with playing(script):
        sender = transport(script)
        job = sender.submit(MODEL, {}, BLOB)
        assert sender.fetch(job) is None
        assert sender.fetch(job) is None
        reply = sender.fetch(job)
    assert (job, reply.job) == (JOB, JOB)
    assert torch.equal(reply.result["x"], THREE)
    assert reply.up == 0
    assert b'"session_id":""' in script.bodies[0]


def test_the_same_by_its_id_alone(monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    script = Scripted(
        polls=[(404, ""), frame("QUEUED", "Position 1"), frame("RUNNING"), COMPLETED_BY_URL]
    )
    with playing(script):
        job = Job(JOB, address(script.url), limits())
        assert job.status() == "UNKNOWN"
        assert job.status() == "QUEUED: Position 1"
        assert not job.done()
        assert job.done()
        assert torch.equal(job.result().result["x"], THREE)
    with pytest.raises(ValueError, match="no job id"):
        Job("../status", address(script.url))


def test_ctrl_c_leaves_the_job():
    held = threading.Event()
    script = Scripted(frames=[frame("RUNNING"), held, done(x=1)])

    def stop(update):
        if update.status == "RUNNING":
            _thread.interrupt_main()

    with playing(script):
        with pytest.raises(Interrupted, match=r'job-1.*pick_up\("job-1", model.run') as caught:
            run(script, progress=stop)
        held.set()
    assert caught.value.job == JOB
    assert isinstance(caught.value, KeyboardInterrupt)
    assert not isinstance(caught.value, Exception)
    assert caught.value.__context__ is None
    assert script.count("POST") == 1


def test_ctrl_c_before_anything_was_sent():
    def stop(update):
        raise KeyboardInterrupt

    script = Scripted(subscribes=[(503, "")])
    with playing(script), pytest.raises(Interrupted, match="nothing was sent"):
        run(script, progress=stop)


def test_waits_double_are_jittered_and_bounded():
    steady = limits(attempts=20, first_wait=1.0, max_wait=8.0, patience=1000.0)
    tries = Backoff(steady)
    waits = [tries.next_wait() for _ in range(8)]
    for wait, most in zip(waits, [1, 2, 4, 8, 8, 8, 8, 8], strict=True):
        assert most / 2 <= wait <= most
    assert len({wait / most for wait, most in zip(waits[3:], [8] * 5, strict=True)}) == 5
    impatient = Backoff(limits(patience=5.0))
    assert not impatient.again(after=3600.0)
    assert impatient.limits.sleep.__self__.sleeps == []


def test_small_jobs_do_not_wait():
    steady = limits()
    assert poll_wait(steady, 0.0) <= 0.02
    assert poll_wait(steady, 1.0) <= 0.25
    assert 3.75 <= poll_wait(steady, 3600.0) <= 5.0


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"patience": 0.0}, {"quiet": -1.0}])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(limits(), **wrong)
