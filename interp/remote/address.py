"""Which server, and why it is trusted.

nnsight unpickles results (`torch.load(weights_only=False)`), and whoever makes a pickle decides
what runs when it is opened. So the host that answers can run code on this machine. Two are trusted
without a word: NDIF's own service and this machine. Any other has to be named by `allow_host=`,
also when the environment variable NDIF_HOST names it: a variable is set too easily by somebody
else's script.

>>> address("http://127.0.0.1:5001")
Address(url='http://127.0.0.1:5001', ndif=False, loopback=True)
>>> address("https://ndif.example.org", allow_host="ndif.example.org").url
'https://ndif.example.org'
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from nnsight.schema.config import CONFIG, ApiConfig

from interp.remote.errors import BadAddress, UntrustedHost

NDIF = str(ApiConfig.model_fields["HOST"].default)
"""The address of NDIF's service, as nnsight ships it."""

NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?\.?")


@dataclass(frozen=True)
class Address:
    """A server that is trusted with results. Made by `address`, not by hand.

    Attributes:
        url: scheme, host and port, without a slash at the end.
        ndif: it is NDIF's own service.
        loopback: it is this machine.
        allowed: other hosts that `allow_host` named, from which results may be fetched too.
    """

    url: str
    ndif: bool
    loopback: bool
    allowed: tuple[str, ...] = field(default=(), repr=False)

    @property
    def host(self) -> str:
        """Host and port, as messages name it: "api.ndif.us", "127.0.0.1:5001"."""
        return self.url.partition("://")[2]

    @property
    def websocket(self) -> str:
        """The same address for websockets: ws:// for http://, wss:// for https://."""
        return "ws" + self.url.removeprefix("http")


def address(remote: bool | str, allow_host: str | Sequence[str] = ()) -> Address:
    """The server that `remote=` means, if it may be trusted.

    Args:
        remote: True for NDIF (or what NDIF_HOST names), or "http://HOST:PORT", "https://HOST".
        allow_host: hosts to trust besides NDIF and this machine: "name" or "name:port", exactly.

    Raises:
        BadAddress: not an address, or one with a user, password, path or query.
        UntrustedHost: a host that is not trusted, or one that is, without encryption.
    """
    if remote is True:
        url, source = CONFIG.API.HOST, "nnsight's configuration (NDIF_HOST, or its config file)"
    elif isinstance(remote, str):
        url, source = remote, "remote="
    else:
        raise BadAddress(
            f"remote={remote!r} names no server: True for NDIF, or 'http://127.0.0.1:5001' for one "
            "of your own"
        )
    parts = _split(url, source)
    host, port = _host(parts, source), parts.port
    name = f"[{host}]" if ":" in host else host
    exact = f"{name}:{port}" if port else name
    found = f"{parts.scheme}://{exact}"
    allowed = [allow_host] if isinstance(allow_host, str) else list(allow_host)
    allowed = [entry.strip().lower() for entry in allowed]
    if found == NDIF:
        return Address(found, ndif=True, loopback=False, allowed=tuple(allowed))
    if is_loopback(host):
        return Address(found, ndif=False, loopback=True, allowed=tuple(allowed))
    if parts.scheme != "https":
        raise UntrustedHost(
            f"{found} is another machine without encryption: anybody on the way could read the "
            f"key and put code into the results. Use https://{name}, or a tunnel to this machine "
            f"(ssh -L 5001:localhost:PORT {host}) and http://127.0.0.1:5001"
        )
    if name not in allowed and exact not in allowed:
        raise UntrustedHost(
            f"{exact} (from {source}) is neither NDIF nor this machine. Results are unpickled, "
            "so the host that sends them can run code here. If you trust it with that, say so: "
            f"allow_host={exact!r}"
        )
    return Address(found, ndif=False, loopback=False, allowed=tuple(allowed))


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine: "localhost", 127.0.0.0/8 or ::1. No name is looked up.

    >>> [is_loopback(h) for h in ("localhost", "127.0.0.1", "::1", "localhost.example.org")]
    [True, True, True, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _split(url: str, source: str) -> SplitResult:
    """The parts of a URL that has a scheme, a host, a port at most. Quotes nothing but the host."""
    good = "an address is http://HOST:PORT or https://HOST"
    if any(character.isspace() or not character.isprintable() for character in url):
        raise BadAddress(f"{source} holds spaces or control characters; {good}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadAddress(f"{source} is not an address ({error}); {good}") from None
    if "@" in parts.netloc:  # not quoted: what stands before it may be a password
        raise BadAddress(
            f"{source} holds a user or password (something@{parts.hostname}); {good}. The key is "
            "set by NDIF_API_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        said = "'local' is no server, it runs here" if url == "local" else f"not {url[:60]!r}"
        raise BadAddress(f"{source}: {good}, {said}")
    if parts.path not in ("", "/") or "?" in url or "#" in url:
        raise BadAddress(
            f"{source}: {good}, with no path, query or fragment behind "
            f"{parts.scheme}://{parts.netloc}"
        )
    if port == 0:
        raise BadAddress(f"{source}: port 0 is no address; the server prints the port it took")
    return parts


def _host(parts: SplitResult, source: str) -> str:
    """The host in lower case, an IP address or a plain name.

    The rebuilt URL is all that is used later, so what this lets through has to mean the same to
    every parser.
    """
    host = (parts.hostname or "").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        if not NAME.fullmatch(host):
            raise BadAddress(
                f"{source}: {host!r} is no host name: letters, digits, '-' and '.'"
            ) from None
        return host
