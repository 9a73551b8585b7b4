"""Layerwise probes of any model on any data: the study behind `interp probe`.

    open the data -> fit a probe a stage -> score them on other pictures -> tables, probes, report

Nothing is kept of the pictures but sums, so memory does not grow with their number, and processes
(`torchrun`) share them out and add up. What comes out is a run folder:

    tables/stages.parquet        the curve: accuracy, mean accuracy, token-mIoU, pixel-mIoU
    tables/groups.parquet        the same by where tokens lie: boundary, interior, early, late
    tables/classes.parquet       IoU, accuracy and counts of each class at each stage
    tables/map.parquet           accuracy by place in the picture
    tables/confusion.parquet     what was said instead of what
    tables/penalties.parquet     how each penalty did on held-out tokens (`ridge`)
    probes.safetensors           the probes
    summary.json, manifest.json, report.html

With `controls` two more kinds of stage are in the tables: random features of each width, which must
stay at the floor, and probes of the same states fitted on shuffled labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp.datasets import Data, open_data
from interp.errors import Untestable
from interp.model import MLLM
from interp.probes.fitting import Fitted, Fitting
from interp.probes.parts import QUESTION, DataParts
from interp.probes.reading import NOISE, ModelStream
from interp.probes.scores import CEILING, FLOOR, Scores
from interp.probes.scoring import bank_rows, score
from interp.report import write_report
from interp.runs import RunFolder
from interp.studies.recovery import MEASURES, REFERENCE
from interp.studies.stages import kind_of, label
from interp.studies.study import at_one_size
from interp.world import World

SHUFFLED = ", shuffled labels"
MAP = 24  # rows and columns that places in pictures are told apart by, at most

#: called with the name of a step and how many pictures more are done
OnStep = Callable[[str, int], None]


@dataclass(frozen=True)
class ProbeArguments:
    """Everything that decides a probe run's numbers, besides model and data themselves.

    Attributes:
        model: as it was given on the command line, or a name for a module.
        data: the dataset, as `interp.datasets.open_data` takes it.
        stages: hook names or patterns; the model's own stages if empty.
        fitting: how probes are fitted.
        limit: pictures that are fitted on, drawn with the seed; all if None.
        limit_test: pictures that are scored; all if None.
        pixels: whether pixels are scored, too, in the pictures' own sizes.
        soft: whether a token's target is the share of each class in it.
        controls: random features and shuffled labels.
        resize: (width, height) that pictures are brought to first, or None.
        question: the prompt.
        batch_size: pictures in one forward pass.
        n_boot: replicates behind each interval.
        seed: of every random draw.
    """

    model: str
    data: str = "scenes"
    stages: tuple[str, ...] = ()
    fitting: Fitting = field(default_factory=Fitting)
    limit: int | None = None
    limit_test: int | None = None
    pixels: bool = True
    soft: bool = False
    controls: bool = False
    resize: tuple[int, int] | None = None
    question: str = QUESTION
    batch_size: int = 8
    n_boot: int = 1000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Asked:
    """Streams of a probe run.

    Attributes:
        data: both splits.
        fit, test: what probes are fitted on, and what they are scored on.
        pictures: how many of each.
    """

    data: Data
    fit: ModelStream
    test: ModelStream
    pictures: tuple[int, int]


def prepare(model: MLLM, arguments: ProbeArguments) -> Asked:
    """Open the data; nothing is run yet.

    Raises:
        DataWrong: data that are not there, or not as they should be.
        HookNotFound: stages that the model lacks.
        ValueError: more pictures asked for than there are.
    """
    a = arguments
    data = at_one_size(open_data(a.data), a.resize)
    if data.fit.classes != data.test.classes:
        raise ValueError(f"the splits of {a.data} do not have the same classes")
    sources = []
    for split, limit in zip(data, (a.limit, a.limit_test), strict=True):
        n = len(split) if limit is None else min(limit, len(split))
        # a penalty is chosen by batches that are left out: few pictures make ten, all the same
        size = min(a.batch_size, max(1, n // 10)) if split is data.fit else a.batch_size
        sources.append(
            DataParts(
                model, split, n, question=a.question, batch_size=size, shuffle=True, seed=a.seed
            )
        )
    a.fitting.check(sources[0].n_parts)
    # noise of its own for each split: a probe must not know the noise that it is scored on
    fit, test = (
        ModelStream(
            model, source, a.stages or None, soft=a.soft, noise=a.controls, seed=2 * a.seed + number
        )
        for number, source in enumerate(sources)
    )
    return Asked(data, fit, test, (sources[0].n, sources[1].n))


def probe_study(
    model: MLLM,
    out: str | Path,
    arguments: ProbeArguments,
    *,
    overwrite: bool = False,
    world: World | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Fit and score, and write `out` (the first process does); returns the summary.

    Args:
        model: the model under study.
        out: the run folder; see `RunFolder.create` for when an existing one is refused.
        arguments: what decides the numbers.
        overwrite: replace another run's files in `out`.
        world: processes that share the work.
        on_step: called as pictures are done.
    """
    a, world = arguments, world or World()
    asked = prepare(model, a)
    folder = None
    if world.first:
        folder = RunFolder.create(out, "probe", asdict(a), overwrite=overwrite)
    if on_step is not None:
        for step, stream in (("fitting", asked.fit), ("scoring", asked.test)):
            stream.on_run = partial(on_step, step)
    fitted = a.fitting.fit(
        asked.fit,
        shuffled=a.controls,
        seed=a.seed,
        world=world,
    )
    scores = _score(asked.test, fitted, a, world)
    summary = _summary(model, asked, fitted, scores, a)
    if folder is None:
        return summary
    for name, table in _tables(model, fitted, scores).items():
        folder.write_table(name, table)
    with folder.writing("probes.safetensors") as path:
        fitted.bank.save(path)
    folder.write_json("summary.json", summary)
    which = model.fingerprint() if model.has_weights else f"hosted: {model.host.key}"
    prints = {"fit_data": asked.data.fit.fingerprint(), "test_data": asked.data.test.fingerprint()}
    folder.note(seed=a.seed, fingerprints={"model": which, **prints})
    write_report(folder)
    folder.finish()
    return summary


def _score(stream: ModelStream, fitted: Fitted, a: ProbeArguments, world: World) -> Scores:
    rows = bank_rows(fitted.bank)
    if fitted.shuffled is not None:
        rows |= bank_rows(fitted.shuffled.only(stream.stages), SHUFFLED)
    scores = Scores(
        list(rows),
        stream.classes,
        n_boot=a.n_boot,
        seed=a.seed,
        shape=_map_shape(stream),
        pixels=a.pixels,
        majority=int(np.argmax(fitted.counts)),
    )
    score(stream, rows, [scores], world=world)
    return scores


def _map_shape(stream: ModelStream) -> tuple[int, int]:
    """The first picture's grid of tokens, or a coarser one."""
    rows, cols = next(iter(stream.source.parts([0]))).x.grid.shapes[0]
    return min(MAP, rows), min(MAP, cols)


def _tables(model: MLLM, fitted: Fitted, scores: Scores) -> dict[str, pd.DataFrame]:
    """All tables, by name; stages in the order of the forward pass, controls behind."""
    about = pd.DataFrame([_about(model, stage, i) for i, stage in enumerate(scores.stages)])
    table = scores.table().merge(about, on="stage", how="inner")
    whole = table[table["group"] == "all"]
    pairs = zip(whole["unit"], whole["metric"], strict=True)
    curve = whole.assign(metric=[MEASURES.get(pair, "") for pair in pairs])
    curve = curve[curve["metric"] != ""].drop(columns=["group", "unit"])
    groups = table[(table["group"] != "all") & (table["metric"] == "accuracy")]
    found = {
        "stages": curve.reset_index(drop=True),
        "groups": groups.drop(columns=["unit"]).reset_index(drop=True),
        "references": _references(scores),
        "classes": _classes(scores, about),
        "map": _map(scores, about),
        "confusion": _confusion(scores, about),
    }
    if fitted.errors:
        found["penalties"] = pd.DataFrame(
            [
                {"stage": stage, "alpha": alpha, "error": error}
                for stage, by_alpha in fitted.errors.items()
                for alpha, error in by_alpha.items()
            ]
        )
    return found


def _about(model: MLLM, row: str, order: int) -> dict[str, Any]:
    """What a row of the scores is."""
    stage = row.removesuffix(SHUFFLED)
    kind = "shuffled_labels" if stage != row else kind_of(stage)
    on_path = stage.startswith(NOISE) or not model.off_path(stage)
    return {"stage": row, "label": label(stage), "order": order, "kind": kind, "on_path": on_path}


def _references(scores: Scores) -> pd.DataFrame:
    """Floor and ceiling, as the table has them: of one picture there are no intervals."""
    wanted = {
        (FLOOR, "token", "accuracy"): ("majority_floor", "accuracy"),
        (FLOOR, "token", "miou"): ("majority_floor", "token_miou"),
        (CEILING, "pixel", "miou"): ("token_ceiling", "pixel_miou"),
    }
    rows = scores.table().query("group == 'all'").set_index(["stage", "unit", "metric"])
    values = [
        (*name, rows.loc[key, "estimate"]) for key, name in wanted.items() if key in rows.index
    ]
    return pd.DataFrame(values, columns=["name", "metric", "estimate"])


def _classes(scores: Scores, about: pd.DataFrame) -> pd.DataFrame:
    units = ("token", "pixel") if scores.spec.pixels else ("token",)
    parts = [
        scores.per_class(stage, unit).assign(stage=stage, unit=unit)
        for stage in scores.stages
        for unit in units
    ]
    return pd.concat(parts, ignore_index=True).merge(about[["stage", "order", "kind"]], on="stage")


def _map(scores: Scores, about: pd.DataFrame) -> pd.DataFrame:
    row, col = np.indices(scores.spec.shape).reshape(2, -1)
    parts = [
        pd.DataFrame(
            {"stage": s, "row": row, "col": col, "accuracy": scores.per_position(s).ravel()}
        ).dropna()
        for s in scores.stages
    ]
    return pd.concat(parts, ignore_index=True).merge(about[["stage", "order", "kind"]], on="stage")


def _confusion(scores: Scores, about: pd.DataFrame) -> pd.DataFrame:
    """Counts above zero only: most pairs of 150 classes never meet."""
    parts = []
    for stage in scores.stages:
        counts = scores.confusion(stage)
        true, said = np.nonzero(counts)
        names = np.array(scores.classes)
        pairs = {"true": names[true], "said": names[said], "n": counts[true, said]}
        parts.append(pd.DataFrame({"stage": stage, **pairs}))
    return pd.concat(parts, ignore_index=True).merge(about[["stage", "order", "kind"]], on="stage")


def _summary(
    model: MLLM, asked: Asked, fitted: Fitted, scores: Scores, a: ProbeArguments
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    stages = asked.test.stages
    last = stages[-1]
    for name, stage, minus in (
        ("drop_off", REFERENCE, "adapter.hook_in"),
        ("recovery", last, REFERENCE),
    ):
        if stage in stages and minus in stages and stage != minus:
            for metric in ("accuracy", "miou"):
                try:
                    found = scores.difference(stage, minus, metric).as_dict()
                except Untestable:
                    continue  # one picture has no interval
                figures[f"{name}_{metric}"] = found
    return {
        "model": a.model,
        "architecture": repr(model),
        "data": a.data,
        "classes": list(scores.classes),
        "colors": [list(color) for color in asked.data.test.colors],
        "n_probe_images": asked.pictures[0],
        "n_test_images": scores.n_images,
        "n_probe_tokens": round(float(np.sum(fitted.counts))),
        "n_test_tokens": int(scores.confusion(stages[0]).sum()),
        "widths": dict(asked.fit.widths),
        "solver": fitted.bank.solver,
        "unconverged": [s for s in fitted.bank.stages if not fitted.bank.converged[s]],
        "penalty": dict(fitted.bank.penalty),
        "reference_stage": REFERENCE if REFERENCE in stages else stages[0],
        "readout_stage": last,
        "adapter_reads": model.adapter_reads,
        "unseen_pixels": scores.unseen if scores.spec.pixels else None,
        "findings": {},
        "figures": figures,
    }
