"""Trials: what can only be found out by changing something, and the claims about the ends.

`interp.check.claims` has the equations inside the towers. Here is the rest of what is asked:

* `adapter`, `logits`: what lies between the towers, and behind the second, is what the table says;
* `parity`: the clean run is plain transformers' run;
* `edits`: at every hook of a block in the middle of a tower, an identity edit changes nothing (0.0)
  and a real one moves the logits;
* `reads`: the logits depend on the vision blocks that they are said to depend on, and on no others;
* `boxes`: with attention in the vision tower switched off, so that each patch is left to itself,
  repainting the picture inside a token's box changes that token more than any other of its view.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from interp import attention
from interp.check.claims import SOFTCAP, Finding, affine, centred, precise, watch, worst
from interp.execution import execute
from interp.families.base import module_at
from interp.inputs import Inputs
from interp.model import MLLM

#: the name by which configurations call a bound on logits
FINAL_SOFTCAP = "final_logit_softcapping"
#: how many tokens of each view are repainted
N_TOKENS = 6


def adapter(model: MLLM, x: Inputs) -> Iterator[Finding]:
    """What the adapter and the deepstack mergers read is what the table says.

    The adapter may get a part of the stage (without CLS), in another order (pixels shuffled), so
    the values are compared after sorting.
    """
    final = "vision.ln_final.hook_normalized"
    through_norm = final in model.hooks.names
    deepstack = [
        f"vision.blocks.{layer}.hook_resid_post"
        for layer in model.family.deepstack_reads(model.config)
    ]
    read = [*model.vision_reads, *deepstack, "adapter.hook_in", *([final] * through_norm)]
    mergers = {
        str(k): module_at(model.module, f"{model.family.deepstack}.{k}")
        for k in range(len(deepstack))
    }
    with watch(mergers) as seen:
        run = model.run(x, read=read)
    stage = torch.cat([precise(run[name]) for name in model.vision_reads], dim=-1)
    where = " and ".join(model.vision_reads)
    if through_norm:
        tower = model.family.vision
        stage = affine(
            module_at(model.module, tower.final_norm), precise(run[final]), tower.names.norm_offset
        )
        where += ", through the final norm"
    entered = precise(run["adapter.hook_in"])
    per_position = stage.shape[0] * stage.shape[2]
    kept = stage[:, stage.shape[1] - entered.numel() // per_position :]
    error = worst(entered.flatten().sort().values, kept.flatten().sort().values)
    yield Finding("adapter.hook_in is the stage it reads", error, where)
    for merger, name in enumerate(deepstack):
        entered = precise(seen[str(merger)][0])
        error = worst(entered.flatten(), precise(run[name]).flatten())
        yield Finding("deepstack mergers read their stages", error, f"deepstack.{merger}, {name}")


def logits(model: MLLM, x: Inputs) -> Iterator[Finding]:
    """From the last block to the logits: the final norm, the unembedding, and a bound on them."""
    tower = model.family.language
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    run = model.run(x, read=[last, "ln_final.hook_scale", "ln_final.hook_normalized"])
    norm = module_at(model.module, tower.final_norm)
    normalized, scale = (precise(run[f"ln_final.hook_{at}"]) for at in ("normalized", "scale"))
    error = worst(normalized * scale, centred(norm, precise(run[last])))
    yield Finding("last resid_post / scale = ln_final.normalized", error, "ln_final")
    out = affine(norm, normalized, tower.names.norm_offset)
    unembed: Any = module_at(model.module, model.family.unembed)
    assert run.logits is not None
    with torch.no_grad():
        made = precise(unembed(out.to(run.logits.dtype)))
    cap = getattr(getattr(model.config, tower.config), FINAL_SOFTCAP, None)
    where = model.family.unembed if cap is None else f"{model.family.unembed}, softcap {cap:g}"
    made = made if cap is None else cap * torch.tanh(made / cap)
    yield Finding("ln_final, unembedded, gives the logits", worst(precise(run.logits), made), where)


def parity(model: MLLM, x: Inputs) -> Iterator[Finding]:
    """The clean run against plain transformers, whose own attention function is put back in."""
    ours = model.run(x).logits
    assert ours is not None
    text = getattr(model.config, model.family.language.config)
    # transformers' sdpa leaves Gemma 2's bound on the scores out
    kernel = "sdpa" if getattr(text, SOFTCAP, None) is None else "eager"
    try:
        model.module.set_attn_implementation(kernel)  # type: ignore[operator]
        plain = _plain(model, x)
    finally:
        attention.register(model.module, model.family)
    yield Finding(
        "the clean run is plain transformers'", worst(precise(ours), precise(plain)), kernel
    )


def _plain(model: MLLM, x: Inputs) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.module(**model.to_device(x), use_cache=False).logits
    return logits


# -- edits -----------------------------------------------------------------------------------------


def edits(model: MLLM, x: Inputs, *, vision: bool) -> Iterator[Finding]:
    """Reads, identity edits and real edits at the hooks of a tower's middle block and ends."""
    untouched = model.run(x).logits
    assert untouched is not None
    for name in _sample(model, vision):
        # edits are compared with a run that reads the same hook: looking inside attention takes
        # another kernel, and so changes the last bit
        read = model.run(x, read=name).logits
        assert read is not None
        same = model.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: value.clone())])
        moved = model.run_with_hooks(x, fwd_hooks=[(name, _disturb)])
        yield Finding("reading changes the kernel at most", _change(read, untouched), name)
        yield Finding("an identity edit changes nothing", _change(same, read), name, bound=0.0)
        claim = "a real edit moves the logits (least move)"
        yield Finding(claim, _change(moved, read), name, must_move=True)


def _sample(model: MLLM, vision: bool) -> list[str]:
    if vision:
        read = model.vision_reads[0].split(".")
        block = f"vision.blocks.{int(read[2]) // 2}."
        ends: tuple[str, ...] = ("vision.hook_embed", "vision.ln_final.", "adapter.", "deepstack.")
    else:
        block = f"blocks.{model.cfg.n_layers // 2}."
        ends = ("hook_embed", "ln_final.")
    return [name for name in model.hooks.names if name.startswith((block, *ends))]


def _disturb(value: Tensor, hook: Any) -> Tensor:
    """An edit that no norm undoes: a factor that differs along the last axis (of a norm's scale,
    which has but one number a token, from token to token).

    Of a mask, the first open key of each query that has another one is closed.
    """
    if value.dtype == torch.bool:
        first = value & (value.cumsum(-1) == 1) & (value.sum(-1, keepdim=True) > 1)
        return value & ~first
    axis = -1 if value.shape[-1] > 1 else -2
    wave = 1 + 0.5 * torch.sin(1 + torch.arange(value.shape[axis], device=value.device))
    return value * (wave if axis == -1 else wave[:, None]).to(value.dtype)


def _change(logits: Tensor, clean: Tensor) -> float:
    """The largest change of a logit, relative to the largest logit."""
    return worst(precise(logits), precise(clean))


def reads(model: MLLM, x: Inputs) -> Iterator[Finding]:
    """Which vision blocks reach the logits, asked with torch's own hooks, not with ours."""
    clean = _plain(model, x)
    for layer in range(model.cfg.n_vision_layers):
        name = f"vision.blocks.{layer}.hook_resid_post"
        block = module_at(model.module, model.family.block_path(layer, vision=True))
        # first in line: transformers collects the states by a hook of its own
        handle = block.register_forward_hook(_disturb_output, prepend=True)
        try:
            moved = _change(_plain(model, x), clean)
        finally:
            handle.remove()
        if model.off_path(name):
            yield Finding("blocks off the path do not reach the logits", moved, name, bound=0.0)
        else:
            yield Finding("blocks on the path reach the logits", moved, name, must_move=True)


def _disturb_output(module: Any, args: Any, out: Any) -> Any:
    return (_disturb(out[0], None), *out[1:]) if isinstance(out, tuple) else _disturb(out, None)


# -- places ----------------------------------------------------------------------------------------

BOX = "a token answers to its own box"


def boxes(model: MLLM, image: Image.Image, prompt: str) -> Iterator[Finding]:
    """How much the other tokens of a view change when one token's box is repainted, to its own."""
    before, grid = _entries(model, image, prompt)
    for view in range(len(grid.shapes)):
        members = grid.of_view(view)
        for place in range(0, len(members), max(1, len(members) // N_TOKENS)):
            token = members[place]
            where = f"token {token} of {len(grid)}, box {np.round(grid.box[token]).tolist()}"
            painted = _repainted(image, grid.box[token])
            if painted is None:  # padding
                continue
            after, _ = _entries(model, painted, prompt)
            change = (after - before).norm(dim=-1).cpu().numpy()[members]
            own, others = change[place], np.delete(change, place)
            ratio = float(others.max(initial=0) / own) if own > 0 else float("inf")
            yield Finding(BOX, ratio, where, bound=0.99)


def _entries(model: MLLM, image: Image.Image, prompt: str) -> tuple[Tensor, Any]:
    """What enters the language model at each image token, if no patch sees another one."""
    x = model.prepare(image, prompt)
    silent = [
        (name, lambda z, hook: torch.zeros_like(z))
        for name in model.hooks.expand("vision.blocks.*.attn.hook_z")
        if not model.off_path(name)
    ]
    entry = "blocks.0.hook_resid_pre"
    run = execute(model, x, functions=silent, read=[entry], logits=False)
    return precise(run[entry])[
        torch.as_tensor(x.grid.row), torch.as_tensor(x.grid.position)
    ], x.grid


def _repainted(image: Image.Image, box: np.ndarray) -> Image.Image | None:
    """The picture with the middle of a box inverted; None if the picture has no pixel there.

    Only the middle, since a resize blends the edges with the neighbours.
    """
    pixels = np.array(image)
    left, top, right, bottom = box
    dx, dy = (right - left) / 4, (bottom - top) / 4
    x0, x1 = int(np.floor(left + dx)), int(np.ceil(right - dx))
    y0, y1 = int(np.floor(top + dy)), int(np.ceil(bottom - dy))
    part = pixels[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    part[:] = 255 - part
    return Image.fromarray(pixels) if part.size else None
