"""A server that plays a script: what it answers to each request is told in advance.

Not a server that runs anything: it hands out canned results. It counts what it was sent, so that a
test can say "once". Connections are cut for real, at the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
import zstandard
from nnsight.schema.response import ResponseModel

CUT = "cut"  # no answer: the connection breaks
FREEZE = "freeze"  # nothing is read any more, so no ping is answered
LATE = "late"  # no answer, but the job is taken
JOB = "job-1"
KEY = "planted-key-0123456789"
MODEL = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "lab/eyes", "revision": null}'
ENV = {
    "python_version": "3.11.9 (main) [GCC]",
    "packages": {"nnsight": "0.8.1", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
}


def deployment(repo_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "deployment_level": "HOT",
        "application_state": "RUNNING",
        "model_key": f"X:{repo_id}",
        "repo_id": repo_id,
        "revision": "main",
        "task": "image-text-to-text",
        **fields,
    }


def packed(**values: Any) -> bytes:
    """A result as a server stores it."""
    with io.BytesIO() as file:
        torch.save(values, file)
        return zstandard.ZstdCompressor().compress(file.getvalue())


def frame(status: str, description: str = "", **fields: Any) -> str:
    """A status as text."""
    return json.dumps({"id": JOB, "status": status, "description": description, **fields})


def done(**values: Any) -> bytes:
    """COMPLETED with the result in it, as a binary frame."""
    return ResponseModel(id=JOB, status="COMPLETED", data=packed(**values)).pickle()


RECEIVED = frame("RECEIVED")
COMPLETED_BY_URL = frame("COMPLETED", data="/results/one")


@dataclass
class Scripted:
    """What is answered, in turn: the last entry of a list stands for all that follow.

    Attributes:
        posts: to POST /request: RECEIVED and the like, (HTTP status, detail[, headers]), CUT, LATE.
        frames: on the websocket once a job is taken; CUT breaks the connection, FREEZE leaves it
            open and dead, a `threading.Event` is waited for.
        polls: to GET /response.
        downloads: to GET /results: bytes, (status, detail), CUT (in the middle).
        subscribes: to /subscribe: None accepts, (status, detail) refuses.
        env, deployments, whoami: to the questions of `interp status`; None is a 404.
    """

    posts: list[Any] = field(default_factory=lambda: [RECEIVED])
    frames: list[Any] = field(default_factory=lambda: [frame("RUNNING"), done(x=torch.arange(3))])
    polls: list[Any] = field(default_factory=lambda: [COMPLETED_BY_URL])
    downloads: list[Any] = field(default_factory=lambda: [packed(x=torch.arange(3))])
    subscribes: list[Any] = field(default_factory=lambda: [None])
    env: Any = field(default_factory=lambda: ENV)
    deployments: Any = field(default_factory=lambda: {"a": deployment("lab/eyes")})
    whoami: Any = field(default_factory=lambda: {"email": "a@b", "tags": []})
    key: str = KEY
    url: str = ""
    seen: list[str] = field(default_factory=list)  # "POST", "poll", ...
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def count(self, what: str) -> int:
        return self.seen.count(what)

    def turn(self, what: str, script: list[Any]) -> Any:
        self.seen.append(what)
        return script[min(self.count(what), len(script)) - 1]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        self.headers.append(headers)
        path = scope["path"]
        if scope["type"] == "websocket":
            await self.socket(receive, send)
        elif path == "/request":
            body = b""
            while True:
                part = await receive()
                body += part.get("body", b"")
                if not part.get("more_body"):
                    break
            self.bodies.append(body)
            answer = self.turn("POST", self.posts)
            if answer == LATE or (isinstance(answer, str) and answer != CUT):
                self.taken.set()
            await self.say(CUT if answer == LATE else answer, send)
        elif path.startswith("/response/"):
            await self.say(self.turn("poll", self.polls), send)
        elif path.startswith("/results/"):
            await self.say(self.turn("download", self.downloads), send)
        elif path == "/whoami" and headers.get("ndif-api-key") != self.key:
            self.seen.append(path)
            await self.say((401, "who are you?"), send)
        else:
            self.seen.append(path)
            answer = {
                "/env": self.env,
                "/status": None if self.deployments is None else {"deployments": self.deployments},
                "/whoami": self.whoami,
            }.get(path)
            await self.say((404, "Not Found") if answer is None else json.dumps(answer), send)

    async def socket(self, receive: Any, send: Any) -> None:
        answer = self.turn("subscribe", self.subscribes)
        await receive()
        if answer is not None:
            status, detail = answer
            body = json.dumps({"detail": detail}).encode()
            await send(
                {
                    "type": "websocket.http.response.start",
                    "status": status,
                    "headers": [(b"content-length", str(len(body)).encode())],
                }
            )
            await send({"type": "websocket.http.response.body", "body": body})
            return
        self.taken = asyncio.Event()
        await send({"type": "websocket.accept"})
        session = f"session-{self.count('subscribe')}"
        await send({"type": "websocket.send", "text": json.dumps({"session_id": session})})
        await self.taken.wait()
        for one in self.frames:
            if one == CUT:
                send.__self__.transport.abort()
                return
            if one == FREEZE:
                send.__self__.transport.pause_reading()
            elif isinstance(one, threading.Event):
                await asyncio.to_thread(one.wait, 20)
            elif isinstance(one, bytes):
                await send({"type": "websocket.send", "bytes": one})
            else:
                await send({"type": "websocket.send", "text": one})
        await receive()  # until the client hangs up

    taken: Any = field(default_factory=asyncio.Event)

    async def say(self, answer: Any, send: Any) -> None:
        if answer == CUT:
            send.__self__.transport.abort()
            return
        status, body, more = 200, answer, {}
        if isinstance(answer, tuple):
            status, detail, *rest = answer
            body, more = json.dumps({"detail": detail}), rest[0] if rest else {}
        body = body.encode() if isinstance(body, str) else body
        headers = [(b"content-length", str(len(body)).encode())]
        headers += [(k.encode(), v.encode()) for k, v in more.items()]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def playing(script: Scripted) -> Iterator[Scripted]:
    """The script on a free port of this machine."""
    # named as TCP, or asyncio leaves Nagle's algorithm on: 40 ms an answer
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    script.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(
        uvicorn.Config(script, log_level="critical", lifespan="off", ws="websockets-sansio")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()
