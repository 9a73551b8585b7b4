"""The language of hook names: *where* in the model something is read or edited.

A hook name is TransformerLens's, letter for letter. The language model's names stand alone, the
vision tower's and the adapter's carry a prefix and then the same suffixes::

    blocks.3.hook_resid_post            language model, after block 3     [batch, pos, d_model]
    blocks.3.attn.hook_pattern          its attention, after the softmax  [batch, head, query, key]
    vision.blocks.0.attn.hook_z         vision tower, per-head output     [image, pos, head, d_head]
    adapter.hook_out                    the image tokens the LLM is given [image, token, d_model]

The axis `image` counts what the vision tower takes as one row of its batch: a picture, a tile of
one (LLaVA-NeXT, InternVL, Idefics3), or all pictures together in a single row of patches, of which
each attends to its own picture or window only (the Qwen-VL families).

Two names are ours: `attn.hook_mask`, bool, True where a query may attend to a key, and
`deepstack.{k}.hook_out`, what Qwen3-VL adds to the image tokens after language block k.

Some suffixes exist only where the family has the part (`OPTIONAL_HOOKS`): rotated queries and keys,
the second factor of a gated MLP, the norms that Gemma puts *behind* attention and MLP.

Three things are decided here and nowhere else: which names a model has (`Vocabulary`), in which
order the forward pass reaches them (nnsight wants its accesses in that order), and what a pattern
means. A pattern is a glob over whole names; `*` matches any run of characters, `[4-12]` a range of
*numbers* (not of characters, as a shell would have it), `{q,k}` one of several words. A pattern
that matches nothing raises and names the nearest hooks: a hook that cannot fire is an error.

>>> vocabulary = Vocabulary(n_layers=2, n_vision_layers=1)
>>> vocabulary.expand("blocks.*.hook_resid_post")
['blocks.0.hook_resid_post', 'blocks.1.hook_resid_post']
>>> vocabulary.shape("blocks.1.attn.hook_z")
'batch pos head d_head'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from interp.errors import UnknownHook, nearest

#: Suffixes of one transformer block in the order the forward pass reaches them, with the shape of
#: the tensor there (axes named as in einops).
BLOCK_HOOKS: dict[str, str] = {
    "hook_resid_pre": "batch pos d_model",
    "ln1.hook_scale": "batch pos 1",
    "ln1.hook_normalized": "batch pos d_model",
    "attn.hook_q": "batch pos head d_head",
    "attn.hook_k": "batch pos kv_head d_head",
    "attn.hook_v": "batch pos kv_head d_head",
    "attn.hook_rot_q": "batch pos head d_head",
    "attn.hook_rot_k": "batch pos kv_head d_head",
    "attn.hook_mask": "batch head query key",
    "attn.hook_attn_scores": "batch head query key",
    "attn.hook_pattern": "batch head query key",
    "attn.hook_z": "batch pos head d_head",
    "attn.hook_result": "batch pos head d_model",
    "ln1_post.hook_scale": "batch pos 1",
    "ln1_post.hook_normalized": "batch pos d_model",
    "hook_attn_out": "batch pos d_model",
    "hook_resid_mid": "batch pos d_model",
    "ln2.hook_scale": "batch pos 1",
    "ln2.hook_normalized": "batch pos d_model",
    "mlp.hook_pre": "batch pos d_mlp",
    "mlp.hook_pre_linear": "batch pos d_mlp",
    "mlp.hook_post": "batch pos d_mlp",
    "ln2_post.hook_scale": "batch pos 1",
    "ln2_post.hook_normalized": "batch pos d_model",
    "hook_mlp_out": "batch pos d_model",
    "hook_resid_post": "batch pos d_model",
}
#: Parts that only some blocks have, with their suffixes.
OPTIONAL_HOOKS: dict[str, tuple[str, ...]] = {
    "rotary": ("attn.hook_rot_q", "attn.hook_rot_k"),
    "gated": ("mlp.hook_pre_linear",),
    "post_norms": (
        "ln1_post.hook_scale",
        "ln1_post.hook_normalized",
        "ln2_post.hook_scale",
        "ln2_post.hook_normalized",
    ),
}

#: TransformerLens's own spellings of the towers, accepted everywhere a name is.
#: The first that fits counts.
ALIASES = {
    "vision_encoder.encoder_layers.": "vision.blocks.",
    "vision_encoder.": "vision.",
    "vision_projector.": "adapter.",
}

#: The norm behind the last block.
FINAL_NORM = {
    "ln_final.hook_scale": "batch pos 1",
    "ln_final.hook_normalized": "batch pos d_model",
}

Pattern = str | Iterable[str] | Callable[[str], bool]

#: on a model that is as transformers made it, the pattern is an output of attention, and so is
#: reached behind what goes into the output projection
LATE_ON_STOCK = ("attn.hook_pattern", "attn.hook_result")


class HookName:
    """What a function of `run_with_hooks` is told: where it is. TransformerLens's attributes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"HookName({self.name!r})"

    def layer(self) -> int:
        """The block's number, counted in its own tower.

        Raises:
            ValueError: the hook lies in no block.
        """
        return layer_of(self.name)


def layer_of(name: str) -> int:
    """The number of the block that a hook lies in, counted in its own tower.

    Raises:
        ValueError: it lies in none.
    """
    match = re.search(r"\bblocks\.(\d+)\.", name)
    if match is None:
        raise ValueError(f"{name!r} lies in no block, so it has no layer")
    return int(match[1])


class Vocabulary:
    """The hook names of one model, in execution order.

    Args:
        n_layers: blocks of the language model.
        n_vision_layers: blocks of the vision tower.
        parts: which of `OPTIONAL_HOOKS` the language model's blocks have.
        vision_parts: the same of the vision tower's.
        deepstack: vision blocks behind which an extra merger reads, in the order of the mergers.
        vision_ln_final: whether the adapter reads the vision tower through a final norm.
        lacks: names that cannot be had on this model though its family has them, each with what
            would do instead; given, the model is a stock one (`interp.stock`).
    """

    def __init__(
        self,
        n_layers: int,
        n_vision_layers: int,
        *,
        parts: Iterable[str] = ("rotary", "gated"),
        vision_parts: Iterable[str] = (),
        deepstack: Sequence[int] = (),
        vision_ln_final: bool = False,
        lacks: Mapping[str, str] | None = None,
    ) -> None:
        self.lacks = dict(lacks or {})
        stock = lacks is not None
        shapes = {"hook_embed": "batch pos d_model", "vision.hook_embed": "image pos d_model"}
        for layer in range(n_vision_layers):
            for suffix, shape in _block_hooks(vision_parts, stock).items():
                shapes[f"vision.blocks.{layer}.{suffix}"] = shape.replace("batch", "image")
            if layer in deepstack:
                merger = deepstack.index(layer)
                shapes[f"deepstack.{merger}.hook_out"] = "image token d_model"
        if vision_ln_final:
            shapes |= {f"vision.{k}": v.replace("batch", "image") for k, v in FINAL_NORM.items()}
        shapes["adapter.hook_in"] = "image token d_vision"
        shapes["adapter.hook_out"] = "image token d_model"
        for layer in range(n_layers):
            for suffix, shape in _block_hooks(parts, stock).items():
                shapes[f"blocks.{layer}.{suffix}"] = shape
        shapes |= FINAL_NORM
        self.shapes = {name: shape for name, shape in shapes.items() if name not in self.lacks}

    @cached_property
    def names(self) -> list[str]:
        """All names, in the order in which the forward pass reaches them."""
        return list(self.shapes)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return {name: rank for rank, name in enumerate(self.names)}

    def rank(self, name: str) -> int:
        """The place of `name` in the execution order.

        Raises:
            UnknownHook: the model has no such hook.
        """
        name = canonical(name)
        if name not in self._ranks:
            if name in self.lacks:
                raise UnknownHook(f"{name!r} cannot be had on this model: {self.lacks[name]}")
            raise UnknownHook(
                f"no hook {name!r} on this model; {nearest(name, self.names)} "
                "(`model.hooks.names` lists all of them)"
            )
        return self._ranks[name]

    def shape(self, name: str) -> str:
        """The axes of the tensor at `name`, as words."""
        return self.shapes[self.names[self.rank(name)]]

    def expand(self, pattern: Pattern | None) -> list[str]:
        """The names that a pattern (or several, or a predicate) matches, in execution order.

        Raises:
            UnknownHook: some pattern matches nothing; the nearest names are given.
        """
        if pattern is None:
            return []
        if callable(pattern):
            found = [name for name in self.names if pattern(name)]
            if not found:
                raise UnknownHook(f"the filter {pattern!r} accepts none of this model's hooks")
            return found
        if not isinstance(pattern, str):
            pattern = list(pattern)
            if not pattern:
                raise UnknownHook("an empty list of hook names; leave it out to read nothing")
            found = [name for one in pattern for name in self.expand(one)]
            return sorted(set(found), key=self.rank)
        name = canonical(pattern)
        if not set(name) & set("*?[{"):
            self.rank(name)  # raises with the nearest names
            return [name]
        if range_ := re.search(r"\[([^\]]*)\]", name):
            # one number at a time, so that a layer which the model lacks is told
            parts = [
                self.expand(f"{name[: range_.start()]}{number}{name[range_.end() :]}")
                for number in _numbers(range_[1], pattern)
            ]
            return sorted({found for part in parts for found in part}, key=self.rank)
        if words := re.search(r"\{([^}]*)\}", name):
            parts = [
                self.expand(f"{name[: words.start()]}{word}{name[words.end() :]}")
                for word in words[1].split(",")
            ]
            return sorted({found for part in parts for found in part}, key=self.rank)
        regex = re.compile(re.escape(name).replace(r"\*", ".*").replace(r"\?", "[^.]"))
        found = [known for known in self.names if regex.fullmatch(known)]
        if not found:
            raise UnknownHook(
                f"the pattern {pattern!r} matches no hook of this model; "
                f"{nearest(name.replace('*', '0'), self.names)}"
            )
        return found


def _block_hooks(parts: Iterable[str], stock: bool = False) -> dict[str, str]:
    missing = [s for part, names in OPTIONAL_HOOKS.items() if part not in set(parts) for s in names]
    order = list(BLOCK_HOOKS)
    if stock:
        late, early = LATE_ON_STOCK
        order.remove(late)
        order.insert(order.index(early) + 1, late)
    return {suffix: BLOCK_HOOKS[suffix] for suffix in order if suffix not in missing}


def canonical(name: str) -> str:
    """The house spelling of a name: TransformerLens's tower prefixes become ours.

    >>> canonical("vision_encoder.blocks.0.hook_resid_post")
    'vision.blocks.0.hook_resid_post'
    >>> canonical("vision_encoder.encoder_layers.*.hook_mlp_out")
    'vision.blocks.*.hook_mlp_out'
    """
    for theirs, ours in ALIASES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _numbers(text: str, pattern: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UnknownHook(
                f"[{text}] in the pattern {pattern!r} is no range of layers; "
                "write [3], [0,2,5] or [4-12]"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UnknownHook(f"[{text}] in the pattern {pattern!r} runs backwards")
        numbers.extend(range(first, last + 1))
    return numbers
