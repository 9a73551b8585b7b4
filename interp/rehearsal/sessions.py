"""Websockets: one session a connection, to which the statuses of its jobs are sent.

A client subscribes before it sends a job, is told the session's id in the first frame, and names it
in the request. From then on each status of that job is a text frame of JSON; a result that is small
enough comes as one binary frame. Nothing is expected from the client: what it sends is thrown away.

A session that is lost loses no job: statuses are kept on the board as well, and GET /response/ID
tells the latest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import Callable

from fastapi import WebSocket, WebSocketDisconnect

from .faults import Faults

WAITING = 2000  # frames a client may be behind before it is cut off


class Session:
    """One subscribed websocket.

    Attributes:
        id: what requests name it by.
        base: the server's address as this client spells it, for the URLs it is given.
    """

    def __init__(self, base: str) -> None:
        self.id = uuid.uuid4().hex
        self.base = base
        self.frames: asyncio.Queue[str | bytes | None] = asyncio.Queue(WAITING)

    def put(self, frame: str | bytes) -> None:
        """Queue a frame; a client that does not read is cut off once too many wait."""
        try:
            self.frames.put_nowait(frame)
        except asyncio.QueueFull:
            while not self.frames.empty():
                self.frames.get_nowait()
            self.frames.put_nowait(None)


class Sessions:
    """The open websockets.

    Args:
        limit: how many may be open at a time.
        faults: may want some of them cut.
        cut: cuts the connection to a client, given its address.
    """

    def __init__(self, limit: int, faults: Faults, cut: Callable[[WebSocket], None]) -> None:
        self.limit = limit
        self.open: dict[str, Session] = {}
        self._faults = faults
        self._cut = cut

    async def serve(self, websocket: WebSocket) -> None:
        """Speak to one client until either side has gone."""
        session = Session(f"http://{websocket.headers.get('host', '')}")
        self.open[session.id] = session
        try:
            await websocket.accept()
            await websocket.send_text(json.dumps({"session_id": session.id}))
            deaf = asyncio.create_task(_discard(websocket))
            telling = asyncio.create_task(self._tell(websocket, session))
            try:
                await asyncio.wait({deaf, telling}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (deaf, telling):
                    task.cancel()
                await asyncio.gather(deaf, telling, return_exceptions=True)
        except WebSocketDisconnect:
            pass
        finally:
            del self.open[session.id]

    async def _tell(self, websocket: WebSocket, session: Session) -> None:
        told = 0
        while (frame := await session.frames.get()) is not None:
            if isinstance(frame, bytes):
                await websocket.send_bytes(frame)
            else:
                await websocket.send_text(frame)
            told += 1
            if told == self._faults.drop_after and self._faults.take("drop-after"):
                self._cut(websocket)
                return
        with contextlib.suppress(RuntimeError):  # it may be closing already
            await websocket.close(1008, "too many statuses unread")


async def _discard(websocket: WebSocket) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
