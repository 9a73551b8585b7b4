"""The whole study from the command line, on a few scenes: files, keys, determinism, refusals."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaProcessor
from typer.testing import CliRunner

from interp import MLLM
from interp.cli import app
from interp.datasets import open_data
from interp.loading import BUNDLED
from interp.probes import ProbeBank
from interp.probes.fitting import Fitting
from interp.runs import RunFolder
from interp.studies.study import KEYS, StudyArguments, few_of, study
from tests.datasets import drawn
from tests.zoo import build

SMALL = ["--n-probe", "30", "--n-test", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    done = CliRunner().invoke(app, ["study", "--out", str(out), *SMALL])
    assert done.exit_code == 0, done.output
    assert "report.html" in done.output
    return out


def test_summary_has_the_documented_keys(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert tuple(summary["findings"]) == KEYS
    for finding in summary["findings"].values():
        assert finding["low"] <= finding["estimate"] <= finding["high"]
        assert isinstance(finding["holds"], bool)
        assert finding["text"]
        if finding["control"] is not None:
            assert {"name", "estimate", "low", "high"} <= finding["control"].keys()
    assert summary["n_test_images"] == 12


def test_manifest_tells_how_to_do_it_again(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["arguments"]["n_probe"] == 30
    assert len(manifest["fingerprints"]["model"]) == 64
    assert {"torch", "transformers", "nnsight"} <= manifest["versions"].keys()
    assert "probes.safetensors" in manifest["files"]


def test_tables_and_probes_open(folder, tiny):
    for name in ("stages", "knockout", "knockout_effect", "heads", "positions", "dose", "tokens"):
        assert len(pd.read_parquet(folder / "tables" / f"{name}.parquet"))
    assert list(ProbeBank.load(folder / "probes.safetensors").stages) == tiny.stages
    with safe_open(folder / "probes.safetensors", "pt") as probes:
        assert probes.metadata()


def test_the_same_run_again_gives_the_same_bytes(folder, tmp_path):
    done = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "again"), *SMALL])
    assert done.exit_code == 0, done.output
    for file in [*sorted((folder / "tables").iterdir()), folder / "summary.json"]:
        again = tmp_path / "again" / file.relative_to(folder)
        assert again.read_bytes() == file.read_bytes(), file.name


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = CliRunner().invoke(app, ["study", "--out", str(tmp_path), *SMALL])
    assert done.exit_code == 1
    assert "thesis.tex" in done.output
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_missing_model_is_one_line_not_a_traceback(tmp_path):
    done = CliRunner().invoke(app, ["study", "--model", "./nowhere", "--out", str(tmp_path / "x")])
    assert done.exit_code == 1
    assert "nowhere" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "x").exists()


def test_hooks_are_listed():
    done = CliRunner().invoke(app, ["hooks", "tiny", "blocks.2.attn.hook_*"])
    assert done.exit_code == 0
    assert "blocks.2.attn.hook_pattern" in done.output
    assert "batch head query key" in done.output


def test_another_llava_of_another_grid_in_bfloat16(tiny, tmp_path):
    """Random weights, 5 x 5 tokens, grouped-query heads: claims without evidence are said to be
    untestable, and the page is written all the same."""
    config = type(tiny.config).from_pretrained(BUNDLED["tiny"])
    config.vision_config.image_size, config.image_seq_length = 40, 25
    config.text_config.num_key_value_heads = 2
    torch.manual_seed(0)
    module = type(tiny.module)(config)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}
        ),
        tokenizer=AutoProcessor.from_pretrained(BUNDLED["tiny"]).tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.processor.chat_template,
    )
    model = MLLM.load(module, processor=processor, dtype="bfloat16")
    arguments = StudyArguments(model="random", n_probe=16, n_test=10, batch_size=5)
    summary = study(model, tmp_path / "run", arguments, quiet=True)
    assert summary["grid"] == [5, 5]
    knockout = summary["findings"]["knockout"]
    assert knockout["holds"] is False
    assert knockout["text"].startswith("Not testable here")
    assert "Not testable here" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("family", ["gemma3", "qwen3-vl"])
def test_a_family_with_more_in_its_stream(family, tmp_path):
    """Gemma3 normalises what heads write and sees pictures both ways, which leaves nothing to open;
    Qwen3-VL adds deepstack between its blocks, a part of its own."""
    module, processor = build(family)
    model = MLLM.load(module, processor=processor)
    arguments = StudyArguments(model=family, n_probe=16, n_test=8)
    findings = study(model, tmp_path / "run", arguments)["findings"]
    said = " ".join(str(finding) for finding in findings.values())
    assert ("see each other both ways already" in said) == (family == "gemma3")
    folder = RunFolder.open(tmp_path / "run")
    if family == "qwen3-vl":
        parts = folder.read_table("components").set_index("component")["estimate"]
        assert any(name.startswith("deepstack") for name in parts.index)
        assert parts.drop("margin").sum() == pytest.approx(parts["margin"], abs=1e-3)


def test_on_pictures_of_many_sizes_as_the_model_crops_them(tmp_path):
    """Drawn VOC: pictures of all sizes; what the processor cuts off is not on the page either."""
    root, out = drawn.voc(tmp_path / "voc").root, tmp_path / "run"
    options = ["--data", f"voc:{root}", "--out", str(out), "--n-probe", "5", "--n-test", "5"]
    done = CliRunner().invoke(app, ["study", *options, "--solver", "ridge", "--batch-size", "1"])
    assert done.exit_code == 0, done.output
    folder = RunFolder.open(out)
    summary = folder.read_json("summary.json")
    assert summary["classes"][0] == "background"
    assert set(summary["findings"]) == set(KEYS)
    sizes = {Image.open(picture).size for picture in (out / "pictures").iterdir()}
    assert all(abs(width - height) <= 1 for width, height in sizes)  # the middle square
    stages = folder.read_table("stages")
    assert {"accuracy", "mean_accuracy", "token_miou", "pixel_miou"} == set(stages["metric"])


def test_a_model_that_looks_at_pictures_in_their_own_sizes_wants_one_size(tmp_path):
    module, processor = build("qwen2.5-vl")
    model = MLLM.load(module, processor=processor)
    root = drawn.ade20k(tmp_path / "ade", size=(90, 60)).root
    asked = {"model": "qwen", "data": f"ade20k:{root}", "n_probe": 5, "n_test": 5, "batch_size": 2}
    several = drawn.ade20k(tmp_path / "several").root
    with pytest.raises(ValueError, match=r"token grids of .* --resize 448x448"):
        study(model, tmp_path / "no", StudyArguments(**asked | {"data": f"ade20k:{several}"}))
    assert not (tmp_path / "no" / "manifest.json").exists()
    arguments = StudyArguments(**asked, resize=(64, 64), fitting=Fitting("ridge", alphas=(0.1,)))
    summary = study(model, tmp_path / "run", arguments, quiet=True)
    assert set(summary["findings"]) == set(KEYS)
    assert len(summary["classes"]) == 150


def test_fewer_pictures_are_drawn_with_the_seed(tmp_path):
    """Sets lie in the order of their names, so the first ones are of a kind; scenes do not."""
    data = open_data(f"ade20k:{drawn.ade20k(tmp_path).root}")
    picks = {
        seed: tuple(sample.name for sample in few_of(data, (3, 3), seed).test) for seed in range(8)
    }
    assert len(set(picks.values())) > 2
    assert all(list(names) == sorted(set(names)) and len(names) == 3 for names in picks.values())
    again = few_of(data, (3, 3), 5)
    assert tuple(sample.name for sample in again.test) == picks[5]
    assert again.test.fingerprint() != few_of(data, (4, 4), 5).test.fingerprint()
    scenes = few_of(open_data("scenes"), (2, 3), 7)
    assert [s.name for s in scenes.test] == ["test/0", "test/1", "test/2"]
    with pytest.raises(ValueError, match=r"6 pictures asked of ade20k .*--n-test from 2 to 5"):
        few_of(data, (3, 6), 0)
