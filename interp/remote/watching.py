"""The websocket on which a server tells what becomes of a job.

It is subscribed to before the request is sent, so that nothing is missed, and it belongs to a
session: jobs sent with that session's id report here. It cannot be opened again for the same
session; when it drops, the job is followed by asking for it (`interp.remote.transport`).
"""

from __future__ import annotations

import json
import time
from typing import Any

import websocket
from nnsight.schema.response import ResponseModel

from interp.remote.address import Address
from interp.remote.keys import Key, redact
from interp.remote.limits import Limits
from interp.remote.wire import CONNECT, Answer, Lost

ABNF = websocket.ABNF


class Watch:
    """An open subscription. `open_watch` makes one.

    Attributes:
        session: the id to send a request with.
        closed: why it is over, None while it is not.
    """

    def __init__(self, connection: _Counting, session: str, key: Key | None) -> None:
        self.session, self.closed = session, None
        self._connection, self._key = connection, key
        self._asked_at = -1  # bytes that had come when the last ping was sent

    closed: str | None

    @property
    def down(self) -> int:
        """Bytes received."""
        return self._connection.n_received

    def next(self, seconds: float) -> ResponseModel | None:
        """The next status, or None after so many seconds of silence, or when it is closed.

        Results arrive as pickles here, so this runs what the host sends: `address` has said that
        it may.
        """
        until = time.monotonic() + seconds
        while self.closed is None:
            try:
                self._connection.settimeout(max(0.001, until - time.monotonic()))
                opcode, data = self._connection.recv_data(control_frame=True)
            except websocket.WebSocketTimeoutException:
                return None
            except (websocket.WebSocketException, OSError) as error:
                self.closed = redact(f"{type(error).__name__}: {error}", self._key)
                return None
            if opcode == ABNF.OPCODE_CLOSE:
                self.closed = "the server closed it"
            elif opcode in (ABNF.OPCODE_TEXT, ABNF.OPCODE_BINARY):
                return self._status(opcode, data)
            elif time.monotonic() >= until:  # pings alone do not make a wait longer
                return None
        return None

    def lives(self) -> bool:
        """After silence: has anything come since the last such question? Asks again by a ping."""
        silent = self._asked_at == self._connection.n_received
        if self.closed is None and silent:
            self.closed = "it gave no sign of life"
        if self.closed is None:
            self._asked_at = self._connection.n_received
            try:
                self._connection.ping()
            except (websocket.WebSocketException, OSError) as error:
                self.closed = redact(f"{type(error).__name__}: {error}", self._key)
        return self.closed is None

    def close(self) -> None:
        """Hang up, without waiting for the other side."""
        self.closed = self.closed or "closed here"
        self._connection.shutdown()

    def _status(self, opcode: int, data: bytes) -> ResponseModel | None:
        try:
            if opcode == ABNF.OPCODE_BINARY:
                return cleaned(ResponseModel.unpickle(data), self._key)
            return cleaned(ResponseModel.model_validate_json(data), self._key)
        except Exception as error:  # a frame cut short breaks the unpickler in any way it likes
            self.closed = redact(f"it sent what is no status ({type(error).__name__})", self._key)
            return None


def open_watch(address: Address, key: Key | None, limits: Limits) -> Watch | Answer | Lost:
    """Subscribe: the watch, or how the server refused, or how the connection broke.

    To be called, and the watch used, within an open `Wire`, which keeps the key from the logs.
    """
    connection = _Counting(limits.result)
    try:
        connection.connect(
            f"{address.websocket}/subscribe",
            header=None if key is None else key.headers(),
            timeout=min(CONNECT, limits.answer),
            redirect_limit=0,  # a redirect would be followed with the key
            http_no_proxy=["*"] if address.loopback else None,
        )
        first = connection.recv()
        session = json.loads(first)["session_id"]
        if isinstance(session, str) and session:
            return Watch(connection, session, key)
        result: Answer | Lost = Lost("the session id it sent is empty", sent=False)
    except websocket.WebSocketBadStatusException as error:
        body = error.resp_body or b""
        result = Answer(error.status_code, bytes(body), dict(error.resp_headers or {}))
    except (ValueError, KeyError, TypeError):
        result = Lost("its first message held no session id", sent=False)
    except (websocket.WebSocketException, OSError) as error:
        result = Lost(redact(f"{type(error).__name__}: {error}", key), sent=False)
    connection.shutdown()
    return result


def cleaned(status: ResponseModel, key: Key | None) -> ResponseModel:
    """A status without the key in its words, should a server quote it."""
    return status.model_copy(update={"description": redact(status.description, key)})


class _Counting(websocket.WebSocket):
    """A websocket that counts what it receives, and stops at a bound.

    Counted below the frames: a large result that is still on its way is a sign of life, too.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(enable_multithread=False)
        self.n_received, self.limit = 0, limit

    def _recv(self, bufsize: int) -> Any:
        data = super()._recv(bufsize)
        self.n_received += len(data)
        if self.n_received > self.limit:
            raise websocket.WebSocketException(f"more than {self.limit} bytes came")
        return data
