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

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from interp.edits.base import Edit
from interp.errors import EditHadNoEffect, HeadError, NotHere, UnknownHook
from interp.execution import HookFunction, Run, execute
from interp.generation import Generation, generate
from interp.hooks import Pattern
from interp.inputs import Inputs, Pictures, from_tensors, prepare
from interp.instrumented import Instrumented
from interp.keeping import Keep
from interp.lens.cache import StreamCache
from interp.lens.view import LensView
from interp.loading import load
from interp.many import run_many


class MLLM(Instrumented):
    """A loaded multimodal LLM. Make one with `MLLM.load`.

    What it inherits from `Instrumented`: `module`, `nn`, `processor`, `family`, `hooks`, `cfg`,
    `trace`, `hook`, `stages`.
    """

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | nn.Module,
        *,
        processor: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        attn: str = "interp",
        remote: bool | str = False,
        allow_host: str | Sequence[str] = (),
        transfer: str = "float32",
        **options: Any,
    ) -> MLLM:
        """Load a model, or a model that a server hosts.

        Args:
            source: "tiny" (bundled), a hub id, a local folder, or a transformers module, which is
                then instrumented in place: HookPoints are added and its attention function is
                switched; its numbers stay those of SDPA.
            processor: the transformers processor; found by itself for an id or a folder.
            device: where to put the model, for instance "cuda".
            dtype: of the weights; as they were saved if None.
            trust_remote_code: run code from the model's repository. Off unless asked for.
            attn: "interp", or the stock kernels "sdpa" or "eager", on which mask edits work but the
                hooks inside attention do not exist.
            remote: True or "ndif" for NDIF, "http://127.0.0.1:5001" for a server of one's own;
                these run the model: no weights are loaded here, everything else stays as it is.
                "local" packs requests the same way and runs them here, on a stock model. With
                `remote` the model may be a text-only one.
            allow_host: other servers that are trusted; their results are unpickled, that is, they
                can run code here.
            transfer: "float16" halves what comes back (`model.host.traffic` states the rounding).
            options: passed on to transformers' `from_pretrained`: `revision`, `device_map="auto"`,
                `max_memory`, `quantization_config`, `token`; with `remote`, `limits` of
                `interp.remote`; also `load_in_4bit=True` and
                `load_in_8bit=True`, where bitsandbytes is installed.

        Raises:
            ModelNotFound: no such folder, or no model in it.
            NotMultimodal: not a multimodal LLM, or a family without a table.
        """
        if transfer not in ("float32", "float16"):
            raise ValueError(f'transfer={transfer!r}; "float32" or "float16"')
        if not remote:
            given = {"allow_host": allow_host, "transfer": transfer != "float32"}
            given["limits"] = options.pop("limits", None)
            for name in [name for name, value in given.items() if value]:
                raise ValueError(f"{name}= is about remote models, and remote= is not given")
            module, found = load(
                source,
                processor=processor,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                **options,
            )
            return cls(module, found, attn)
        if attn != "interp":
            raise ValueError(f"attn={attn!r}: a hosted model attends as each request needs it")
        options |= {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        # with what it takes to talk to servers
        from interp.remote.connect import connect

        module, found, host = connect(
            source,
            remote,
            allow_host,
            half=transfer == "float16",
            processor=processor,
            trust_remote_code=trust_remote_code,
            **options,
        )
        return cls(module, found, host=host)

    # -- inputs -----------------------------------------------------------------------------------

    def prepare(
        self,
        image: Pictures | None,
        text: str | Sequence[str],
        **settings: Any,
    ) -> Inputs:
        """Pictures and a question to `Inputs`, through the model's own processor.

        Args:
            image: a PIL image, a uint8 array `[height, width, 3]`, a path; several, one a row; or
                lists of them, the pictures of each row. None for a text-only model.
            text: the question, one for all rows or one a row; goes through the chat template
                unless it already holds the image placeholders. A text-only model takes it as it is.
            settings: of the image processor, for this call (`do_pan_and_scan=True`).
        """
        processor = self.needed_processor()
        return prepare(self.family, self.config, processor, image, text, **settings)

    def inputs(
        self,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        tiles: Sequence[tuple[int, int]] | None = None,
        **tensors: Tensor,
    ) -> Inputs:
        """Ready-made model inputs to the `Inputs` that `prepare` makes, with its grids.

        Args:
            sizes: (width, height) of each original picture, in order of appearance; by default
                what the tensors say, else the pixels that the model is given.
            tiles: (rows, columns) of tiles of each picture, where the tensors do not say it and
                the model has no processor.
            tensors: `input_ids`, `pixel_values`, ... by the names of the model's forward.
        """
        processor = None if tiles is not None else self.processor
        return from_tensors(
            self.family, self.config, tensors, sizes=sizes, tiles=tiles, processor=processor
        )

    # -- running ----------------------------------------------------------------------------------

    def run(
        self,
        x: Inputs,
        *edits: Edit,
        read: Pattern | None = None,
        keep: Keep = None,
        logits: bool = True,
        strict: bool = True,
        allow_empty_rows: bool = False,
        mass: bool = True,
        change: bool = False,
    ) -> Run:
        """Run once, with edits, and read. No gradients; a bare `trace` has them.

        Args:
            x: a prepared batch.
            edits: applied in the order given, see `interp.edits`.
            read: hook names to read: a glob, several, or a predicate on names.
            keep: what of each state: all, its image tokens ("tokens"), the classes that a
                `ProbeBank` reads there, or what a function `fn(state, hook)` makes of it. It is
                made where the model is: only this is held, and comes back from a server.
            logits: compute them; without, the forward stops after the last hook read.
            strict: raise if an edit changes nothing.
            allow_empty_rows: let an edit leave queries with nothing to attend to.
            mass: put the attention mass of edited edges into the receipts; costs a product of
                queries and keys an edited layer.
            change: put the relative change of each edited layer's `hook_z` into them, too.

        Raises:
            UnknownHook, HeadError, EdgeError, EditHadNoEffect, EmptyRow: see `interp.errors`.
        """
        _check_call(x, edits)
        names = self.hooks.expand(read)
        if not (names or edits or logits):
            raise ValueError("nothing to do: no read, no edit, and logits=False")
        if keep is not None and not names:
            raise ValueError("keep= is about what is read, and nothing is: give read=")
        return execute(
            self,
            x,
            edits=edits,
            read=names,
            keep=keep,
            logits=logits,
            strict=strict,
            allow_empty_rows=allow_empty_rows,
            mass=mass,
            change=change,
        )

    def run_many(
        self,
        x: Inputs,
        edits: Iterable[Edit | Sequence[Edit]],
        *,
        read: Pattern | None = None,
        logits: bool = True,
        strict: bool = True,
        allow_empty_rows: bool = False,
        mass: bool = True,
        change: bool = False,
        batch_size: int | None = None,
    ) -> list[Run]:
        """`run` once for each of many edits, in order; what they share is done once.

        Args:
            x: a prepared batch.
            edits: the variants, each an edit or several; an empty list is the clean run.
            read, logits, strict, allow_empty_rows, mass, change: as in `run`.
            batch_size: variants in one forward pass at most (`interp.many`).
        """
        _check_call(x, ())
        return run_many(
            self,
            x,
            edits,
            read=read,
            logits=logits,
            strict=strict,
            allow_empty_rows=allow_empty_rows,
            mass=mass,
            change=change,
            batch_size=batch_size,
        )

    def run_with_cache(
        self,
        x: Inputs,
        *edits: Edit,
        names_filter: Pattern | None = None,
        stop_at_layer: int | None = None,
        remove_batch_dim: bool = False,
    ) -> tuple[Tensor, StreamCache]:
        """TransformerLens's: the logits, and an `ActivationCache` of the hooks asked for.

        Args:
            x: a prepared batch.
            edits: as in `run`.
            names_filter: glob, names or predicate; None caches every hook but `hook_result`, which
                holds `[batch, pos, head, d_model]` a layer.
            stop_at_layer: run only the blocks before this one, and return the residual stream that
                enters it, `[batch, pos, d_model]`, instead of the logits; hooks from there on are
                not cached. Negative numbers count from the end, `n_layers` gives the stream behind
                the last block.
            remove_batch_dim: drop the batch axis of a single row.

        Raises:
            UnknownHook: no such hook, or none before `stop_at_layer`.
            HeadError: no such layer.
        """
        _check_call(x, edits)
        names = self.hooks.expand(_all_but_results if names_filter is None else names_filter)
        if stop_at_layer is None:
            run = execute(self, x, edits=edits, read=names)
            end = run.logits
        else:
            stop = self._stop(stop_at_layer)
            kept = self._before(stop, names)
            if not kept:
                raise UnknownHook(
                    f"{names_filter!r} matches only hooks from {stop!r} on, where "
                    f"stop_at_layer={stop_at_layer} ends the run"
                )
            run = execute(self, x, edits=edits, read=[*kept, stop], logits=False, stop=stop)
            end = run.states[stop] if stop in kept else run.states.pop(stop)
        assert end is not None
        cache = StreamCache(run.states, LensView(self))
        return end, cache.remove_batch_dim() if remove_batch_dim else cache

    def run_with_hooks(
        self,
        x: Inputs,
        *edits: Edit,
        fwd_hooks: Sequence[tuple[Pattern, HookFunction]] = (),
        stop_at_layer: int | None = None,
    ) -> Tensor:
        """TransformerLens's: the logits under functions `fn(tensor, hook) -> tensor | None`.

        A function that returns None may have edited its tensor in place; either way the edit
        counts. `hook.name` and `hook.layer()` tell where it is. `stop_at_layer` is as in
        `run_with_cache`.

        Raises:
            EditHadNoEffect: a function that would act from `stop_at_layer` on only.
        """
        _check_call(x, edits)
        stop = None if stop_at_layer is None else self._stop(stop_at_layer)
        functions: list[tuple[str, HookFunction]] = []
        for where, function in fwd_hooks:
            names = self.hooks.expand(where)
            if stop is not None:
                names = self._before(stop, names)
                if not names:
                    raise EditHadNoEffect(
                        f"the function at {where!r} acts only from {stop!r} on, where "
                        f"stop_at_layer={stop_at_layer} ends the run"
                    )
            functions += [(name, function) for name in names]
        read = [] if stop is None else [stop]
        run = execute(
            self, x, edits=edits, read=read, functions=functions, logits=stop is None, stop=stop
        )
        end = run.logits if stop is None else run.states[stop]
        assert end is not None
        return end

    def _stop(self, layer: int) -> str:
        """The hook whose value `stop_at_layer` returns."""
        n_layers = self.cfg.n_layers
        if not -n_layers <= layer <= n_layers:
            raise HeadError(
                f"stop_at_layer={layer}: the model has {n_layers} layers, -{n_layers} to "
                f"{n_layers} would do"
            )
        if layer == n_layers:
            return f"blocks.{n_layers - 1}.hook_resid_post"
        return f"blocks.{layer % n_layers}.hook_resid_pre"

    def _before(self, stop: str, names: Sequence[str]) -> list[str]:
        """Names that a run which ends at `stop` still reaches, as TransformerLens has it."""
        last = self.hooks.rank(stop) - stop.endswith("resid_pre")
        return [name for name in names if self.hooks.rank(name) <= last]

    def bridge(self) -> Any:
        """The same weights, not copied, as a TransformerLens `TransformerBridge`.

        `interp.lens.bridge` says what is right and what is wrong on it.

        Raises:
            NoBridge: TransformerLens does not know the family, or the weights cannot be shared.
        """
        self.require_weights("a bridge")
        from interp.lens.bridge import bridge  # TransformerLens's bridges take seconds to import

        return bridge(self)

    @overload
    def generate(
        self, x: Inputs, *edits: Edit, details: Literal[False] = False, **settings: Any
    ) -> list[str]: ...
    @overload
    def generate(
        self, x: Inputs, *edits: Edit, details: Literal[True], **settings: Any
    ) -> Generation: ...
    def generate(
        self,
        x: Inputs,
        *edits: Edit,
        max_new_tokens: int = 64,
        seed: int | None = None,
        details: bool = False,
        **settings: Any,
    ) -> list[str] | Generation:
        """Answer in words: one text a row, without the prompt. Greedy unless asked otherwise.

        Args:
            x: a prepared batch.
            edits: mask edits; an edge stays cut while the answer is written, and
                `interp.generation.answer_edges` makes edges to positions written later.
            max_new_tokens: of the answer.
            seed: of the draws, with `do_sample=True`.
            details: return ids, logits and receipts, too.
            settings: `interp.generation.generate` documents them.
        """
        _check_call(x, edits)
        if self.host is not None:
            raise NotHere(
                "generate is not sent to servers yet: model.run(x, *edits).logits[:, -1] are the "
                "logits of the next token; or load the model without remote="
            )
        if not details:
            self.needed_processor()
        made = generate(self, x, edits, max_new_tokens=max_new_tokens, seed=seed, **settings)
        return made if details else list(made.texts or [])


def _all_but_results(name: str) -> bool:
    return not name.endswith("hook_result")


def _check_call(x: Any, edits: Sequence[Any]) -> None:
    """The two slips of the first day, told by name."""
    if not isinstance(x, Inputs):
        raise TypeError(
            f"{type(x).__name__} is no prepared batch; x = model.prepare(image, text) makes one"
        )
    for edit in edits:
        if not isinstance(edit, Edit):
            hint = "functions go through run_with_hooks(x, fwd_hooks=[(name, fn)])"
            if isinstance(edit, str):
                hint = "to read hooks pass read=..."
            elif isinstance(edit, list) and all(isinstance(one, Edit) for one in edit):
                hint = "give edits one by one, or as *edits"
            raise TypeError(f"{edit!r} is no edit; Knockout(edges) and Ablate(hook) are; {hint}")
