"""Before a request: is there a server, a key, a model, and do the versions fit?

    print(status())                                  # NDIF
    print(status("http://127.0.0.1:5001"))           # a rehearsal server
    vision_models()                                  # models with a vision tower that are up

`status` never raises for what it finds: it tells, with what would do about it. `require_ready` is
the same check in code, and raises what would break a request before anything is sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from interp.remote import keys
from interp.remote.address import Address, address
from interp.remote.errors import (
    NoKey,
    NotHosted,
    RemoteError,
    Unreachable,
    VersionsDiffer,
    WrongKey,
)
from interp.remote.keys import Key, find_key, redact, unused_key
from interp.remote.limits import Limits
from interp.remote.server import HostedModel, ServerStatus, hosted
from interp.remote.versions import Problem, Versions, misfits, versions_here, versions_there
from interp.remote.wire import Answer, Lost, Wire

ANSWER = 30.0  # seconds to wait for one answer


def status(remote: bool | str = True, allow_host: str | Sequence[str] = ()) -> ServerStatus:
    """Ask a server what it has, and compare it with what is here.

    Args:
        remote: True for NDIF, or a URL.
        allow_host: hosts to trust besides NDIF and this machine.

    Raises:
        BadAddress, UntrustedHost: of `interp.remote.address.address`.
        NoKey: NDIF_API_KEY holds something that cannot be a key.
    """
    at = address(remote, allow_host)
    return look(at, find_key(at))


def vision_models(
    remote: bool | str = True, allow_host: str | Sequence[str] = ()
) -> list[HostedModel]:
    """The models with a vision tower that a server has up.

    Raises:
        Unreachable: the server does not answer.
    """
    found = status(remote, allow_host)
    if not found.reachable:
        raise Unreachable(str(found.problems[0]))
    return [model for model in found.models if model.vision and model.up]


def look(address: Address, key: Key | None) -> ServerStatus:
    """`status` for an address that is trusted already."""
    here = versions_here()
    with Wire(address, key, Limits(answer=ANSWER)) as wire:
        listed = wire.get("/status", signed=False)
        deployments = _deployments(listed)
        if deployments is None:
            problem = _not_there(address, key, listed)
            return ServerStatus(
                address.url, False, (), here, Versions(), key is not None, None, (problem,)
            )
        env = wire.get("/env", signed=False)
        who = wire.get("/whoami")
    there = versions_there(env.json() if isinstance(env, Answer) and env.status == 200 else None)
    models = hosted(deployments)
    accepted = _accepted(key, who)
    problems = _about_key(address, key, accepted, who) + misfits(here, there)
    if not any(model.up for model in models):
        problems.append(Problem("no model is up", "try again later", blocks=True))
    if there == Versions():
        problems.append(
            Problem("the server does not tell its versions", "watch for odd errors", blocks=False)
        )
    return ServerStatus(
        address.url,
        True,
        models,
        here,
        there,
        key is not None,
        accepted,
        tuple(sorted(problems, key=lambda problem: not problem.blocks)),
    )


def hosted_names(wire: Wire) -> list[str] | None:
    """The repo ids that a server has, None if it does not say."""
    deployments = _deployments(wire.get("/status", signed=False))
    if deployments is None:
        return None
    return list(dict.fromkeys(model.repo_id for model in hosted(deployments)))


_cache: dict[str, tuple[float, Key | None, ServerStatus]] = {}
_lock = threading.Lock()


def require_ready(
    address: Address,
    key: Key | None,
    repo_id: str,
    *,
    keep: float = 300.0,
    clock: Callable[[], float] = time.monotonic,
) -> ServerStatus:
    """Raise what would break a request for a model; what was found good is not asked again soon.

    Args:
        address: of the server.
        key: to be used.
        repo_id: of the model.
        keep: seconds for which a good answer is taken to hold. A bad one is not kept.
        clock: seconds.

    Raises:
        Unreachable, NoKey, WrongKey, NotHosted, VersionsDiffer: whichever comes first.
    """
    with _lock:
        at, with_key, found = _cache.get(address.url, (0.0, None, None))
    if found is None or with_key != key or clock() - at > keep or found.model(repo_id) is None:
        found = look(address, key)
        _raise_first(address, key, repo_id, found)
        with _lock:
            _cache[address.url] = clock(), key, found
    return found


def not_hosted(host: str, repo_id: str, names: Sequence[str]) -> NotHosted:
    """The error for a model that a server does not have, naming what it has."""
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return NotHosted(
        f"{host} does not have {repo_id}; it has: {shown or 'nothing'}. `interp status` lists them "
        "with their tasks; a server of your own: interp serve MODEL"
    )


def _raise_first(address: Address, key: Key | None, repo_id: str, found: ServerStatus) -> None:
    if not found.reachable:
        raise Unreachable(str(found.problems[0]))
    kind: type[RemoteError]
    blocking = [problem for problem in found.problems if problem.blocks]
    if found.accepted is False or (key is None and address.ndif):
        kind = NoKey if key is None else WrongKey
        raise kind(str(blocking[0]))
    model = found.model(repo_id)
    if model is None:
        raise not_hosted(address.host, repo_id, [m.repo_id for m in found.models])
    if misfit := [problem for problem in misfits(found.here, found.there) if problem.blocks]:
        raise VersionsDiffer(f"{address.host} and this environment do not fit. {misfit[0]}")


def _deployments(answer: Answer | Lost) -> dict[str, Any] | None:
    data = answer.json() if isinstance(answer, Answer) and answer.status == 200 else None
    found = data.get("deployments") if isinstance(data, dict) else None
    return found if isinstance(found, dict) else None


def _not_there(address: Address, key: Key | None, answer: Answer | Lost) -> Problem:
    if isinstance(answer, Lost):
        what = f"{address.host} cannot be reached ({answer.why})"
    elif answer.status == 200:
        what = f"{address.host} answers, but not as a server for nnsight does"
    else:
        words = redact(answer.body[:200].decode(errors="replace"), key)
        what = f"{address.host} answers /status with HTTP {answer.status} ({words})"
    if address.loopback:
        fix = "is it running, and on this port? interp serve MODEL --port 5001 starts one"
    elif address.ndif:
        fix = "is this machine online? Otherwise try later; discuss.ndif.us tells about outages"
    else:
        fix = "check the address and the network"
    return Problem(what, fix, blocks=True)


def _accepted(key: Key | None, who: Answer | Lost) -> bool | None:
    """Whether the server lets this key (or none) in; None if it does not say.

    NDIF's /whoami answers with no email both for a key that it does not know and where keys are
    not checked at all, so that is not a no.
    """
    if isinstance(who, Lost) or who.status not in (200, 401, 403):
        return None
    if who.status != 200:
        return False
    data = who.json()
    known = isinstance(data, dict) and bool(data.get("email"))
    return True if known and key is not None else None


def _about_key(
    address: Address, key: Key | None, accepted: bool | None, who: Answer | Lost
) -> list[Problem]:
    fix = keys.where_to_put_it(address)
    if key is None and (unused := unused_key()):
        fix = f"{fix}. {unused}"
    if accepted is False:
        what = "the server asks for an API key" if key is None else "the API key is not accepted"
        return [Problem(what, fix, blocks=True)]
    if key is None:
        return [Problem("no API key is set", fix, blocks=address.ndif)]
    if accepted is None and isinstance(who, Answer) and who.status == 200:
        what = "the server does not recognise the API key, or does not check keys"
        return [Problem(what, "if requests are refused, " + fix, blocks=False)]
    return []
