"""Text-only models: Llama, Qwen, Gemma without eyes, for scripts that are also run on those.

Only what a server hosts is taken (`MLLM.load(..., remote=...)`); in this process TransformerLens
serves them. They are a family like any other, whose vision tower has no blocks: the language
model's hooks, edits and receipts are what they are everywhere, and whatever is about pictures says
that there is no vision tower.

    model = MLLM.load("meta-llama/Llama-3.1-8B", remote=True)
    x = model.prepare(None, "The Eiffel Tower is in")
    run = model.run(x, Knockout(x.edges(src="first", dst="last")))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from interp.errors import NO_VISION, NotMultimodal, UnknownHook
from interp.families.base import Block, Family, Tower
from interp.families.blocks import TEXT
from interp.families.layouts import Layout
from interp.hooks import Pattern, Vocabulary, canonical

#: what hooks of the parts that such a model lacks begin with
PICTURES = ("vision.", "adapter.", "deepstack.")
NOTHING = Block(ln1="", attn="", o="", ln2="", mlp="", mlp_pre="", mlp_post="")


def _nowhere(config: Any) -> tuple[int, ...]:
    return ()


def _no_pictures(config: Any, processor: Any, tensors: Any, sizes: Any, tiles: Any) -> list[Layout]:
    if sizes or tiles:
        raise NotMultimodal(NO_VISION)
    return []


TEXT_ONLY = Family(
    name="text-only",
    # the language towers of Qwen-VL have types of their own, and are no models by themselves
    model_types=tuple(kind for kind in TEXT if "_vl_" not in kind),
    language=Tower(
        blocks="model.layers",
        embed="model.embed_tokens",
        block=TEXT,
        config="",
        rotary=True,
        final_norm="model.norm",
    ),
    vision=Tower(blocks="", embed="", block=NOTHING, config=""),
    adapter="",
    layout=_no_pictures,
    adapter_reads=_nowhere,
    task="text-generation",
)


class LanguageHooks(Vocabulary):
    """The hook names of a model without a vision tower; others raise `UnknownHook`, saying so.

    Args: as of `Vocabulary`.
    """

    def __init__(
        self,
        n_layers: int,
        n_vision_layers: int = 0,
        *,
        parts: Iterable[str] = ("rotary", "gated"),
        lacks: Mapping[str, str] | None = None,
        **vision: Any,
    ) -> None:
        # no super(): a server is sent this class
        Vocabulary.__init__(self, n_layers, 0, parts=parts, lacks=lacks)
        shapes = self.shapes.items()
        self.shapes = {name: shape for name, shape in shapes if not name.startswith(PICTURES)}

    def rank(self, name: str) -> int:
        """The place of `name` in the execution order."""
        _require_language(name)
        return Vocabulary.rank(self, name)

    def expand(self, pattern: Pattern | None) -> list[str]:
        """The names that a pattern (or several, or a predicate) matches, in execution order."""
        if isinstance(pattern, str):
            _require_language(pattern)
        return Vocabulary.expand(self, pattern)


def _require_language(name: str) -> None:
    if canonical(name).startswith(PICTURES):
        raise UnknownHook(f"no hook {name!r}: {NO_VISION}")


def encode(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts as `input_ids` and `attention_mask`, `[text, pos]`, padded on the tokenizer's side.

    Args:
        tokenizer: it needs no padding token; whatever stands at padding is masked.
        texts: taken as they are. One that begins with the BOS token, as a chat template's does, is
            given no second one.

    Raises:
        ValueError: no text, or one without any token.
    """
    bos, pad = tokenizer.bos_token, tokenizer.pad_token_id or 0
    rows = [
        torch.tensor(
            tokenizer(one, add_special_tokens=not (bos and one.startswith(bos)))["input_ids"],
            dtype=torch.long,
        )
        for one in texts
    ]
    if not rows or not all(map(len, rows)):
        raise ValueError("there is a text with no token in it; give some words")
    side = tokenizer.padding_side
    ones = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side),
        "attention_mask": pad_sequence(ones, batch_first=True, padding_side=side),
    }
