"""The whole study: four claims on one model and one dataset, into one run folder.

    prepare -> fit probes -> recovery -> knockout -> heads -> bidirectional -> tables, report

Probes are fitted on one split and everything is reported on another. Nothing is written before the
folder has been checked, each file appears whole or not at all, and the manifest comes last: a
folder with a manifest is a finished run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from interp.datasets import Data, drawn, open_data, resized
from interp.edits import Knockout
from interp.errors import Untestable
from interp.model import MLLM
from interp.probes.fitting import Fitting
from interp.probes.parts import QUESTION
from interp.report import write_report
from interp.report.pictures import picture_file
from interp.runs import RunFolder
from interp.studies import heads as heads_study
from interp.studies import knockout as knockout_study
from interp.studies.bidirectional import TITLE as BIDIRECTIONAL
from interp.studies.bidirectional import bidirectional, opened
from interp.studies.conditions import anchor_edges
from interp.studies.recovery import Baseline, recovery
from interp.studies.result import Result, untestable
from interp.studies.split import Split

N_PICTURES = 8
KEYS = ("drop_off", "recovery", "knockout", "heads", "bidirectional")


@dataclass(frozen=True)
class StudyArguments:
    """Everything that decides a study's numbers, besides model and data themselves.

    Attributes:
        model: as it was given on the command line, or a name for a module.
        data: the dataset, as `interp.datasets.open_data` takes it.
        n_probe: images the probes are fitted on.
        n_test: images everything is reported on.
        resize: (width, height) that pictures and masks are brought to first, or None. Families
            that look at pictures in their own sizes need it: a study has one token grid.
        fitting: how probes are fitted.
        question: the prompt; image tokens precede it, so it does not change their states.
        batch_size: images in one forward pass.
        seed: of every random draw.
    """

    model: str
    data: str = "scenes"
    n_probe: int = 600
    n_test: int = 300
    question: str = QUESTION
    batch_size: int = 50
    resize: tuple[int, int] | None = None
    fitting: Fitting = field(default_factory=Fitting)
    seed: int = 0


def study(
    model: MLLM,
    out: str | Path,
    arguments: StudyArguments,
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the four studies and write `out`; returns the summary.

    Args:
        model: the model under study.
        out: the run folder; see `RunFolder.create` for when an existing one is refused.
        arguments: what decides the numbers.
        overwrite: replace another study's files in `out`.
        quiet: no progress bars.
    """
    a = arguments
    data = at_one_size(open_data(a.data), a.resize)
    probe_data, test_data = few_of(data, (a.n_probe, a.n_test), a.seed)
    folder = RunFolder.create(out, arguments=asdict(a), overwrite=overwrite)
    with _bars(quiet) as bars:
        prepare = bars.add_task("preparing the pictures", total=2)
        probe = Split.prepare(model, probe_data, a.n_probe, a.question, batch_size=a.batch_size)
        bars.advance(prepare)
        test = Split.prepare(model, test_data, a.n_test, a.question, batch_size=a.batch_size)
        bars.advance(prepare)

        def step(name: str, n_images: int) -> Callable[[int], None]:
            task = bars.add_task(name, total=n_images)
            done = 0

            def tell(n: int) -> None:
                nonlocal done
                done = min(done + n, n_images)  # a pass looks at its first part once more
                bars.update(task, completed=done)

            return tell

        # images forwarded: recovery reads both splits twice (the model, its shuffled control)
        both = a.n_probe + a.n_test
        base, results = recovery(
            probe, test, fitting=a.fitting, seed=a.seed, on_batch=step("1 recovery", 2 * both)
        )
        cuts = knockout_study.passes(model, test.marks is not None)
        for name, title, claim, n_images in (
            ("2 knockout", knockout_study.TITLE, knockout_study.knockout, cuts * a.n_test),
            ("3 heads", heads_study.TITLE, heads_study.heads, heads_study.passes() * a.n_test),
            ("4 bidirectional", BIDIRECTIONAL, bidirectional, both),
        ):
            progress = step(name, n_images)
            try:
                results.append(claim(base, seed=a.seed, on_batch=progress))
            except Untestable as why:
                results.append(untestable(title, str(why)))

    summary = _summary(base, results, arguments, test_data)
    for result in results:
        for name, table in result.tables.items():
            folder.write_table(name, table)
    folder.write_table("tokens", _tokens(base))
    for image in range(min(N_PICTURES, len(test))):
        picture = seen_part(test_data[image].image, test, image)
        folder.write_bytes(picture_file(test.names[image]), _png(picture))
    with folder.writing("probes.safetensors") as path:
        base.bank.save(path)
    folder.write_json("summary.json", summary)
    folder.note(
        seed=a.seed,
        fingerprints={
            "model": model.fingerprint(),
            "probe_data": probe_data.fingerprint(),
            "test_data": test_data.fingerprint(),
        },
    )
    write_report(folder)
    folder.finish()
    return summary


def _summary(
    base: Baseline, results: list[Result], arguments: StudyArguments, data: Any
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for result in results:
        figures |= {key: interval.as_dict() for key, interval in result.figures.items()}
    return {
        "model": arguments.model,
        "architecture": repr(base.test.model),
        "data": arguments.data,
        "classes": list(base.classes),
        "colors": [list(color) for color in data.colors],
        "n_probe_images": len(base.probe),
        "n_test_images": len(base.test),
        "grid": list(base.test.shape),
        "reference_stage": base.reference,
        "readout_stage": base.readout,
        "adapter_reads": base.test.model.adapter_reads,
        "findings": {key: r.finding.as_dict() for key, r in zip(KEYS, results, strict=True)},
        "figures": figures,
    }


def _tokens(base: Baseline) -> pd.DataFrame:
    """What the probes say of every token of the first scenes: before, after, cut, opened."""
    test, n = base.test, min(N_PICTURES, len(base.test))
    _, anchors = anchor_edges(base)
    edges = test.edges(anchors)
    said = {
        "adapter": base.predicted[base.reference],
        "final": base.predicted[base.readout],
        "knockout": base.reread(lambda i: [Knockout(edges[i])] if len(edges[i]) else [])[
            base.readout
        ],
        "bidirectional": base.reread(opened(test))[base.readout],
    }
    image, token = np.indices((n, test.n_tokens)).reshape(2, -1)
    row, col = np.divmod(token, test.shape[1])
    return pd.DataFrame(
        {
            "name": [test.names[i] for i in image],
            "image": image,
            "token": token,
            "row": row,
            "col": col,
            "label": test.labels[image, token],
            **{name: values[image, token] for name, values in said.items()},
        }
    )


def at_one_size(data: Data, size: tuple[int, int] | None) -> Data:
    """Both splits with pictures and masks of one size, if one is given."""
    return data if size is None else Data(*(resized(split, size) for split in data))


def few_of(data: Data, n: tuple[int, int], seed: int) -> Data:
    """So many pictures of each split, drawn with the seed; of the scenes, which are drawn at random
    already, the first.

    Raises:
        ValueError: fewer pictures than asked for.
    """
    for split, asked, option in zip(data, n, ("--n-probe", "--n-test"), strict=True):
        if not 2 <= asked <= len(split):
            raise ValueError(
                f"{asked} pictures asked of {split.name} {split.split}, which has {len(split)}: "
                f"{option} from 2 to {len(split)} would do"
            )
    if data.fit.name == "scenes":
        return Data(*(split[:asked] for split, asked in zip(data, n, strict=True)))
    return Data(*(drawn(split, asked, seed) for split, asked in zip(data, n, strict=True)))


def seen_part(picture: Image.Image, split: Split, image: int) -> Image.Image:
    """What the tokens of an image cover: without what the processor cuts off, with its padding."""
    x, at = next((x, at) for x, at in split.slices() if at.start <= image < at.stop)
    box = x.grid.box[x.grid.of_image(image - at.start)]
    return picture.crop((*box[:, :2].min(0).round(), *box[:, 2:].max(0).round()))


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _bars(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        disable=quiet,
    )
