"""Processors as they come back from files: every family's, in both spellings of a repository."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import LlavaConfig
from transformers.utils import is_torchvision_available

from interp.errors import ModelNotFound
from interp.loading import load
from interp.processing import NoVideos, read_processor
from tests.zoo import ZOO, build, picture

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{{ '[picture]' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
)
#: with torchvision, transformers takes other image processors, whose pixels differ in the last bits
same_backend = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
VIDEO = ("llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl", "smolvlm")


def saved(name, path):
    """The case's model and processor, and a folder with both."""
    module, processor = build(name)
    processor.chat_template = TEMPLATE
    module.save_pretrained(path)
    processor.save_pretrained(path)
    return module, processor


def as_on_the_hub(path):
    """Rewrite a folder as older repositories have it: the image processor in a file of its own."""
    settings = json.loads((path / "processor_config.json").read_text())
    images = settings.pop("image_processor")
    images["processor_class"] = settings["processor_class"]
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    if set(settings) == {"processor_class"}:
        (path / "processor_config.json").unlink()
    else:
        (path / "processor_config.json").write_text(json.dumps(settings))
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").unlink()
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def tensors(processor, name):
    batch = processor(images=[picture(50, 70)], text=[ZOO[name].prompt], return_tensors="pt")
    return {key: torch.as_tensor(value) for key, value in batch.items()}


def assert_same(processor, expected, name):
    assert type(processor).__name__ == type(expected).__name__
    got, wanted = tensors(processor, name), tensors(expected, name)
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    assert processor.apply_chat_template(message) == "[picture]what"


@same_backend
@pytest.mark.parametrize("name", ZOO)
def test_folder_gives_the_model_and_the_processor_that_were_saved(name, tmp_path):
    module, processor = saved(name, tmp_path)
    loaded, found = load(tmp_path)
    assert_same(found, processor, name)
    assert found.image_processor.to_dict() == processor.image_processor.to_dict()
    batch = {key: value for key, value in tensors(found, name).items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(
            loaded(**batch, use_cache=False).logits, module(**batch, use_cache=False).logits
        )


@same_backend
@pytest.mark.parametrize("name", [*VIDEO, "llava-clip-llama", "gemma3"])
def test_files_of_an_older_repository_give_the_same(name, tmp_path):
    module, processor = saved(name, tmp_path)
    as_on_the_hub(tmp_path)
    assert_same(read_processor(str(tmp_path), module.config), processor, name)


@same_backend
def test_class_is_the_configuration_s_where_no_file_names_one(tmp_path):
    module, processor = saved("qwen2.5-vl", tmp_path)
    as_on_the_hub(tmp_path)
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        settings = json.loads((tmp_path / file).read_text())
        settings.pop("processor_class", None)
        (tmp_path / file).write_text(json.dumps(settings))
    assert_same(read_processor(str(tmp_path), module.config), processor, "qwen2.5-vl")


def test_class_that_a_file_names_goes_before_the_configuration_s(tmp_path):
    module, _ = saved("qwen2.5-vl", tmp_path)
    as_on_the_hub(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "processor_class": "Qwen2VLProcessor"}))
    found = read_processor(str(tmp_path), module.config)
    assert type(found).__name__ == "Qwen2VLProcessor"


@pytest.mark.parametrize("name", VIDEO)
def test_video_is_refused_with_the_reason(name, tmp_path):
    module, _ = saved(name, tmp_path)
    found = read_processor(str(tmp_path), module.config)
    assert isinstance(found.video_processor, NoVideos)
    prompt = f"<bos> {found.video_token} what is in the picture ?"
    with pytest.raises(ImportError, match=r"without its video part.*install torchvision"):
        found(text=[prompt], videos=[np.zeros((2, 32, 32, 3), np.uint8)], return_tensors="pt")


def test_missing_library_of_a_processor_is_named(tmp_path, monkeypatch):
    saved("smolvlm", tmp_path)
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(ImportError, match=r"processor of .* library that is missing.*num2words"):
        load(tmp_path)


class UnknownConfig(LlavaConfig):
    """As code from a repository may bring one: transformers knows no processor class for it."""


def test_unknown_configuration_with_no_processor_files_is_refused(tmp_path):
    with pytest.raises(OSError, match="Can't load image processor"):
        read_processor(str(tmp_path), UnknownConfig())
    build("llava-clip-llama")[1].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"there is only a .*, which has no image_processor"):
        read_processor(str(tmp_path), UnknownConfig())


def test_processor_that_transformers_does_not_know_is_refused(tmp_path):
    module, _ = saved("llava-clip-llama", tmp_path)
    as_on_the_hub(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "UnheardOf"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(OSError, match="Unrecognized image processor"):
        read_processor(str(tmp_path), module.config)


def test_tokenizer_alone_is_no_processor(tmp_path):
    module, processor = build("qwen2-vl")
    module.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match=r"comes with no processor.*pass one"):
        load(tmp_path)
