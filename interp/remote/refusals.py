"""What a server's "no" means, and what would do about it.

A refusal arrives as an HTTP status and, usually, a JSON `{"detail": ...}`. None of these is worth
another try: the same request would be refused again.
"""

from __future__ import annotations

import json
from typing import Any

from interp.remote.address import Address
from interp.remote.errors import (
    NoKey,
    Refused,
    RemoteError,
    TooLarge,
    VersionsDiffer,
    WrongKey,
)
from interp.remote.keys import Key, redact, unused_key, where_to_put_it
from interp.remote.progress import size
from interp.remote.ready import hosted_names, not_hosted
from interp.remote.versions import misfits, pip_command, versions_here, versions_there
from interp.remote.wire import Answer, Wire

MOST = 2000  # characters of a server's own words


def refusal(wire: Wire, answer: Answer, *, model_key: str = "", n_bytes: int = 0) -> RemoteError:
    """The error for an answer that is a no; asks the server what it hosts, or its versions.

    Args:
        wire: to the server.
        answer: of a status that is neither good nor worth another try.
        model_key: of the request, "" if it was none.
        n_bytes: of the request's payload.
    """
    address, key = wire.address, wire.key
    said = words(answer, key)
    if answer.status in (401, 403):
        return _about_key(address, key, answer.status, said)
    if answer.status == 413:
        return TooLarge(
            f"{address.host} takes no request of {size(n_bytes)} ({n_bytes} bytes): {said}. Send "
            "fewer images at once, or smaller ones; tensors that an edit needs travel with it, too"
        )
    repo_id = repo_of(model_key)
    if answer.status in (400, 404, 422) and repo_id:
        names = hosted_names(wire)
        if names is not None and repo_id.casefold() not in [name.casefold() for name in names]:
            return not_hosted(address.host, repo_id, names)
    if answer.status in (400, 422, 426) and ("version" in said.lower() or "python" in said.lower()):
        return VersionsDiffer(f"{address.host} refused the request: {said}. {_how_to_fit(wire)}")
    if 300 <= answer.status < 400:
        where = answer.headers.get("location", "somewhere else")
        return Refused(
            f"{address.host} sends on to {redact(where, key)[:MOST]}. That was not followed, since "
            "the key would go there; if it is right, use that address"
        )
    return Refused(f"{address.host} refused the request (HTTP {answer.status}): {said}")


def words(answer: Answer, key: Key | None) -> str:
    """What a server said, on one line and without the key."""
    data: Any = answer.json()
    said = data.get("detail", data) if isinstance(data, dict) else data
    if said is None:
        said = answer.body.decode(errors="replace")
    if not isinstance(said, str):
        said = json.dumps(said)
    return redact(" ".join(said.split()), key)[:MOST].rstrip(". ") or "it gave no reason"


def repo_of(model_key: str) -> str:
    """The repo id in a model key ("import.path:{json}"), "" if there is none."""
    try:
        return str(json.loads(model_key.partition(":")[2])["repo_id"])
    except (ValueError, KeyError, TypeError):
        return ""


def _about_key(address: Address, key: Key | None, status: int, said: str) -> RemoteError:
    if key is None:
        more = f" {unused_key()}." if unused_key() else ""
        return NoKey(
            f"{address.host} asks for an API key, and none is set ({said}): "
            f"{where_to_put_it(address)}.{more}"
        )
    what = "does not accept the API key" if status == 401 else "does not allow this with the key"
    return WrongKey(f"{address.host} {what} ({said}): {where_to_put_it(address)}")


def _how_to_fit(wire: Wire) -> str:
    """The command that makes this environment fit the server's."""
    answer = wire.get("/env", signed=False)
    env = answer.json() if isinstance(answer, Answer) and answer.status == 200 else None
    here, there = versions_here(), versions_there(env)
    fixes = [str(problem) for problem in misfits(here, there) if problem.blocks]
    if command := pip_command(there, here):
        fixes.append(f"to get the server's versions: {command}")
    return ". ".join(fixes) or "`interp status` compares the versions here and there"
