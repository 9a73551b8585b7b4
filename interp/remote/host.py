"""`Host`: where a model's forward passes run, and what travels there and back.

A model that was loaded with `remote=` has one (`model.host`). Whatever opens a trace goes through
it: `call` for this library's own functions (`interp.shipping.at_model`), `trace` for a trace that
a user opens. Both pack a block, send it or run it here (`remote="local"`), and count its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nnsight
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import save
from nnsight.tracing.util import push

from interp import errors
from interp.hooked import Hooked
from interp.loading import fast_kernel
from interp.remote.asked import what_was_asked
from interp.remote.errors import RemoteError
from interp.remote.here import run_here
from interp.remote.later import MODE, Sent
from interp.remote.payload import pack_block
from interp.remote.there import answered


@dataclass
class Traffic:
    """What went over the wire.

    Attributes:
        requests: how many.
        up, down: bytes of requests and results, compressed as they travel.
        seconds: from the first byte to the last.
        rounding: largest relative error (of norms) that a float16 transfer made; 0 without.
    """

    requests: int = 0
    up: int = 0
    down: int = 0
    seconds: float = 0.0
    rounding: float = 0.0

    def __str__(self) -> str:
        rounded = f", rounded to float16 ({self.rounding:.1e} relative)" if self.rounding else ""
        return (
            f"{self.requests} request{'s' * (self.requests != 1)}, {_size(self.up)} up, "
            f"{_size(self.down)} down, {self.seconds:.1f} s{rounded}"
        )


def _size(n: int) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e5 else f"{n / 1e3:.1f} kB"


class Host:
    """Where a model runs.

    Args:
        key: the model's, by which servers know it.
        transport: sends requests; None to run them here.
        half: let float32 results travel as float16.

    Attributes:
        traffic: what all requests of this model took so far.
        last: what the last one took.
    """

    def __init__(self, key: str, transport: Any = None, *, half: bool = False) -> None:
        self.key, self.transport, self.half = key, transport, half
        self.traffic, self.last = Traffic(), Traffic()

    def __repr__(self) -> str:
        return f"Host({self.where}; {self.traffic})"

    @property
    def where(self) -> str:
        """The server's address, or that it is played here."""
        return "here as on a server" if self.transport is None else str(self.transport.address.url)

    def wrap(self, module: Any) -> Any:
        """The nnsight model that requests are written against: the tree, as every server has it."""
        return nnsight.NNsight(module)

    def trace(self, model: Hooked, tensors: dict[str, Any], attn: str) -> Any:
        """A user's own trace, which is one request."""
        return model.nn.trace(**tensors, use_cache=False, backend=Sending(self, model, attn))

    def call(
        self, function: Callable[..., Any], model: Hooked, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """What a function of this library returns, run where the model is.

        Raises:
            InterpError: what it raised there, as the class that it is here.
            RemoteError: what went wrong on the way (`interp.remote.errors`).
        """
        attn = kwargs.get("attn", "sdpa")
        of = what_was_asked(function, args, kwargs)
        answer = _asked(Sending(self, model, attn), of, function, model, args, kwargs, self.half)
        if answer["of"] != of:
            raise RemoteError(
                f"the job answers another call ({answer['of']}) than this one ({of}): pick it up "
                "with the function and the arguments that were submitted"
            )
        if "error" in answer:
            kind, message, notes = answer["error"]
            error = getattr(errors, kind, errors.InterpError)(message)
            for note in notes:
                error.add_note(note)
            raise error
        self.last.rounding = answer["rounding"]
        self.traffic.rounding = max(self.traffic.rounding, answer["rounding"])
        return answer["value"]

    def count(self, up: int, down: int, seconds: float) -> None:
        """Add one request."""
        self.last = Traffic(1, up, down, seconds)
        self.traffic.requests += 1
        self.traffic.up += up
        self.traffic.down += down
        self.traffic.seconds += seconds


def _asked(
    backend: Backend,
    of: str,
    function: Callable[..., Any],
    model: Any,
    args: Any,
    kwargs: dict[str, Any],
    half: bool,
) -> dict[str, Any]:
    """The request: one session, whose body is one call."""
    with model.nn.session(backend=backend):
        answer = nnsight.save(answered(of, function, model, args, kwargs, half))
    return answer


class Sending(Backend):
    """nnsight's way of running a block: elsewhere."""

    def __init__(self, host: Host, model: Hooked, attn: str) -> None:
        self.host, self.model = host, model
        self.attn = fast_kernel(model.module) if attn == "sdpa" else attn

    def __call__(self, tracer: Any) -> None:
        """Pack the block, have it run, and put what it saved into the caller's frame."""
        host, model = self.host, self.model
        blob = pack_block(tracer, model)
        frame = tracer.info.frame
        if host.transport is None:
            objects = {"Interleaver": model.nn.interleaver}
            objects |= {f"Module:{envoy.path}": envoy._module for envoy in model.nn.modules()}
            filename = frame.f_code.co_filename
            saved, down = run_here(blob, filename, model.module, objects, self.attn)
            host.count(len(blob), down, 0.0)
        else:
            reply = self._sent(blob)
            saved = reply.result
            host.count(reply.up, reply.down, reply.seconds)
        for value in saved.values():
            save(value)
        push(frame, saved)

    def _sent(self, blob: bytes) -> Any:
        """The reply to the request, or to the job that is picked up (`interp.remote.later`)."""
        transport, env = self.host.transport, {"attn_implementation": self.attn}
        try:
            if (mode := MODE.get()) is None:
                return transport.run(self.host.key, env, blob)
            if mode.job is None:
                raise Sent(transport.submit(self.host.key, env, blob))
            return transport.wait(mode.take())
        finally:
            if transport.progress is not None:
                transport.progress.close()
