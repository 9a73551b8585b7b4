"""What TransformerLens's tools ask of a model, answered for an MLLM's language model.

`ActivationCache` and the tools behind it hold a `model` and ask it for little: sizes and words for
the architecture (`cfg`), each block's `W_O` and `W_out`, the final norm as a module, `W_U`, and
what a text's token is. `LensView` answers, and `interp.lens.cache` gives one to each cache.

Where a family normalises what attention and MLP write (Gemma 2 and 3), "what a head writes" is not
`z W_O` but that times the norm's weight, over its scale. `as_written` gives `W_O` and `W_out` with
the weight in them; the scale, which differs from position to position, goes onto the states.
"""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from interp.weights import BlockWeights, LanguageWeights, NormWeights

if TYPE_CHECKING:
    from interp.instrumented import Instrumented


class LensView(LanguageWeights):
    """What TransformerLens's tools ask of a model, answered for an MLLM's language model.

    Attributes:
        cfg: the sizes, and TransformerLens's words for the architecture.
        n_deepstack: how many blocks are followed by a deepstack feature.
        adapter: makes the model's logits of what the unembedding gives (a cap, where there is one).
        as_written: whether `blocks` gives `W_O` and `W_out` as they write into the stream, past
            Gemma's post norms, and nothing else.
    """

    def __init__(self, model: Instrumented) -> None:
        self.module, self.family, self._model = model.module, model.family, model
        words = {
            "attn_only": False,
            "normalization_type": "LN" if isinstance(self.ln_final, nn.LayerNorm) else "RMS",
            "device": model.device,
            "model_name": type(model.module).__name__,
        }
        self.cfg: Any = SimpleNamespace(**{**asdict(model.cfg), **words})
        self.n_deepstack = sum(name.startswith("deepstack.") for name in model.hooks.names)
        text = cast(Any, model.config).get_text_config()
        cap = getattr(text, "final_logit_softcapping", None)
        self.adapter = SimpleNamespace(
            apply_output_logits_transform=lambda logits: (
                cap * torch.tanh(logits / cap) if cap else logits
            )
        )
        self.as_written = False

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._model.tokenizer

    @property
    def post_norms(self) -> bool:
        """Whether what attention and MLP write is normalised before it is added."""
        return self.family.language.names.post_norms

    @property
    def blocks(self) -> Any:
        """Weights block by block."""
        blocks = super().blocks
        return [_Writers(block) for block in blocks] if self.as_written else blocks

    def norm_before(self, layer: int, mlp_input: bool = False) -> NormWeights:
        """Weights of the norm at a block's attention or MLP; of the final one past the last."""
        if layer == self.cfg.n_layers:
            return self.ln_final_weights
        block = super().blocks[layer]
        return block.ln2 if mlp_input else block.ln1

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Tensor:
        """Sum of what biases wrote into the stream before block `layer`, `[d_model]`."""
        bias = super().accumulated_bias(layer, mlp_input, include_mlp_biases)
        if self.post_norms and bias.any():
            raise NotImplementedError(
                f"{self.cfg.model_name} normalises what attention and MLP write, so that their "
                "biases are no constant part of the stream; decompose_resid holds here"
            )
        return bias


class _Writers:
    """A block's weights on their way out, with the post norms' weights in them."""

    def __init__(self, block: BlockWeights) -> None:
        self._block = block
        self.attn = self.mlp = self

    W_O = property(lambda self: self._past(self._block.attn.W_O, self._block.ln1_post))
    W_out = property(lambda self: self._past(self._block.mlp.W_out, self._block.ln2_post))
    b_O = property(lambda self: self._block.attn.b_O)
    b_out = property(lambda self: self._block.mlp.b_out)

    @staticmethod
    def _past(weight: Tensor, norm: NormWeights | None) -> Tensor:
        return weight if norm is None else weight * norm.w
