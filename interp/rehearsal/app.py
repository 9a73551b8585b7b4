"""The server's routes: NDIF's, as nnsight 0.8's client uses them.

    GET  /subscribe       websocket; the first frame is {"session_id"}, then the jobs' statuses
    POST /request         a job: form field `data` (JSON) and file `blob`; answers RECEIVED
    GET  /response/ID     the latest status of any job
    GET  /results/TICKET  a result's bytes; whoever has the URL may have it, as on NDIF
    GET  /status, /env    what is served, and with which packages; open to all
    GET  /whoami, /ping
    GET  /faults          which faults fired, and how often each job ran; not NDIF's

All but the open ones demand the key, compared in constant time. Whatever is refused is answered by
{"detail": ...} in words.
"""

from __future__ import annotations

import hmac
import json
from typing import Any

from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import ClientDisconnect, HTTPConnection

from .board import Board, Job
from .bodies import Refusal, Refused, read_form
from .cutting import cut
from .faults import Faults
from .options import Options
from .runner import Runner
from .sessions import Sessions
from .versions import installed, misfit

WRAPPER = "nnsight.modeling.transformers.TransformersModel"
SOON = {"Retry-After": "1"}  # seconds


class Envelope(BaseModel):
    """The JSON beside the payload: nnsight's RequestModel."""

    model_key: str = Field(max_length=4096)
    session_id: str = Field("", max_length=256)
    compress: bool = False
    env: dict[str, Any] = {}


def make_app(options: Options, key: str, board: Board, runner: Runner, faults: Faults) -> FastAPI:
    """The application.

    Args:
        options: of the command line.
        key: what clients must send as `ndif-api-key`.
        board: where jobs are kept.
        runner: where they are run; its facts are there once the first worker is.
        faults: what to do wrong.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    sessions = Sessions(options.max_websockets, faults, cut)
    versions = installed(options.pretend_version)
    served = f"{WRAPPER}:" + json.dumps(
        {"repo_id": options.name, "revision": options.revision, "task": options.task}
    )

    def demand_key(connection: HTTPConnection) -> None:
        given = connection.headers.get("ndif-api-key", "")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise Refused(
                401,
                f"{'a wrong' if given else 'no'} API key. This server printed its key when it "
                "started: export it as NDIF_API_KEY before the client starts; it is not your "
                "NDIF key",
                early=True,
            )

    locked = [Depends(demand_key)]

    @app.websocket("/subscribe")
    async def subscribe(websocket: WebSocket) -> None:
        try:
            demand_key(websocket)
            if len(sessions.open) >= sessions.limit:
                raise Refused(429, f"{sessions.limit} websockets are open (--max-websockets)", SOON)
        except Refused as refused:
            await websocket.send_denial_response(Refusal(refused))
            return
        await sessions.serve(websocket)

    @app.post("/request", dependencies=locked)
    async def request(request: Request) -> JSONResponse:
        data, blob = await read_form(request, options.max_body)
        for status in (500, 429, 503):
            if faults.take(f"http{status}"):
                raise Refused(status, f"the fault http{status}", SOON if status == 429 else None)
        envelope = _envelope(data)
        _check_model(envelope.model_key, options)
        if options.require_versions and (why := misfit(request.headers, versions)):
            raise Refused(400, why)
        if len(runner) >= options.max_queue:
            raise Refused(429, f"{len(runner)} jobs are waiting (--max-queue); try later", SOON)
        if runner.n_bytes + len(blob) > 8 * options.max_body:
            raise Refused(429, "too many MB of requests are waiting; try later", SOON)
        session = sessions.open.get(envelope.session_id)
        job = Job(blob, envelope.compress, envelope.env, session)
        board.add(job)
        answer = JSONResponse(job.status)
        runner.add(job)
        if faults.take("lose-answer"):
            cut(request)
        return answer

    @app.get("/response/{job_id}", dependencies=locked)
    async def response(job_id: str, request: Request) -> JSONResponse:
        job = board.get(job_id)
        if job is None or faults.take("poll404"):
            raise Refused(404, f"no job {job_id[:64]!r} here, or no longer (--keep)")
        return JSONResponse(job.answer(f"http://{request.headers.get('host', '')}"))

    @app.get("/results/{ticket}")
    async def results(ticket: str) -> Response:
        result = board.result(ticket)
        if result is None:
            raise Refused(404, "no such result here, or no longer (--keep, --keep-size)")
        return Response(result, media_type="application/octet-stream")

    @app.get("/status")
    async def status() -> dict[str, Any]:
        deployment = {
            "deployment_level": "HOT",
            "application_state": "RUNNING" if runner.facts else "DEPLOYING",
            "model_key": served,
            "repo_id": options.name,
            "revision": options.revision or "main",
            "task": options.task,
            "trust_remote_code": False,
            "n_params": runner.facts.get("n_parameters"),
        }
        return {"deployments": {served: deployment}}

    @app.get("/env")
    async def env() -> dict[str, Any]:
        if not runner.facts:
            raise Refused(503, "the model is being loaded; try later", SOON)
        return dict(runner.facts["env"])

    @app.get("/whoami", dependencies=locked)
    async def whoami() -> dict[str, Any]:
        return {"email": "rehearsal@localhost", "tags": ["rehearsal"]}

    @app.get("/ping")
    async def ping() -> str:
        return "pong"

    @app.get("/faults", dependencies=locked)
    async def fired() -> dict[str, Any]:
        return {"fired": faults.fired, "left": faults.left, "executed": runner.executed}

    @app.exception_handler(Refused)
    async def refuse(_: Request, refused: Refused) -> Response:
        return Refusal(refused)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return Refusal(Refused(500, f"a defect of the rehearsal server: {type(error).__name__}"))

    return app


def _envelope(data: str) -> Envelope:
    try:
        return Envelope.model_validate_json(data)
    except ValidationError as error:
        what = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'all of it'}: {one['msg']}"
            for one in error.errors(include_url=False, include_input=False)[:5]
        )
        raise Refused(400, f"the part `data` is no request: {what[:1000]}") from None


def _check_model(model_key: str, options: Options) -> None:
    """Refuse a key that NDIF would not find among its deployments, were this model one."""
    wrapper, _, rest = model_key.partition(":")
    try:
        asked = json.loads(rest)
        repo_id = asked["repo_id"]
    except (ValueError, KeyError, TypeError):
        raise Refused(400, f"{model_key[:200]!r} is no model key: {WRAPPER}:{{JSON}}") from None
    if wrapper != WRAPPER:
        raise Refused(404, f"this server serves a {WRAPPER}, not a {wrapper[:200]}")
    ours = {"repo_id": options.name, "task": options.task, "revision": options.revision or "main"}
    theirs = {
        "repo_id": repo_id,
        "task": asked.get("task") or options.task,
        "revision": asked.get("revision") or "main",
    }
    for what in ours:
        if ours[what] != theirs[what]:
            raise Refused(
                404,
                f"the model asked for is not here: {what} {str(theirs[what])[:200]!r}; this server "
                f"has {options.name!r} (task {options.task}, revision {ours['revision']}). Start "
                "another with `interp serve MODEL`, or with --name for the name asked for",
            )
