"""Loading: the bundled model, folders and modules, and what is said about everything else."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from interp import MLLM
from interp.errors import ModelNotFound, NotMultimodal
from interp.loading import BUNDLED, load
from tests.conftest import plain_logits, random_inputs, random_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A model and its processor as files."""
    path = tmp_path_factory.mktemp("model")
    random_llava().save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return path


def test_bundled_model_loads_in_transformers_too(tiny, x):
    plain = LlavaForConditionalGeneration.from_pretrained(BUNDLED["tiny"]).eval()
    assert torch.equal(tiny.run(x).logits, plain_logits(plain, x))


def test_folder_is_loaded_as_it_was_saved(rand, rx, tiny, tmp_path):
    random_llava().save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    model = MLLM.load(tmp_path)
    assert model.fingerprint() == rand.fingerprint()
    assert torch.equal(model.run(rx).logits, rand.run(rx).logits)
    assert model.processor.image_token == "<image>"
    half = MLLM.load(str(tmp_path), dtype="bfloat16", processor=tiny.processor)
    assert half.module.dtype == torch.bfloat16
    assert half.processor is tiny.processor


def test_module_is_instrumented_in_place_and_in_eval_mode():
    module = random_llava().train()
    model = MLLM.load(module, device="cpu")
    assert model.module is module
    assert not module.training
    assert model.run(random_inputs(model)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "./nowhere",
            r"no model at './nowhere': it is no folder, no bundled model \(tiny\) and no",
        ),
        ("tinny", "no model at 'tinny'"),
        ("a/b/c", "no hub id of the form org/name"),
    ],
)
def test_missing_folder_is_named(source, says):
    with pytest.raises(ModelNotFound, match=says):
        MLLM.load(source)


def test_hub_id_that_cannot_be_had_is_named():
    with pytest.raises(ModelNotFound, match="no model at 'nobody/nothing'"):
        MLLM.load("nobody/nothing")


def test_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match=r"holds no config\.json.*save_pretrained"):
        MLLM.load(tmp_path)
    with pytest.raises(FileNotFoundError):  # what a caller would expect, too
        MLLM.load(tmp_path)


def test_folder_without_weights_is_named(tmp_path, tiny):
    random_llava().config.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="no model at"):
        MLLM.load(tmp_path)


def test_folder_without_a_processor_asks_for_one(tmp_path, tiny):
    random_llava().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match=r"(?s)comes with no processor.*pass one: MLLM\.load"):
        MLLM.load(tmp_path)
    assert MLLM.load(tmp_path, processor=tiny.processor).processor is tiny.processor


def test_folder_with_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="no model at"):
        MLLM.load(tmp_path)


def test_text_only_model_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlamaConfig(num_hidden_layers=1, vocab_size=8, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        NotMultimodal, match=r"is no multimodal LLM.*'llama'\) has no vision_config"
    ):
        MLLM.load(tmp_path)


def test_family_without_a_table_is_refused_before_its_weights_are_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CLIPConfig().to_dict()))
    with pytest.raises(NotMultimodal, match=r"no family table for model_type 'clip'.*: llava"):
        MLLM.load(tmp_path)


def test_torch_module_that_is_no_transformers_model_is_refused():
    with pytest.raises(NotMultimodal, match=r"Linear \(model_type None\) is no multimodal LLM"):
        MLLM.load(torch.nn.Linear(2, 2))


# -- spread out, offloaded, quantised --------------------------------------------------------------


def test_device_map_gives_the_numbers_of_the_plain_model(folder, rx):
    pytest.importorskip("accelerate")
    module, _ = load(folder, device_map={"": "cpu"})
    assert torch.equal(plain_logits(module, rx), plain_logits(random_llava(), rx))


def test_offloaded_to_disk_gives_the_numbers_of_the_plain_model(folder, rx, tmp_path):
    pytest.importorskip("accelerate")
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"}
    places |= {"model.language_model": "disk", "lm_head": "disk"}
    module, _ = load(folder, device_map=places, offload_folder=tmp_path)
    assert next(module.model.language_model.parameters()).is_meta  # not in memory between uses
    assert torch.equal(plain_logits(module, rx), plain_logits(random_llava(), rx))
    with pytest.raises(ValueError, match="spread out by a device_map, and so neither moved nor"):
        load(module, dtype="bfloat16")


def test_max_memory_reaches_transformers(folder, tmp_path):
    pytest.importorskip("accelerate")
    options = {"device_map": "auto", "offload_folder": tmp_path}
    roomy, _ = load(folder, max_memory={"cpu": "1GB"}, **options)
    tight, _ = load(folder, max_memory={"cpu": "100KB"}, **options)
    assert not any(parameter.is_meta for parameter in roomy.parameters())
    assert any(parameter.is_meta for parameter in tight.parameters())


class NeverMoved(torch.nn.Module):
    """Stands for quantised weights, which must not be handed to `.to`."""

    def to(self, *args, **kwargs):
        raise AssertionError("moved")


@pytest.mark.parametrize(
    ("asked", "bits"),
    [
        ({"load_in_4bit": True}, 4),
        ({"load_in_8bit": True}, 8),
        ({"quantization_config": {"load_in_4bit": True}}, 4),
    ],
)
def test_quantisation_reaches_transformers_and_nothing_is_moved(folder, monkeypatch, asked, bits):
    got = {}

    def from_pretrained(where, **options):
        got.update(options)
        return NeverMoved()

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    load(folder, device="cpu", dtype="bfloat16", max_memory={0: "1GB"}, **asked)
    config = got["quantization_config"]
    config = config if isinstance(config, dict) else config.to_dict()
    assert config[f"load_in_{bits}bit"]
    assert got["device_map"] == {"": "cpu"}
    assert got["dtype"] == torch.bfloat16
    assert got["max_memory"] == {0: "1GB"}
    assert "load_in_4bit" not in got


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_missing_quantisation_library_is_named(folder):
    with pytest.raises(ImportError, match=r"cannot be loaded like this here.*bitsandbytes"):
        load(folder, load_in_4bit=True)


@pytest.mark.parametrize("asked", [{"device": "cpu"}, {"dtype": "float16"}])
def test_quantised_module_is_neither_moved_nor_cast(asked):
    module = random_llava()
    module.is_quantized = True
    with pytest.raises(ValueError, match=f"{next(iter(asked))}=.*is quantised"):
        load(module, **asked)
    assert load(module)[0] is module


# -- options that do not go together ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cpu", "device_map": "auto"}, "both say where the weights go"),
        ({"attn_implementation": "eager"}, "attention goes through interp's own function"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"dtype": "float17"}, "no dtype 'float17'"),
    ],
)
def test_options_that_make_no_sense_are_refused(folder, options, says):
    with pytest.raises(ValueError, match=says):
        load(folder, **options)


def test_unknown_option_is_not_swallowed(folder):
    with pytest.raises(TypeError, match="devcie_map"):
        load(folder, devcie_map="auto")


def test_options_for_files_are_refused_for_a_module():
    with pytest.raises(ValueError, match="revision: for a model that is read from files"):
        load(random_llava(), revision="main")


# -- code from a model's repository ----------------------------------------------------------------

OWN_CODE = """
from pathlib import Path
from transformers import LlavaConfig, LlavaForConditionalGeneration

Path({flag!r}).touch()

class OwnConfig(LlavaConfig):
    pass

class Own(LlavaForConditionalGeneration):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path, tiny, monkeypatch):
    """A folder whose config points to code in it, and the file that this code makes when run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    path, flag = tmp_path / "own", tmp_path / "was_run"
    random_llava().save_pretrained(path)
    tiny.processor.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForImageTextToText": "own.Own",
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(OWN_CODE.format(flag=str(flag)))
    return path, flag


def test_code_from_the_repository_is_not_run_unless_asked_for(with_code):
    path, flag = with_code
    module, _ = load(path)
    assert type(module) is LlavaForConditionalGeneration
    assert not flag.exists()
    module, _ = load(path, trust_remote_code=True)  # the same folder does run it when told to
    assert type(module).__name__ == "Own"
    assert flag.exists()


def test_model_that_needs_its_own_code_is_refused_without_running_it(with_code):
    path, flag = with_code
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(NotMultimodal, match=r"(?s)can be loaded here.*trust_remote_code=True"):
        load(path)
    assert not flag.exists()


def test_unknown_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(NotMultimodal, match="unheard_of"):
        load(tmp_path)
