"""What is said about a family without a table: the places that a table would have to name."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from interp.families.tree import describe
from tests.zoo import TEXT, build

CONFIG = {
    "vision_config": hf.PixtralVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    ),
    "text_config": hf.MistralConfig(**TEXT),
}


def line(text, path):
    """The line about a path, and the indented ones below it."""
    lines = text.splitlines()
    (start,) = [i for i, one in enumerate(lines) if one.split()[:1] == [path]]
    below = lines[start + 1 :]
    end = next(i for i, one in enumerate(below) if not one.startswith(" " * 8))
    return "\n".join([lines[start], *below[:end]])


@pytest.mark.parametrize("built", [False, True])
def test_family_without_a_table_is_described(built):
    config = hf.Mistral3Config(**CONFIG)
    model = hf.Mistral3ForConditionalGeneration(config) if built else config
    text = describe(model)
    assert "tree of Mistral3ForConditionalGeneration" in text
    vision = line(text, "model.vision_tower.transformer.layers")
    assert "2 x PixtralAttentionLayer: the vision tower's blocks?" in vision
    assert "attention: PixtralAttention, attention with k_proj, v_proj, q_proj, o_proj" in vision
    assert "feed_forward: PixtralMLP, MLP? with gate_proj, up_proj, down_proj" in vision
    assert "ffn_norm: PixtralRMSNorm, a norm" in vision
    assert "3 x MistralDecoderLayer: the language model's blocks?" in line(
        text, "model.language_model.layers"
    )
    assert "adapter?" in line(text, "model.multi_modal_projector")
    assert "Embedding 128 x 48: embed?" in line(text, "model.language_model.embed_tokens")
    assert "the final norm?" in line(text, "model.language_model.norm")
    assert "Linear 48 -> 128: unembed?" in line(text, "lm_head")
    assert "docs/families.md" in text
    assert "interp check" in text


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen3-vl", "internvl", "idefics3"])
def test_guesses_are_right_where_a_table_tells(name):
    from interp.families import family_of

    module, _ = build(name)
    text, family = describe(module), family_of(module)
    for tower, what in ((family.vision, "vision tower"), (family.language, "language model")):
        assert f"the {what}'s blocks?" in line(text, tower.blocks)
    assert "adapter?" in line(text, family.adapter)
    assert "unembed?" in line(text, family.unembed)


def test_what_cannot_be_built_does_not_hide_the_guide():
    text = describe(hf.CLIPConfig())
    assert "cannot be shown" in text
    assert "docs/families.md" in text


def test_no_weights_are_made_for_a_configuration():
    huge = hf.MistralConfig(hidden_size=2**15, num_hidden_layers=200, intermediate_size=2**17)
    text = describe(hf.Mistral3Config(**{**CONFIG, "text_config": huge}))  # terabytes, if they were
    assert "200 x MistralDecoderLayer" in text
    assert torch.get_default_device() == torch.device("cpu")
