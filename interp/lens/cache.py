"""An `ActivationCache` whose sums are right on a multimodal LLM.

`run_with_cache` gives one of these. It *is* a `transformer_lens.ActivationCache`, and its methods
are TransformerLens's own code. What they ask of a model, `interp.lens.view` answers, and what they
read is put right first (`StreamCache._stream`), because on an MLLM five things are not what that
code takes for granted:

* **The stream does not start at `hook_embed`.** At image positions that hook holds placeholders,
  which the adapter's output overwrites. The first term of a decomposition, still labelled "embed",
  is `blocks.0.hook_resid_pre`. (TransformerBridge takes `hook_embed`: its sum misses the picture.)
* **Something may be added between blocks.** Qwen3-VL adds a deepstack feature to the image tokens
  after the first blocks: these are terms of their own, labelled "0_deepstack", ..., and come last.
* **Nothing is folded.** Norms keep their weights, so `apply_ln_to_stack` divides by the cached
  scale *and multiplies by the norm's weight*. TransformerBridge leaves the weight out unless its
  compatibility mode has folded it, and then `logit_attrs` do not add up to the logit there. Here
  they do, and equal those of a bridge with `fold_ln`. Where the model caps its logits (PaliGemma
  2), they add up to the logit before the cap.
* **Gemma 2 and 3 normalise what attention and MLP write.** A head's part of the stream is then
  `z_h W_O^h` times the weight of that norm over its scale, which is frozen at what it was in the
  run; `stack_head_results` and the neurons' results are such parts. `cache["result", l]` stays
  what the hook holds.
* **Pictures are not rows.** Tiles make the vision tower's first axis another one than the batch's,
  so slicing or dropping the batch axis leaves `vision.*`, `adapter.*` and `deepstack.*` alone.

A decomposition into all parts is compared with the stream itself and raises if it misses it. For
what TransformerLens gives to the letter, gaps and all, there is `cache.on_bridge()`.

    logits, cache = model.run_with_cache(x)
    parts, labels = cache.decompose_resid(return_labels=True, pos_slice=-1)
    cache.logit_attrs(parts, model.to_single_token("dog"), pos_slice=-1)    # [part, batch]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities import Slice

from interp.errors import NotRead, SumMismatch, nearest
from interp.hooks import canonical
from interp.lens.view import LensView

TOWERS = ("vision.", "adapter.", "deepstack.")
TOLERANCE = 1e-4


class StreamCache(ActivationCache):
    """A run's states with TransformerLens's methods; see the module docstring.

    Args:
        states: states by hook name.
        view: answers for the model.
        has_batch_dim: whether the language model's states have a batch axis.
    """

    model: LensView
    has_batch_dim: bool

    def __init__(
        self, states: dict[str, Tensor], view: LensView, has_batch_dim: bool = True
    ) -> None:
        super().__init__(states, view, has_batch_dim)

    def __getitem__(self, key: Any) -> Tensor:
        key = canonical(key) if isinstance(key, str) else key
        try:
            return cast(Tensor, super().__getitem__(key))
        except KeyError as error:
            name = str(error.args[0])
            raise NotRead(
                f"{name!r} is not in this cache of {len(self)} hooks; {nearest(name, self)} "
                "names_filter= of run_with_cache says what is kept (None keeps all but hook_result)"
            ) from None

    def on_bridge(self) -> ActivationCache:
        """A plain TransformerLens cache of the same states.

        Its methods give what they give on an unprocessed TransformerBridge, gaps and all.
        """
        return ActivationCache(dict(self.cache_dict), self.model, self.has_batch_dim)

    # -- the batch axis ----------------------------------------------------------------------------

    def _batch_size(self) -> int:
        sizes = {len(state) for name, state in self.items() if not name.startswith(TOWERS)}
        return max(sizes, default=1)

    def remove_batch_dim(self, batch_size: int | None = None) -> StreamCache:
        """Drop the language model's batch axis, in place; the towers keep their image axis.

        Raises:
            ValueError: the batch has more than one row.
        """
        n_rows = self._batch_size() if batch_size is None else batch_size
        if self.has_batch_dim and n_rows != 1:
            raise ValueError(f"a batch of {n_rows} rows keeps its axis; slice it first")
        if self.has_batch_dim:
            for name, state in self.cache_dict.items():
                if not name.startswith(TOWERS):
                    self.cache_dict[name] = state[0]
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> StreamCache:
        """Rows of the batch; the towers keep all their images.

        Raises:
            ValueError: there is no batch axis any more.
        """
        if not self.has_batch_dim:
            raise ValueError("the batch axis was removed, so there are no rows to slice")
        rows = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        states = {
            name: state if name.startswith(TOWERS) else rows.apply(state, dim=0)
            for name, state in self.items()
        }
        return type(self)(states, self.model, has_batch_dim=rows.mode != "int")

    # -- norms -------------------------------------------------------------------------------------

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Parts of the stream as the norm at `layer` lets them through: its scale and its weight.

        Arguments as in TransformerLens, which leaves out the weight.

        Raises:
            ValueError: parts of other positions than the scale's, which would broadcast.
        """
        at = self._layer(layer)
        n_layers = self.model.cfg.n_layers
        norm = "ln_final" if at == n_layers else f"blocks.{at}.ln{2 if mlp_input else 1}"
        scale = self.cache_dict.get(f"{norm}.hook_scale")
        whole = pos_slice is None and batch_slice is None and not recompute_ln
        if whole and scale is not None and residual_stack.shape[1:-1] != scale.shape[:-1]:
            raise ValueError(
                f"parts {list(residual_stack.shape)} for a scale {list(scale.shape)}: they would "
                "broadcast; pass the pos_slice and batch_slice with which the parts were made"
            )
        out = super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )
        if recompute_ln and at == n_layers:
            return cast(Tensor, out)  # the norm itself was run, weight and all
        return cast(Tensor, out * self.model.norm_before(at, mlp_input).w.to(out.device))

    def _stack_neuron_results_apply_ln_projected(
        self,
        layer: int,
        pos_slice: Slice,
        neuron_slice: Slice,
        project_2d: Tensor,
        mlp_input: bool = False,
    ) -> Tensor:
        # (x / scale * w) @ p is (x / scale) @ (w * p): the weight goes into the projection
        weight = self.model.norm_before(layer, mlp_input).w.to(project_2d.device)
        return cast(
            Tensor,
            super()._stack_neuron_results_apply_ln_projected(
                layer, pos_slice, neuron_slice, weight[:, None] * project_2d, mlp_input
            ),
        )

    # -- decompositions ----------------------------------------------------------------------------

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Any = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """The stream at `layer` as a stack of what was written into it; see TransformerLens.

        With `incl_embeds` (the default) that holds the start of the stream ("embed") and what
        deepstack added ("0_deepstack", ...).

        Raises:
            NotRead: a part is not in the cache.
            SumMismatch: all parts were asked for, and do not add up to the stream.
        """
        rows = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        at = self._layer(layer)
        if incl_embeds:
            self["resid_pre", 0]  # raises if it is missing: TransformerLens would leave it out
        parts, labels = ActivationCache.decompose_resid(
            self._stream(), at, mlp_input, mode, False, rows, incl_embeds, True
        )
        if incl_embeds:
            parts, labels = self._with_deepstack(parts, labels, at, rows)
        if incl_embeds and mode == "all":
            self._check_sum(parts, at, mlp_input, rows)
        if apply_ln:
            parts = self.apply_ln_to_stack(parts, at, mlp_input, rows)
        return (parts, labels) if return_labels else parts

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:
        """The stream at `layer` by head, by neuron (or MLP), start, biases, and deepstack.

        Arguments as in TransformerLens.

        Raises:
            NotRead, SumMismatch: as in `decompose_resid`.
        """
        rows = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        at = self._layer(layer)

        def through(states: Tensor) -> Tensor:
            if apply_ln:
                states = self.apply_ln_to_stack(states, at, mlp_input, rows)
            return states if project_output_onto is None else states @ project_output_onto

        self["resid_pre", 0]  # as above
        parts, labels = ActivationCache.get_full_resid_decomposition(
            self._stream(heads=True, neurons=expand_neurons),
            at,
            mlp_input,
            expand_neurons,
            apply_ln,
            rows,
            True,
            project_output_onto,
        )
        parts, labels = self._with_deepstack(parts, labels, at, rows, through)
        self._check_sum(parts, at, mlp_input, rows, through)
        return (parts, labels) if return_labels else parts

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:
        """What each head before `layer` wrote; arguments as in TransformerLens."""
        stream = self._stream(heads=True)
        return ActivationCache.stack_head_results(
            stream, self._layer(layer), return_labels, incl_remainder, pos_slice, apply_ln
        )

    def stack_neuron_results(self, layer: int | None, *args: Any, **kwargs: Any) -> Any:
        """What each neuron before `layer` wrote; arguments as in TransformerLens."""
        stream = self._stream(neurons=True)
        return ActivationCache.stack_neuron_results(stream, self._layer(layer), *args, **kwargs)

    def get_neuron_results(self, layer: int, *args: Any, **kwargs: Any) -> Tensor:
        """What each neuron of `layer` wrote; arguments as in TransformerLens."""
        stream = self._stream(neurons=True)
        return cast(Tensor, ActivationCache.get_neuron_results(stream, layer, *args, **kwargs))

    # -- the stream as it is -----------------------------------------------------------------------

    def _stream(self, *, heads: bool = False, neurons: bool = False) -> StreamCache:
        """These states as TransformerLens's code takes them to be; see the module docstring.

        Args:
            heads, neurons: whether what single heads or neurons write will be asked for.
        """
        if self.model.as_written:
            return self
        states = dict(self.cache_dict)
        states.pop("hook_embed", None)
        if "blocks.0.hook_resid_pre" in states:
            states["hook_embed"] = states["blocks.0.hook_resid_pre"]
        for layer in range(min(self.model.n_deepstack, self.model.cfg.n_layers - 1)):
            states.pop(f"blocks.{layer}.hook_resid_post", None)
            if (entering := f"blocks.{layer + 1}.hook_resid_pre") in states:
                states[f"blocks.{layer}.hook_resid_post"] = states[entering]
        for layer, block in enumerate(self.model.blocks if self.model.post_norms else ()):
            prefix = f"blocks.{layer}"
            for hook in ("hook_z", "hook_result") if heads else ():
                if (name := f"{prefix}.attn.{hook}") in states:
                    scale = self[f"{prefix}.ln1_post.hook_scale"].unsqueeze(-1)
                    # W_O of `_Writers` holds the norm's weight for z; a result has passed W_O
                    weight = block.ln1_post.w if hook == "hook_result" else 1.0
                    states[name] = states[name] / scale * weight
            if neurons and f"{prefix}.mlp.hook_post" in states:
                scale = self[f"{prefix}.ln2_post.hook_scale"]
                states[f"{prefix}.mlp.hook_post"] = states[f"{prefix}.mlp.hook_post"] / scale
        view = copy.copy(self.model)
        view.as_written = True
        return StreamCache(states, view, self.has_batch_dim)

    def _with_deepstack(
        self,
        parts: Tensor,
        labels: list[str],
        layer: int,
        rows: Slice,
        through: Callable[[Tensor], Tensor] = lambda states: states,
    ) -> tuple[Tensor, list[str]]:
        """Parts and labels with one more for each deepstack feature added before `layer`."""
        for after in range(min(self.model.n_deepstack, layer)):
            if after + 1 == self.model.cfg.n_layers:
                raise NotImplementedError(
                    "this model adds a deepstack feature behind its last block, where no hook sees "
                    "it; decompose an earlier layer"
                )
            added = self["resid_pre", after + 1] - self["resid_post", after]
            parts = torch.cat([parts, through(rows.apply(added, dim=-2)[None])])
            labels = [*labels, f"{after}_deepstack"]
        return parts, labels

    def _check_sum(
        self,
        parts: Tensor,
        layer: int,
        mlp_input: bool,
        rows: Slice,
        through: Callable[[Tensor], Tensor] = lambda states: states,
    ) -> None:
        """Raise if parts miss the stream at `layer`, where the cache holds it."""
        name = f"blocks.{layer}.hook_resid_{'mid' if mlp_input else 'pre'}"
        if layer == self.model.cfg.n_layers:
            name = f"blocks.{layer - 1}.hook_resid_post"
        if name not in self.cache_dict:
            return
        state = self[name]
        # a stream in half precision is rounded at every addition
        allowed = (
            max(TOLERANCE, 8 * torch.finfo(state.dtype).eps) if state.itemsize < 4 else TOLERANCE
        )
        whole = through(rows.apply(state, dim=-2)[None])[0].float()
        size = torch.linalg.vector_norm(parts, ord=1, dim=0, dtype=torch.float32)
        error = (parts.sum(0, dtype=torch.float32) - whole).abs() / size.clamp_min(1e-12)
        if error.max() > allowed:
            raise SumMismatch(
                f"the parts miss {name!r} by {float(error.max()):.2e} of their size (allowed in "
                f"{state.dtype}: {allowed:.0e}); were values edited in this run behind the hook "
                "that holds them, or does this family add something that has no hook?"
            )

    def _layer(self, layer: int | None) -> int:
        """A block's number, or `n_layers`, which is where -1 and None are in TransformerLens.

        Raises:
            ValueError: there is no such block.
        """
        n_layers = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return int(n_layers)
        if not 0 <= layer <= n_layers:
            raise ValueError(f"layer {layer}: there are 0 to {n_layers}, the last is the end")
        return layer
