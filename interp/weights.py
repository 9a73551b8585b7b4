"""Weights by TransformerLens's names: per head, input on the left, biases never missing.

transformers keeps a projection as one matrix `[out, in]` for all heads together, under another
name in every family; Qwen's vision tower keeps queries, keys and values in a single one. Here they
are what the field's formulas speak of, so that `x @ W_Q[layer, head] + b_Q[layer, head]` is
`hook_q`, and `z @ W_O[layer, head]` is `hook_result`:

    model.W_Q                [layer, head, d_model, d_head]
    model.W_K, model.W_V     [layer, kv_head, d_model, d_head]
    model.W_O                [layer, head, d_head, d_model]
    model.W_in, model.W_out  [layer, d_model, d_mlp], [layer, d_mlp, d_model]
    model.W_E, model.W_U     [d_vocab, d_model], [d_model, d_vocab]
    model.blocks[3].attn.W_O [head, d_head, d_model], a view of the weight itself
    model.vision.W_Q         the same of the vision tower

What to know before trusting a formula:

* *nothing is folded*: norms keep their weights, so a direction read off `W_U` must pass the final
  norm's weight first (`interp.lens.cache` does it). TransformerLens folds in a mode of its own;
* with grouped queries, `W_K` and `W_V` have one matrix a *key-value* head, as `hook_k` and
  `TransformerBridge` have; `QK` and `OV` repeat them;
* where an MLP is gated, `W_gate` makes `mlp.hook_pre` and `W_in` the other factor;
* a bias that the model lacks is zeros (`TransformerBridge` raises there), a gate it lacks an error;
* a norm's `w` is what it multiplies by: `1 + weight` in Gemma;
* `W_E` is the table itself: Gemma multiplies what it looks up by sqrt(d_model).

Stacked ones (`model.W_Q`) are copies, made anew on every access.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from interp.dims import Dims
from interp.errors import UnreadableWeight
from interp.families.base import Block, Family, module_at


class NormWeights:
    """A norm's weights: `w` `[d_model]`, what it multiplies by, and `b` `[d_model]`."""

    def __init__(self, norm: nn.Module, offset: float) -> None:
        self._norm = norm
        self._offset = offset

    @property
    def w(self) -> Tensor:
        """What the norm multiplies by, in float32 at least where the family adds one to it."""
        weight = _plain(self._norm, "weight")
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self._offset

    @property
    def b(self) -> Tensor:
        """What the norm adds."""
        return _bias(self._norm, len(_plain(self._norm, "weight")))


class AttentionWeights:
    """Projections of one attention layer, by head.

    `W_Q` `[head, d_model, d_head]`, `W_K`, `W_V` `[kv_head, d_model, d_head]`,
    `W_O` `[head, d_head, d_model]`, `b_Q` ... `b_V` `[head, d_head]`, `b_O` `[d_model]`.
    """

    def __init__(self, block: nn.Module, names: Block, d_head: int) -> None:
        self._block = block
        self._names = names
        self._d_head = d_head

    def _part(self, part: str) -> tuple[Tensor, Tensor]:
        """Weight `[out, in]` and bias `[out]` of a projection, cut out of a fused one."""
        module = module_at(self._block, self._names.part(part))
        weight = _plain(module, "weight")
        bias = _bias(module, len(weight))
        if self._names.qkv and part != "o":
            third = "qkv".index(part)
            return weight.chunk(3)[third], bias.chunk(3)[third]
        return weight, bias

    def _in(self, part: str) -> Tensor:
        return self._part(part)[0].unflatten(0, (-1, self._d_head)).transpose(1, 2)

    def _in_bias(self, part: str) -> Tensor:
        return self._part(part)[1].unflatten(0, (-1, self._d_head))

    W_Q = property(lambda self: self._in("q"))
    W_K = property(lambda self: self._in("k"))
    W_V = property(lambda self: self._in("v"))
    W_O = property(lambda self: self._part("o")[0].T.unflatten(0, (-1, self._d_head)))
    b_Q = property(lambda self: self._in_bias("q"))
    b_K = property(lambda self: self._in_bias("k"))
    b_V = property(lambda self: self._in_bias("v"))
    b_O = property(lambda self: self._part("o")[1])


class MLPWeights:
    """Matrices of one MLP: `W_gate`, `W_in` `[d_model, d_mlp]`, `W_out` `[d_mlp, d_model]`."""

    def __init__(self, block: nn.Module, names: Block) -> None:
        self._block = block
        self._names = names

    def _module(self, part: str) -> nn.Module:
        return module_at(self._block, self._names.part(part))

    @property
    def _in(self) -> nn.Module:
        return self._module("mlp_gated" if self._names.gated else "mlp_pre")

    @property
    def _gate(self) -> nn.Module:
        if not self._names.gated:
            raise AttributeError(
                "these blocks have no gated MLP, so no W_gate; W_in makes hook_pre"
            )
        return self._module("mlp_pre")

    W_in = property(lambda self: _plain(self._in, "weight").T)
    W_gate = property(lambda self: _plain(self._gate, "weight").T)
    W_out = property(lambda self: _plain(self._module("mlp_post"), "weight").T)
    b_in = property(lambda self: _bias(self._in, self.W_in.shape[1]))
    b_gate = property(lambda self: _bias(self._gate, self.W_gate.shape[1]))
    b_out = property(lambda self: _bias(self._module("mlp_post"), self.W_out.shape[1]))


class BlockWeights:
    """Weights of one block: `attn`, `mlp`, and its norms `ln1`, `ln2`.

    Families that also normalise what attention and MLP write (Gemma 2 and 3) have `ln1_post` and
    `ln2_post`, None elsewhere.
    """

    def __init__(self, block: nn.Module, names: Block, d_head: int) -> None:
        self.attn = AttentionWeights(block, names, d_head)
        self.mlp = MLPWeights(block, names)

        def norm(path: str) -> NormWeights:
            return NormWeights(module_at(block, path), names.norm_offset)

        self.ln1, self.ln2 = norm(names.ln1), norm(names.ln2)
        self.ln1_post = norm(names.ln1_post) if names.ln1_post else None
        self.ln2_post = norm(names.ln2_post) if names.ln2_post else None


class TowerWeights:
    """The weights of a tower, stacked over its layers; see the module docstring for shapes.

    A mixin: it needs `module`, `family` and `cfg`.
    """

    module: nn.Module
    family: Family
    cfg: Dims
    _tower: ClassVar[str] = "language"

    @property
    def blocks(self) -> Sequence[BlockWeights]:
        """Weights block by block: `blocks[3].attn.W_O`, views of the weights themselves."""
        tower = getattr(self.family, self._tower)
        d_head = self.cfg.d_vision_head if self._tower == "vision" else self.cfg.d_head
        layers = cast(nn.ModuleList, module_at(self.module, tower.blocks))
        return [BlockWeights(block, tower.names, d_head) for block in layers]

    def _stack(self, one: Callable[[BlockWeights], Tensor]) -> Tensor:
        parts = [one(block) for block in self.blocks]
        return torch.stack([part.to(parts[0].device) for part in parts])  # layers may be spread

    W_Q = property(lambda self: self._stack(lambda block: block.attn.W_Q))
    W_K = property(lambda self: self._stack(lambda block: block.attn.W_K))
    W_V = property(lambda self: self._stack(lambda block: block.attn.W_V))
    W_O = property(lambda self: self._stack(lambda block: block.attn.W_O))
    b_Q = property(lambda self: self._stack(lambda block: block.attn.b_Q))
    b_K = property(lambda self: self._stack(lambda block: block.attn.b_K))
    b_V = property(lambda self: self._stack(lambda block: block.attn.b_V))
    b_O = property(lambda self: self._stack(lambda block: block.attn.b_O))
    W_in = property(lambda self: self._stack(lambda block: block.mlp.W_in))
    W_gate = property(lambda self: self._stack(lambda block: block.mlp.W_gate))
    W_out = property(lambda self: self._stack(lambda block: block.mlp.W_out))
    b_in = property(lambda self: self._stack(lambda block: block.mlp.b_in))
    b_gate = property(lambda self: self._stack(lambda block: block.mlp.b_gate))
    b_out = property(lambda self: self._stack(lambda block: block.mlp.b_out))

    @property
    def QK(self) -> FactoredMatrix:
        """What a head's query position asks of a key position, `[layer, head, d_model, d_model]`.

        Factored: `W_Q W_K^T`. Norms, rotation and norms on queries and keys are not in it.
        """
        return FactoredMatrix(self.W_Q, self._repeat(self.W_K).transpose(-1, -2))

    @property
    def OV(self) -> FactoredMatrix:
        """What a head writes when it attends to a position, `[layer, head, d_model, d_model]`."""
        return FactoredMatrix(self._repeat(self.W_V), self.W_O)

    def _repeat(self, by_kv_head: Tensor) -> Tensor:
        n_heads = self.cfg.n_vision_heads if self._tower == "vision" else self.cfg.n_heads
        return by_kv_head.repeat_interleave(n_heads // by_kv_head.shape[1], dim=1)


class VisionWeights(TowerWeights):
    """The vision tower's weights; `model.vision` is one."""

    _tower = "vision"

    def __init__(self, module: nn.Module, family: Family, cfg: Dims) -> None:
        self.module, self.family, self.cfg = module, family, cfg


class LanguageWeights(TowerWeights):
    """The language model's weights, with its vocabulary at both ends. A mixin; `MLLM` has it.

    Beside what `TowerWeights` needs, it needs a `tokenizer` where words are given.
    """

    @property
    def W_E(self) -> Tensor:
        """The embedding table, `[d_vocab, d_model]`."""
        return _plain(module_at(self.module, self.family.language.embed), "weight")

    @property
    def W_U(self) -> Tensor:
        """The unembedding, `[d_model, d_vocab]`."""
        return _plain(self.unembed, "weight").T

    @property
    def b_U(self) -> Tensor:
        """The unembedding's bias, `[d_vocab]`."""
        return _bias(self.unembed, self.W_U.shape[1])

    @property
    def unembed(self) -> nn.Module:
        """The module that turns normalised states into logits."""
        return module_at(self.module, self.family.unembed)

    @property
    def ln_final(self) -> nn.Module:
        """The norm between the last block and the unembedding: a module, call it."""
        return module_at(self.module, self.family.language.final_norm)

    @property
    def ln_final_weights(self) -> NormWeights:
        """Its weights."""
        return NormWeights(self.ln_final, self.family.language.names.norm_offset)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        raise NotImplementedError("the class that mixes this in has it")

    def to_tokens(self, text: str) -> Tensor:
        """The ids of a text's tokens, `[1, pos]`, with nothing put before or after.

        Words only: `prepare` is for prompts with pictures.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids], dtype=torch.long)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            ValueError: it is several tokens, or one that the vocabulary lacks.
        """
        ids = self.to_tokens(text)[0].tolist()
        if len(ids) != 1:
            parts = self.tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"{text!r} is {len(ids)} tokens, {parts}; give one of these or its id (a leading "
                "space often makes the difference)"
            )
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if ids[0] == unknown and text != self.tokenizer.unk_token:
            raise ValueError(f"the tokenizer does not know {text!r}: it reads it as unknown")
        return int(ids[0])

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """The columns of `W_U` for tokens, `[..., d_model]`: where each logit is read off.

        The final norm's weight is *not* in them, since nothing is folded: apply it to the states,
        as `cache.logit_attrs` does.

        Args:
            tokens: a text of one token, an id, or a tensor of ids.
        """
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        # a tensor of one id gives [d_model], as TransformerLens has it
        ids = torch.as_tensor(ids, device=self.W_U.device)
        return self.W_U.T[int(ids) if ids.numel() == 1 else ids]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Tensor:
        """Sum of what biases wrote into the stream before block `layer`, `[d_model]`.

        Args:
            layer: biases of the blocks before this one.
            mlp_input: also that of its attention.
            include_mlp_biases: the MLPs' too, not only attention's.
        """
        blocks = self.blocks
        parts = [block.attn.b_O for block in blocks[: layer + mlp_input]]
        if include_mlp_biases:
            parts += [block.mlp.b_out for block in blocks[:layer]]
        zero = torch.zeros(self.cfg.d_model, device=self.W_U.device, dtype=self.W_U.dtype)
        return sum((part.to(zero.device) for part in parts), start=zero)


def _plain(module: nn.Module, name: str) -> Tensor:
    """A weight as a plain tensor, without its gradient.

    Raises:
        UnreadableWeight: quantised (its numbers are codes), or not in this process.
    """
    weight: Tensor = getattr(module, name).detach()
    if weight.is_meta:
        raise UnreadableWeight(
            f"the {name} of a {type(module).__name__} is not in this process: a server has it, or "
            "it is offloaded; load the model here"
        )
    if not weight.is_floating_point() or weight.itemsize < 2:
        raise UnreadableWeight(
            f"the {name} of a {type(module).__name__} is {weight.dtype} {list(weight.shape)} on "
            f"{weight.device}: quantised, so it cannot be read as a matrix; hooks "
            "work on such a model, for weights load it unquantised"
        )
    return weight


def _bias(module: nn.Module, width: int) -> Tensor:
    if getattr(module, "bias", None) is not None:
        return _plain(module, "bias")
    weight = cast(Tensor, module.weight)
    return torch.zeros(width, dtype=weight.dtype, device=weight.device)
