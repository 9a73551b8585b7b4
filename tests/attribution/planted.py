"""A LLaVA whose heads are known, because every weight was set by hand.

Attribution methods answer "which heads, reading from which tokens, make a wrong token right?" This
model is a question with a known answer. Its pictures are 4 x 4 tokens in regions of one class each.
In every region some tokens are *anchors* and *relays*, which look like their true class, and some
are *wrong*: they look like another. What pulls the wrong ones to their true class is this, and
nothing else:

| role | layer.head | what it does |
|---|---|---|
| direct | 1.2 | wrong tokens attend to the anchors of their region, and the class is said |
| sender | 0.1 | at relays: attends to anchors, writes their class where only the receiver reads |
| receiver | 2.3 | wrong tokens attend to relays and say what the sender left there |
| decoy | 1.0 | wrong tokens attend to anchors with more than 0.9; writes much where nobody reads |
| against | 2.1 | like direct, with the opposite sign |
| saturated | 3.0 | attends to anchors with 1 - 1e-6; without them says what the *wrong* look like |
| clipped | 1.3 | writes the class three times as large as an MLP of block 2 lets through |
| answer | 4.2 | the last word reads what the wrong tokens say, and the answer's logits follow |

All other heads are *noise*: small random weights that read and write everywhere.

How it is built:

1. **Pixels are codes.** A patch has as many values as the vision tower is wide, and the patch
   embedding copies them. A code holds every feature together with its negative and is brought to
   mean 0 and variance 1, so that the LayerNorm leaves it alone. The tower's blocks write nothing.
2. **RMSNorm does nothing**, nearly: every token carries a constant "ballast" beside which all the
   rest is small, and the norm's weight divides it out again.
3. **RoPE does nothing**, nearly: with a huge base the dimensions used here rotate by 1e-13 at most.
4. **Each feature has a place of its own** in the stream (`Place`). What a token looks like and what
   it *says* are two places, equal at the start: heads read the first and write the second, the
   probe reads the second. So no planted head disturbs another, except where that is the point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from interp import MLLM
from interp.inputs import Inputs
from interp.labels import IGNORE
from interp.probes import ProbeBank

N_LAYERS, N_HEADS, D_HEAD, D_MODEL = 5, 4, 16, 64
SIDE, PATCH = 4, 4
D_CODE = 3 * PATCH**2
CLASSES = ("sky", "sea", "beach", "meadow")
N_REGIONS = 3
BALLAST = 3000.0
WORDS = {"<pad>": 0, "<bos>": 1, "what": 2, "?": 3, **{c: 4 + i for i, c in enumerate(CLASSES)}}
IMAGE_TOKEN = 15
END_LAYER = 3
START, END = "adapter.hook_out", f"blocks.{END_LAYER}.hook_resid_post"
CLIP_LAYER = 2  # the one block whose MLP is not zero
STARTS_BEYOND = 1.0  # what that MLP lets through of what the clipped head writes


class Place:
    """Where in the residual stream each feature lives."""

    ballast = 0
    bos = 1
    ask = 2  # the last word
    look = slice(4, 8)  # one number a class; never written
    say = slice(8, 12)  # equal to look at the start; what the probe reads
    scratch = slice(12, 16)  # from the sender to the receiver
    trash = slice(16, 20)  # where the decoy writes
    much = slice(20, 24)  # where the clipped head writes, and the MLP reads
    anchor = slice(24, 27)  # the region's number, at anchors only
    relay = slice(27, 30)
    wrong = slice(30, 33)
    texture = slice(33, 39)  # noise of each token's own


class Head(NamedTuple):
    """A planted head.

    Attributes:
        sign: of its exact effect on the wrong tokens' margin when it no longer reads the right
            tokens of their region, 0 for none.
    """

    layer: int
    head: int
    role: str
    sign: int


PLANTED = (
    Head(0, 1, "sender", +1),
    Head(1, 0, "decoy", 0),
    Head(1, 2, "direct", +1),
    Head(1, 3, "clipped", +1),
    Head(2, 1, "against", -1),
    Head(2, 3, "receiver", +1),
    Head(3, 0, "saturated", +1),
    Head(4, 2, "answer", 0),
)

#: score, before the softmax, of a match of regions, and of the first token, which takes the rest;
#: all other tokens have 0. The two lie close together where attention is to be far from saturated.
MATCH = {"sender": 8, "decoy": 12, "direct": 8, "clipped": 8, "against": 8, "receiver": 8}
FIRST = {"sender": 7, "decoy": 8, "direct": 7.5, "clipped": 7, "against": 7.5, "receiver": 7.5}
#: how much a head writes of what it reads
GAIN = {
    "sender": 1.0,
    "decoy": 20.0,
    "direct": 2.0,
    "clipped": 3.0,
    "against": -1.5,
    "receiver": 1.5,
    "saturated": 1.0,
    "answer": 1.0,
}
CLIPPED_GAIN = 1.2
NOISE = 0.05


@dataclass(frozen=True, eq=False)
class Planted:
    """The model, a batch of pictures, and what is known about both.

    Attributes:
        model, x: as any.
        masks: `[n_images, height, width]` class of each pixel.
        labels: `[n_tokens]`, as `x.grid.labels(masks, len(CLASSES))` gives them.
        bank: probes at the adapter and after every block, all reading `Place.say`.
        region: `[n_images, n_tokens]` the region's number in its picture; -1 for the unlabelled.
        role: `[n_images, n_tokens]` "anchor", "relay", "wrong" or "none".
        true, looks: `[n_images, n_tokens]` class, and the class that the token looks like.
    """

    model: MLLM
    x: Inputs
    masks: np.ndarray
    labels: np.ndarray
    bank: ProbeBank
    region: np.ndarray
    role: np.ndarray
    true: np.ndarray
    looks: np.ndarray

    def head(self, role: str) -> tuple[int, int]:
        """(layer, head) of the one with this role."""
        return next((h.layer, h.head) for h in PLANTED if h.role == role)


def planted(n_images: int = 6, *, seed: int = 0, calm: tuple[int, ...] = ()) -> Planted:
    """The planted model and a batch of random pictures.

    Args:
        n_images: one a row of the batch.
        seed: of the pictures; the model is always the same.
        calm: images in which no token is wrong.
    """
    rng = np.random.default_rng(seed)
    model = MLLM.load(planted_module())
    pictures = [_picture(rng, calm=i in calm) for i in range(n_images)]
    true, looks, region, role = (np.stack(arrays) for arrays in zip(*pictures, strict=True))
    codes = np.stack([_codes(rng, *picture[1:]) for picture in pictures])
    n = SIDE * SIDE
    words = [WORDS["<bos>"], *[IMAGE_TOKEN] * n, WORDS["what"], WORDS["?"]]
    x = model.inputs(
        input_ids=torch.tensor([words] * n_images),
        pixel_values=torch.from_numpy(_pixels(codes)).float(),
        attention_mask=torch.ones(n_images, len(words), dtype=torch.long),
    )
    masks = true.reshape(-1, SIDE, SIDE).repeat(PATCH, 1).repeat(PATCH, 2)
    labels = x.grid.labels(masks, len(CLASSES))
    return Planted(model, x, masks, labels, _bank(), region, role, true, looks)


# -- pictures --------------------------------------------------------------------------------------

LAYOUTS = (
    ("0000", "0000", "1111", "1111"),
    ("0011", "0011", "0011", "0011"),
    ("0000", "0000", "1122", "1122"),
    ("0011", "0011", "2222", "2222"),
    ("0111", "0111", "0122", "0122"),
)


def _picture(rng: np.random.Generator, calm: bool) -> tuple[np.ndarray, ...]:
    """(true, looks, region, role) of one picture's tokens, `[n_tokens]` each."""
    layout = LAYOUTS[rng.integers(len(LAYOUTS))]
    region = np.array([int(c) for line in layout for c in line])
    classes = rng.permutation(len(CLASSES))[:N_REGIONS]
    true = classes[region]
    role = np.full(region.shape, "none", dtype="<U8")
    for number in np.unique(region):
        at = np.flatnonzero(region == number)
        # in causal order: an anchor, a relay that can see it, then any, at least one of them wrong
        rest = rng.choice(["anchor", "relay", "wrong", "wrong"], len(at) - 3)
        role[at] = ["anchor", "relay", *rng.permutation([*rest, "wrong"])]
    if calm:
        role[role == "wrong"] = "relay"
    looks = true.copy()
    for token in np.flatnonzero(role == "wrong"):
        looks[token] = rng.choice([c for c in range(len(CLASSES)) if c != true[token]])
    if rng.random() < 0.5:  # a corner without a label
        true[-1], region[-1], role[-1] = IGNORE, -1, "none"
    return true, looks, region, role


def _codes(
    rng: np.random.Generator, looks: np.ndarray, region: np.ndarray, role: np.ndarray
) -> np.ndarray:
    """`[n_tokens, D_CODE]`: features, their negatives, and what brings the variance to 1."""
    n = len(looks)
    features = np.zeros((n, D_CODE // 2))
    features[np.arange(n), looks] = 1
    for i, name in enumerate(("anchor", "relay", "wrong")):
        at = np.flatnonzero(role == name)
        features[at, len(CLASSES) + i * N_REGIONS + region[at]] = 1
    features[:, 13:19] = rng.normal(0, 0.3, (n, 6))
    features[:, -1] = np.sqrt(D_CODE / 2 - (features**2).sum(1))
    return np.concatenate([features, -features], 1)


def _pixels(codes: np.ndarray) -> np.ndarray:
    """Codes `[n, n_tokens, D_CODE]` as pictures `[n, 3, height, width]`."""
    patches = codes.reshape(-1, SIDE, SIDE, 3, PATCH, PATCH)
    return patches.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE * PATCH, SIDE * PATCH)


def _bank() -> ProbeBank:
    stages = (START, *(f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)))
    weight = torch.zeros(len(CLASSES), D_MODEL)
    weight[:, Place.say] = torch.eye(len(CLASSES))
    return ProbeBank(
        stages=stages,
        classes=CLASSES,
        weights=dict.fromkeys(stages, weight),
        intercepts=dict.fromkeys(stages, torch.zeros(len(CLASSES))),
        seen=(True,) * len(CLASSES),
        n_iter=dict.fromkeys(stages, 0),
        converged=dict.fromkeys(stages, True),
    )


# -- weights ---------------------------------------------------------------------------------------


def planted_module() -> LlavaForConditionalGeneration:
    """The transformers module, every weight set here."""
    module = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=D_CODE,
                intermediate_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=SIDE * PATCH,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                hidden_size=D_MODEL,
                intermediate_size=len(CLASSES),
                num_hidden_layers=N_LAYERS,
                num_attention_heads=N_HEADS,
                num_key_value_heads=N_HEADS,
                head_dim=D_HEAD,
                vocab_size=IMAGE_TOKEN + 1,
                hidden_act="relu",
                max_position_embeddings=64,
                rope_parameters={"rope_type": "default", "rope_theta": 1e30},
                tie_word_embeddings=False,
                pad_token_id=WORDS["<pad>"],
                bos_token_id=WORDS["<bos>"],
                eos_token_id=None,
            ),
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            projector_hidden_act="linear",
        )
    )
    module.set_attn_implementation("sdpa")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        _set_vision(module)
        _set_language(module.model.language_model, torch.Generator().manual_seed(0))
        first = WORDS[CLASSES[0]]  # the classes' words follow each other
        module.lm_head.weight[first : first + len(CLASSES), Place.say] = torch.eye(len(CLASSES))
    return module.eval()


def _set_vision(module: nn.Module) -> None:
    tower = module.model.vision_tower
    for part in tower.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.fill_(1)
    embed = tower.embeddings
    embed.patch_embedding.weight.copy_(torch.eye(D_CODE).view(D_CODE, 3, PATCH, PATCH))
    embed.class_embedding.copy_(torch.tensor([1.0, -1.0]).repeat(D_CODE // 2))
    adapter = module.model.multi_modal_projector
    adapter.linear_1.weight[Place.look, : len(CLASSES)] = torch.eye(len(CLASSES))
    adapter.linear_1.weight[Place.say, : len(CLASSES)] = torch.eye(len(CLASSES))
    # the three roles' region numbers and the texture follow each other in both
    n = Place.texture.stop - Place.anchor.start
    behind = slice(len(CLASSES), len(CLASSES) + n)
    adapter.linear_1.weight[Place.anchor.start : Place.texture.stop, behind] = torch.eye(n)
    adapter.linear_2.weight.copy_(torch.eye(D_MODEL))
    adapter.linear_2.bias[Place.ballast] = BALLAST


def _set_language(language: nn.Module, random: torch.Generator) -> None:
    embed = language.embed_tokens.weight
    embed[:, Place.ballast] = BALLAST
    embed[WORDS["<bos>"], Place.bos] = 1
    embed[WORDS["?"], Place.ask] = 1
    language.norm.weight.fill_(BALLAST / D_MODEL**0.5)
    roles = {(h.layer, h.head): h.role for h in PLANTED}
    for number, block in enumerate(language.layers):
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.fill_(BALLAST / D_MODEL**0.5)
        for head in range(N_HEADS):
            q, k, v, o = matrices = [torch.zeros(D_HEAD, D_MODEL) for _ in range(4)]
            role = roles.get((number, head), "noise")
            if role == "noise":
                for matrix in matrices:
                    matrix.normal_(0, NOISE, generator=random)
                    matrix[:, Place.ballast] = 0
                for matrix in (q, k, v):
                    matrix[:, Place.trash] = 0  # nobody reads it
            else:
                _attend(role, q, k)
                _copy(role, v, o)
            at = slice(head * D_HEAD, (head + 1) * D_HEAD)
            attention = block.self_attn
            attention.q_proj.weight[at] = q * D_HEAD**0.5
            attention.k_proj.weight[at] = k
            attention.v_proj.weight[at] = v
            attention.o_proj.weight[:, at] = o.T
    _set_clip(language.layers[CLIP_LAYER].mlp)


STILL = range(4, 8)  # dimensions of a head that hardly rotate, with their partners 12 to 15


def _attend(role: str, q: Tensor, k: Tensor) -> None:
    """Who attends to whom: regions match in three dimensions, the fourth is for the first token."""
    match, first = list(STILL[:N_REGIONS]), STILL[N_REGIONS]
    eye = torch.eye(N_REGIONS)
    if role == "answer":
        q[match[0], Place.ask], k[match[0], Place.wrong] = 16, 1
        q[first, Place.ballast], k[first, Place.bos] = 10 / BALLAST, 1
        return
    asks = Place.relay if role == "sender" else Place.wrong
    answers = Place.relay if role == "receiver" else Place.anchor
    if role == "saturated":  # 15 between anchors and wrong tokens, and 8 to the first token
        q[match, asks], k[match, answers] = 30 * eye, eye
        k[match, Place.wrong] = eye / 2
        q[first, Place.ballast] = 7 / BALLAST
    else:
        q[match, asks], k[match, answers] = MATCH[role] * eye, eye
        q[first, Place.ballast] = FIRST[role] / BALLAST
    k[first, Place.bos] = 1


def _copy(role: str, v: Tensor, o: Tensor) -> None:
    """What is read where, and written where; `o` is `[d_head, d_model]`, as W_O of a head."""
    source = {"receiver": Place.scratch, "answer": Place.say}.get(role, Place.look)
    target = {"sender": Place.scratch, "decoy": Place.trash, "clipped": Place.much}
    dims = slice(0, len(CLASSES))
    v[dims, source] = torch.eye(len(CLASSES))
    o[dims, target.get(role, Place.say)] = GAIN[role] * torch.eye(len(CLASSES))


def _set_clip(mlp: nn.Module) -> None:
    """say += -gain relu(1 - much): what goes beyond 1 changes nothing any more."""
    n = len(CLASSES)
    mlp.gate_proj.weight[:, Place.ballast] = STARTS_BEYOND / BALLAST
    mlp.gate_proj.weight[:, Place.much] = -torch.eye(n)
    mlp.up_proj.weight[:, Place.ballast] = 1 / BALLAST
    mlp.down_proj.weight[Place.say] = -CLIPPED_GAIN * torch.eye(n)
