"""Reading a request's body within bounds, and refusing one properly.

A body's size is what its Content-Length says, or what has come so far where that is missing or a
lie; either way no more than the bound is ever held. A refusal is sent at once, while the client may
still be sending. The rest of the body is then read and thrown away for a few seconds: closing a
connection on unread data resets it, and the client would see a broken pipe, not the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

from fastapi import Request
from fastapi.responses import JSONResponse
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Receive, Scope, Send

OTHER_PARTS = 2**20  # bytes the form may have beside the payload
LISTEN_ON = 5.0  # seconds


class Refused(Exception):
    """A request that is not taken; becomes an answer with this status and {"detail": ...}.

    Args:
        status: of HTTP.
        detail: the reason, and what would do.
        headers: of the answer.
        early: the request's body has not been read to its end.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        headers: Mapping[str, str] | None = None,
        *,
        early: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = {**(headers or {}), **({"Connection": "close"} if early else {})}
        self.early = early


class Refusal(JSONResponse):
    """The answer to a request that may still be on its way here."""

    def __init__(self, refused: Refused) -> None:
        super().__init__({"detail": refused.detail}, refused.status, refused.headers)
        self.early = refused.early

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, then let the client finish what it was saying."""
        if scope["type"] != "http" or not self.early:
            await super().__call__(scope, receive, send)
            return
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(LISTEN_ON):
                while (await receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


async def read_form(request: Request, longest: int) -> tuple[str, bytes]:
    """The two parts of a request for a job: `data`, a text, and `blob`, a file.

    Args:
        request: whose body has not been read.
        longest: bytes the blob may have.

    Raises:
        Refused: 413 if it is larger, 400 if it is no form or a part is missing.
    """
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > longest + OTHER_PARTS:
        raise _too_large(longest, f"{int(said) / 2**20:.1f} MB")
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(
            400, "the body is no multipart/form-data with the parts `data` and `blob`", early=True
        )
    parser = MultiPartParser(request.headers, _bounded(request, longest), max_files=1, max_fields=8)
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, ValueError, KeyError) as error:
        raise Refused(400, f"the form cannot be read: {error}", early=True) from None
    try:
        data, blob = form.get("data"), form.get("blob")
        if not isinstance(data, str) or not isinstance(blob, UploadFile):
            parts = ", ".join(sorted(form)) or "none"
            raise Refused(400, f"the form needs a text `data` and a file `blob`; it has: {parts}")
        read = await blob.read()
    finally:
        await form.close()
    if len(read) > longest:
        raise _too_large(longest, f"{len(read) / 2**20:.1f} MB", early=False)
    return data, read


async def _bounded(request: Request, longest: int) -> AsyncGenerator[bytes, None]:
    n_bytes = 0
    async for chunk in request.stream():
        n_bytes += len(chunk)
        if n_bytes > longest + OTHER_PARTS:
            raise _too_large(longest, f"more than {longest / 2**20:g} MB")
        yield chunk


def _too_large(longest: int, size: str, *, early: bool = True) -> Refused:
    return Refused(
        413,
        f"the request has {size}; this server takes {longest / 2**20:g} MB (--max-body). Send "
        "less: a large tensor among the variables that the traced code uses is sent with it",
        early=early,
    )
