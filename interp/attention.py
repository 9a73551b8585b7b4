"""The one attention function through which every tower attends.

transformers lets a model look its attention up by name. We register the name "interp" and switch
every tower to it: one function then sees the queries, keys and values of all families, without
touching family code. It does one of two things:

* nobody looks inside: it hands everything to transformers' own SDPA function, untouched, so the
  numbers and the speed are those of the stock model;
* somebody looks at the scores or the pattern (`interp.points.watched`): it writes attention out,
  with a HookPoint at each step, so that what is edited there is what flows on.

Packed towers (the Qwen-VL families) have a function of their own, `packed_attention`.

A model may also be left on a stock kernel, "sdpa" or "eager" (`register`). Mask edits work there
just the same, since they go in at the attention module's input; what only this function carries
(scores, pattern, mask, rotated queries and keys, z) is then refused by name (`require`).

Masks are boolean here, True = may attend, or None where SDPA's causal flag does the work. A row
with no key left gives a pattern of zeros (SDPA does the same), never NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from interp.errors import EmptyRow, UnknownHook
from interp.families.base import Family, module_at
from interp.points import ATTENTION_POINTS, watched

NAME = "interp"
#: attention functions that a model can be loaded with: ours, and transformers' own
KERNELS = (NAME, "sdpa", "eager")
#: scores that `softmax_into` takes at a time: what stays in a CPU's cache, or fills a GPU
BLOCK, BLOCK_ELSEWHERE = {"cpu": 2**17}, 2**22
#: with "flash" in it, so that packed towers hand over their row whole (see `packed_attention`)
PACKED_NAME = "interp_flash_packed"


def hooked_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with TransformerLens's hooks inside; transformers' attention-function signature.

    Args:
        module: the attention module, carrying its HookPoints.
        query: `[batch, head, query, d_head]`, already rotated.
        key: `[batch, kv_head, key, d_head]`.
        value: `[batch, kv_head, key, d_head]`.
        attention_mask: `[batch, 1 or head, query, key]` (bool, or float added to the scores), or
            None.
        scaling: factor on the scores; 1/sqrt(d_head) if None.
        dropout: must be 0 where somebody looks inside (models under study run in eval mode).

    Returns:
        z as `[batch, query, head, d_head]`, and None for the weights.
    """
    if not hasattr(module, "hook_z"):  # a tower this library did not instrument
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    if hasattr(module, "hook_rot_q"):
        if watched(module.hook_rot_q):
            query = module.hook_rot_q(query.transpose(1, 2)).transpose(1, 2)
        if watched(module.hook_rot_k):
            key = module.hook_rot_k(key.transpose(1, 2)).transpose(1, 2)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if watched(module.hook_mask):
        attention_mask = _fire_mask(module, query, key, attention_mask, is_causal)
    softcap = kwargs.get("softcap")  # which no SDPA kernel knows
    if watched(module.hook_attn_scores) or watched(module.hook_pattern) or softcap is not None:
        z = _written_out(
            module, query, key, value, attention_mask, scaling, dropout, is_causal, kwargs
        )
    else:
        z, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    return (module.hook_z(z) if watched(module.hook_z) else z), None


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,
    interp_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over one row of patches, of which each attends to its own chunk only.

    The Qwen vision towers pack all pictures (in windowed layers: all windows) into one row. Given
    any other function they call it once a chunk; under a name with "flash" in it they hand over the
    whole row with the chunks' borders, `cu_seq_lens_q` `[n_chunks + 1]`. So the hooks here see one
    tensor. Where nobody looks at scores, pattern or mask, the chunks go one by one through SDPA, as
    in the stock model; otherwise the chunks are the blocks of a mask.

    Args: as `hooked_attention`; the batch is 1. `interp_mask` is the mask of a mask edit, bool
        `[1, 1 or head, query, key]`, which takes the chunks' place.
    """
    kwargs = {"is_causal": False}
    if not hasattr(module, "hook_z"):
        raise TypeError(f"{type(module).__name__} has no HookPoints: points.attach was not called")
    if watched(module.hook_rot_q):
        query = module.hook_rot_q(query.transpose(1, 2)).transpose(1, 2)
    if watched(module.hook_rot_k):
        key = module.hook_rot_k(key.transpose(1, 2)).transpose(1, 2)
    lengths = cu_seq_lens_q.diff()
    chunk = torch.arange(len(lengths), device=query.device).repeat_interleave(lengths)
    mask = interp_mask
    if watched(module.hook_mask):
        blocks = (chunk[:, None] == chunk)[None, None] if mask is None else mask
        edited = _fire_mask(module, query, key, blocks, False)
        mask = mask if edited is blocks else edited
    if watched(module.hook_attn_scores) or watched(module.hook_pattern):
        mask = (chunk[:, None] == chunk)[None, None] if mask is None else mask
        z = _written_out(module, query, key, value, mask, scaling, dropout, False, kwargs)
    elif mask is not None:
        z, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    else:
        chunks = zip(*(x.split(lengths.tolist(), dim=2) for x in (query, key, value)), strict=True)
        parts = [
            sdpa_attention_forward(module, *qkv, None, dropout, scaling, **kwargs)[0]
            for qkv in chunks
        ]
        z = torch.cat(parts, dim=1)
    return (module.hook_z(z) if watched(module.hook_z) else z), None


def _fire_mask(
    module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """The mask after its point; the very one that came if nothing there was edited."""
    mask = bool_mask(attention_mask, query, key, is_causal)
    # a copy of its own, by head: the same tensor serves every layer, and an edit of this layer
    # must not leak into the next
    edited: Tensor = module.hook_mask(mask.expand(*query.shape[:2], -1, -1).clone())
    if edited.dtype != torch.bool:
        raise TypeError(
            f"{module.hook_mask.name}: the mask is bool, True where a query may attend, and "
            f"{edited.dtype} would be added to the scores; return .bool(), or edit hook_attn_scores"
        )
    if torch.equal(edited, mask.expand_as(edited)):
        return attention_mask  # so that looking leaves the kernel, and the last bit, alone
    if (mask.any(-1) & ~edited.any(-1)).any():
        raise EmptyRow(
            f"an edit at {module.hook_mask.name!r} leaves queries with no key to attend to"
        )
    return edited


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """z under a mask, `[batch, head, query, d_head]`; nobody is told, nothing is hooked.

    Args:
        query, key, value: as `hooked_attention` has them.
        mask: `[batch or 1, 1 or head, query, key]` bool.
        scaling: factor on the scores.
        softcap: bound of the scores (Gemma 2), if any.
    """
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap)) * softcap
    return softmax(scores.masked_fill_(~mask, -torch.inf)).to(value.dtype) @ value


def _written_out(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool,
    kwargs: dict[str, Any],
) -> Tensor:
    unknown = [k for k in ("position_bias", "s_aux") if kwargs.get(k) is not None]
    if unknown or dropout:
        raise NotImplementedError(
            f"{module.hook_z.name}: attention with {', '.join(unknown) or 'dropout'} cannot be "
            "opened up yet; read hook_z, or put the model into eval mode"
        )
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    # in place where it can be: a fresh tensor of this size costs more than the arithmetic
    scores = (query @ key.transpose(-1, -2)).mul_(scaling or query.shape[-1] ** -0.5)
    if (softcap := kwargs.get("softcap")) is not None:  # Gemma 2
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        scores = scores + attention_mask
    elif attention_mask is not None or is_causal:
        scores.masked_fill_(~bool_mask(attention_mask, query, key, is_causal), -torch.inf)
    shown = watched(module.hook_attn_scores)
    if shown:
        scores = module.hook_attn_scores(scores)
    if scores.requires_grad:
        pattern = softmax(scores).to(query.dtype)
    else:
        # the scores' memory becomes the pattern's, unless somebody may have kept them
        reused = not shown and scores.dtype == query.dtype
        pattern = softmax_into(scores if reused else query.new_empty(scores.shape), scores)
    if watched(module.hook_pattern):
        pattern = module.hook_pattern(pattern)
    return (pattern @ value).transpose(1, 2).contiguous()


def bool_mask(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """The mask a layer truly uses, `[batch or 1, 1 or head, query, key]` bool, True = may attend.

    None means what SDPA makes of it: causal by flag (aligned at the first key), or everything.
    """
    if mask is not None:
        return as_bool(mask)
    full = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return (full.tril() if is_causal and query.shape[2] > 1 else full)[None, None]


def as_bool(mask: Tensor) -> Tensor:
    """A mask as bool, whether it came as bool or as the "0 or minus infinity" of eager attention.

    Raises:
        TypeError: a float mask with other values, which no boolean can express.
    """
    if mask.dtype == torch.bool:
        return mask
    closed = mask <= torch.finfo(mask.dtype).min / 2
    if not (closed | (mask == 0)).all():
        raise TypeError(
            f"an additive {mask.dtype} mask with values other than 0 and -inf is a bias, not a "
            "mask; edit hook_attn_scores instead"
        )
    return ~closed


def softmax(scores: Tensor) -> Tensor:
    """Softmax over keys in float32; a row that is closed everywhere becomes zeros, not NaN."""
    pattern = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if pattern[..., :1].isnan().any():  # such a row, or scores that were no numbers
        closed = (scores == -torch.inf).all(-1, keepdim=True)
        pattern = pattern.masked_fill(closed, 0.0)
    return pattern


def softmax_into(out: Tensor, scores: Tensor) -> Tensor:
    """`softmax(scores)` written into `out`, a block of rows at a time; no gradients.

    So the largest tensor of a model is held once: neither the scores nor a float32 copy of a
    half-precision pattern stands beside it.

    Args:
        out: contiguous, of the scores' shape; may be `scores` itself.
        scores: `[batch, head, query, key]`.

    Returns:
        `out`.
    """
    n_keys = scores.shape[-1]
    n_rows = max(1, BLOCK.get(scores.device.type, BLOCK_ELSEWHERE) // max(1, n_keys))
    blocks = scores.reshape(-1, n_keys).split(n_rows)
    for block, to in zip(blocks, out.view(-1, n_keys).split(n_rows), strict=True):
        to.copy_(softmax(block))
    return out


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """Keys or values of grouped-query attention, repeated to one a query head."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def register(model: nn.Module, family: Family, attn: str = NAME) -> None:
    """Make the functions known to transformers and switch every tower of `model` to one of them.

    Args:
        model: a transformers model.
        family: its table.
        attn: "interp", or "sdpa" or "eager" for transformers' own.

    Raises:
        ValueError: another kernel: flash and flex attention take no mask that an edit could change.
    """
    if attn not in KERNELS:
        raise ValueError(
            f"attn={attn!r}: interp runs on {', '.join(KERNELS)}; flash and flex attention make "
            "their masks themselves, so that edges could be neither cut nor looked at"
        )
    for name, function in ((NAME, hooked_attention), (PACKED_NAME, packed_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
    if (came := kernel(model)) not in (*KERNELS, None):
        warnings.warn(
            f"this model came with {came!r} attention, which takes no edited mask; it now attends "
            f"through {attn!r}, whose numbers are those of exact attention",
            stacklevel=2,
        )
    model.set_attn_implementation(attn)  # type: ignore[operator]
    if family.vision.packed:
        for block in cast(nn.ModuleList, module_at(model, family.vision.blocks)):
            attention: Any = module_at(block, family.vision.names.part("attn"))
            if not isinstance(attention.config, PackedConfig):
                attention.config = PackedConfig(attention.config)


def kernel(module: Any) -> str | None:
    """The name of the attention function that a model, or one attention module, runs on."""
    name = getattr(module.config, "_attn_implementation", None)
    return NAME if name == PACKED_NAME else name


def require(module: Any, names: Iterable[str]) -> None:
    """Raise if hooks are asked for that the model's attention function does not carry.

    Args:
        module: the transformers model.
        names: canonical hook names.

    Raises:
        UnknownHook: a hook of our function's, on a model that runs on a stock kernel.
    """
    if (attn := kernel(module)) == NAME:
        return
    inner = [name for name in names if name.rpartition(".attn.")[2] in ATTENTION_POINTS]
    if inner:
        raise UnknownHook(
            f"{', '.join(inner[:3])}: only interp's own attention function carries "
            f"{'these hooks' if len(inner) > 1 else 'this hook'}, and the model attends through "
            f"{attn!r}; load it with attn={NAME!r}"
        )


class PackedConfig:
    """A packed tower's configuration, as its attention modules see it.

    Where the tower attends through "interp", its attention modules are told the name that makes
    them hand over their row whole. The configuration itself stays as it is: other models may be
    made from it, and transformers would look for a flash kernel of that name.
    """

    def __init__(self, config: Any) -> None:
        self.__dict__["config"] = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "config" not in self.__dict__:  # while being copied
            raise AttributeError(name)
        return getattr(self.__dict__["config"], name)

    @property
    def _attn_implementation(self) -> Any:
        name = self.__dict__["config"]._attn_implementation
        return PACKED_NAME if name == NAME else name
