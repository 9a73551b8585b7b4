"""Hooks on a model that nobody prepared: what a stock transformers model on a server has.

Most hooks are a module's input or output, and those are there on every model. The rest, which a
model in this process carries by HookPoints (`interp.points`), are worked out here from what can be
seen from outside:

| hook | on a stock model |
|---|---|
| `attn.hook_z` | the input of the output projection, by head; can be edited |
| `hook_attn_out`, `hook_mlp_out` behind a norm (Gemma 2, 3) | that norm's output; can be edited |
| `attn.hook_rot_q`, `hook_rot_k`, `hook_mask` | the arguments of the attention function |
| `attn.hook_pattern` | attention's second output, which only "eager" gives |
| `attn.hook_result` | the output projection, called once a head |
| `hook_scale`, `hook_normalized` of norms | from the norm's input |
| `hook_resid_mid` | the input of the second norm |

All but the first two lines are *read only*: what stands there is a copy, or a value that nothing
reads on. Assigning to them is refused, and so is an edit in place, at the end of the trace
(`Given`). Masks are edited by mask edits, at the attention module's input, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from interp.attention import bool_mask
from interp.errors import EditHadNoEffect, UnknownHook
from interp.families.base import Family
from interp.hooks import layer_of
from interp.norms import norm_scale

#: by suffix: what to edit instead of a hook that can only be read
INSTEAD = {
    "attn.hook_rot_q": "edit attn.hook_q",
    "attn.hook_rot_k": "edit attn.hook_k",
    "attn.hook_mask": "edges are cut and opened by Knockout, Unmask and EditMask",
    "attn.hook_pattern": "cut edges with Knockout, or edit attn.hook_z",
    "attn.hook_result": "edit attn.hook_z, head by head",
    "hook_resid_mid": "edit hook_attn_out, or hook_resid_pre of this block",
    "hook_scale": "edit the stream that enters the norm",
    "hook_normalized": "edit the stream that enters the norm",
}
SCORES = "the scores are never outside the attention function; read attn.hook_pattern"
SCALED = "a learnt scale follows the module; take the difference of hook_resid_{before} and {after}"
PACKED = "the tower's attention is called once a picture or window; load the model here"


def lacking(family: Family, n_layers: int, n_vision_layers: int) -> dict[str, str]:
    """Names that a stock model of a family does not have, with what would do."""
    out = {}
    for tower, prefix, n in (
        (family.vision, "vision.", n_vision_layers),
        (family.language, "", n_layers),
    ):
        for layer in range(n):
            block = f"{prefix}blocks.{layer}."
            out[f"{block}attn.hook_attn_scores"] = SCORES
            if tower.names.attn_scale:
                out[f"{block}hook_attn_out"] = SCALED.format(before="pre", after="mid")
                out[f"{block}hook_mlp_out"] = SCALED.format(before="mid", after="post")
            if tower.packed:
                for part in ("rot_q", "rot_k", "mask", "pattern"):
                    out[f"{block}attn.hook_{part}"] = PACKED
    return out


def instead_of(name: str) -> str | None:
    """What to edit instead of a hook, if it can only be read."""
    suffix = name.split(".", name.startswith("vision.") + 2)[-1] if "blocks." in name else name
    return INSTEAD.get(suffix) or INSTEAD.get(name.rpartition(".")[2])


def require_stock(names: Iterable[str], *, edited: bool) -> None:
    """Raise for hooks that are to be edited and can only be read.

    Raises:
        UnknownHook: naming what would do.
    """
    for name in names if edited else ():
        if instead := instead_of(name):
            raise UnknownHook(
                f"{name!r} can only be read on a hosted model, whose attention and norms are "
                f"transformers' own: {instead}; or load the model here"
            )


class Given:
    """Values handed out to be read only, so that an edit in place does not pass for one."""

    def __init__(self) -> None:
        self._values: list[tuple[str, Tensor, int]] = []

    def out(self, name: str, value: Tensor) -> Tensor:
        """The value, remembered with torch's count of its edits."""
        self._values.append((name, value, value._version))
        return value

    def check(self) -> None:
        """Raise if one of them was edited; forget them."""
        values, self._values = self._values, []
        for name, value, version in values:
            if value._version != version:
                raise EditHadNoEffect(
                    f"{name!r} was edited in place, and can only be read on a hosted model: "
                    f"{instead_of(name)}; or load the model here"
                )


class DerivedSite:
    """A hook whose value is worked out; what `interp.sites.Site` is for those that are there."""

    __slots__ = ("_given", "_read", "name")

    def __init__(self, name: str, read: Callable[[], Tensor], given: Given) -> None:
        self.name, self._read, self._given = name, read, given

    @property
    def output(self) -> Tensor:
        """The value here: waits until the forward pass reaches it. Only inside a trace."""
        return self._given.out(self.name, self._read())

    @output.setter
    def output(self, value: Tensor) -> None:
        require_stock([self.name], edited=True)


def stock_site(model: Any, name: str, d_head: int, given: Given) -> DerivedSite | None:
    """A hook that a stock model has no place for; None for one that it has.

    Args:
        model: a `Hooked`.
        name: of the hook, canonical and known.
        d_head: width of a head in its tower.
        given: remembers what is handed out.
    """
    if instead_of(name) is None:
        return None
    tower, rest = model.family.tower(name)
    if rest.startswith("ln_final."):
        norm = tower.final_norm
        return DerivedSite(name, lambda: _norm(model, norm, rest, tower.packed), given)
    _, number, suffix = rest.split(".", 2)
    layer, vision = int(number), tower is model.family.vision

    def part(which: str) -> str:
        return str(model.family.block_path(layer, which, vision=vision))

    if suffix in ("attn.hook_rot_q", "attn.hook_rot_k"):
        which = 1 if suffix.endswith("q") else 2
        return DerivedSite(name, lambda: _call(model, part("attn"))[which].transpose(1, 2), given)
    if suffix == "attn.hook_mask":
        return DerivedSite(name, lambda: _mask(model, part("attn")), given)
    if suffix == "attn.hook_pattern":
        return DerivedSite(name, lambda: _pattern(model, name, part("attn")), given)
    if suffix == "attn.hook_result":
        packed = tower.packed
        return DerivedSite(name, lambda: _results(model, part("o"), d_head, packed), given)
    if suffix == "hook_resid_mid":
        return DerivedSite(name, lambda: _rows(model.envoy(part("ln2")).input, tower.packed), given)
    norm = part(suffix.split(".")[0])
    return DerivedSite(name, lambda: _norm(model, norm, suffix, tower.packed), given)


def inside(model: Any, names: Iterable[str]) -> set[str]:
    """Paths of the attention modules that must be looked into for these hooks.

    nnsight can show what happens inside a forward, but only one that it was told of before it runs.
    """
    found = set()
    for name in names:
        if name.endswith(("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_mask")):
            tower, rest = model.family.tower(name)
            vision = tower is model.family.vision
            found.add(model.family.block_path(layer_of(rest), "attn", vision=vision))
    return found


def _rows(value: Tensor, packed: bool) -> Tensor:
    """A copy, with a batch axis."""
    return (value.unsqueeze(0) if packed else value).clone()


def _call(model: Any, attention: str) -> tuple[Any, ...]:
    """What the attention function is called with: module, query, key, value, mask."""
    source = model.envoy(attention).source
    # the name is bound first and called last: transformers' towers all call it so
    names = [name for name in source.names if name.startswith("attention_interface_")]
    args, _ = getattr(source, max(names, key=lambda name: int(name.rpartition("_")[2]))).inputs
    return tuple(args)


def _mask(model: Any, attention: str) -> Tensor:
    module, query, key, _, mask = _call(model, attention)[:5]
    causal = bool(getattr(module, "is_causal", True))
    return bool_mask(mask, query, key, causal).expand(*query.shape[:2], -1, -1).clone()


def _pattern(model: Any, name: str, attention: str) -> Tensor:
    pattern = model.envoy(attention).output[1]
    if pattern is None:
        raise UnknownHook(
            f"{name!r}: only eager attention gives its weights, and this run attends through "
            'another kernel; model.trace(x, attn="eager") asks for it'
        )
    return pattern.clone()


def _norm(model: Any, path: str, hook: str, packed: bool) -> Tensor:
    norm = model.envoy(path)
    centred, scale = norm_scale(model.submodule(path), _rows(norm.input, packed))
    return scale if hook.endswith("scale") else centred / scale


def _results(model: Any, path: str, d_head: int, packed: bool) -> Tensor:
    """What each head writes: the projection of its z alone, less the bias."""
    project = model.envoy(path)
    z = _rows(project.input, packed).unflatten(-1, (-1, d_head))
    nothing = project(torch.zeros_like(z[:1, :1]).flatten(-2))
    one = torch.eye(z.shape[-2], dtype=z.dtype, device=z.device)
    return torch.stack([project((z * row[:, None]).flatten(-2)) - nothing for row in one], -2)
