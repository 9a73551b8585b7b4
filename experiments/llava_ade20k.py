"""The paper's question on its own ground: where does LLaVA-1.5 lose and regain ADE20K's classes?

    python experiments/llava_ade20k.py ADEChallengeData2016 --dry-run      what it will take
    python experiments/llava_ade20k.py ADEChallengeData2016 --out results/llava
    torchrun --nproc-per-node 8 experiments/llava_ade20k.py ADEChallengeData2016 --out results/llava

First a ridge probe at every stage, fitted in one pass over the training pictures and scored on the
validation pictures (OUT/probe). Then the four findings with their controls on fewer pictures, on
one GPU (OUT/study). The weights come from the hub and the pictures from their licensed copy.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print as say

from interp import MLLM
from interp.probes.fitting import Fitting
from interp.report.text import findings_table
from interp.studies.plan import plan
from interp.studies.probing import ProbeArguments, prepare, probe_study
from interp.studies.study import StudyArguments, study
from interp.threads import suit_threads
from interp.world import World


def main(
    ade20k: Annotated[Path, typer.Argument(help="The folder ADEChallengeData2016.")],
    out: Path = Path("results/llava_ade20k"),
    model: str = "llava-hf/llava-1.5-7b-hf",
    dtype: str = "bfloat16",
    batch_size: int = 8,
    limit: Annotated[int | None, typer.Option(help="Training pictures; all.")] = None,
    limit_test: Annotated[int | None, typer.Option(help="Validation pictures; all.")] = None,
    n_probe: Annotated[int, typer.Option(help="Training pictures of the findings.")] = 1000,
    n_test: Annotated[int, typer.Option(help="Validation pictures of the findings.")] = 300,
    seed: int = 0,
    dry_run: bool = False,
) -> None:
    data = f"ade20k:{ade20k}"
    with World.join() as world:
        gpu = torch.cuda.is_available()
        vlm = MLLM.load(model, dtype=dtype, device=f"cuda:{world.local_rank}" if gpu else None)
        suit_threads(vlm)
        asked = ProbeArguments(
            model, data, fitting=Fitting("ridge"), limit=limit, limit_test=limit_test,
            controls=True, batch_size=batch_size, seed=seed,
        )  # fmt: skip
        cost = plan(prepare(vlm, asked), asked, processes=world.size)
        if world.first:
            print(cost)
        if dry_run:
            return
        probe_study(vlm, out / "probe", asked, world=world)
        first = world.first
    if first:
        # all stages of so many pictures fit no memory: minibatches, started at the ridge solution
        fit = Fitting("logistic", memory=16)
        four = StudyArguments(
            model, data, n_probe, n_test, batch_size=batch_size, fitting=fit, seed=seed
        )
        say(findings_table(study(vlm, out / "study", four)))


if __name__ == "__main__":
    typer.run(main)
