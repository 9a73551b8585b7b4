"""HookPoints in the tree, for what no module boundary carries.

Most hooks are a module's input or output, and nnsight reaches those by itself. The rest exist only
*inside* a forward: attention scores, the pattern, the mask, a head's result, a norm's scale. For
each of these a real `transformer_lens.hook_points.HookPoint` is attached to the module that
computes it, and is called from there:

* inside attention, by the one attention function of `interp.attention`;
* at norms and at the output projection, by an ordinary torch forward hook set up here.

A point costs nothing while nobody looks at it. `watched` says whether somebody does: a nnsight
trace that is waiting for this very point (its worker is parked there), a nnsight cache that
records it, or a hook added the TransformerLens way with `point.add_hook(fn)`. So attention stays
on the fast kernel and no norm is computed twice unless a value is really wanted.

Edits are applied as differences: where a point hangs beside the computation (norms, results), the
module's own output is changed by exactly what the edit changed. An identity edit therefore changes
nothing, to the last bit.
"""

from __future__ import annotations

import re
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from interp.families.base import Family, Tower, module_at
from interp.hooks import BLOCK_HOOKS

ATTENTION_POINTS = (
    "hook_rot_q",
    "hook_rot_k",
    "hook_mask",
    "hook_attn_scores",
    "hook_pattern",
    "hook_z",
)


class Point(HookPoint):
    """TransformerLens's HookPoint with a name, whose `layer()` knows the vision tower's too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def layer(self) -> int:
        """The block's number, counted in its own tower.

        Raises:
            ValueError: the hook lies in no block.
        """
        match = re.search(r"\bblocks\.(\d+)\.", str(self.name))
        if match is None:
            raise ValueError(f"{self.name!r} lies in no block, so it has no layer")
        return int(match[1])


def attach(module: nn.Module, family: Family) -> None:
    """Hang a named HookPoint for every inner hook into both towers (once per module)."""
    for tower, prefix in ((family.vision, "vision."), (family.language, "")):
        blocks = cast(nn.ModuleList, module_at(module, tower.blocks))
        for layer, block in enumerate(blocks):
            _attach_block(block, tower, f"{prefix}blocks.{layer}.")
        if tower.final_norm:
            _attach_norm(module_at(module, tower.final_norm), f"{prefix}ln_final.")


def _attach_block(block: nn.Module, tower: Tower, prefix: str) -> None:
    attention = module_at(block, tower.block.part("attn"))
    if hasattr(attention, "hook_z"):
        return  # loaded before: the same module may be wrapped twice
    for hook in ATTENTION_POINTS:
        if f"attn.{hook}" in BLOCK_HOOKS and (tower.rotary or not hook.startswith("hook_rot")):
            _add(attention, hook, f"{prefix}attn.{hook}")
    _attach_norm(module_at(block, tower.block.ln1), f"{prefix}ln1.")
    ln2 = module_at(block, tower.block.ln2)
    _add(ln2, "hook_resid_mid", f"{prefix}hook_resid_mid")
    ln2.register_forward_pre_hook(_fire_resid_mid)
    _attach_norm(ln2, f"{prefix}ln2.")
    projection = module_at(block, tower.block.part("o"))
    _add(projection, "hook_result", f"{prefix}attn.hook_result")
    projection.d_head = attention.head_dim
    projection.register_forward_hook(_fire_result)


def _attach_norm(norm: nn.Module, prefix: str) -> None:
    if hasattr(norm, "hook_scale"):
        return
    _add(norm, "hook_scale", f"{prefix}hook_scale")
    _add(norm, "hook_normalized", f"{prefix}hook_normalized")
    norm.register_forward_hook(_fire_norm)


def _add(module: nn.Module, hook: str, name: str) -> None:
    module.add_module(hook, Point(name))


# -- is anybody looking? --------------------------------------------------------------------------


def listen(module: nn.Module, envoy: Any) -> None:
    """Tell every point which nnsight interleaver serves it, and under which location.

    Wrapping a module twice is fine: its points then listen to both.
    """
    interleaver = weakref.ref(envoy.interleaver)
    for path, point in module.named_modules():
        if isinstance(point, Point):
            living = [(ref, at) for ref, at in _watchers(point) if ref() is not None]
            point.__dict__["interp_watchers"] = [*living, (interleaver, f"{envoy.path}.{path}")]


def _watchers(point: HookPoint) -> list[tuple[weakref.ref[Any], str]]:
    return point.__dict__.get("interp_watchers", [])


def watched(point: HookPoint) -> bool:
    """Whether a trace, a cache or a TransformerLens hook wants the value at this point now."""
    if point._forward_hooks or point._backward_hooks:
        return True
    for reference, path in _watchers(point):
        interleaver = reference()
        if interleaver is not None and interleaver.interleaving:
            for side in (f"{path}.output", f"{path}.input"):
                if side in interleaver.parked or side in interleaver.observers:
                    return True
    return False


# -- points beside the computation -----------------------------------------------------------------


def _fire_resid_mid(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    point: HookPoint = norm.hook_resid_mid
    if watched(point):
        x = args[0]
        edited = point(x)
        if edited is not x:
            # the block adds this same tensor back after the MLP, so the edit must be in place
            x.copy_(edited)


def norm_scale(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x centred if the norm centres, its scale): the norm is `centred / scale * weight (+ bias)`.

    Scale is TransformerLens's `hook_scale`: the root mean square with epsilon, `[..., 1]`, float32
    for half-precision inputs.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x, (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def _fire_norm(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    scale_point: HookPoint = norm.hook_scale
    normalized_point: HookPoint = norm.hook_normalized
    if not (watched(scale_point) or watched(normalized_point)):
        return None
    x, scale = norm_scale(norm, args[0])
    before = x / scale
    # the points may edit their tensor in place, so they are handed copies
    scale = scale_point(scale.clone())
    # asked only now: a trace's worker that waited for the scale may move on to the next point
    after = normalized_point(x / scale)
    change = (after - before) * norm.weight
    return output + change.to(output.dtype)


def head_results(projection: nn.Linear, z: Tensor, d_head: int) -> Tensor:
    """What each head writes into the residual stream: `z_h W_O^h`, `[batch, pos, head, d_model]`.

    Elhage et al. 2021 ("A Mathematical Framework"): attention's output is the sum of these, plus
    the projection's bias.
    """
    weight = projection.weight.unflatten(1, (-1, d_head))  # [d_model, head, d_head]
    return torch.einsum("bphd,mhd->bphm", z.unflatten(-1, (-1, d_head)), weight)


def _fire_result(projection: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    point: HookPoint = projection.hook_result
    if not watched(point):
        return None
    before = head_results(projection, args[0], projection.d_head)
    after = point(before.clone())
    return output + (after - before).sum(-2).to(output.dtype)
