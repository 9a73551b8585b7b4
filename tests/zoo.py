"""One tiny random model a family, built from its configuration, with a processor made in memory.

No hub, no files: the tokenizers know a dozen words and the family's special tokens, the image
processors are transformers' own (the Pillow ones), set to pictures of a few dozen pixels. Weights
are drawn large, so that every part of a model matters, and projections that initialise to zero
(Gemma3's adapter, InternVL's layer scales) are drawn too: with them at zero all vision edits would
look dead.

A new family adds a builder and one line in `ZOO`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from interp.processing import stills

WORDS = "what is in the picture ? a red dog on green grass . user assistant : \n".split(" ")  # noqa: SIM905


def tokenizer(*special: str, **named: str) -> hf.PreTrainedTokenizerFast:
    """A word tokenizer with the special tokens given; `named` become attributes too."""
    tokens = ["<pad>", "<unk>", "<bos>", "<eos>", *special, *named.values(), *WORDS]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=dict(named),
    )
    made.add_tokens([*special, *named.values()], special_tokens=True)
    return made


def picture(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    """Noise: every pixel differs from its neighbours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# -- configurations --------------------------------------------------------------------------------

N_VOCAB = 128
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": N_VOCAB,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
STILL = {"do_normalize": False, "do_rescale": True}


def llava(text: Any, vision: Any, **config: Any) -> tuple[Any, Any]:
    words = tokenizer("<image>")
    clip = isinstance(vision, hf.CLIPVisionConfig)
    images = (
        CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **STILL
        )
        if clip
        else SiglipImageProcessorPil(size={"height": 32, "width": 32}, **STILL)
    )
    strategy = "default" if clip else "full"
    processor = hf.LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip),
    )
    made = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
        **{"vision_feature_layer": -2, **config},
    )
    return hf.LlavaForConditionalGeneration(made), processor


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def llava_next() -> tuple[Any, Any]:
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    words = tokenizer("<image>")
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=PINPOINTS,
        **STILL,
    )
    processor = hf.LlavaNextProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    made = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    return hf.LlavaNextForConditionalGeneration(made), processor


def llava_onevision() -> tuple[Any, Any]:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    words = tokenizer("<image>", "<video>")
    pinpoints = [[32 * rows, 32 * cols] for rows in range(1, 5) for cols in range(1, 5)]
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints, **STILL
    )
    processor = stills(hf.LlavaOnevisionProcessor)(
        images,
        words,
        None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
    )
    made = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
    )
    return hf.LlavaOnevisionForConditionalGeneration(made), processor


def _qwen_processor(kind: Any, patch: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = tokenizer("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
    images = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
        **STILL,
    )
    return stills(kind)(images, words, None)


def _qwen_ids(processor: Any) -> dict[str, int]:
    ids = processor.tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }


QWEN_VISION = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def qwen2_vl() -> tuple[Any, Any]:
    processor = _qwen_processor(hf.Qwen2VLProcessor, 8)
    made = hf.Qwen2VLConfig(
        vision_config={
            **QWEN_VISION,
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": 48,
            "mlp_ratio": 2,
        },
        text_config={**TEXT, "rope_parameters": QWEN_ROPE},
        **_qwen_ids(processor),
    )
    return hf.Qwen2VLForConditionalGeneration(made), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    processor = _qwen_processor(hf.Qwen2_5_VLProcessor, 8)
    made = hf.Qwen2_5_VLConfig(
        vision_config={
            **QWEN_VISION,
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 40,
            "out_hidden_size": 48,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config={**TEXT, "rope_parameters": QWEN_ROPE},
        **_qwen_ids(processor),
    )
    return hf.Qwen2_5_VLForConditionalGeneration(made), processor


def qwen3_vl() -> tuple[Any, Any]:
    processor = _qwen_processor(hf.Qwen3VLProcessor, 8)
    made = hf.Qwen3VLConfig(
        vision_config={
            **QWEN_VISION,
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 40,
            "out_hidden_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**TEXT, "head_dim": 8, "rope_parameters": QWEN_ROPE},
        **_qwen_ids(processor),
    )
    return hf.Qwen3VLForConditionalGeneration(made), processor


def gemma3() -> tuple[Any, Any]:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    words = tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, **STILL)
    processor = hf.Gemma3Processor(images, words, image_seq_length=4)
    ids = words.convert_tokens_to_ids
    made = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            **TEXT,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        mm_tokens_per_image=4,
        image_token_id=ids("<image_soft_token>"),
        boi_token_id=ids("<start_of_image>"),
        eoi_token_id=ids("<end_of_image>"),
    )
    return hf.Gemma3ForConditionalGeneration(made), processor


def _paligemma(text: Any) -> tuple[Any, Any]:
    words = tokenizer("<image>")
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, **STILL)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, words)
    made = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=48, vision_use_head=False),
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        projection_dim=48,
    )
    return hf.PaliGemmaForConditionalGeneration(made), processor


def paligemma() -> tuple[Any, Any]:
    return _paligemma(hf.GemmaConfig(**TEXT, head_dim=8))


def paligemma2() -> tuple[Any, Any]:
    return _paligemma(
        hf.Gemma2Config(
            **TEXT,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=6,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=30.0,
        )
    )


def internvl() -> tuple[Any, Any]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        GotOcr2ImageProcessorPil,
    )

    words = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32},
        crop_to_patches=True,
        min_patches=1,
        max_patches=4,
        **STILL,
    )
    processor = stills(hf.InternVLProcessor)(images, words, None, image_seq_length=4)
    made = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(
            **{**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
            use_qk_norm=True,
            layer_scale_init_value=0.5,
        ),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return hf.InternVLForConditionalGeneration(made), processor


def _idefics(name: str) -> tuple[Any, Any]:
    if name == "Idefics3":
        from transformers.models.idefics3.image_processing_pil_idefics3 import (
            Idefics3ImageProcessorPil as Images,
        )
    else:
        from transformers.models.smolvlm.image_processing_pil_smolvlm import (
            SmolVLMImageProcessorPil as Images,
        )

    tags = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
    words = tokenizer(
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
        "<global-img>",
        *tags,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    images = Images(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}, do_pad=True, **STILL
    )
    vision = {**VISION}
    config = {
        "text_config": hf.LlamaConfig(**TEXT),
        "image_token_id": words.convert_tokens_to_ids("<image>"),
        "scale_factor": 2,
        "pad_token_id": 0,
    }
    if name == "Idefics3":
        processor = hf.Idefics3Processor(images, words, image_seq_len=4)
        made = hf.Idefics3Config(vision_config=vision, **config)
        return hf.Idefics3ForConditionalGeneration(made), processor
    processor = stills(hf.SmolVLMProcessor)(images, words, None, image_seq_len=4)
    made = hf.SmolVLMConfig(vision_config=vision, **config)
    return hf.SmolVLMForConditionalGeneration(made), processor


@dataclass(frozen=True)
class Case:
    """One family (or one pair of towers of it): how to build it and what to ask it."""

    build: Callable[[], tuple[Any, Any]]
    prompt: str


PROMPT = "<bos> <image> what is in the picture ?"
QWEN_PROMPT = "<bos> <|vision_start|> <|image_pad|> <|vision_end|> what is in the picture ?"
ZOO: dict[str, Case] = {
    "llava-clip-llama": Case(
        lambda: llava(hf.LlamaConfig(**TEXT), hf.CLIPVisionConfig(**VISION)), PROMPT
    ),
    "llava-siglip-mistral": Case(
        lambda: llava(
            hf.MistralConfig(**TEXT, sliding_window=7),
            hf.SiglipVisionConfig(**VISION, vision_use_head=False),
            vision_feature_layer=-1,
        ),
        PROMPT,
    ),
    "llava-clip-qwen2": Case(
        lambda: llava(
            hf.Qwen2Config(**TEXT), hf.CLIPVisionConfig(**VISION), vision_feature_layer=[-3, -2]
        ),
        PROMPT,
    ),
    "llava-next": Case(llava_next, PROMPT),
    "llava-onevision": Case(llava_onevision, PROMPT),
    "qwen2-vl": Case(qwen2_vl, QWEN_PROMPT),
    "qwen2.5-vl": Case(qwen2_5_vl, QWEN_PROMPT),
    "qwen3-vl": Case(qwen3_vl, QWEN_PROMPT),
    "gemma3": Case(gemma3, "<bos> <start_of_image> what is in the picture ?"),
    "paligemma": Case(paligemma, "<image> what is in the picture ?"),
    "paligemma2": Case(paligemma2, "<image> what is in the picture ?"),
    "internvl": Case(internvl, "<bos> <IMG_CONTEXT> what is in the picture ?"),
    "idefics3": Case(lambda: _idefics("Idefics3"), PROMPT),
    "smolvlm": Case(lambda: _idefics("SmolVLM"), PROMPT),
}


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The random model and the processor of a case in `ZOO`."""
    torch.manual_seed(seed)
    module, processor = ZOO[name].build()
    randomise(module)
    return module.eval().to(dtype), processor


def randomise(module: nn.Module) -> None:
    """Weights large enough that everything matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            else:  # weights of norms, scales and biases
                parameter.add_(torch.randn_like(parameter) * 0.25)


def inputs(model: Any, name: str, **options: Any) -> Any:
    """A picture and a question for a model of the case `name`, through its processor."""
    return model.prepare(picture(), ZOO[name].prompt, **options)
