"""A model with names for everything inside it: hooks, envoys, sizes, stages.

`Instrumented` is what `interp.execution` runs and what `MLLM` is built on. Making one changes the
transformers module in place: HookPoints are hung into it (`interp.points`), its attention goes
through `interp.attention`, and nnsight wraps it. Its numbers stay those of SDPA.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import nnsight
import torch
from torch import nn

from interp import attention, points
from interp.dims import Dims
from interp.errors import NotHere
from interp.families import family_of
from interp.families.text import LanguageHooks
from interp.hooked import FIRST, Hooked, first_device
from interp.hooks import Vocabulary
from interp.inputs import Inputs
from interp.stock import lacking, require_stock
from interp.weights import BlockWeights, LanguageWeights, VisionWeights


class Traced(nnsight.NNsight):
    """nnsight's wrapper, which would send inputs to the first parameter's device, be it meta."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return first_device(self._module)


class Instrumented(Hooked, LanguageWeights):
    """A transformers module under nnsight, with hooks by name.

    Attributes beside those of `Hooked`:
        config: the transformers configuration.
        processor: its transformers processor, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        processor: Any = None,
        attn: str = attention.NAME,
        host: Any = None,
    ) -> None:
        self.family = family_of(module) if host is None else family_of(module, hosted=True)
        self.family.check(module)
        self.module, self.processor, self.host = module, processor, host
        self.config = module.config
        self.stock = host is not None
        self.cfg = Dims.of(module, self.family)
        self.deepstack = self.family.deepstack_reads(self.config)
        n, n_vision = self.cfg.n_layers, self.cfg.n_vision_layers
        vocabulary = Vocabulary if self.family.has_vision else LanguageHooks
        self.hooks = vocabulary(
            n,
            n_vision,
            parts=self.family.language.parts,
            vision_parts=self.family.vision.parts,
            deepstack=self.deepstack,
            vision_ln_final=bool(self.family.vision.final_norm),
            lacks=lacking(self.family, n, n_vision) if self.stock else None,
        )
        states = sorted({i % (n_vision + 1) for i in self.family.adapter_reads(self.config)})
        self.vision_reads = tuple(
            f"vision.blocks.{i - 1}.hook_resid_post" if i else FIRST for i in states
        )
        if host is None:
            points.attach(module, self.family)
            attention.register(module, self.family, attn)
            self.nn = Traced(module)
            points.listen(module, self.nn)
        else:
            self.nn = host.wrap(module)
        self.ready()

    def __deepcopy__(self, memo: dict[int, Any]) -> Instrumented:
        """Another model with weights of its own, and hooks that are its own."""
        module = copy.deepcopy(self.module, memo)
        return type(self)(module, self.processor, attention.kernel(self.module) or attention.NAME)

    def __repr__(self) -> str:
        c = self.cfg
        vision = "no vision tower"
        if self.family.has_vision:
            vision = f"vision {c.n_vision_layers} layers x {c.n_vision_heads} heads"
        where = self.host.where if self.host else self.device
        return (
            f"MLLM({type(self.module).__name__}: {vision}, LLM {c.n_layers} layers x "
            f"{c.n_heads} heads, d_model {c.d_model}, {self.dtype}, {where})"
        )

    @property
    def n_parameters(self) -> int:
        """How many parameters the model has."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    # -- nnsight ----------------------------------------------------------------------------------

    def trace(self, x: Inputs, *, attn: str = "sdpa") -> Any:
        """A nnsight trace of one forward pass: `with model.trace(x): ...`.

        Args:
            x: a prepared batch.
            attn: the kernel on a hosted model; "eager" gives patterns.
        """
        tensors = self.to_device(x)
        if self.host is None:
            return self.nn.trace(**tensors, use_cache=False)
        return self.host.trace(self, tensors, attn)

    def require(self, names: Iterable[str], *, edited: bool = False) -> None:
        """Raise unless these hooks can be had here, as values or to be edited.

        Args:
            names: canonical hook names.
            edited: whether they are to be edited.

        Raises:
            UnknownHook: naming what would do.
        """
        if self.stock:
            require_stock(names, edited=edited)
        else:
            attention.require(self.module, names)

    @property
    def has_weights(self) -> bool:
        """Whether the weights are here. Not with `remote="local"` either, lest what works there
        fail on a server."""
        return self.host is None

    def require_weights(self, what: str) -> None:
        """Raise for something that needs the weights, if a server has them.

        Raises:
            NotHere: naming `what`.
        """
        if not self.has_weights:
            raise NotHere(
                f"{what} needs the model's weights here, and {self.host!r} has them: load the "
                "model without remote="
            )

    @property
    def blocks(self) -> Sequence[BlockWeights]:
        """Weights of the language model block by block: `blocks[3].attn.W_O`."""
        self.require_weights("a weight")
        return LanguageWeights.blocks.fget(self)  # type: ignore[attr-defined]

    # -- weights and such --------------------------------------------------------------------------

    @property
    def vision(self) -> VisionWeights:
        """The vision tower's weights: `model.vision.W_Q`.

        Raises:
            NotMultimodal: a text-only model.
        """
        self.family.require_vision()
        return VisionWeights(self.module, self.family, self.cfg)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; of a text-only model the processor is one.

        Raises:
            ValueError: the model was loaded without a processor.
        """
        processor = self.needed_processor()
        return getattr(processor, "tokenizer", processor)

    def needed_processor(self) -> Any:
        """The processor, or an error that says how to give one."""
        if self.processor is None:
            raise ValueError(
                "this model was loaded without a processor, so it can neither prepare pictures nor "
                "write words; pass one: "
                "MLLM.load(module, processor=AutoProcessor.from_pretrained(...))"
            )
        return self.processor

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, types and bytes of all weights: which model this is."""
        self.require_weights("a fingerprint")
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy().tobytes())
        return digest.hexdigest()
