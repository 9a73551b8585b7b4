"""A model with names for everything inside it: hooks, envoys, sizes, stages.

`Instrumented` is what `interp.execution` runs and what `MLLM` is built on. Making one changes the
transformers module in place: HookPoints are hung into it (`interp.points`), its attention goes
through `interp.attention`, and nnsight wraps it. Its numbers stay those of SDPA.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from functools import cached_property
from typing import Any

import nnsight
import torch
from torch import Tensor, nn

from interp import attention, points
from interp.dims import Dims
from interp.errors import AlreadyRunning
from interp.families import family_of
from interp.hooks import Vocabulary, canonical
from interp.inputs import Inputs
from interp.path import Path
from interp.sites import Site, envoy_at
from interp.tokens import TokenGrid
from interp.weights import LanguageWeights, VisionWeights

FIRST = "vision.blocks.0.hook_resid_pre"


def _after(merger: int) -> str:
    return f"blocks.{merger}.hook_resid_post"


def first_device(module: nn.Module) -> torch.device:
    """Where the first weights are that are anywhere: offloaded ones are not."""
    there = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
    return next(there, torch.device("cpu"))  # all offloaded: accelerate takes inputs from there


class Traced(nnsight.NNsight):
    """nnsight's wrapper, which would send inputs to the first parameter's device, be it meta."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return first_device(self._module)


class Instrumented(LanguageWeights):
    """A transformers module under nnsight, with hooks by name.

    Attributes:
        module: the transformers model, in eval mode, attending through `interp.attention`.
        nn: the nnsight model around it.
        processor: its transformers processor, or None.
        family: its family table.
        hooks: its hook names, in execution order.
        cfg: its sizes.
    """

    def __init__(
        self, module: nn.Module, processor: Any = None, attn: str = attention.NAME
    ) -> None:
        self.family = family_of(module)
        self.family.check(module)
        self.module = module
        self.config = module.config
        self.processor = processor
        self.cfg = Dims.of(module, self.family)
        self.hooks = Vocabulary(
            self.cfg.n_layers,
            self.cfg.n_vision_layers,
            parts=self.family.language.parts,
            vision_parts=self.family.vision.parts,
            deepstack=self.family.deepstack_reads(self.config),
            vision_ln_final=bool(self.family.vision.final_norm),
        )
        points.attach(module, self.family)
        attention.register(module, self.family, attn)
        self.nn = Traced(module)
        points.listen(module, self.nn)

        self._lock, self._runner = threading.Lock(), 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Instrumented:
        """Another model with weights of its own, and hooks that are its own."""
        module = copy.deepcopy(self.module, memo)
        return type(self)(module, self.processor, attention.kernel(self.module) or attention.NAME)

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

    def __repr__(self) -> str:
        c = self.cfg
        return (
            f"MLLM({type(self.module).__name__}: vision {c.n_vision_layers} layers x "
            f"{c.n_vision_heads} heads, LLM {c.n_layers} layers x {c.n_heads} heads, d_model "
            f"{c.d_model}, {self.dtype}, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the model's first weights are."""
        return first_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; of quantised ones, what they are computed in."""
        return self.module.dtype  # type: ignore[return-value]

    @property
    def n_parameters(self) -> int:
        """How many parameters the model has."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def to_device(self, x: Inputs) -> dict[str, Tensor]:
        """The model's inputs on its device, pictures in its precision."""
        dtype = self.dtype
        return {
            name: tensor.to(self.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in x.tensors.items()
        }

    # -- nnsight ----------------------------------------------------------------------------------

    def trace(self, x: Inputs) -> Any:
        """A nnsight trace of one forward pass: `with model.trace(x): ...`."""
        return self.nn.trace(**self.to_device(x), use_cache=False)

    def hook(self, name: str) -> Site:
        """A hook inside a trace: `.output` reads it, assigning or editing in place writes it."""
        self.hooks.rank(name)
        name = canonical(name)
        attention.require(self.module, [name])
        d_head = self.cfg.d_vision_head if name.startswith("vision.") else self.cfg.d_head
        place = self.family.place(name, d_head)
        return Site(
            name,
            self.envoy(place.path),
            place,
            off_path=self.off_path(name),
            shared=name in self._shared,
        )

    def envoy(self, path: str) -> Any:
        """The nnsight envoy of the module at a dotted path."""
        return envoy_at(self.nn, path)

    # -- what the names mean on this model ---------------------------------------------------------

    def grid_of(self, name: str, x: Inputs) -> TokenGrid:
        """Where the pieces of the pictures lie in a hook's tensor.

        In the language model these are its image tokens, in the vision tower its patches (as many,
        or several a token), behind the adapter its vectors.

        Raises:
            ValueError: the hook has no axis of tokens (scores, patterns, masks), or holds other
                things there.
        """
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
        """What the adapter reads, what deepstack adds, which vision blocks lead nowhere."""
        reads = self.family.deepstack_reads(self.config)
        return Path(
            adapter_reads=self.vision_reads,
            through_norm=bool(self.family.vision.final_norm),
            deepstack=tuple(
                (f"vision.blocks.{i}.hook_resid_post", f"deepstack.{k}.hook_out", _after(k))
                for k, i in enumerate(reads)
            ),
            off_path=tuple(
                i
                for i in range(self.cfg.n_vision_layers)
                if self.off_path(f"vision.blocks.{i}.hook_resid_post")
            ),
        )

    @cached_property
    def vision_reads(self) -> tuple[str, ...]:
        """The vision stages that the adapter reads: one, or several that are concatenated."""
        n = self.cfg.n_vision_layers
        states = sorted({i % (n + 1) for i in self.family.adapter_reads(self.config)})
        return tuple(f"vision.blocks.{i - 1}.hook_resid_post" if i else FIRST for i in states)

    @cached_property
    def _shared(self) -> set[str]:
        """Inputs of vision blocks that the adapter reads too, being outputs of the block before."""
        layers = [int(name.split(".")[2]) for name in self.vision_reads if name != FIRST]
        return {f"vision.blocks.{layer + 1}.hook_resid_pre" for layer in layers}

    @property
    def adapter_reads(self) -> str:
        """The last stage that the adapter reads; later vision blocks are off the path."""
        return self.vision_reads[-1]

    def off_path(self, name: str) -> bool:
        """Whether a hook lies in a vision block behind `adapter_reads`: edits there do nothing."""
        name = canonical(name)
        behind = self.hooks.rank(name) > self.hooks.rank(self.adapter_reads)
        return behind and name.startswith("vision.blocks.")

    @property
    def stages(self) -> list[str]:
        """Where segmentation is probed, in order: vision embedding, vision layers, adapter, LLM."""
        first = FIRST if self.family.vision.reordered else "vision.hook_embed"
        vision = [f"vision.blocks.{i}.hook_resid_post" for i in range(self.cfg.n_vision_layers)]
        llm = [f"blocks.{i}.hook_resid_post" for i in range(self.cfg.n_layers)]
        return [first, *vision, "adapter.hook_in", "adapter.hook_out", *llm]

    @property
    def vision(self) -> VisionWeights:
        """The vision tower's weights: `model.vision.W_Q`."""
        return VisionWeights(self.module, self.family, self.cfg)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer.

        Raises:
            ValueError: the model was loaded without a processor.
        """
        return self.needed_processor().tokenizer

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
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy().tobytes())
        return digest.hexdigest()
