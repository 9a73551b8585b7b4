"""The same model twice: in this process, and stock, with every call packed as for a server.

    local, there = pair("qwen2.5-vl")
    same(local.run(x).logits, there.run(x).logits)

`remote="local"` runs what a server would run, on what it would be sent; the tests against a real
server in a process of its own are in `test_server.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from interp import MLLM, ProbeBank
from tests.conftest import random_llava
from tests.zoo import ZOO, build, picture

CLASSES = tuple("abcd")


def pair(name: str) -> tuple[MLLM, MLLM]:
    """A case of the zoo as (here, as on a server), of equal weights."""
    module, processor = build(name)
    stock, _ = build(name)
    return (
        MLLM.load(module, processor=processor),
        MLLM.load(stock, processor=processor, remote="local"),
    )


def random_pair() -> tuple[MLLM, MLLM]:
    """The random LLaVA of `tests.conftest`, both ways; without a processor."""
    return MLLM.load(random_llava()), MLLM.load(random_llava(), remote="local")


def padded(model: MLLM, name: str, *, alike: bool = False) -> Any:
    """Two pictures, of one size if `alike`, and questions of different length: a row is padded."""
    prompt = ZOO[name].prompt
    other = picture(40, 32, seed=1) if alike else picture(36, 50, seed=1)
    return model.prepare([picture(40, 32), other], [prompt, f"{prompt} a red dog"])


def same(a: torch.Tensor, b: torch.Tensor, what: str = "", *, within: float = 1e-5) -> None:
    """Equal shapes, dtypes and numbers, up to float32 rounding; NaNs and infinities alike."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype), what
    a, b = a.detach(), b.detach()
    if not a.is_floating_point():
        assert torch.equal(a, b), what
        return
    size = max(1.0, float(a.abs().nan_to_num(0, 0, 0).max()))
    error = float((a / size - b / size).nan_to_num(0, 0, 0).abs().max())
    assert torch.equal(a.isfinite(), b.isfinite()), what
    assert error <= within, f"{what}: {error:.1e} apart"


def random_bank(model: MLLM, stages: Any, *, seed: int = 0) -> ProbeBank:
    """Probes of random weights at stages of the language model's width."""
    draw = torch.Generator().manual_seed(seed)
    stages = tuple(stages)
    d_model = model.cfg.d_model
    return ProbeBank(
        stages=stages,
        classes=CLASSES,
        weights={s: torch.randn(len(CLASSES), d_model, generator=draw) for s in stages},
        intercepts={s: torch.zeros(len(CLASSES)) for s in stages},
        seen=(True,) * len(CLASSES),
        n_iter=dict.fromkeys(stages, 1),
        converged=dict.fromkeys(stages, True),
    )
