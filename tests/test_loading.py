"""Loading: the bundled model, folders and modules, and what is said about everything else."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CLIPConfig, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from interp import MLLM
from interp.errors import ModelNotFound, NotMultimodal
from interp.loading import BUNDLED
from tests.conftest import plain_logits, random_inputs, random_llava


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


def test_folder_without_weights_is_named(tmp_path):
    random_llava().config.save_pretrained(tmp_path)
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
