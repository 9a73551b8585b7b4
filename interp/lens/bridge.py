"""The same weights as a `TransformerBridge`, for tools that want TransformerLens's own model.

`model.bridge()` makes a second module tree of the same transformers class, puts *the very same
parameters and buffers* into it, and hands it to TransformerLens. Nothing is copied, and this
library's own module is not touched: TransformerLens rewires the tree it is given, ours keeps its
hooks. Because the weights are shared, changing a parameter in place changes both; TransformerLens's
`enable_compatibility_mode` does not do that (it folds into tensors of its own).

    bridge = model.bridge()
    tensors = dict(model.to_device(x))
    logits, cache = bridge.run_with_cache(tensors.pop("input_ids"), **tensors)

It is not made by `boot_transformers`, which runs `pip install torchvision` where that is missing,
and with it changes torch.

What to know of it (transformer-lens 4.3; tests/lens/test_bridge.py holds every line of this):

* its vision tower goes by `vision_encoder.*`, its adapter by `vision_projector.*`;
* edits of scores and pattern do nothing in its vision towers and in the Qwen-VL families;
* `decompose_resid` starts at `hook_embed`, which on an MLLM misses the pictures, and leaves out
  what Qwen3-VL adds between blocks; `apply_ln_to_stack` leaves out the norm's weight unless it was
  folded. `model.run_with_cache` gives the same methods without these gaps (`interp.lens.cache`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoTokenizer

from interp.errors import NoBridge
from interp.instrumented import Instrumented


def bridge(model: Instrumented) -> TransformerBridge:
    """A `TransformerBridge` on the model's own weights; see the module docstring.

    Raises:
        NoBridge: TransformerLens does not know the family, or the weights are quantised or spread
            over several devices.
        ValueError: the model has no tokenizer.
    """
    kind = type(model.module).__name__
    twin = _twin(model.module)
    # TransformerLens reads the tokenizer anew, to have it begin texts with their first token, from
    # the name it was loaded under: from the hub, if not from here
    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        try:
            with _no_libraries_asked_for():
                made = build_bridge_from_module(
                    twin, kind, hf_config=twin.config, tokenizer=tokenizer
                )
        except ValueError as error:
            if "Unsupported architecture" not in str(error):
                raise
            raise NoBridge(
                f"TransformerLens has no bridge for {model.family.name} ({kind}); its own methods "
                "work on what model.run_with_cache returns, which needs no bridge"
            ) from error
    made.processor = model.processor
    return made


@contextmanager
def _no_libraries_asked_for() -> Iterator[None]:
    """TransformerLens's Qwen-VL adapters refuse to be made without torchvision, which they need for
    loading a processor. Here there is one, and what it gives are tensors."""
    asked = ArchitectureAdapter._check_required_libraries
    ArchitectureAdapter._check_required_libraries = lambda self: None
    try:
        yield
    finally:
        ArchitectureAdapter._check_required_libraries = asked


def _twin(module: nn.Module) -> nn.Module:
    """A fresh module of the same class whose parameters and buffers are those of `module`.

    Raises:
        NoBridge: its tree differs from the one its class makes, as when it is quantised.
    """
    if len(set(getattr(module, "hf_device_map", {}).values())) > 1:
        raise NoBridge("the model is spread over several devices, which a bridge cannot share")
    kind: Any = type(module)
    config = copy.deepcopy(cast(Any, module).config)
    config.architectures = [kind.__name__]
    with torch.device("meta"):
        twin: nn.Module = kind._from_config(config, attn_implementation="eager")
    twin.train(module.training)
    for name, theirs in twin.named_modules():
        try:
            ours = module.get_submodule(name)
        except AttributeError:
            ours = nn.Module()
        for kept in ("_parameters", "_buffers"):
            held = getattr(ours, kept)
            if {k: _shape(v) for k, v in held.items()} != {
                k: _shape(v) for k, v in getattr(theirs, kept).items()
            }:
                raise NoBridge(
                    f"{name!r} holds {', '.join(held) or 'nothing'} of another shape or name than "
                    f"a fresh {type(module).__name__} does (is the model quantised, or has it "
                    "adapters?), so its weights cannot be shared"
                )
            getattr(theirs, kept).update(held)
    return twin


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
