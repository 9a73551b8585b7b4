"""Cutting a connection off, which no ASGI application can do.

A network that fails says no goodbye: the client finds its connection closed, with no answer and no
closing frame. `Cuttable` is uvicorn's HTTP protocol, remembering each client's transport by the
client's address; a websocket stays on the transport on which it was asked for.
"""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from starlette.requests import HTTPConnection
from uvicorn.protocols.http.h11_impl import H11Protocol

_transports: WeakValueDictionary[tuple[str, int], asyncio.Transport] = WeakValueDictionary()


class Cuttable(H11Protocol):
    """For `uvicorn.Config(http=Cuttable)`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember who is at the other end."""
        super().connection_made(transport)
        if self.client is not None:
            _transports[self.client] = transport


def cut(connection: HTTPConnection) -> None:
    """Close the connection that a request or a websocket came by, at once."""
    client = connection.client
    transport = _transports.get((client.host, client.port)) if client else None
    if transport is not None:
        transport.abort()
