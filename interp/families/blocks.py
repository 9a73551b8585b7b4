"""The transformer blocks that multimodal LLMs are made of, by transformers' names for their parts.

A family's table picks from these; a tower with other names gets one more `Block` here.
"""

from __future__ import annotations

from dataclasses import replace

from interp.families.base import Block

#: Llama and all that copy its names (a norm on queries and keys, as Qwen3 has, is nobody's hook)
LLAMA = Block(
    ln1="input_layernorm",
    attn="self_attn",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    o="o_proj",
    ln2="post_attention_layernorm",
    mlp="mlp",
    mlp_pre="gate_proj",
    mlp_gated="up_proj",
    mlp_post="down_proj",
)
#: Gemma 1: its norms multiply by 1 + weight
GEMMA = replace(LLAMA, norm_offset=1.0)
#: Gemma 2 and 3: also a norm behind attention and one behind the MLP
GEMMA2 = replace(
    GEMMA,
    ln1_post="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    ln2_post="post_feedforward_layernorm",
)
#: language towers by the `model_type` of their configuration
TEXT: dict[str, Block] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), LLAMA),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
}

#: CLIP, SigLIP and the SigLIP of Idefics3 and SmolVLM
VIT = Block(
    ln1="layer_norm1",
    attn="self_attn",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    o="out_proj",
    ln2="layer_norm2",
    mlp="mlp",
    mlp_pre="fc1",
    mlp_post="fc2",
)
#: Qwen2-VL's tower
QWEN_VIT = Block(
    ln1="norm1",
    attn="attn",
    qkv="qkv",
    o="proj",
    ln2="norm2",
    mlp="mlp",
    mlp_pre="fc1",
    mlp_post="fc2",
)
INTERN_VIT = Block(
    ln1="layernorm_before",
    attn="attention",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    o="projection_layer",
    ln2="layernorm_after",
    mlp="mlp",
    mlp_pre="fc1",
    mlp_post="fc2",
    attn_scale="lambda_1",
    mlp_scale="lambda_2",
)
