"""`interp probe`: a segmentation probe at every stage of a model, on any data, at any scale.

    torchrun --nproc-per-node 4 -m interp probe --model M --data ade20k:PATH --out DIR

Processes share the pictures; each loads the model on a GPU of its own, the first one writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from interp.commands.common import (
    QUESTION,
    SAID,
    BatchSize,
    Data,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    Model,
    Overwrite,
    Question,
    Resize,
    Seed,
    Threads,
    console,
    fail,
    load,
    size,
    steps,
)
from interp.commands.fitting import ClassWeight, Components, Disk, Epochs, Memory, Penalty, Solver

#: kinds of rows that are no stage of the model, and what they are called
CONTROLS = {"shuffled_labels": "shuffled labels", "random_features": "random features"}


def probe(
    out: Annotated[Path | None, typer.Option(help="Run folder to write.")] = None,
    model: Model = "tiny",
    data: Data = "scenes",
    stages: Annotated[
        list[str] | None,
        typer.Option(help='Hooks or patterns, "blocks.*.hook_resid_post"; all stages by default.'),
    ] = None,
    solver: Solver = "ridge",
    penalty: Penalty = 1.0,
    class_weight: ClassWeight = None,
    components: Components = None,
    soft: Annotated[bool, typer.Option(help="Targets are shares of classes in a token.")] = False,
    controls: Annotated[bool, typer.Option(help="Random features and shuffled labels.")] = False,
    pixels: Annotated[bool, typer.Option(help="Score pixels too, in full resolution.")] = True,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Pictures to fit on, drawn with the seed; all.")
    ] = None,
    limit_test: Annotated[int | None, typer.Option(min=1, help="Pictures to score; all.")] = None,
    batch_size: BatchSize = 8,
    memory: Memory = 4.0,
    disk: Disk = 0.0,
    epochs: Epochs = 4,
    resize: Resize = None,
    question: Question = QUESTION,
    seed: Seed = 0,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit a linear segmentation probe at every stage, and score it on pictures of its own."""
    import warnings

    import torch
    from sklearn.exceptions import ConvergenceWarning

    from interp.datasets import open_data
    from interp.probes.fitting import Fitting
    from interp.studies.plan import plan
    from interp.studies.probing import ProbeArguments, prepare, probe_study
    from interp.threads import suit_threads
    from interp.world import World

    try:
        fitting = Fitting(
            solver, penalty, class_weight=class_weight, components=components,
            memory=memory, disk=disk, epochs=epochs,
        )  # fmt: skip
        arguments = ProbeArguments(
            model, data, tuple(stages or ()), fitting, limit, limit_test, pixels, soft, controls,
            size(resize), question, batch_size, seed=seed,
        )  # fmt: skip
        if out is None and not dry_run:
            raise ValueError("--out is missing: the run folder to write (or --dry-run)")
        if solver == "ridge" and (penalty, disk, epochs) != (1.0, 0.0, 4):
            raise ValueError("--C, --disk and --epochs are of --solver logistic, and this is ridge")
        open_data(data)  # before a model is loaded
        warnings.simplefilter("ignore", ConvergenceWarning)  # said below, in words
        with World.join() as world:
            if world.size > 1 and device_map is not None:
                raise ValueError("--device-map spreads one model over all GPUs: use one process")
            if world.size > 1 and device is None and device_map is None:
                device = f"cuda:{world.local_rank}" if torch.cuda.is_available() else None
            loaded = load(model, device=device, device_map=device_map, dtype=dtype)
            suit_threads(loaded, threads)
            cost = plan(prepare(loaded, arguments), arguments, processes=world.size)
            if world.first:
                console.print(str(cost), highlight=False, soft_wrap=True)
            if dry_run:
                return
            assert out is not None
            total = {
                "fitting": -(-cost.pictures[0] * cost.passes[0] // world.size),
                "scoring": -(-cost.pictures[1] // world.size),
            }
            with steps(total, quiet=not world.first) as tell:
                summary = probe_study(
                    loaded, out, arguments, overwrite=overwrite, world=world, on_step=tell
                )
            if world.first:
                console.print(_curve(out, summary))
                for line in [*_changes(summary), *_doubts(summary)]:
                    console.print(line, highlight=False, soft_wrap=True)
                console.print(f"report: {out / 'report.html'}")
    except SAID as error:
        fail(error)


def _curve(out: Path, summary: dict[str, Any]) -> Table:
    """The curve over the stages, and what it must be seen against, from the tables written."""
    from interp.runs import RunFolder

    folder = RunFolder.open(out)
    rows, lines = folder.read_table("stages"), folder.read_table("references")
    metrics = {"accuracy": "accuracy", "token_miou": "token mIoU", "pixel_miou": "pixel mIoU"}
    shown = [metric for metric in metrics if metric in set(rows["metric"])]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{summary['model']} on {summary['data']}, {summary['solver']}: "
        f"{summary['n_test_images']:,} pictures (probes fitted on "
        f"{summary['n_probe_images']:,} others)",
        title_justify="left",
        title_style="bold",
        caption="Intervals: 95%, bootstrap over pictures.",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("stage", min_width=16)
    for metric in shown:
        table.add_column(metrics[metric], no_wrap=True)
    control = rows["kind"].isin(CONTROLS)
    for _, of_stage in rows[~control].sort_values("order").groupby("order", sort=False):
        values = of_stage.set_index("metric")
        table.add_row(values["label"].iloc[0], *(_cell(values.loc[metric]) for metric in shown))
    table.add_section()
    for kind, name in CONTROLS.items():
        of_kind = rows[rows["kind"] == kind]
        if len(of_kind):
            best = of_kind.groupby("metric")["estimate"].max()
            table.add_row(name, *(f"up to {100 * best[metric]:.1f}" for metric in shown))
    for name, words in (("majority_floor", "floor (one class)"), ("token_ceiling", "ceiling")):
        known = lines[lines["name"] == name].set_index("metric")["estimate"]
        if len(known):
            cells = [f"{100 * known[m]:.1f}" if m in known.index else "" for m in shown]
            table.add_row(words, *cells)
    return table


def _cell(row: Any) -> str:
    """An estimate in hundredths with its interval; of one picture there is none."""
    estimate, low, high = (100 * row[name] for name in ("estimate", "low", "high"))
    return f"{estimate:.1f}" + (f" [{low:.1f}, {high:.1f}]" if low == low else "")


def _changes(summary: dict[str, Any]) -> list[str]:
    """Drop-off and recovery in points, where both ends were read."""
    lines = []
    for name, title in (("drop_off", "at the adapter"), ("recovery", "over the language model")):
        parts = []
        for metric, short in (("accuracy", "accuracy"), ("miou", "token mIoU")):
            if found := summary["figures"].get(f"{name}_{metric}"):
                values = [100 * found[key] for key in ("estimate", "low", "high")]
                parts.append("{} {:+.1f} [{:+.1f}, {:+.1f}]".format(short, *values))
        if parts:
            lines.append(f"{title}: {', '.join(parts)} points")
    return lines


def _doubts(summary: dict[str, Any]) -> list[str]:
    """What a reader must know beside the numbers."""
    late = summary["unconverged"]
    if not late:
        return []
    few = ", ".join(late[:4]) + (", ..." if len(late) > 4 else "")
    return [
        f"{len(late)} probes stopped before they were at their optimum ({few}): more --epochs, a "
        "larger --batch-size, or more --memory to keep the features would do"
    ]
