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

import weakref
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from interp.families.base import Family, Tower, module_at, weight_of
from interp.hooks import layer_of
from interp.norms import norm_scale

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
        return layer_of(str(self.name))


def attach(module: nn.Module, family: Family) -> None:
    """Hang a named HookPoint for every inner hook into both towers (once per module)."""
    for tower, prefix in ((family.vision, "vision."), (family.language, "")):
        blocks = cast(nn.ModuleList, module_at(module, tower.blocks))
        for layer, block in enumerate(blocks):
            if not hasattr(module_at(block, tower.names.part("attn")), "hook_z"):
                _attach_block(block, tower, f"{prefix}blocks.{layer}.")
        if tower.final_norm:
            norm = module_at(module, tower.final_norm)
            if not hasattr(norm, "hook_scale"):
                _attach_norm(norm, f"{prefix}ln_final.", tower.names.norm_offset)


def _attach_block(block: nn.Module, tower: Tower, prefix: str) -> None:
    names = tower.names
    attention = module_at(block, names.part("attn"))
    for hook in ATTENTION_POINTS:
        if tower.rotary or not hook.startswith("hook_rot"):
            _add(attention, hook, f"{prefix}attn.{hook}")
    _attach_norm(module_at(block, names.ln1), f"{prefix}ln1.", names.norm_offset)
    _attach_norm(module_at(block, names.ln2), f"{prefix}ln2.", names.norm_offset)
    projection = module_at(block, names.part("o"))
    _add(projection, "hook_result", f"{prefix}attn.hook_result")
    projection.d_head = attention.head_dim
    projection.register_forward_hook(_fire_result)
    # what attention and MLP add to the stream is no module's output where it is scaled or
    # normalised on the way
    ln2 = module_at(block, names.ln2)
    for part, post, scale in (
        ("attn", names.ln1_post, names.attn_scale),
        ("mlp", names.ln2_post, names.mlp_scale),
    ):
        if post:
            norm = module_at(block, post)
            _attach_norm(norm, f"{prefix}ln{1 if part == 'attn' else 2}_post.", names.norm_offset)
            _add(norm, f"hook_{part}_out", f"{prefix}hook_{part}_out")
            norm.register_forward_hook(partial(_fire_out, part))
        elif scale:
            added = module_at(block, names.part(part))
            _add(added, f"hook_{part}_out", f"{prefix}hook_{part}_out")
            added.register_forward_hook(partial(_fire_scaled, part, getattr(block, scale), ln2))
    _add(ln2, "hook_resid_mid", f"{prefix}hook_resid_mid")
    ln2.register_forward_pre_hook(partial(_fire_resid_mid, bool(names.mlp_scale)))


def _attach_norm(norm: nn.Module, prefix: str, offset: float) -> None:
    _add(norm, "hook_scale", f"{prefix}hook_scale")
    _add(norm, "hook_normalized", f"{prefix}hook_normalized")
    norm.register_forward_hook(partial(_fire_norm, offset))


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


def _fire(point: HookPoint, value: Tensor, n_axes: int) -> Tensor:
    """The value after the point, which sees it with a batch axis even where the tower has none."""
    if value.ndim == n_axes:
        return cast(Tensor, point(value))
    return cast(Tensor, point(value.unsqueeze(0)).squeeze(0))


def _fire_resid_mid(scaled: bool, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    x = args[0]
    if scaled:
        # `_fire_scaled` left here what an edit of attention's output adds, and will write into x
        # again behind the MLP
        if (change := norm.__dict__.pop("interp_change", None)) is not None:
            x.add_(change)
        norm.__dict__["interp_stream"] = x
    point = cast(HookPoint, norm.hook_resid_mid)
    if watched(point):
        # the block adds this same tensor back after the MLP, so the edit must be in place; who
        # looks gets a copy, which stays what it was
        x.copy_(_fire(point, x.clone(), 3))


def _fire_scaled(part: str, scale: Tensor, ln2: nn.Module, added: nn.Module, _: Any, out: Any):  # type: ignore[no-untyped-def]
    """A point for what InternViT adds: the part's output times a learnt scale.

    The module's own output cannot carry an edit (the scale may be zero), so the edit's difference
    goes into the stream itself: attention's when the second norm reads it, the MLP's at once.
    """
    stream = ln2.__dict__.pop("interp_stream", None) if part == "mlp" else None
    point = cast(HookPoint, getattr(added, f"hook_{part}_out"))
    if not watched(point):
        return
    if scale.is_meta:
        raise NotImplementedError(f"{point.name!r}: its scale is offloaded by the device_map")
    before = scale * (out[0] if isinstance(out, tuple) else out)
    change = _fire(point, before.clone(), 3) - before
    if part == "attn":
        ln2.__dict__["interp_change"] = change
    elif stream is not None:
        stream.add_(change)


def _fire_out(part: str, norm: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    point = cast(HookPoint, getattr(norm, f"hook_{part}_out"))
    return _fire(point, output, 3) if watched(point) else None


def _fire_norm(offset: float, norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    scale_point: HookPoint = norm.hook_scale
    normalized_point: HookPoint = norm.hook_normalized
    if not (watched(scale_point) or watched(normalized_point)):
        return None
    x, scale = norm_scale(norm, args[0])
    before = x / scale
    # the points may edit their tensor in place, so they are handed copies
    scale = _fire(scale_point, scale.clone(), 3)
    # asked only now: a trace's worker that waited for the scale may move on to the next point
    after = _fire(normalized_point, x / scale, 3)
    change = (after - before) * (weight_of(norm) + offset)
    return output + change.to(output.dtype)


def head_results(projection: Any, z: Tensor, d_head: int) -> Tensor:
    """What each head writes into the residual stream: `z_h W_O^h`, `[..., pos, head, d_model]`.

    Elhage et al. 2021 ("A Mathematical Framework"): attention's output is the sum of these, plus
    the projection's bias. A quantised projection, whose weight is no matrix, is called once a head.

    Args:
        projection: the output projection.
        z: its input, `[..., pos, head * d_head]`.
        d_head: width of a head.
    """
    weight = weight_of(projection)
    z = z.unflatten(-1, (-1, d_head))
    if isinstance(projection, nn.Linear) and weight.is_floating_point() and weight.ndim == 2:
        return torch.einsum("...hd,mhd->...hm", z, weight.unflatten(1, (-1, d_head)))
    one = torch.eye(z.shape[-2], dtype=z.dtype, device=z.device)
    bias = 0 if projection.bias is None else weight_of(projection, "bias")
    # only the class's forward: hooks, ours included, must not see these calls
    parts = [type(projection).forward(projection, (z * row[:, None]).flatten(-2)) for row in one]
    return torch.stack([part - bias for part in parts], dim=-2)


def _fire_result(projection: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    point: HookPoint = projection.hook_result
    if not watched(point):
        return None
    before = head_results(projection, args[0], projection.d_head)
    after = _fire(point, before.clone(), 4)
    return output + (after - before).sum(-2).to(output.dtype)
