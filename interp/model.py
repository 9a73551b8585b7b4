"""`MLLM`: a multimodal language model with names for everything inside it.

    model = MLLM.load("tiny")                                   # or a hub id, a folder, a module
    x = model.prepare(picture, "What is in the picture?")
    run = model.run(x, Knockout(edges), read="blocks.*.hook_resid_post")

`run` is the house's own way: edits are values, reads are patterns, receipts come back.
`run_with_cache` and `run_with_hooks` are TransformerLens's, and `trace` with `hook` is nnsight's,
for what no helper covers. All of them are the same machinery (`interp.execution`) on the same
module, so they give the same numbers, and a clean run gives those of plain transformers.

In a bare trace, hooks are taken in execution order, as always in nnsight; `run` sorts for you.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import nnsight
import torch
from torch import Tensor, nn
from transformer_lens import ActivationCache

from interp import attention, points
from interp.dims import Dims
from interp.edits.masks import MaskEdit
from interp.execution import HookFunction, Run, execute
from interp.families import family_of
from interp.families.base import module_at
from interp.hooks import Pattern, Vocabulary, canonical
from interp.inputs import Inputs, Picture, prepare
from interp.loading import load
from interp.sites import Site, envoy_at
from interp.tokens import TokenGrid


class MLLM:
    """A loaded multimodal LLM. Make one with `MLLM.load`.

    Attributes:
        module: the transformers model, in eval mode, attending through `interp.attention`.
        nn: the nnsight model around it.
        processor: its transformers processor, or None.
        family: its family table.
        hooks: its hook names, in execution order.
        cfg: its sizes.
    """

    def __init__(self, module: nn.Module, processor: Any = None) -> None:
        self.family = family_of(module)
        self.module = module
        self.config = module.config
        self.processor = processor
        self.cfg = Dims.of(self.config, self.family)
        self.hooks = Vocabulary(
            self.cfg.n_layers,
            self.cfg.n_vision_layers,
            rotary=self.family.language.rotary,
            vision_rotary=self.family.vision.rotary,
        )
        points.attach(module, self.family)
        attention.register(module)
        self.nn = nnsight.NNsight(module)
        points.listen(module, self.nn)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | nn.Module,
        *,
        processor: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> MLLM:
        """Load a model.

        Args:
            source: "tiny" (bundled), a hub id, a local folder, or a transformers module, which is
                then instrumented in place: HookPoints are added and its attention function is
                switched; its numbers stay those of SDPA.
            processor: the transformers processor; found by itself for an id or a folder.
            device: where to put the model, for instance "cuda".
            dtype: of the weights; as they were saved if None.
            revision: of the hub repository.
            trust_remote_code: run code from the model's repository. Off unless asked for.

        Raises:
            ModelNotFound: no such folder, or no model in it.
            NotMultimodal: not a multimodal LLM, or a family without a table.
        """
        module, processor = load(
            source,
            processor=processor,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return cls(module, processor)

    def __repr__(self) -> str:
        c = self.cfg
        return (
            f"MLLM({type(self.module).__name__}: vision {c.n_vision_layers} layers x "
            f"{c.n_vision_heads} heads, LLM {c.n_layers} layers x {c.n_heads} heads, d_model "
            f"{c.d_model}, {next(self.module.parameters()).dtype}, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the model's first weights are."""
        return next(self.module.parameters()).device

    @property
    def n_parameters(self) -> int:
        """How many parameters the model has."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    # -- inputs -----------------------------------------------------------------------------------

    def prepare(self, image: Picture | Sequence[Picture], text: str | Sequence[str]) -> Inputs:
        """Pictures and a question to `Inputs`, through the model's own processor.

        Args:
            image: a PIL image, a uint8 array `[height, width, 3]`, a path; or several, one a row.
            text: the question, one for all rows or one a row; goes through the chat template
                unless it already holds the image placeholder.
        """
        return prepare(self.family, self.config, self._needed_processor(), image, text)

    def _needed_processor(self) -> Any:
        if self.processor is None:
            raise ValueError(
                "this model was loaded without a processor, so it can neither prepare pictures nor "
                "write words; pass one: "
                "MLLM.load(module, processor=AutoProcessor.from_pretrained(...))"
            )
        return self.processor

    def to_device(self, x: Inputs) -> dict[str, Tensor]:
        """The model's inputs on its device, pictures in its precision."""
        dtype = next(self.module.parameters()).dtype
        return {
            name: tensor.to(self.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in x.tensors.items()
        }

    # -- running ----------------------------------------------------------------------------------

    def run(
        self,
        x: Inputs,
        *edits: MaskEdit,
        read: Pattern | None = None,
        logits: bool = True,
        strict: bool = True,
        allow_empty_rows: bool = False,
        mass: bool = True,
    ) -> Run:
        """Run once, with edits, and read.

        Args:
            x: a prepared batch.
            edits: applied in the order given, see `interp.edits`.
            read: hook names to read: a glob, several, or a predicate on names.
            logits: compute them; without, the forward stops after the last hook read.
            strict: raise if an edit changes nothing.
            allow_empty_rows: let an edit leave queries with nothing to attend to.
            mass: put the attention mass of edited edges into the receipts; costs a product of
                queries and keys an edited layer.

        Raises:
            UnknownHook, HeadError, EdgeError, EditHadNoEffect, EmptyRow: see `interp.errors`.
        """
        for edit in edits:
            if not isinstance(edit, MaskEdit):
                raise TypeError(
                    f"{edit!r} is no edit; Knockout(edges) and Unmask(edges) are, and functions go "
                    "through run_with_hooks"
                )
        names = self.hooks.expand(read)
        if not (names or edits or logits):
            raise ValueError("nothing to do: no read, no edit, and logits=False")
        return execute(
            self,
            x,
            edits=edits,
            read=names,
            logits=logits,
            strict=strict,
            allow_empty_rows=allow_empty_rows,
            mass=mass,
        )

    def run_with_cache(
        self, x: Inputs, *edits: MaskEdit, names_filter: Pattern | None = None
    ) -> tuple[Tensor, ActivationCache]:
        """TransformerLens's: the logits, and an `ActivationCache` of the hooks asked for.

        Args:
            x: a prepared batch.
            edits: as in `run`.
            names_filter: glob, names or predicate; None caches every hook but `hook_result`, which
                holds `[batch, pos, head, d_model]` a layer.
        """
        default = lambda name: not name.endswith("hook_result")  # noqa: E731
        run = self.run(x, *edits, read=default if names_filter is None else names_filter)
        assert run.logits is not None
        return run.logits, ActivationCache(run.states, self)

    def run_with_hooks(
        self,
        x: Inputs,
        *edits: MaskEdit,
        fwd_hooks: Sequence[tuple[Pattern, HookFunction]] = (),
    ) -> Tensor:
        """TransformerLens's: the logits under functions `fn(tensor, hook) -> tensor | None`.

        A function that returns None may have edited its tensor in place; either way the edit
        counts. `hook.name` and `hook.layer()` tell where it is.
        """
        functions = [(name, fn) for where, fn in fwd_hooks for name in self.hooks.expand(where)]
        run = execute(self, x, edits=edits, functions=functions)
        assert run.logits is not None
        return run.logits

    def generate(self, x: Inputs, *, max_new_tokens: int = 64, **kwargs: Any) -> list[str]:
        """Answer in words: one text a row, without the prompt. Greedy unless asked otherwise."""
        processor = self._needed_processor()
        kwargs = {"do_sample": False, **kwargs, "max_new_tokens": max_new_tokens}
        with torch.no_grad():
            ids = self.module.generate(**self.to_device(x), **kwargs)  # type: ignore[operator]
        new = ids[:, x.n_pos :]
        return list(processor.batch_decode(new, skip_special_tokens=True))

    # -- nnsight ----------------------------------------------------------------------------------

    def trace(self, x: Inputs) -> Any:
        """A nnsight trace of one forward pass: `with model.trace(x): ...`."""
        return self.nn.trace(**self.to_device(x), use_cache=False)

    def hook(self, name: str) -> Site:
        """A hook inside a trace: `.output` reads it, assigning or editing in place writes it."""
        self.hooks.rank(name)
        name = canonical(name)
        d_head = self.cfg.d_vision_head if name.startswith("vision.") else self.cfg.d_head
        place = self.family.place(name, d_head)
        return Site(name, self.envoy(place.path), place)

    def envoy(self, path: str) -> Any:
        """The nnsight envoy of the module at a dotted path."""
        return envoy_at(self.nn, path)

    # -- what the names mean on this model ---------------------------------------------------------

    def image_tokens(self, name: str, state: Tensor, grid: TokenGrid) -> Tensor:
        """Image tokens of a state, `[n_images, n_tokens, ...]`; see `Run.tokens`.

        Raises:
            ValueError: the hook has no axis of positions (scores, patterns, masks).
        """
        if self.hooks.shape(name).split()[1] not in ("pos", "token"):
            raise ValueError(
                f"{name!r} is [{self.hooks.shape(name)}]: it has no token axis to pick image "
                "tokens from; index it with grid.position"
            )
        if name.startswith("adapter."):
            return state
        if name.startswith("vision."):
            return self.family.vision_tokens(self.config, state)
        return grid.gather(state)

    @cached_property
    def adapter_reads(self) -> str:
        """The stage the adapter really reads; later vision layers are off the path."""
        return f"vision.blocks.{self.family.adapter_reads(self.config)}.hook_resid_post"

    def off_path(self, name: str) -> bool:
        """Whether a hook lies in a vision block behind `adapter_reads`: edits there do nothing."""
        behind = self.hooks.rank(name) > self.hooks.rank(self.adapter_reads)
        return behind and canonical(name).startswith("vision.")

    @property
    def stages(self) -> list[str]:
        """Where segmentation is probed, in order: vision embedding, vision layers, adapter, LLM."""
        vision = [f"vision.blocks.{i}.hook_resid_post" for i in range(self.cfg.n_vision_layers)]
        llm = [f"blocks.{i}.hook_resid_post" for i in range(self.cfg.n_layers)]
        return ["vision.hook_embed", *vision, "adapter.hook_in", "adapter.hook_out", *llm]

    @cached_property
    def W_O(self) -> Tensor:
        """Output projections of the language model, `[layer, head, d_head, d_model]`."""
        weights = [
            module_at(self.module, self.family.block_path(layer, "o")).weight
            for layer in range(self.cfg.n_layers)
        ]
        split = [w.T.unflatten(0, (self.cfg.n_heads, self.cfg.d_head)) for w in weights]  # type: ignore[operator]
        return torch.stack(split).detach()

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, types and bytes of all weights: which model this is."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy().tobytes())
        return digest.hexdigest()
