"""One HTTP exchange at a time, with its bytes counted; nothing here is tried twice.

An exchange ends as an `Answer` or as `Lost`. `Lost.sent` is what decides whether a request may be
sent again: as long as a part of its body was still here when the connection broke, no server can
have run it. Both are returned, not raised, because an exception would keep httpx's frames alive,
and their local variables hold the request's headers, where the key is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from types import TracebackType
from typing import Any

import httpx

from interp.remote.address import Address
from interp.remote.keys import Key, kept_from_logs, redact
from interp.remote.limits import Limits

CONNECT = 10.0  # seconds to open a connection
CHUNK = 1 << 17


@dataclass(frozen=True)
class Answer:
    """What the server said: HTTP status, body, headers in lower case."""

    status: int
    body: bytes = field(repr=False)  # a server may quote what it was sent, key and all
    headers: Mapping[str, str] = field(repr=False)

    @property
    def busy(self) -> bool:
        """The server could not do it now: 429, or an error of its own."""
        return self.status in (429, 500, 502, 503, 504)

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to wait, or None; dates are not read."""
        try:
            seconds = float(self.headers.get("retry-after", ""))
        except ValueError:
            return None
        return seconds if 0 <= seconds < float("inf") else None

    def json(self) -> Any:
        """The body as JSON, None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


@dataclass(frozen=True)
class Lost:
    """A connection that broke, and whether the whole request had left before."""

    why: str
    sent: bool


@dataclass(frozen=True)
class Over:
    """A body of more bytes than were allowed; the rest was not read."""

    limit: int


class Wire:
    """The HTTP side of one run: `up` and `down` count the bytes of all bodies.

    Used as `with Wire(...) as wire:`; inside, the key is kept from the logs.
    """

    def __init__(self, address: Address, key: Key | None, limits: Limits) -> None:
        self.address, self.key, self.limits = address, key, limits
        self.up = self.down = 0
        self._logs = kept_from_logs(key)
        secure = address.url.startswith("https")
        self._client = httpx.Client(
            verify=secure or not address.loopback,  # loading certificates takes 20 ms
            trust_env=not address.loopback,  # a proxy has no business between us and ourselves
            follow_redirects=False,  # the key goes to the host that was named, or nowhere
            timeout=httpx.Timeout(limits.answer, connect=min(CONNECT, limits.answer)),
        )

    def post(self, envelope: str, blob: bytes) -> Answer | Lost:
        """Send a request: the JSON envelope and the payload, as nnsight's client does."""
        body = None
        answer: Answer | Lost
        try:
            request = self._client.build_request(
                "POST",
                f"{self.address.url}/request",
                data={"data": envelope},
                files={"blob": ("request", blob, "application/octet-stream")},
                # a connection of its own: one that the server has closed meanwhile would break
                # *after* the body had left, and nobody could tell whether it was read
                headers={"connection": "close", **versions_here(), **self._key()},
            )
            body = request.stream = _Counted(request.stream)
            answer = self._answer(self._client.send(request))
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            answer = self._lost(error, sent=body is not None and body.finished)
        self.up += 0 if body is None else body.bytes
        return answer

    def get(self, path: str, *, signed: bool = True) -> Answer | Lost:
        """GET a path of the server, with the key unless `signed` is False."""
        try:
            return self._answer(
                self._client.get(
                    f"{self.address.url}{path}", headers=self._key() if signed else None
                )
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return self._lost(error, sent=True)

    def download(self, url: str) -> Answer | Lost | Over:
        """The whole body behind a URL, fetched without the key."""
        parts, n = [], 0
        try:
            with self._client.stream("GET", url) as response:
                for chunk in response.iter_bytes(CHUNK):
                    n += len(chunk)
                    if n > self.limits.result:
                        return Over(self.limits.result)
                    parts.append(chunk)
                return Answer(response.status_code, b"".join(parts), dict(response.headers))
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return self._lost(error, sent=True)
        finally:
            self.down += n

    def __enter__(self) -> Wire:
        self._logs.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()
        self._logs.__exit__(None, None, None)

    def _key(self) -> dict[str, str]:
        return {} if self.key is None else self.key.headers()

    def _answer(self, response: httpx.Response) -> Answer:
        self.down += len(response.content)
        return Answer(response.status_code, response.content, dict(response.headers))

    def _lost(self, error: Exception, *, sent: bool) -> Lost:
        return Lost(redact(f"{type(error).__name__}: {error}", self.key), sent)


class _Counted(httpx.SyncByteStream):
    """A body that knows how much of it was taken, and whether all was.

    A part is taken when the one before has been handed to the system, so `finished` is False as
    long as anything of the body is certainly still here.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.bytes, self.finished = stream, 0, False

    def __iter__(self) -> Iterator[bytes]:
        for part in self.stream:
            yield part
            self.bytes += len(part)
        self.finished = True


def versions_here() -> dict[str, str]:
    """The headers by which nnsight's client tells who it is, and when it sent."""
    return {
        "ndif-timestamp": repr(time.time()),
        "nnsight-version": metadata.version("nnsight"),
        "python-version": sys.version,
    }
