"""A model as code beside its forward pass sees it: hooks by name, sizes, grids, one run at a time.

`Hooked` is what runs, edits and attributions are written against. It comes in two ways:

* `interp.instrumented.Instrumented` prepares a transformers module in this process: HookPoints are
  hung into it, so that every hook of the vocabulary is there;
* a model that a server hosts is *stock*, as transformers made it. There the same code runs on a
  `Hooked` that `interp.remote` makes on the server; hooks are places that a stock model has too,
  or are worked out from such (`interp.stock`).

So this module is shipped to servers by its source: it imports nothing that a server lacks, and
calls neither `super()` nor an import of its own inside a function.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from interp.dims import Dims
from interp.errors import AlreadyRunning
from interp.families.base import Family
from interp.hooks import Vocabulary, canonical
from interp.inputs import Inputs
from interp.path import Path
from interp.sites import Site, envoy_at
from interp.stock import Given, inside, stock_site
from interp.tokens import TokenGrid

FIRST = "vision.blocks.0.hook_resid_pre"


def first_device(module: nn.Module) -> torch.device:
    """Where the first weights are that are anywhere: offloaded ones are not."""
    there = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
    return next(there, torch.device("cpu"))  # all offloaded: accelerate takes inputs from there


class Hooked:
    """A model with names for everything inside it.

    Attributes:
        module: the transformers model.
        nn: the nnsight model around it.
        family: its family table.
        hooks: its hook names, in execution order.
        cfg: its sizes.
        vision_reads: the vision stages that the adapter reads: one, or several, concatenated.
        deepstack: the vision blocks that extra mergers read, in their order.
        stock: whether it is as transformers made it, without HookPoints.
        host: where its forward passes run, if that is not here (`interp.remote.host.Host`).
    """

    module: nn.Module
    nn: Any
    family: Family
    hooks: Vocabulary
    cfg: Dims
    vision_reads: tuple[str, ...]
    deepstack: tuple[int, ...]
    stock: bool = False
    host: Any = None

    def ready(self) -> None:
        """Set up what belongs to this process; once the attributes are there."""
        self._lock, self._runner, self._given = threading.Lock(), 0, Given()

    # -- one run at a time ------------------------------------------------------------------------

    def begin(self) -> None:
        """Take the model for one run; other threads wait until `end`.

        Raises:
            AlreadyRunning: by this very thread, from within a hook function.
        """
        if self._runner == threading.get_ident():
            raise AlreadyRunning(
                "this model is running already, and a hook function cannot run it again; run the "
                "other batch first, and keep what you need of it"
            )
        self._lock.acquire()
        self._runner = threading.get_ident()

    def end(self) -> None:
        """Give the model back."""
        self._runner = 0
        self._lock.release()

    # -- where it is ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model's first weights are."""
        return first_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; of quantised ones, what they are computed in."""
        return self.module.dtype  # type: ignore[return-value]

    def to_device(self, x: Inputs) -> dict[str, Tensor]:
        """The model's inputs on its device, pictures in its precision."""
        dtype = self.dtype
        return {
            name: tensor.to(self.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in x.tensors.items()
        }

    # -- hooks ------------------------------------------------------------------------------------

    def hook(self, name: str) -> Any:
        """A hook inside a trace: `.output` reads it, assigning or editing in place writes it."""
        self.hooks.rank(name)
        name = canonical(name)
        self.require([name])
        d_head = self.cfg.d_vision_head if name.startswith("vision.") else self.cfg.d_head
        if self.stock and (site := stock_site(self, name, d_head, self._given)) is not None:
            return site
        place = self.family.place(name, d_head, stock=self.stock)
        return Site(
            name,
            self.envoy(place.path),
            place,
            off_path=self.off_path(name),
            shared=name in self._shared(),
        )

    def require(self, names: Iterable[str], *, edited: bool = False) -> None:
        """Make ready for hooks that a pass is going to read or edit; raise if it cannot be."""
        if self.stock:
            for path in sorted(inside(self, names)):
                self.envoy(path).source  # noqa: B018  (nnsight rewrites the forward at first sight)

    def untouched(self) -> None:
        """At the end of a trace: raise if a value that is only read was edited in place."""
        self._given.check()

    def envoy(self, path: str) -> Any:
        """The nnsight envoy of the module at a dotted path."""
        return envoy_at(self.nn, path)

    def submodule(self, path: str) -> Any:
        """The module itself at a dotted path."""
        return self.module.get_submodule(path)

    # -- what the names mean on this model ---------------------------------------------------------

    def grid_of(self, name: str, x: Inputs) -> TokenGrid:
        """Where the pieces of the pictures lie in a hook's tensor.

        In the language model these are its image tokens, in the vision tower its patches (as many,
        or several a token), behind the adapter its vectors.

        Raises:
            ValueError: the hook has no axis of tokens (scores, patterns, masks), or holds other
                things there.
            NotMultimodal: a text-only model.
        """
        self.family.require_vision()
        name = canonical(name)
        if self.hooks.shape(name).split()[1] not in ("pos", "token"):
            raise ValueError(
                f"{name!r} is [{self.hooks.shape(name)}]: it has no token axis to pick image "
                "tokens from; index it with grid.position"
            )
        if name == "hook_embed":
            raise ValueError(
                "hook_embed holds placeholders at the image tokens, which are then overwritten; "
                "read adapter.hook_out or blocks.0.hook_resid_pre"
            )
        if name == "vision.hook_embed" and self.family.vision.reordered:
            raise ValueError(
                f"{self.family.name} reorders its patches into windows behind vision.hook_embed; "
                f"read {FIRST}"
            )
        by_patch = name.startswith("vision.")
        if name == "adapter.hook_in" and self.family.merges_in_adapter:
            by_patch = True
        if by_patch:
            return x.patches
        if not name.startswith(("adapter.", "deepstack.")):
            return x.grid
        return x.adapter

    def path(self) -> Path:
        """What the adapter reads, what deepstack adds, which vision blocks lead nowhere.

        Raises:
            NotMultimodal: a text-only model.
        """
        self.family.require_vision()
        return Path(
            adapter_reads=self.vision_reads,
            through_norm=bool(self.family.vision.final_norm),
            deepstack=tuple(
                (f"vision.blocks.{i}.hook_resid_post", f"deepstack.{k}.hook_out", _after(k))
                for k, i in enumerate(self.deepstack)
            ),
            off_path=tuple(
                i
                for i in range(self.cfg.n_vision_layers)
                if self.off_path(f"vision.blocks.{i}.hook_resid_post")
            ),
        )

    def _shared(self) -> set[str]:
        """Inputs of vision blocks that the adapter reads too, being outputs of the block before."""
        layers = [int(name.split(".")[2]) for name in self.vision_reads if name != FIRST]
        return {f"vision.blocks.{layer + 1}.hook_resid_pre" for layer in layers}

    @property
    def adapter_reads(self) -> str:
        """The last stage that the adapter reads; later vision blocks are off the path. Empty if
        there is no adapter."""
        return self.vision_reads[-1] if self.vision_reads else ""

    def off_path(self, name: str) -> bool:
        """Whether a hook lies in a vision block behind `adapter_reads`: edits there do nothing."""
        name = canonical(name)
        rank = self.hooks.rank(name)
        return name.startswith("vision.blocks.") and rank > self.hooks.rank(self.adapter_reads)

    @property
    def stages(self) -> list[str]:
        """Where segmentation is probed, in order: vision embedding, vision layers, adapter, LLM.

        Raises:
            NotMultimodal: a text-only model.
        """
        self.family.require_vision()
        first = FIRST if self.family.vision.reordered else "vision.hook_embed"
        vision = [f"vision.blocks.{i}.hook_resid_post" for i in range(self.cfg.n_vision_layers)]
        llm = [f"blocks.{i}.hook_resid_post" for i in range(self.cfg.n_layers)]
        return [first, *vision, "adapter.hook_in", "adapter.hook_out", *llm]


def _after(merger: int) -> str:
    return f"blocks.{merger}.hook_resid_post"
