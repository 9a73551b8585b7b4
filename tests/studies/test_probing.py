"""`interp probe`: its numbers against scikit-learn's, its folder, its plan, its command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, jaccard_score
from torch.nn.functional import interpolate
from typer.testing import CliRunner

from interp import MLLM, ProbeBank
from interp.cli import app
from interp.datasets import scenes
from interp.probes.fitting import Fitting
from interp.probes.parts import QUESTION, DataParts
from interp.probes.reading import NOISE, ModelStream
from interp.probes.ridge import fit_ridge
from interp.runs import RunFolder
from interp.studies.plan import amount, plan
from interp.studies.probing import SHUFFLED, ProbeArguments, prepare, probe_study
from tests import zoo
from tests.datasets import drawn

ARGUMENTS = ProbeArguments(
    "tiny", fitting=Fitting("ridge"), limit=60, limit_test=24, batch_size=10, controls=True, seed=3
)
END = "blocks.4.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "run"
    told: dict[str, int] = {}

    def tell(step: str, more: int) -> None:
        told[step] = told.get(step, 0) + more

    probe_study(tiny, out, ARGUMENTS, on_step=tell)
    assert told["scoring"] >= 24
    assert told["fitting"] >= 60
    return RunFolder.open(out)


@pytest.fixture(scope="module")
def by_hand(tiny):
    """What the saved probes say of the test pictures, with plain runs."""
    order = np.random.default_rng(3).permutation(1000)[:24]
    samples = [scenes("test")[int(i)] for i in order]
    x = tiny.prepare([s.image for s in samples], QUESTION)
    states = tiny.run(x, read=tiny.stages)
    masks = np.stack([s.mask for s in samples])
    return x, states, masks


def test_a_run_is_whole_and_says_what_it_is(folder):
    folder.verify()
    summary = folder.read_json("summary.json")
    assert summary["solver"] == "ridge"
    assert (summary["n_probe_images"], summary["n_test_images"]) == (60, 24)
    assert (summary["n_probe_tokens"], summary["n_test_tokens"]) == (6000, 2400)
    assert summary["unseen_pixels"] == 0
    assert folder.has("report.html")
    assert "probes.safetensors" in folder.files


def test_the_curve_is_scikit_learns(folder, by_hand):
    x, states, masks = by_hand
    bank = ProbeBank.load(folder.path / "probes.safetensors")
    truth = x.grid.labels(list(masks), 10)
    table = folder.read_table("stages").set_index(["stage", "metric"])["estimate"]
    for stage in ("adapter.hook_out", END):
        logits = bank.logits(stage, states.tokens(stage))
        said = logits.argmax(-1).flatten().numpy()
        assert table[stage, "accuracy"] == pytest.approx((said == truth).mean())
        assert table[stage, "mean_accuracy"] == pytest.approx(balanced_accuracy_score(truth, said))
        assert table[stage, "token_miou"] == pytest.approx(
            jaccard_score(truth, said, average="macro", labels=np.unique([*truth, *said]))
        )
        up = interpolate(logits.unflatten(1, (10, 10)).movedim(-1, 1), (80, 80), mode="bilinear")
        pixels = up.argmax(1).numpy().ravel()
        of = masks.ravel()
        assert table[stage, "pixel_miou"] == pytest.approx(
            jaccard_score(of, pixels, average="macro", labels=np.unique([*of, *pixels])), abs=1e-4
        )


def test_tables_agree_with_each_other(folder):
    stages = folder.read_table("stages").set_index(["stage", "metric"])["estimate"]
    classes = folder.read_table("classes").query("unit == 'token'")
    confusion, places = folder.read_table("confusion"), folder.read_table("map")
    for stage, of in confusion.groupby("stage"):
        right = of.query("true == said")["n"].sum() / of["n"].sum()
        assert right == pytest.approx(stages[stage, "accuracy"])
        assert of["n"].sum() == 2400
    for stage, of in classes.groupby("stage"):
        assert of["iou"].mean() == pytest.approx(stages[stage, "token_miou"])
    assert set(places["stage"]) == set(confusion["stage"])
    groups = folder.read_table("groups")
    assert set(groups["group"]) == {"boundary", "interior", "early", "middle", "late"}
    at_end = groups.query("stage == @END").set_index("group")
    assert at_end.loc[["boundary", "interior"], "n"].sum() == 2400
    assert at_end.loc["interior", "estimate"] > at_end.loc["boundary", "estimate"]


def test_controls_stay_at_the_floor_and_stages_do_not(folder):
    table = folder.read_table("stages").query("metric == 'accuracy'")
    floor = folder.read_table("references").set_index(["name", "metric"])["estimate"]
    floor = floor["majority_floor", "accuracy"]
    assert set(table["kind"]) == {
        "vision", "adapter", "llm", "random_features", "shuffled_labels"
    }  # fmt: skip
    controls = table[table["kind"].isin(["random_features", "shuffled_labels"])]
    assert (controls["low"] < floor + 0.05).all()
    assert (controls["estimate"] < 0.25).all()
    assert (table[~table["stage"].isin(controls["stage"])]["estimate"] > 0.35).all()
    assert {f"{NOISE}96", f"{NOISE}128", f"{END}{SHUFFLED}"} <= set(controls["stage"])


def test_the_penalty_that_was_taken_has_the_least_error(folder):
    bank = ProbeBank.load(folder.path / "probes.safetensors")
    for stage, of in folder.read_table("penalties").groupby("stage"):
        best = of.loc[of["error"].idxmin(), "alpha"]
        assert bank.penalty[stage] == pytest.approx(best * 6000)


def test_the_differences_are_those_of_the_table(folder):
    stages = folder.read_table("stages").set_index(["stage", "metric"])["estimate"]
    figures = folder.read_json("summary.json")["figures"]
    rise = stages[END, "accuracy"] - stages["adapter.hook_out", "accuracy"]
    assert figures["recovery_accuracy"]["estimate"] == pytest.approx(rise)
    assert figures["recovery_miou"]["low"] < figures["recovery_miou"]["high"]
    drop = stages["adapter.hook_out", "accuracy"] - stages["adapter.hook_in", "accuracy"]
    assert abs(drop) > 0.01  # else its sign could not be told
    assert figures["drop_off_accuracy"]["estimate"] == pytest.approx(drop)
    drop = stages["adapter.hook_out", "token_miou"] - stages["adapter.hook_in", "token_miou"]
    assert figures["drop_off_miou"]["estimate"] == pytest.approx(drop)


def test_fit_and_test_have_noise_of_their_own(tiny):
    few = replace(ARGUMENTS, limit=2, limit_test=2, batch_size=1, stages=("adapter.hook_out",))
    for seed in (0, 3):
        asked = prepare(tiny, replace(few, seed=seed))
        fit, test = (dict(s.read([0]))[0].features for s in (asked.fit, asked.test))
        name = f"{NOISE}96"
        assert fit[name].shape == test[name].shape == (100, 96)
        together = np.corrcoef(fit[name].flatten(), test[name].flatten())[0, 1]
        assert abs(together) < 0.05  # of 9600 numbers: 5 standard errors


def test_soft_labels_and_sizes_reach_both_splits(tiny):
    few = replace(ARGUMENTS, limit=2, limit_test=2, batch_size=1)
    for arguments, soft, size in (
        (few, False, (80, 80)),
        (replace(few, soft=True), True, (80, 80)),
        (replace(few, resize=(120, 60)), False, (120, 60)),
    ):
        asked = prepare(tiny, arguments)
        for stream in (asked.fit, asked.test):
            for (_, tokens), part in zip(
                stream.labels([0, 1]), stream.source.parts([0, 1]), strict=True
            ):
                assert (tokens.shares is not None) == soft
                assert part.x.grid.sizes == (size,)
                assert [mask.shape for mask in part.masks] == [size[::-1]]


def test_a_smaller_capacity_and_soft_labels_run_too(tiny, tmp_path):
    arguments = ProbeArguments(
        "tiny", stages=("adapter.*", "blocks.[3-4].attn.hook_z"), limit=30, limit_test=10,
        fitting=Fitting("ridge", components=16, class_weight="balanced"), soft=True, pixels=False,
        batch_size=5,
    )  # fmt: skip
    probe_study(tiny, tmp_path / "run", arguments)
    table = RunFolder.open(tmp_path / "run").read_table("stages")
    assert "LLM 4 attn.z" in set(table["label"])
    assert "pixel_miou" not in set(table["metric"])


def test_the_plan_counts_what_is_there(tiny):
    asked = prepare(tiny, ARGUMENTS)
    found = plan(asked, ARGUMENTS)
    assert found.pictures == (60, 24)
    assert found.tokens == 100
    assert found.passes == (1, 1)
    assert found.kept == "stream"
    widths = [*[128] * 5, *[96] * 6, 96, 128]
    assert list(found.widths.values()) == widths
    sums = 8 * sum(d * d + 20 * d for d in widths)
    assert found.memory["statistics"] == 2 * sums
    # 60 pictures make ten batches at least: a penalty is chosen by those that are left out
    assert found.memory["states of a batch"] == 4 * 6 * 100 * sum(widths)
    assert all(s > 0 for s in found.seconds)
    assert found.duration > 0
    text = str(found)
    assert "60 fitted on, 24 scored" in text
    assert "none of it grows" in text
    # memory is the same for any number of pictures, features that are kept are not
    few, many = (
        ProbeArguments("tiny", fitting=Fitting("ridge"), limit=n, batch_size=10, controls=True)
        for n in (200, 900)
    )
    assert plan(prepare(tiny, few), few).memory == plan(prepare(tiny, many), many).memory
    assert plan(prepare(tiny, few), few).memory["waiting statistics"] == 8 * sums
    kept = ProbeArguments("tiny", fitting=Fitting("logistic"), limit=600, batch_size=10)
    found = plan(prepare(tiny, kept), kept)
    assert (found.kept, found.passes) == ("memory", (1, 1))
    assert found.memory["features"] >= 600 * 100 * 4 * (5 * 128 + 6 * 96)
    short = ProbeArguments("tiny", fitting=Fitting("logistic", memory=0.01, epochs=3), limit=600)
    found = plan(prepare(tiny, short), short)
    assert (found.kept, found.passes) == ("stream", (4, 1))


def test_the_plan_counts_the_controls_and_the_processes(tiny):
    for memory, passes in ((4.0, 1), (0.001, 4)):
        fitting = Fitting("logistic", memory=memory, epochs=3)
        without = ProbeArguments("tiny", fitting=fitting, limit=60, limit_test=20, batch_size=10)
        assert plan(prepare(tiny, without), without).passes == (passes, 1)
        both = replace(without, controls=True)
        # the shuffled labels are a fit of their own
        assert plan(prepare(tiny, both), both).passes == (2 * passes, 1)
    one, two = (plan(prepare(tiny, without), without, processes=n) for n in (1, 2))
    two = replace(two, seconds=one.seconds)  # measured, so never twice the same
    # whole batches are shared out; here both have as many
    assert two.duration == pytest.approx(one.duration / 2, rel=0.1)
    assert "2 processes" in str(two)
    assert "processes" not in str(one)


def test_amounts_are_short():
    assert [amount(n) for n in (900, 4.4e6, 5.2e9, 44e9, 3.7e12)] == [
        "1 kB", "4.4 MB", "5.2 GB", "44 GB", "3.7 TB"
    ]  # fmt: skip


def run(*options: str) -> str:
    result = CliRunner().invoke(app, ["probe", *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_from_the_shell_on_ade20k(tmp_path):
    root = drawn.ade20k(tmp_path / "ade").root
    out = tmp_path / "run"
    printed = run(
        "--data", f"ade20k:{root}", "--out", str(out), "--stages", "adapter.hook_out",
        "--stages", END, "--solver", "logistic", "--memory", "0", "--epochs", "1",
    )  # fmt: skip
    assert "5 fitted on, 5 scored" in printed
    assert "150 classes" in printed
    assert "stopped before they were at their optimum" in printed
    folder = RunFolder.open(out)
    assert set(folder.read_table("stages")["stage"]) == {"adapter.hook_out", END}
    summary = folder.read_json("summary.json")
    assert len(summary["classes"]) == 150
    assert 0 <= summary["unseen_pixels"] < 1
    assert str(tmp_path) not in (out / "manifest.json").read_text()


def test_a_dry_run_writes_nothing(tmp_path):
    printed = run("--dry-run", "--limit", "20", "--limit-test", "10", "--out", str(tmp_path / "x"))
    assert "20 fitted on, 10 scored" in printed
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--out is missing"),
        (["--dry-run", "--solver", "svm"], "solver='svm'; there are logistic and ridge"),
        (["--dry-run", "--data", "ade20k:nowhere"], "nowhere"),
        (["--dry-run", "--stages", "block.*"], "block.*"),
        (["--dry-run", "--resize", "448"], "such as 448x448"),
        (["--dry-run", "--limit", "1"], "1 batch of pictures to fit on"),
        (["--dry-run", "--C", "0.1"], "--C, --disk and --epochs are of --solver logistic"),
        (["--dry-run", "--solver", "logistic", "--C", "nan"], "C=nan: a positive number would do"),
        (["--dry-run", "--class-weight", "even"], "class_weight='even'"),
        (["--dry-run", "--device", "bogus"], "--device bogus"),
    ],
)
def test_what_cannot_be_is_said_in_words(options, words):
    result = CliRunner().invoke(app, ["probe", *options])
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize("option", ["--batch-size", "--limit", "--epochs", "--threads"])
def test_numbers_that_count_are_positive(option):
    result = CliRunner().invoke(app, ["probe", "--dry-run", option, "0"])
    assert result.exit_code == 2
    assert option in result.output


def test_pictures_of_many_sizes_on_a_model_that_looks_at_them_so(tmp_path):
    module, processor = zoo.build("qwen2.5-vl")
    model = MLLM(module, processor)
    root = drawn.ade20k(tmp_path / "ade").root
    arguments = ProbeArguments(
        "qwen", f"ade20k:{root}", fitting=Fitting("ridge", alphas=(0.1,)), batch_size=2,
        question=zoo.ZOO["qwen2.5-vl"].prompt,
    )  # fmt: skip
    summary = probe_study(model, tmp_path / "run", arguments)
    assert summary["n_test_images"] == 5
    table = RunFolder.open(tmp_path / "run").read_table("stages")
    assert np.isfinite(table["estimate"]).all()


def test_a_model_spread_over_places_gives_the_same_probes(tmp_path):
    module, processor = zoo.build("llava-clip-llama")
    module.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"}
    places |= {"model.language_model": "disk", "lm_head": "disk"}
    plain = MLLM.load(tmp_path / "model")
    spread = MLLM.load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    assert next(spread.module.model.language_model.parameters()).is_meta
    banks = []
    for model in (plain, spread):
        source = DataParts(
            model, scenes("probe"), 20, question=zoo.ZOO["llava-clip-llama"].prompt, batch_size=4
        )
        banks.append(fit_ridge(ModelStream(model, source)).bank)
    for stage in banks[0].stages:
        assert torch.equal(banks[0].weight(stage), banks[1].weight(stage))


def test_the_page_runs(capsys):
    """The example of docs/probing.md, as written."""
    page = (Path(__file__).parents[2] / "docs" / "probing.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.S)
    assert example is not None
    exec(compile(example[1], "docs/probing.md", "exec"), {})
    assert "blocks.4.hook_resid_post" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_give_what_one_gives(processes, folder, tmp_path):
    """Real processes over gloo on loopback; the tables and the probes are the same bytes."""
    a = ARGUMENTS
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes), "-m", "interp", "probe", "--out", str(tmp_path / "run"),
        "--limit", str(a.limit), "--limit-test", str(a.limit_test), "--seed", str(a.seed),
        "--batch-size", str(a.batch_size), "--controls", "--threads", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pictures   60 fitted on") == 1  # the first one speaks
    other = RunFolder.open(tmp_path / "run")
    other.verify()
    one, several = (ProbeBank.load(f.path / "probes.safetensors") for f in (folder, other))
    for stage in one.stages:
        assert torch.equal(one.weight(stage), several.weight(stage))
        assert torch.equal(one.intercept(stage), several.intercept(stage))
    for name in ("stages", "groups", "classes", "map", "confusion", "penalties"):
        pd.testing.assert_frame_equal(folder.read_table(name), other.read_table(name))
    summaries = [json.loads((f.path / "summary.json").read_text()) for f in (folder, other)]
    assert summaries[0] == summaries[1]
