"""Messages between the server and its worker: a JSON head and a body of bytes, over a socket.

Not pickles: the worker has run other people's code, and what comes from it is read as data only. A
message is the two lengths (4 and 8 bytes, big endian), the head, the body. The worker's end blocks;
the server's end is asyncio's.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from typing import Any

LENGTHS = struct.Struct(">IQ")
LONGEST_HEAD = 16 * 2**20  # bytes: the heads hold log lines, tracebacks, a list of packages

Message = tuple[dict[str, Any], bytes]


class Link:
    """The worker's end. Many threads may send; one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, body: bytes = b"", **head: Any) -> None:
        """Send one message.

        Raises:
            OSError: the server is gone.
        """
        packed = json.dumps(head).encode()
        with self._sending:
            self._sock.sendall(LENGTHS.pack(len(packed), len(body)) + packed)
            self._sock.sendall(body)

    def receive(self) -> Message:
        """The next message.

        Raises:
            EOFError: the server is gone.
        """
        n_head, n_body = LENGTHS.unpack(self._exactly(LENGTHS.size))
        return json.loads(self._exactly(n_head)), bytes(self._exactly(n_body))

    def _exactly(self, n: int) -> bytearray:
        into = bytearray(n)
        view, got = memoryview(into), 0
        while got < n:
            count = self._sock.recv_into(view[got:])
            if not count:
                raise EOFError("the server has gone")
            got += count
        return into


async def send(writer: asyncio.StreamWriter, head: dict[str, Any], body: bytes = b"") -> None:
    """Send one message from the server's end.

    Raises:
        OSError: the worker is gone.
    """
    packed = json.dumps(head).encode()
    writer.write(LENGTHS.pack(len(packed), len(body)) + packed)
    writer.write(body)
    await writer.drain()


async def receive(reader: asyncio.StreamReader, longest: int) -> Message:
    """The next message at the server's end.

    Args:
        reader: of the socket to the worker.
        longest: bytes a body may have.

    Raises:
        EOFError: the worker is gone, or sends what is no message.
    """
    try:
        n_head, n_body = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
        if n_head > LONGEST_HEAD or n_body > longest:
            raise EOFError(f"the worker announced a message of {n_head} + {n_body} bytes")
        head = json.loads(await reader.readexactly(n_head))
        if not isinstance(head, dict):
            raise EOFError(f"the worker sent {type(head).__name__} for a head")
        return head, await reader.readexactly(n_body)
    except (ValueError, OSError) as error:
        raise EOFError(f"the worker's message cannot be read: {error}") from error
