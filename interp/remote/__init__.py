"""Models that run elsewhere: on NDIF, on a rehearsal server, or here as if they did.

    model = MLLM.load("llava-hf/llava-1.5-7b-hf", remote=True)      # and everything stays as it is
    print(status())                                                 # who hosts what, does it fit?
    job = submit(model.run, x, Knockout(edges))                     # leave it running
    run = pick_up(job.id, model.run, x, Knockout(edges))            # from any process

Two halves meet in `host`. One says *what* travels: `payload` packs a call with the code it needs
(`sources`), unless a server could not run it (`lacking`); `there` holds what begins and ends it on
the server, `here` plays the server in this process. The other knows *how*: `transport` and what it
is made of send it once and only once, `keys` and `address` decide who is talked to. `later` leaves
calls and picks them up.
"""

from interp.remote.errors import RemoteError
from interp.remote.jobs import Job
from interp.remote.later import Pending, pick_up, submit
from interp.remote.limits import Limits
from interp.remote.ready import require_ready, status, vision_models

__all__ = [
    "Job",
    "Limits",
    "Pending",
    "RemoteError",
    "pick_up",
    "require_ready",
    "status",
    "submit",
    "vision_models",
]
