"""What the benchmark asks of every tool: one small function a setting.

A setting is a function from a `Bench` to a row: for each peer either a call without arguments that
does the job once and returns `(logits, what it kept)`, or a sentence that says why the peer cannot.
Calls of one row must give equal logits, and equal kept tensors in the same order unless the setting
says that they differ; `overhead.py` checks both before it takes any time.

    @setting("all residuals read", goal=1.05)
    def residuals(b: Bench) -> Row:
        return {"interp": lambda: ..., "eager": "why not", ...}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peers import Bench, all_blocks, hooked, plain, text_blocks
from torch import Tensor

from interp import Knockout
from interp.edges import EdgeSet

Result = tuple[Tensor, list[Tensor]]
Call = Callable[[], Result]
Row = dict[str, Call | str]


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        title: as the table says it.
        make: the calls, given the peers.
        goal: the ratio to plain sdpa that this library must stay under, None for no goal.
        same_kept: whether all peers keep the same tensors.
        edits: whether the logits must differ from those of a clean run.
    """

    title: str
    make: Callable[[Bench], Row]
    goal: float | None = None
    same_kept: bool = True
    edits: bool = False


SETTINGS: list[Setting] = []

NO_PATTERN = "SDPA never makes the pattern, so there is nothing to hook"
NO_RECEIPTS = "it has no receipts"
NO_NAMES = "it has no names for what lies inside a module"
REPORTED_ONLY = "the pattern that the module returns is a report; what flows on is computed inside"


def setting(title: str, **more: Any) -> Callable[[Callable[[Bench], Row]], Callable[[Bench], Row]]:
    """Add a row to the table."""

    def add(make: Callable[[Bench], Row]) -> Callable[[Bench], Row]:
        SETTINGS.append(Setting(title, make, **more))
        return make

    return add


@setting("idle", goal=1.03)
def idle(b: Bench) -> Row:
    def nnsight() -> Result:
        out: dict[str, Tensor] = {}
        with torch.no_grad(), b.traced.trace(**b.tensors, use_cache=False):
            out["logits"] = b.traced.output.logits
        return out["logits"], []

    return {
        "interp": lambda: _ours(b, None),
        "sdpa": lambda: (plain(b.sdpa, b.tensors), []),
        "eager": lambda: (plain(b.eager, b.tensors), []),
        "nnsight": nnsight,
        "bridge": lambda: (b.run_bridge(), []),
    }


@setting("all residuals read", goal=1.05)
def residuals(b: Bench) -> Row:
    def torch_hooks(module: Any) -> Result:
        kept: list[Tensor] = []
        with hooked(all_blocks(module), lambda _m, _args, out: kept.append(_first(out))):
            return plain(module, b.tensors), kept

    def nnsight() -> Result:
        kept: list[Tensor] = []
        out: dict[str, Tensor] = {}
        with torch.no_grad(), b.traced.trace(**b.tensors, use_cache=False):
            for block in all_blocks(b.traced):
                kept.append(_first(block.output))
            out["logits"] = b.traced.output.logits
        return out["logits"], kept

    return {
        "interp": lambda: _ours(b, "*blocks.*.hook_resid_post"),
        "sdpa": lambda: torch_hooks(b.sdpa),
        "eager": lambda: torch_hooks(b.eager),
        "nnsight": nnsight,
        "bridge": lambda: b.cache_bridge(lambda name: name.endswith("hook_resid_post")),
    }


@setting("one pattern read", goal=1.06)
def one_pattern(b: Bench) -> Row:
    name = f"blocks.{b.middle}.attn.hook_pattern"
    return {
        "interp": lambda: _ours(b, name),
        "sdpa": NO_PATTERN,
        "eager": lambda: _eager_patterns(b, [text_blocks(b.eager)[b.middle]]),
        "nnsight": lambda: _nnsight_patterns(b, [text_blocks(b.traced_eager)[b.middle]]),
        "bridge": lambda: b.cache_bridge(lambda hook: hook == name),
    }


@setting("one pattern edited", goal=1.06, edits=True)
def one_pattern_edited(b: Bench) -> Row:
    name = f"blocks.{b.middle}.attn.hook_pattern"

    def ablate(pattern: Tensor, hook: Any = None) -> Tensor:
        pattern[:, 0] = 0  # head 0, in place
        return pattern

    def nnsight() -> Result:
        out: dict[str, Tensor] = {}
        attention = text_blocks(b.traced_eager)[b.middle].self_attn
        with torch.no_grad(), b.traced_eager.trace(**b.tensors, use_cache=False):
            inner = attention.source.attention_interface_1.source
            inner.nn_functional_dropout_0.output = ablate(inner.nn_functional_dropout_0.output)
            out["logits"] = b.traced_eager.output.logits
        return out["logits"], []

    return {
        "interp": lambda: (b.ours.run_with_hooks(b.x, fwd_hooks=[(name, ablate)]), []),
        "sdpa": NO_PATTERN,
        "eager": REPORTED_ONLY,
        "nnsight": nnsight,
        "bridge": lambda: (b.run_bridge([(name, ablate)]), []),
    }


def _knockout(b: Bench, *, mass: bool) -> Row:
    """Cut the edges in one head a layer, another head in every layer."""
    cut = [Knockout(b.edges, layers=i, heads=i % b.n_heads) for i in range(b.n_layers)]
    return _cut(b, cut, b.edges, lambda layer: layer % b.n_heads, mass=mass)


def _dense(b: Bench, *, mass: bool) -> Row:
    """Cut half of all edges between image tokens, in all heads of all layers."""
    return _cut(b, [Knockout(b.dense)], b.dense, lambda layer: None, mass=mass)


def _cut(
    b: Bench,
    cut: list[Knockout],
    edges: EdgeSet,
    head: Callable[[int], int | None],
    *,
    mass: bool,
) -> Row:
    """A row of edges cut in one head of a layer, or in all of them (None)."""
    dst, src = (torch.tensor(at) for at in (edges.dst, edges.src))
    heads = [slice(None) if head(i) is None else head(i) for i in range(b.n_layers)]
    known: dict[str, Tensor] = {}

    def masked(mask: Tensor | None, layer: int) -> Tensor:
        n_pos = b.x.n_pos
        if mask is None:  # causal by SDPA's flag
            mask = torch.ones(n_pos, n_pos, dtype=torch.bool, device=b.sdpa.device).tril()[None]
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.expand(1, 1 if head(layer) is None else b.n_heads, n_pos, n_pos).clone()
        mask[:, heads[layer], dst, src] = closed
        return mask

    def once(mask: Tensor | None, layer: int) -> Tensor:
        """The mask of a layer; of all layers where all are the same."""
        if head(layer) is not None:
            return masked(mask, layer)
        if layer == 0:
            known["mask"] = masked(mask, layer)
        return known["mask"]

    def torch_hooks(module: Any) -> Result:
        attentions = [block.self_attn for block in text_blocks(module)]

        def pre_hook(attention: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = once(kwargs["attention_mask"], attention.layer_idx)
            return args, {**kwargs, "attention_mask": mask}

        with hooked(attentions, pre_hook, before=True):
            return plain(module, b.tensors), []

    def nnsight() -> Result:
        out: dict[str, Tensor] = {}
        with torch.no_grad(), b.traced.trace(**b.tensors, use_cache=False):
            for layer, block in enumerate(text_blocks(b.traced)):
                args, kwargs = block.self_attn.inputs
                mask = once(kwargs["attention_mask"], layer)
                block.self_attn.inputs = (args, {**kwargs, "attention_mask": mask})
            out["logits"] = b.traced.output.logits
        return out["logits"], []

    def closing(layer: int) -> Callable[..., Tensor]:
        def close(scores: Tensor, hook: Any) -> Tensor:
            scores[:, heads[layer], dst, src] = torch.finfo(scores.dtype).min
            return scores

        return close

    points = [(f"blocks.{i}.attn.hook_attn_scores", closing(i)) for i in range(b.n_layers)]
    return {
        "interp": lambda: (_logits(b.ours.run(b.x, *cut, mass=mass)), []),
        "sdpa": lambda: torch_hooks(b.sdpa),
        "eager": lambda: torch_hooks(b.eager),
        "nnsight": nnsight,
        "bridge": lambda: (b.run_bridge(points), []),
    }


@setting("per-head knockout in every layer", goal=1.15, edits=True)
def knockout(b: Bench) -> Row:
    return _knockout(b, mass=False)


@setting("knockout with attention mass in receipts", goal=1.15, edits=True)
def knockout_with_mass(b: Bench) -> Row:
    row = _knockout(b, mass=True)
    return {peer: call if peer == "interp" else NO_RECEIPTS for peer, call in row.items()}


@setting("dense edges cut in every layer", edits=True)
def dense(b: Bench) -> Row:
    return _dense(b, mass=False)


@setting("dense edges cut, mass in receipts", edits=True)
def dense_with_mass(b: Bench) -> Row:
    row = _dense(b, mass=True)
    return {peer: call if peer == "interp" else NO_RECEIPTS for peer, call in row.items()}


@setting("all patterns read", goal=1.30)
def all_patterns(b: Bench) -> Row:
    return {
        "interp": lambda: _ours(b, "*blocks.*.attn.hook_pattern"),
        "sdpa": NO_PATTERN,
        "eager": lambda: _eager_patterns(b, all_blocks(b.eager)),
        "nnsight": lambda: _nnsight_patterns(b, all_blocks(b.traced_eager)),
        "bridge": lambda: b.cache_bridge(lambda name: name.endswith("attn.hook_pattern")),
    }


@setting("full cache", same_kept=False)
def full_cache(b: Bench) -> Row:
    def ours() -> Result:
        logits, cache = b.ours.run_with_cache(b.x)
        return logits, list(cache.values())

    return {
        "interp": ours,
        "sdpa": NO_NAMES,
        "eager": NO_NAMES,
        "nnsight": NO_NAMES,
        "bridge": lambda: b.cache_bridge(None),
    }


# -- what several settings share -------------------------------------------------------------------


def _ours(b: Bench, read: str | None) -> Result:
    run = b.ours.run(b.x, read=read)
    return _logits(run), list(run.states.values())


def _logits(run: Any) -> Tensor:
    assert run.logits is not None
    return run.logits


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _eager_patterns(b: Bench, blocks: list[Any]) -> Result:
    kept: list[Tensor] = []
    attentions = [block.self_attn for block in blocks]
    with hooked(attentions, lambda _m, _args, out: kept.append(out[1])):
        return plain(b.eager, b.tensors), kept


def _nnsight_patterns(b: Bench, blocks: list[Any]) -> Result:
    kept: list[Tensor] = []
    out: dict[str, Tensor] = {}
    with torch.no_grad(), b.traced_eager.trace(**b.tensors, use_cache=False):
        for block in blocks:
            kept.append(block.self_attn.output[1])
        out["logits"] = b.traced_eager.output.logits
    return out["logits"], kept
