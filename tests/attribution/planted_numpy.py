"""The planted model once more, in float64 NumPy, with heads that can be cut: the independent truth.

It takes the weights from the module's state dict and nothing else from torch, transformers or
interp. Edges are cut before the softmax, the rest of the row renormalises, and a row with nothing
left writes zero, which is what interp's `Knockout` promises.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.attribution.planted import (
    D_CODE,
    D_HEAD,
    END_LAYER,
    IMAGE_TOKEN,
    N_HEADS,
    N_LAYERS,
    PATCH,
    SIDE,
    Place,
    Planted,
)

Cut = Mapping[tuple[int, int], np.ndarray]
Target = Callable[["Forward"], np.ndarray]
N_IMAGE = SIDE * SIDE
FIRST_IMAGE = 1  # position of the first image token, behind <bos>


@dataclass
class Forward:
    """What a forward pass leaves: the stream after each block, patterns, values, z by head."""

    embed: np.ndarray
    post: list[np.ndarray] = field(default_factory=list)  # [batch, pos, d_model]
    pattern: list[np.ndarray] = field(default_factory=list)  # [batch, head, query, key]
    value: list[np.ndarray] = field(default_factory=list)  # [batch, head, key, d_head]
    z: list[np.ndarray] = field(default_factory=list)  # [batch, head, query, d_head]
    mlp: list[np.ndarray] = field(default_factory=list)
    logits: np.ndarray | None = None


class Reference:
    """The planted model in NumPy.

    Args:
        planted: of which the weights and the input tensors are taken.
    """

    def __init__(self, planted: Planted) -> None:
        self.planted = planted
        state = planted.model.module.state_dict()
        self.w = {name: t.detach().double().numpy() for name, t in state.items()}
        self.ids = planted.x.tensors["input_ids"].numpy()
        self.pixels = planted.x.tensors["pixel_values"].double().numpy()
        self.clean = self.forward()

    # -- the model ---------------------------------------------------------------------------------

    def vision(self) -> np.ndarray:
        """`[batch, n_tokens, d_model]`, what leaves the adapter. The tower's blocks write zero."""
        for name in (n for n in self.w if n.startswith("model.vision_tower.encoder.layers")):
            if "out_proj" in name or "fc2" in name:
                assert not self.w[name].any(), name
        n = len(self.pixels)
        patches = self.pixels.reshape(n, 3, SIDE, PATCH, SIDE, PATCH).transpose(0, 2, 4, 1, 3, 5)
        weight = self.w["model.vision_tower.embeddings.patch_embedding.weight"]
        code = patches.reshape(n, N_IMAGE, D_CODE) @ weight.reshape(D_CODE, D_CODE).T
        centred = code - code.mean(-1, keepdims=True)
        code = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        for part in ("linear_1", "linear_2"):
            name = f"model.multi_modal_projector.{part}"
            code = code @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]
        return code

    def forward(
        self,
        cut: Cut | None = None,
        z: Cut | None = None,
        added: Sequence[np.ndarray] = (),
    ) -> Forward:
        """One pass.

        Args:
            cut: (layer, head) -> `[batch, query, key]` bool, edges that are closed.
            z: (layer, head) -> `[batch, query, d_head]`, what is put in place of a head's own.
            added: by layer, `[batch, head, pos, d_head]` added to z of image tokens.
        """
        cut, z = cut or {}, z or {}
        stream = self.w["model.language_model.embed_tokens.weight"][self.ids]
        stream[self.ids == IMAGE_TOKEN] = self.vision().reshape(-1, stream.shape[-1])
        out = Forward(stream.copy())
        causal = np.tril(np.ones((stream.shape[1],) * 2, dtype=bool))
        for layer in range(N_LAYERS):
            name = f"model.language_model.layers.{layer}"
            x = self._norm(stream, f"{name}.input_layernorm")
            q, k, v = (
                _split(x @ self.w[f"{name}.self_attn.{p}_proj.weight"].T) for p in ("q", "k", "v")
            )
            scores = _rotate(q) @ _rotate(k).swapaxes(-1, -2) / np.sqrt(D_HEAD)
            open_ = np.broadcast_to(causal, scores.shape).copy()
            for (at, head), edges in cut.items():
                if at == layer:
                    open_[:, head] &= ~edges
            pattern = _softmax(scores, open_)
            heads = pattern @ v
            for (at, head), given in z.items():
                if at == layer:
                    heads[:, head] = given
            if layer < len(added):
                heads[:, :, FIRST_IMAGE : FIRST_IMAGE + N_IMAGE] += added[layer][
                    :, :, FIRST_IMAGE : FIRST_IMAGE + N_IMAGE
                ]
            merged = heads.swapaxes(1, 2).reshape(*stream.shape[:2], -1)
            stream = stream + merged @ self.w[f"{name}.self_attn.o_proj.weight"].T
            x = self._norm(stream, f"{name}.post_attention_layernorm")
            gate, up, down = (self.w[f"{name}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
            mlp = (np.maximum(x @ gate.T, 0) * (x @ up.T)) @ down.T
            stream = stream + mlp
            for kept, value in (
                (out.post, stream),
                (out.pattern, pattern),
                (out.value, v),
                (out.z, heads),
                (out.mlp, mlp),
            ):
                kept.append(value)
        final = self._norm(stream, "model.language_model.norm")
        out.logits = final @ self.w["lm_head.weight"].T
        return out

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.w[f"{name}.weight"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    # -- the question ------------------------------------------------------------------------------

    def margins(self, out: Forward) -> np.ndarray:
        """`[n_images]` mean margin of the wrong tokens at the end; NaN where none is wrong."""
        say = out.post[END_LAYER][:, FIRST_IMAGE : FIRST_IMAGE + N_IMAGE, Place.say]
        p = self.planted
        true = np.where(p.role == "wrong", p.true, 0)
        margin = np.take_along_axis(say, true[..., None], 2) - np.take_along_axis(
            say, p.looks[..., None], 2
        )
        wrong = p.role == "wrong"
        n = wrong.sum(1)
        sums = (margin[..., 0] * wrong).sum(1)
        return np.where(n > 0, sums / np.maximum(n, 1), np.nan)

    def edges(self, group: str, dst: str) -> np.ndarray:
        """`[batch, query, key]` bool: what readers have in a group of sources.

        Args:
            group: "same-region correct", "same-region wrong", "other regions", "text and BOS",
                "self", or "all".
            dst: "queries", the wrong tokens, "image", all image tokens, or "all".
        """
        p, n = self.planted, self.ids.shape[1]
        image = slice(FIRST_IMAGE, FIRST_IMAGE + N_IMAGE)
        same = (p.region[:, :, None] == p.region[:, None, :]) & (p.region >= 0)[:, :, None]
        right = np.isin(p.role, ["anchor", "relay"])[:, None, :]
        inside = {
            "same-region correct": same & right,
            "same-region wrong": same & ~right,
            "other regions": ~same,
        }
        own = np.eye(n, dtype=bool)[None]
        out = np.zeros((len(self.ids), n, n), dtype=bool)
        if group in inside:
            out[:, image, image] = inside[group]
            out &= ~own
        elif group == "text and BOS":
            out[:] = (self.ids != IMAGE_TOKEN)[:, None, :]
            out &= ~own
        else:
            out[:] = own if group == "self" else True
        return out & self.readers(dst)[:, :, None]

    def readers(self, dst: str) -> np.ndarray:
        """`[batch, pos]` bool: "queries", "image" or "all"."""
        reads = np.full(self.ids.shape, dst == "all")
        wrong = self.planted.role == "wrong"
        reads[:, FIRST_IMAGE : FIRST_IMAGE + N_IMAGE] |= wrong if dst == "queries" else True
        return reads

    def effect(
        self, layer: int, head: int, group: str, dst: str, of: Target | None = None
    ) -> np.ndarray:
        """`[n_images]` exact: target clean minus target with a head's edges cut.

        Args:
            of: the target, by default the margin.
        """
        of = of or self.margins
        cut = self.forward({(layer, head): self.edges(group, dst)})
        return of(self.clean) - of(cut)

    def effects(self, group: str = "same-region correct", dst: str = "image") -> np.ndarray:
        """`[n_layers, n_heads, n_images]` exact effect of every head."""
        every = [[self.effect(i, h, group, dst) for h in range(N_HEADS)] for i in range(N_LAYERS)]
        return np.array(every)

    def path(
        self,
        sender: tuple[int, int],
        receiver: tuple[int, int],
        dst: str,
        through: Collection[str] = ("k", "v"),
    ) -> np.ndarray:
        """`[n_images]` what the margin loses if the receiver alone sees that the sender is silent.

        The receiver's `through` inputs come from the clean stream less what the sender wrote, at
        all positions; its z at the readers is what follows, and everything else is clean.
        """
        layer, head = receiver
        wrote = self.clean.z[sender[0]][:, sender[1]] @ self._w_o(*sender)
        clean = self.clean.post[layer - 1]
        name = f"model.language_model.layers.{layer}"
        made = {}
        for part in ("q", "k", "v"):
            x = self._norm(clean - wrote * (part in through), f"{name}.input_layernorm")
            made[part] = _split(x @ self.w[f"{name}.self_attn.{part}_proj.weight"].T)[:, head]
        scores = _rotate(made["q"]) @ _rotate(made["k"]).swapaxes(-1, -2) / np.sqrt(D_HEAD)
        open_ = np.broadcast_to(np.tril(np.ones(scores.shape[1:], dtype=bool)), scores.shape)
        z = _softmax(scores, open_) @ made["v"]
        z = np.where(self.readers(dst)[..., None], z, self.clean.z[layer][:, head])
        return self.margins(self.clean) - self.margins(self.forward(z={receiver: z}))

    def _w_o(self, layer: int, head: int) -> np.ndarray:
        weight = self.w[f"model.language_model.layers.{layer}.self_attn.o_proj.weight"]
        return weight[:, head * D_HEAD : (head + 1) * D_HEAD].T

    # -- the first order ---------------------------------------------------------------------------

    def slope(
        self,
        layer: int,
        head: int,
        group: str,
        dst: str,
        corrected: bool = True,
        of: Target | None = None,
    ) -> np.ndarray:
        """`[n_images]` first-order estimate, its derivative taken numerically.

        The head's z is moved a little towards what it would be (`corrected`), or towards what a
        linearised softmax says it would be.
        """
        pattern, value = self.clean.pattern[layer][:, head], self.clean.value[layer][:, head]
        z = self.clean.z[layer][:, head]
        edges = self.edges(group, dst)
        share = (pattern * edges).sum(-1, keepdims=True)
        part = (pattern * edges) @ value
        if corrected:
            rest = (pattern * ~edges).sum(-1, keepdims=True)
            kept = (pattern * ~edges) @ value
            change = np.divide(kept, rest, out=np.zeros_like(kept), where=rest > 0) - z
            change = np.where(edges.any(-1, keepdims=True), change, 0)
        else:
            change = share * z - part
        step, of = 1e-5, of or self.margins
        moved = [of(self.forward(z={(layer, head): z + sign * step * change})) for sign in (1, -1)]
        return -(moved[0] - moved[1]) / (2 * step)


def _split(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:2], N_HEADS, D_HEAD).swapaxes(1, 2)


def _rotate(x: np.ndarray) -> np.ndarray:
    half = D_HEAD // 2
    angle = np.arange(x.shape[-2])[:, None] * 1e30 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _softmax(scores: np.ndarray, open_: np.ndarray) -> np.ndarray:
    shown = np.where(open_, scores, -np.inf)
    top = shown.max(-1, keepdims=True)
    weights = np.where(open_, np.exp(shown - np.where(np.isfinite(top), top, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
