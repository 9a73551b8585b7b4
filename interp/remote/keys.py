"""The API key: found in two places, shown in none.

A key ends up in bug reports by way of reprs, tracebacks that print local variables, debug logs and
error texts that quote a server's answer. `Key` shows itself only in the headers of a request;
`redact` takes it out of any text that came from elsewhere; `kept_from_logs` does so for what the
network libraries log: websocket-client writes whole requests when its tracing is on.

>>> key = Key("a-key-that-nobody-should-see")
>>> print(key, [key], f"{key:>20}")
Key(...) [Key(...)]             Key(...)
>>> redact("401: a-key-that-nobody-should-see is unknown", key)
'401: [key] is unknown'
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import quote

from nnsight.schema.config import CONFIG

from interp.remote.address import Address
from interp.remote.errors import NoKey

VARIABLE = "NDIF_API_KEY"
SERVICE = "interp"
"""The service under which a keyring holds keys; the user name is the host."""


class Key:
    """An API key that never shows itself, except in `headers()`.

    Raises:
        NoKey: the text cannot be a key: empty, or with characters that no header may hold.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        if not text or not all("!" <= character <= "~" for character in text):
            raise NoKey(
                f"the API key is empty or holds spaces, line ends or letters that no key has "
                f"({len(text)} characters, not shown): copy it again"
            )
        self._text = text

    def headers(self) -> dict[str, str]:
        """The header that carries it. Do not keep the dict: a traceback could print it."""
        return {"ndif-api-key": self._text}

    def __repr__(self) -> str:
        return "Key(...)"

    def __format__(self, spec: str) -> str:
        return format("Key(...)", spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    __hash__ = None  # type: ignore[assignment]  # a hash would tell about the text

    def __copy__(self) -> Key:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Key:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an API key is not pickled: find_key(address) finds it again")


def find_key(address: Address) -> Key | None:
    """The key for a server: from NDIF_API_KEY, else from the keyring, if `keyring` is installed.

    It is kept under the service "interp" and the user name `address.host`
    (`keyring set interp api.ndif.us`). Nothing is ever written, and the key in nnsight's config
    file is not used: see `unused_key`.

    Raises:
        NoKey: NDIF_API_KEY holds something that cannot be a key.
    """
    if text := os.environ.get(VARIABLE, "").strip():
        return Key(text)
    text = _from_keyring(address.host)
    return Key(text) if text else None


def unused_key() -> str:
    """Words about a key that nnsight has and `find_key` does not use, or "".

    nnsight also reads a key from a plain text file (`nnsight login` writes it there) or from a
    notebook's secrets. A key that is used without being named would be one that nobody thinks of.
    """
    if CONFIG.API.APIKEY and not os.environ.get(VARIABLE, "").strip():
        return (
            "nnsight has a key from its config file (plain text) or a notebook secret, which is "
            f"not used here: set {VARIABLE}, or store it by `keyring set {SERVICE} HOST`"
        )
    return ""


def where_to_put_it(address: Address) -> str:
    """How to set a key, in words."""
    source = "from login.ndif.us" if address.ndif else "that the server printed when it was started"
    return (
        f"set {VARIABLE} in the environment to the key {source}, or store it once by "
        f"`keyring set {SERVICE} {address.host}`"
    )


def redact(text: str, key: Key | None) -> str:
    """`text` with the key replaced by "[key]", also where it is written as part of a URL."""
    if key is None:
        return text
    for secret in {key._text, quote(key._text, safe=""), quote(key._text)}:
        text = text.replace(secret, "[key]")
    return text


LOGGERS = ("websocket", "httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy")
"""Those that may write down what is sent or received; a filter does not hold for loggers below."""


@contextlib.contextmanager
def kept_from_logs(key: Key | None) -> Iterator[None]:
    """While it lasts, no record of the network libraries holds the key: it reads "[key]"."""

    def clean(record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage(), key), None
        return True

    loggers = [logging.getLogger(name) for name in LOGGERS]
    for log in loggers:
        log.addFilter(clean)
    try:
        yield
    finally:
        for log in loggers:
            log.removeFilter(clean)


def _from_keyring(user: str) -> str:
    """What the keyring holds for `user`, "" without keyring, without an entry, or if it is shut."""
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return ""
    try:
        return (keyring.get_password(SERVICE, user) or "").strip()
    except (KeyringError, RuntimeError):  # no backend on a bare server, or locked
        return ""
