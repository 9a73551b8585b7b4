"""A study of heads on a dataset: probes, attribution, a run folder (`interp heads`).

Probes for two stages are fitted on one split; the heads between these stages are attributed on
another. What comes out is a `HeadTable` with everything needed to look at it again:

    heads.parquet                 the table: head, source group, image; strongest edges
    heatmap.html                  layers x heads
    probes.safetensors            the frozen probes
    summary.json, manifest.json   what was asked, what it cost, how far to trust it
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from interp.attribution.asking import kinds, last_stage, layers_between
from interp.attribution.cost import Cost
from interp.attribution.heads import METHODS, OnStep, head_attribution
from interp.attribution.screen import attribute
from interp.attribution.table import HeadTable
from interp.datasets import open_data
from interp.model import MLLM
from interp.probes import ProbeBank
from interp.probes.parts import QUESTION
from interp.runs import RunFolder
from interp.studies.split import Split
from interp.studies.study import at_one_size, few_of

SCREEN = "screen"


@dataclass(frozen=True)
class HeadArguments:
    """Everything that decides a head study's numbers, besides model and data themselves.

    Attributes:
        model: as it was given on the command line, or a name for a module.
        data: the dataset.
        method: "screen", or one of `head_attribution`.
        start, end: stages between which heads are looked at; the last block if `end` is None.
        sources: groups of source tokens: "region", "place", "whole", or one group.
        budget: of "screen", the share of heads and groups that is verified exactly.
        n_probe, n_test: images the probes are fitted on, and images the heads are attributed on.
        batch_size: images in one forward pass.
        edges: strongest edges kept of each image.
        memory: GB beyond the weights that exact effects may use, or None.
        resize: (width, height) that pictures are brought to first, or None.
        seed: of every random draw.
    """

    model: str
    data: str = "scenes"
    method: str = SCREEN
    start: str = "adapter.hook_out"
    end: str | None = None
    sources: str = "region"
    budget: float = 0.05
    n_probe: int = 200
    n_test: int = 60
    batch_size: int = 20
    edges: int = 50
    memory: float | None = None
    resize: tuple[int, int] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Asked:
    """What `head_attribution` is asked with.

    Attributes:
        batches: prepared pictures.
        labels: `[n_images, n_tokens]`.
        bank: probes at both stages.
    """

    batches: tuple[Any, ...]
    labels: np.ndarray
    bank: ProbeBank


def check(model: MLLM, arguments: HeadArguments) -> None:
    """Raise for arguments that cannot be, before anything is run or written.

    Raises:
        DataWrong: data that are not there, or not as they should be.
        ValueError: a method, sources or a stage that there is not.
    """
    a = arguments
    if a.method not in (SCREEN, *METHODS):
        raise ValueError(f"method={a.method!r}; there are {SCREEN}, {', '.join(METHODS)}")
    if a.batch_size < 1 or a.n_probe < 2 or a.n_test < 2:
        raise ValueError(
            f"n_probe={a.n_probe}, n_test={a.n_test}, batch_size={a.batch_size}: at least 2 images "
            "of each, and 1 in a batch"
        )
    open_data(a.data)
    kinds(a.sources, by_labels=True)
    layers_between(model, a.start, a.end or last_stage(model))


def prepare(model: MLLM, arguments: HeadArguments) -> Asked:
    """Fit the probes, prepare the pictures."""
    a = arguments
    check(model, a)
    data = few_of(at_one_size(open_data(a.data), a.resize), (a.n_probe, a.n_test), a.seed)
    probe, test = (
        Split.prepare(model, split, n, QUESTION, batch_size=a.batch_size)
        for split, n in zip(data, (a.n_probe, a.n_test), strict=True)
    )
    end = a.end or last_stage(model)
    bank = probe.fit([a.start, end])
    return Asked(test.batches, test.labels, bank)


def head_table(
    model: MLLM,
    asked: Asked,
    arguments: HeadArguments,
    *,
    dry_run: bool = False,
    on_step: OnStep | None = None,
) -> HeadTable | Cost:
    """Attribute; or with `dry_run` say what that costs."""
    a = arguments
    options: dict[str, Any] = {
        "labels": asked.labels,
        "start": a.start,
        "end": a.end,
        "sources": a.sources,
        "dry_run": dry_run,
        "on_step": on_step,
    }
    if a.method == SCREEN:
        options |= {"budget": a.budget, "memory": a.memory, "edges": a.edges, "seed": a.seed}
        return attribute(model, asked.batches, asked.bank, **options)
    options |= {"memory": a.memory} if a.method == "exact" else {"edges": a.edges}
    return head_attribution(model, asked.batches, asked.bank, method=a.method, **options)


def head_study(
    model: MLLM,
    out: str | Path,
    arguments: HeadArguments,
    *,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> HeadTable:
    """Run a head study and write `out`; returns the table.

    Args:
        model: the model under study.
        out: the run folder; see `RunFolder.create` for when an existing one is refused.
        arguments: what decides the numbers.
        overwrite: replace another run's files in `out`.
        on_step: called with (steps done, steps in all).
    """
    check(model, arguments)
    folder = RunFolder.create(out, "heads", asdict(arguments), overwrite=overwrite)
    asked = prepare(model, arguments)
    table = head_table(model, asked, arguments, on_step=on_step)
    assert isinstance(table, HeadTable)
    for name, write in (
        ("heads.parquet", table.save),
        ("probes.safetensors", asked.bank.save),
        ("heatmap.html", table.heatmap().write_html),
    ):
        with folder.writing(name) as path:
            write(path)
    top = table.top(10).to_dict("records")
    folder.write_json("summary.json", {"about": table.about, "top": top})
    data = at_one_size(open_data(arguments.data), arguments.resize).test
    which = model.fingerprint() if model.has_weights else f"hosted: {model.host.key}"
    folder.finish(fingerprints={"model": which, "test_data": data.fingerprint()})
    return table
