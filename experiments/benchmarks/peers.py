"""One medium LLaVA under every tool that the benchmark compares, all with the same weights.

The model is built from its configuration, with random weights: a CLIP tower of width 256 and 6
layers, a Llama of width 512 and 8 layers, 24 x 24 image tokens and 24 words. Speed does not depend
on what the weights say. Agreement does, so they are drawn large enough that every part of the model
moves the logits: two tools that agree then really computed the same thing.

| peer | what it is |
|---|---|
| `interp` | this library |
| `sdpa` | transformers with its fast attention, the model as everybody runs it: the reference |
| `eager` | transformers with its written-out attention, the only one that shows patterns |
| `nnsight` | `nnsight.NNsight` around a plain model; an eager one where patterns are wanted |
| `bridge` | `transformer_lens.model_bridge.TransformerBridge`, which always attends eagerly |

Each has a copy of the module for itself, since three of them change the module they are given.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here

import nnsight
import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformer_lens.model_bridge.sources import build_bridge_from_module

from interp import MLLM
from interp.edges import EdgeSet
from interp.inputs import Inputs

PEERS = ("interp", "sdpa", "eager", "nnsight", "bridge")
PATCH = 14
WORDS = ("a", "red", "dog", "on", "green", "grass", "by", "the", "sea", "under", "clouds")


@dataclass(frozen=True)
class Size:
    """Sizes of a model: widths, layers and heads of both towers, image tokens and all tokens."""

    d_model: int = 512
    n_layers: int = 8
    n_heads: int = 8
    d_vision: int = 256
    n_vision_layers: int = 6
    n_vision_heads: int = 4
    side: int = 24
    n_pos: int = 600

    @classmethod
    def with_tokens(cls, n_pos: int) -> Size:
        """The medium model with about `n_pos` tokens, 24 of them words."""
        side = math.isqrt(n_pos - 24)
        return cls(side=side, n_pos=side * side + 24)


QUICK = Size(
    d_model=48, n_layers=3, n_heads=6, d_vision=32, n_vision_layers=2, side=4, n_pos=16 + 24
)


@dataclass
class Bench:
    """The peers and what they are run on.

    Attributes:
        ours: the model under this library.
        x: its prepared batch.
        sdpa, eager: plain transformers modules.
        traced, traced_eager: nnsight models around plain ones.
        bridge: the TransformerBridge.
        tensors: the model's inputs, on its device and in its precision.
        edges: what the knockout cuts, 24 queries times 48 keys (fewer in the quick model).
        dense: every second edge from an earlier image token to a later one.
    """

    ours: MLLM
    x: Inputs
    sdpa: Any
    eager: Any
    traced: Any
    traced_eager: Any
    bridge: Any
    tensors: dict[str, Tensor]
    edges: EdgeSet
    dense: EdgeSet

    @classmethod
    def build(cls, size: Size, *, dtype: torch.dtype, device: str) -> Bench:
        """Build the model once and hand each peer a copy."""
        plain, processor = _llava(size)
        plain = plain.eval().to(device, dtype)
        plain.set_attn_implementation("sdpa")
        eager = copy.deepcopy(plain)
        eager.set_attn_implementation("eager")
        ours, x, edges = _ours(copy.deepcopy(plain), processor, size)
        n = size.side**2
        token = np.arange(n)
        before = token < token[:, None]  # [dst, src]
        return cls(
            ours=ours,
            x=x,
            sdpa=plain,
            eager=eager,
            traced=nnsight.NNsight(copy.deepcopy(plain)),
            traced_eager=nnsight.NNsight(copy.deepcopy(eager)),
            bridge=_bridge(copy.deepcopy(plain), processor),
            tensors=x.tensors,
            edges=edges,
            dense=x.grid.edges_where((before & ((token + token[:, None]) % 2 == 1))[None]),
        )

    @property
    def n_layers(self) -> int:
        """Blocks of the language model."""
        return self.ours.cfg.n_layers

    @property
    def n_heads(self) -> int:
        """Its query heads."""
        return self.ours.cfg.n_heads

    @property
    def middle(self) -> int:
        """A block in the middle of the language model."""
        return self.n_layers // 2

    def run_bridge(self, hooks: list[tuple[Any, Callable[..., Any]]] | None = None) -> Tensor:
        """The bridge's logits, with functions on its hooks."""
        rest = dict(self.tensors)
        ids = rest.pop("input_ids")
        with torch.no_grad():
            if hooks is None:
                return self.bridge(ids, **rest)
            return self.bridge.run_with_hooks(ids, fwd_hooks=hooks, **rest)

    def cache_bridge(self, names: Callable[[str], bool] | None) -> tuple[Tensor, list[Tensor]]:
        """The bridge's logits and what it cached, in the order in which its hooks fired."""
        rest = dict(self.tensors)
        ids = rest.pop("input_ids")
        with torch.no_grad():
            logits, cache = self.bridge.run_with_cache(ids, names_filter=names, **rest)
        return logits, list(cache.cache_dict.values())


def text_blocks(module: Any) -> Any:
    """The language model's blocks, of a transformers module or of an nnsight model around one."""
    return module.model.language_model.layers


def vision_blocks(module: Any) -> Any:
    """The vision tower's blocks, likewise."""
    return module.model.vision_tower.encoder.layers


def all_blocks(module: Any) -> list[Any]:
    """All blocks in the order in which the forward pass reaches them."""
    return [*vision_blocks(module), *text_blocks(module)]


def plain(module: Any, tensors: dict[str, Tensor]) -> Tensor:
    """The logits of a transformers module, run as everybody would."""
    with torch.no_grad():
        return module(**tensors, use_cache=False).logits


@contextmanager
def hooked(modules: list[Any], hook: Callable[..., Any], *, before: bool = False) -> Iterator[None]:
    """Torch's own forward hooks (or pre-hooks with keyword arguments) while the block runs."""
    if before:
        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    else:
        handles = [m.register_forward_hook(hook) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_forwards(call: Callable[[], Any]) -> int:
    """How often the language model runs while `call` does its work."""
    count = 0

    def hook(module: nn.Module, *_: Any) -> None:
        nonlocal count
        count += isinstance(module, hf.LlamaModel)

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        call()
    finally:
        handle.remove()
    return count


def medium(size: Size, *, dtype: torch.dtype, device: str) -> tuple[MLLM, Inputs, EdgeSet]:
    """The model under this library alone, what it is run on, and what a knockout cuts."""
    plain, processor = _llava(size)
    return _ours(plain.eval().to(device, dtype), processor, size)


def _ours(module: Any, processor: Any, size: Size) -> tuple[MLLM, Inputs, EdgeSet]:
    ours = MLLM.load(module, processor=processor)
    pixels = np.random.default_rng(0).integers(0, 256, (size.side * PATCH,) * 2 + (3,))
    picture = Image.fromarray(pixels.astype(np.uint8))
    n = size.side**2
    n_words = size.n_pos - n
    prompt = " ".join(["<image>", *(WORDS * n_words)[:n_words]])
    x = ours.prepare(picture, prompt)
    x = replace(x, tensors=ours.to_device(x))  # no run pays for moving its inputs
    if x.n_pos != size.n_pos:
        raise RuntimeError(f"the prompt has {x.n_pos} tokens instead of {size.n_pos}")
    edges = x.grid.edges(src=range(min(48, n // 2)), dst=range(n - min(24, n // 4), n))
    return ours, x, edges


def _llava(size: Size) -> tuple[Any, Any]:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", "<image>", *dict.fromkeys(WORDS)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    pixels = size.side * PATCH
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(
            size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
        ),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=size.d_vision,
            intermediate_size=4 * size.d_vision,
            num_hidden_layers=size.n_vision_layers,
            num_attention_heads=size.n_vision_heads,
            image_size=pixels,
            patch_size=PATCH,
        ),
        text_config=hf.LlamaConfig(
            hidden_size=size.d_model,
            intermediate_size=8 * size.d_model // 3,
            num_hidden_layers=size.n_layers,
            num_attention_heads=size.n_heads,
            num_key_value_heads=size.n_heads,
            vocab_size=1024,
            max_position_embeddings=8192,
            pad_token_id=0,
        ),
        image_token_id=vocabulary["<image>"],
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        architectures=["LlavaForConditionalGeneration"],
    )
    torch.manual_seed(0)
    module = hf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    return module, processor


def _bridge(module: Any, processor: Any) -> Any:
    """A TransformerBridge; it wants its tokenizer from a folder.

    Not by `boot_transformers`: where torchvision is missing, that installs it, with another torch.
    """
    module.set_attn_implementation("eager")  # which is what bridges attend by
    with tempfile.TemporaryDirectory() as folder:
        processor.tokenizer.save_pretrained(folder)
        return build_bridge_from_module(
            module,
            type(module).__name__,
            hf_config=module.config,
            tokenizer=hf.AutoTokenizer.from_pretrained(folder),
        )
