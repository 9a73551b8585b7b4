"""Shared models: a random LLaVA built from config, and the bundled one. No hub, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PIP_NO_INDEX"] = "1"  # TransformerLens installs torchvision by itself, if it may

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from interp import MLLM
from interp.inputs import Inputs

# the same examples in every run, and no clock: test machines are shared
settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")
torch.set_num_threads(1)  # test machines have few cores, and the models are tiny

IMAGE_TOKEN = 63
N_POS = 21  # of `random_inputs`: two words, 4 x 4 image tokens, three words


def random_llava(
    *,
    n_kv_heads: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    **config,
) -> LlavaForConditionalGeneration:
    """A 3 + 3 layer LLaVA with grouped-query heads and weights large enough to matter.

    The vision tower's layer -2 is read: its last block is off the path to the logits.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            ),
            text_config=LlamaConfig(
                hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=n_kv_heads,
                vocab_size=64,
                max_position_embeddings=128,
                pad_token_id=0,
            ),
            image_token_id=IMAGE_TOKEN,
            vision_feature_select_strategy="default",
            **{"vision_feature_layer": -2, **config},
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            else:  # weights of norms, and biases: initialised to ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.25)
    model.set_attn_implementation(attn_implementation)
    return model.eval().to(dtype)


def random_inputs(model: MLLM, n_batch: int = 1, *, padding: int = 0, seed: int = 0) -> Inputs:
    """Random pictures and words for a `random_llava`, made without a processor.

    Args:
        model: whose family lays the image tokens out.
        n_batch: rows.
        padding: this many positions on the left of the last row are padding.
        seed: of pixels and words.
    """
    rng = np.random.default_rng(seed)
    words = rng.integers(3, 60, (n_batch, N_POS - 16 + padding))
    image = np.full((n_batch, 16), IMAGE_TOKEN)
    ids = np.concatenate([words[:, :2], image, words[:, 2:]], axis=1)
    ids[-1] = np.roll(ids[-1], padding)
    ids[-1, :padding] = 0
    attended = np.ones_like(ids)
    attended[-1, :padding] = 0
    tensors = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(attended),
        "pixel_values": torch.tensor(rng.normal(size=(n_batch, 3, 32, 32)), dtype=torch.float32),
    }
    return model.inputs(**tensors)


def plain_logits(module: torch.nn.Module, x: Inputs) -> torch.Tensor:
    """What transformers alone gives for `x`."""
    dtype = next(module.parameters()).dtype
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.tensors.items()}
    with torch.no_grad():
        return module(**tensors, use_cache=False).logits


@pytest.fixture(scope="session")
def rand() -> MLLM:
    """A random LLaVA; tests must leave it as they found it."""
    return MLLM.load(random_llava())


@pytest.fixture(scope="session")
def rx(rand) -> Inputs:
    """One row for `rand`."""
    return random_inputs(rand)


@pytest.fixture(scope="session")
def rx2(rand) -> Inputs:
    """A batch of two for `rand`, the second row padded on the left."""
    return random_inputs(rand, 2, padding=3)


@pytest.fixture(scope="session")
def tiny() -> MLLM:
    """The bundled model."""
    return MLLM.load("tiny")


@pytest.fixture(scope="session")
def plain_tiny(tiny):
    """The bundled model as transformers loads it, never touched by `interp`."""
    from interp.loading import BUNDLED

    return LlavaForConditionalGeneration.from_pretrained(BUNDLED["tiny"]).eval()


@pytest.fixture(scope="session")
def scene():
    from interp.datasets import scenes

    return scenes("test")[0]


@pytest.fixture(scope="session")
def x(tiny, scene):
    return tiny.prepare(scene.image, "What is in the picture?")


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
