"""From `MLLM.load(..., remote=...)` to a module without weights and the host that has them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from interp.families import family_of
from interp.loading import load_hosted
from interp.remote.address import address
from interp.remote.host import Host
from interp.remote.keys import find_key
from interp.remote.limits import Limits
from interp.remote.progress import StatusLine
from interp.remote.ready import require_ready
from interp.remote.server import ServerStatus
from interp.remote.transport import Transport

#: how NDIF names a kind of deployment
KIND = "nnsight.modeling.transformers.TransformersModel"


def connect(
    source: Any,
    remote: bool | str,
    allow_host: str | Sequence[str],
    *,
    half: bool,
    limits: Limits | None = None,
    **options: Any,
) -> tuple[nn.Module, Any, Host]:
    """The module, its processor, and where it runs.

    Args:
        source: of the model.
        remote: "local", True or "ndif" for NDIF, or a server's URL.
        allow_host: servers that are trusted beside NDIF's and this machine.
        half: let results travel as float16.
        limits: how long to try and to wait.
        options: of `interp.loading.load`.

    Raises:
        UntrustedHost, BadAddress: `remote` names a host that is not trusted, or none.
        NoKey, WrongKey, NotHosted, VersionsDiffer, Unreachable: what would break a request.
    """
    if remote == "local":
        module, processor, name = load_hosted(source, weights=True, **options)
        return module, processor, Host(name, half=half)
    at = address(True if remote == "ndif" else remote, allow_host)
    key = find_key(at)
    name = os.fspath(source) if isinstance(source, os.PathLike) else source
    # else loading says what is wrong
    found = require_ready(at, key, name) if isinstance(name, str) else None
    module, processor, name = load_hosted(source, weights=False, **options)
    transport = Transport(at, key, limits=limits, progress=StatusLine())
    task = family_of(module, hosted=True).task
    return module, processor, Host(_model_key(found, name, task, options), transport, half=half)


def _model_key(found: ServerStatus | None, name: str, task: str, options: dict[str, Any]) -> str:
    """What a server knows a model by: as it says itself, else as nnsight's client would say it."""
    revision = options.get("revision")
    for model in found.models if found else ():
        same = model.repo_id.casefold() == name.casefold() and model.task in (task, "")
        if same and model.revision == (revision or "main") and model.model_key.startswith(KIND):
            return model.model_key
    about: dict[str, Any] = {"repo_id": name, "revision": revision}
    if options.get("trust_remote_code"):
        about["trust_remote_code"] = True
    return f"{KIND}:{json.dumps(about | {'task': task})}"
