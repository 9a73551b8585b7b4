"""The bundled model's architecture and its folder on disk.

A real `LlavaForConditionalGeneration`, only small: a 10 x 10 grid of 8-pixel patches, a vision
width of 128 and a text width of 96, so that the adapter has to leave something out. Everything
that transformers needs to load it again is written beside the weights: the tokenizer, the image
processor, the chat template, and generation settings without sampling.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_questions import CHAT_TEMPLATE

from interp.datasets.scenes import CELL, GRID, SIZE

READ = -2  # the encoder's layer that the adapter reads, as LLaVA-1.5 does
VISION = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
TEXT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 5}


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **VISION,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=CELL,
        ),
        text_config=LlamaConfig(
            **TEXT,
            **special,
            num_attention_heads=6,
            num_key_value_heads=6,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
        ),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=GRID * GRID,
        vision_feature_layer=READ,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
        **special,
    )
    return LlavaForConditionalGeneration(config)


def pixels_of(image: Image.Image) -> Tensor:
    """[3, 80, 80] in -1 .. 1, exactly as the saved image processor makes them."""
    array = np.asarray(image, np.float32) / 255.0
    return torch.from_numpy((array - 0.5) / 0.5).permute(2, 0, 1)


def save(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Write model, tokenizer and processor so that plain transformers loads them."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=24,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)
