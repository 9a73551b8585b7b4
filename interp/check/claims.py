"""What the hook names claim, as equations between the tensors there.

A name is a promise: that `hook_resid_mid` is `hook_resid_pre` plus `hook_attn_out`, that a row of
`hook_pattern` sums to one, that `hook_mlp_out` comes from `mlp.hook_post`. `blocks` runs a
model and tells by how much each promise is broken, within each block of a tower and between them.

The tensors come from the hooks; beside them stands what torch itself sees going in and out of the
modules (`watch`), and the weights, so a table that names the wrong module cannot agree with itself.
`interp.check.trials` has the claims about the rest of the model; `report` draws the conclusions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interp.execution import Run
from interp.families.base import module_at
from interp.inputs import Inputs
from interp.model import MLLM

#: names by which MLPs call their activation function, and attention its norms of queries and keys
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
HEAD_NORMS = {"q": "q_norm", "k": "k_norm"}
#: the name by which configurations call a bound on attention scores
SOFTCAP = "attn_logit_softcapping"

Seen = dict[str, tuple[Tensor, Tensor]]


class Finding(NamedTuple):
    """By how much a claim is broken, relative to the largest value that is compared.

    Attributes:
        claim: in words.
        error: the largest difference; None if the claim cannot be checked here.
        where: the hook, or the token; for what cannot be checked, why.
        bound: what the error must not exceed, where that is no matter of the model's precision.
        must_move: the claim is that there *is* a difference.
    """

    claim: str
    error: float | None
    where: str
    bound: float | None = None
    must_move: bool = False


# -- whole towers ----------------------------------------------------------------------------------


def blocks(model: MLLM, x: Inputs, *, vision: bool) -> Iterator[Finding]:
    """The claims within each block of a tower, and that blocks hand on what they made."""
    prefix = "vision." if vision else ""
    config: Any = model.config
    n_layers = model.cfg.n_vision_layers if vision else model.cfg.n_layers
    for layer in range(n_layers):
        here, following = f"{prefix}blocks.{layer}.", f"{prefix}blocks.{layer + 1}.hook_resid_pre"
        deepstack, last = f"deepstack.{layer}.hook_out", layer + 1 == n_layers
        deep = not vision and deepstack in model.hooks.names
        read = [name for name in model.hooks.names if name.startswith(here)]
        read += [following] * (not last) + [deepstack] * deep
        modules = block_modules(model, layer, vision=vision)
        with watch(modules) as seen:
            # a run that stops at the last hook read stops before torch sees the block's output
            run = model.run(x, read=read, logits=last)
        yield from BlockClaims(model, run, modules, seen, here, vision=vision).findings()
        if not last:
            left = precise(run[f"{here}hook_resid_post"]).clone()
            if deep:  # Qwen3-VL adds what an extra merger read, at the image tokens
                ids = x.tensors["input_ids"].to(left.device)
                left[ids == config.image_token_id] += precise(run[deepstack]).flatten(0, -2)
            claim = "resid_post = resid_pre of the next block"
            yield Finding(claim, worst(precise(run[following]), left), following)


# -- one block -------------------------------------------------------------------------------------


class BlockClaims:
    """The claims of one block.

    Args:
        model: whose block it is.
        run: read every hook of the block.
        modules: the block's (`block_modules`).
        seen: what `watch` saw of them in the same run.
        prefix: of the block's hooks: "vision.blocks.3.".
        vision: whether it is the vision tower's.
    """

    def __init__(
        self,
        model: MLLM,
        run: Run,
        modules: dict[str, Any],
        seen: Seen,
        prefix: str,
        *,
        vision: bool,
    ) -> None:
        self.tower = model.family.vision if vision else model.family.language
        self.names = self.tower.names
        self.cap = getattr(getattr(model.config, self.tower.config), SOFTCAP, None)
        self.modules = modules
        self.prefix = prefix
        self.mask = run[f"{prefix}attn.hook_mask"]
        self.hooks = {
            name.removeprefix(prefix): precise(run[name])
            for name in run
            if name.startswith(prefix) and not name.endswith("hook_mask")
        }
        self._seen = seen

    def __getitem__(self, suffix: str) -> Tensor:
        return self.hooks[suffix]

    def seen(self, part: str, side: int) -> Tensor:
        """What torch saw go into (0) or come out of (1) a part, with a batch axis."""
        tensor = precise(self._seen[part][side])
        return tensor.unsqueeze(0) if self.tower.packed else tensor

    def findings(self) -> Iterator[Finding]:
        """All claims, in the order of the forward pass."""
        for claims in (self.stream, self.norms, self.attention, self.mlp):
            for claim, error, *bound in claims():
                yield Finding(claim, error, self.prefix.removesuffix("."), *bound)

    def stream(self) -> Iterator[tuple[Any, ...]]:
        """The residual stream: what enters, what is added, what leaves."""
        pre, mid, post = (self[f"hook_resid_{at}"] for at in ("pre", "mid", "post"))
        yield "resid_pre, resid_post are the block's", worst(pre, self.seen("", 0))
        yield "resid_pre, resid_post are the block's", worst(post, self.seen("", 1))
        for part, post_norm in (("attn", self.names.ln1_post), ("mlp", self.names.ln2_post)):
            if not post_norm:
                scale = getattr(self.names, f"{part}_scale")
                factor = precise(getattr(self.modules[""], scale)) if scale else 1
                error = worst(self[f"hook_{part}_out"], self.seen(part, 1) * factor)
                yield "attn_out, mlp_out are the parts'", error
        yield "resid_pre + attn_out = resid_mid", worst(pre + self["hook_attn_out"], mid)
        yield "resid_mid + mlp_out = resid_post", worst(mid + self["hook_mlp_out"], post)

    def norms(self) -> Iterator[tuple[Any, ...]]:
        """Input over scale is normalised; that times the weight is what goes on."""
        first = self.seen("qkv" if self.names.qkv else "q", 0)
        steps = [
            ("ln1", self["hook_resid_pre"], first),
            ("ln2", self["hook_resid_mid"], self.seen("mlp", 0)),
        ]
        if self.names.post_norms:
            steps += [
                (
                    f"ln{1 if part == 'attn' else 2}_post",
                    self.seen(part, 1),
                    self[f"hook_{part}_out"],
                )
                for part in ("attn", "mlp")
            ]
        for ln, enters, leaves in steps:
            norm, normalized = self.modules[ln], self[f"{ln}.hook_normalized"]
            error = worst(normalized * self[f"{ln}.hook_scale"], centred(norm, enters))
            yield "input / scale = normalized", error
            error = worst(affine(norm, normalized, self.names.norm_offset), leaves)
            yield "normalized x weight = what goes on", error

    def attention(self) -> Iterator[tuple[Any, ...]]:
        """From queries, keys and values to what attention adds to the stream."""
        pattern, z, scores = (self[f"attn.hook_{at}"] for at in ("pattern", "z", "attn_scores"))
        query, key = self.normed("q"), self.normed("k")
        if self.tower.rotary:
            for side, before in (("q", query), ("k", key)):
                # some rotations (YaRN) also scale all vectors alike, so: against the usual ratio
                ratio = self[f"attn.hook_rot_{side}"].norm(dim=-1) / before.norm(dim=-1)
                error = worst(ratio / ratio.median(), torch.ones_like(ratio))
                yield "rotation keeps the norms of q and k", error
            query, key = self["attn.hook_rot_q"], self["attn.hook_rot_k"]
        yield "attn_scores = scale x q k", self.scores_error(query, key)
        # a closed score is minus infinity, or the lowest number where a float mask was added
        is_open = scores > torch.finfo(torch.float16).min
        missed = float((is_open != self.mask).double().mean())
        yield "hook_mask is open where scores are finite", missed, 0.0
        softmax = torch.softmax(scores.masked_fill(~self.mask, -torch.inf), -1).nan_to_num(0)
        yield "pattern = softmax(attn_scores)", worst(pattern, softmax)
        open_rows = self.mask.any(-1).to(pattern.dtype)  # a closed row is zeros
        yield "pattern rows sum to one", worst(pattern.sum(-1), open_rows)
        yield (
            "pattern is 0 outside hook_mask",
            float(pattern.masked_fill(self.mask, 0).abs().max()),
            0.0,
        )
        value = by_head(self["attn.hook_v"], z.shape[2])
        yield "z = pattern x v, by head", worst(torch.einsum("bhqk,bkhd->bqhd", pattern, value), z)
        yield "z enters the output projection", worst(z.flatten(-2), self.seen("o", 0))
        bias = getattr(self.modules["o"], "bias", None)
        summed = self["attn.hook_result"].sum(-2)
        summed = summed if bias is None else summed + precise(bias)
        yield "sum of result (+ bias) = o's output", worst(summed, self.seen("o", 1))

    def normed(self, side: str) -> Tensor:
        """Queries or keys behind their norm, if they have one, of each head or of all together."""
        x = self[f"attn.hook_{side}"]
        norm = getattr(self.modules["attn"], HEAD_NORMS[side], None)
        if norm is None:
            return x
        weight = norm.weight
        by_head = weight.shape[-1] == x.shape[-1]
        with torch.no_grad():
            out: Tensor = norm((x if by_head else x.flatten(-2)).to(weight.dtype))
        return precise(out).reshape(x.shape)

    def scores_error(self, query: Tensor, key: Tensor) -> float:
        """Scores against q k, with the factor between them found, not assumed."""
        product = torch.einsum("bqhd,bkhd->bhqk", query, by_head(key, query.shape[2]))[self.mask]
        scores = self["attn.hook_attn_scores"][self.mask]
        linear, bounded = scores, torch.ones_like(self.mask[self.mask])
        if self.cap is not None:  # found where the bound does not bend them much
            bounded = scores.abs() < 0.7 * self.cap
            linear = self.cap * torch.atanh((scores / self.cap).clamp(-0.7, 0.7))
        used = product[bounded]
        factor = (linear[bounded] * used).sum() / (used * used).sum()
        expected = factor * product
        if self.cap is not None:
            expected = self.cap * torch.tanh(expected / self.cap)
        return worst(scores, expected)

    def mlp(self) -> Iterator[tuple[Any, ...]]:
        """The MLP's hidden units, and that they feed what is added."""
        mlp, down, post = self.modules["mlp"], self.modules["mlp_post"], self["mlp.hook_post"]
        act = next((getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name)), None)
        claim = "mlp.post = act(mlp.pre) (x pre_linear)"
        if act is None:
            yield claim, None
        else:
            units = act(self["mlp.hook_pre"])
            yield (
                claim,
                worst(units * self["mlp.hook_pre_linear"] if self.names.gated else units, post),
            )
        with torch.no_grad():
            out = down.forward(post.to(self._seen["mlp_post"][0].dtype))
        yield "mlp.post feeds the MLP's output", worst(precise(out), self.seen("mlp", 1))


# -- helpers ---------------------------------------------------------------------------------------


@contextmanager
def watch(modules: dict[str, nn.Module]) -> Iterator[Seen]:
    """What torch sees: the first input and the output of each module, by its key."""
    seen: Seen = {}

    def keeper(key: str) -> Any:
        def keep(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            first = args[0] if args else kwargs.get("hidden_states")
            seen[key] = (first, out[0] if isinstance(out, tuple) else out)

        return keep

    handles = [
        module.register_forward_hook(keeper(key), with_kwargs=True)
        for key, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def block_modules(model: MLLM, layer: int, *, vision: bool) -> dict[str, Any]:
    """The modules of a block by the table's names for its parts; "" is the block."""
    tower = model.family.vision if vision else model.family.language
    block = module_at(model.module, f"{tower.blocks}.{layer}")
    parts = ["ln1", "attn", "o", "ln2", "mlp", "mlp_post", "ln1_post", "ln2_post"]
    parts += ["qkv"] if tower.names.qkv else ["q"]
    named = [part for part in parts if getattr(tower.names, part)]
    return {"": block, **{part: module_at(block, tower.names.part(part)) for part in named}}


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected; infinite if not finite."""
    if found.shape != expected.shape:
        return float("inf")
    size = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    error = float((found - expected).abs().max() / size)
    return error if error == error else float("inf")


def centred(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm's input as it divides it by the scale."""
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def affine(norm: Any, normalized: Tensor, offset: float) -> Tensor:
    """A norm's weight (and bias) on what it normalised."""
    out = normalized * (precise(norm.weight) + offset)
    bias = getattr(norm, "bias", None)
    return out if bias is None else out + precise(bias)


def by_head(x: Tensor, n_heads: int) -> Tensor:
    """`[batch, pos, kv_head, d]` with each key-value head repeated for the heads that share it."""
    return x.repeat_interleave(n_heads // x.shape[2], dim=2)


def precise(x: Tensor) -> Tensor:
    """In the precision in which claims are computed: more than the model's own, where there is."""
    x = x.detach()
    if x.dtype == torch.float64:
        return x
    return x.double() if x.dtype == torch.float32 and x.device.type != "mps" else x.float()
