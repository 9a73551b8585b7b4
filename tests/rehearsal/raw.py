"""The wire without nnsight's client: plain requests, for what a proper client would not send."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import httpx
import zstandard

from tests.rehearsal.serving import TINY, Server

WRAPPER = "nnsight.modeling.transformers.TransformersModel"


def model_key(repo_id: str = TINY, task: str | None = "image-text-to-text", **more: Any) -> str:
    return f"{WRAPPER}:" + json.dumps({"repo_id": repo_id, "revision": None, "task": task, **more})


def envelope(**fields: Any) -> str:
    return json.dumps({"model_key": model_key(), "compress": True, **fields})


def submit(
    server: Server, blob: bytes, *, headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    """POST a job; `fields` of the envelope."""
    return server.client.post(
        f"{server.url}/request",
        data={"data": envelope(**fields)},
        files={"blob": ("request", blob, "application/octet-stream")},
        headers={**server.headers, **(headers or {})},
    )


def finish(server: Server, job: str) -> dict[str, Any]:
    """A job's last status, once it has one."""
    deadline = time.monotonic() + 120
    while (told := server.get(f"/response/{job}").json())["status"] not in ("COMPLETED", "ERROR"):
        assert time.monotonic() < deadline, told
        time.sleep(0.01)
    return told


def fetch(server: Server, told: dict[str, Any]) -> dict[str, Any]:
    """The values of a COMPLETED job; no key is sent, as nnsight sends none."""
    import torch

    assert told["status"] == "COMPLETED", told["description"]
    response = server.client.get(told["data"])
    response.raise_for_status()
    content = zstandard.ZstdDecompressor().decompress(response.content)
    return torch.load(io.BytesIO(content), weights_only=False)


def run(server: Server, blob: bytes, **fields: Any) -> dict[str, Any]:
    """Submit and wait: the last status."""
    response = submit(server, blob, **fields)
    assert response.status_code == 200, response.text
    return finish(server, response.json()["id"])
