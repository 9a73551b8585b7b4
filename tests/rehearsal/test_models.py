"""Models that are not the bundled one: without a processor, without a vision tower."""

from __future__ import annotations

import torch
import transformers
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel

from tests import zoo
from tests.rehearsal.serving import Starting


def client_of(module, name, task, processor=None, tokenizer=None):
    """What a client has: a module of its own, under the name by which the server knows it."""
    model = TransformersModel(module, task=task, processor=processor, tokenizer=tokenizer)
    model.repo_id = name
    huggingface._ID_CACHE[name] = name
    return model


def test_models_without_processor_and_without_vision(tmp_path, use):
    """Qwen-VL's processor cannot be made without torchvision; a text-only model has none."""
    qwen, processor = zoo.build("qwen2.5-vl")
    words = zoo.tokenizer()
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(**zoo.TEXT)).eval()
    for module, parts, folder in ((qwen, [processor], "qwen"), (text, [words], "text")):
        module.save_pretrained(tmp_path / folder)
        for part in parts:
            part.save_pretrained(tmp_path / folder)
    starting = [
        Starting(str(tmp_path / "qwen"), "--name", "org/qwen"),
        Starting(str(tmp_path / "text"), "--name", "org/text", "--task", "text-generation"),
    ]
    try:
        x = processor(
            images=[zoo.picture()], text=zoo.ZOO["qwen2.5-vl"].prompt, return_tensors="pt"
        )
        seeing = client_of(qwen, "org/qwen", "image-text-to-text", processor=processor)
        server = starting[0].ready()
        url = use(server)
        with seeing.trace(**x, use_cache=False, remote=url):
            there = seeing.output.logits.save()
        with torch.no_grad():
            assert torch.allclose(there, qwen(**x, use_cache=False).logits, atol=1e-5)
        assert "is served without its processor" in server.log.read_text()

        ids = {"input_ids": torch.arange(4, 12)[None]}
        reading = client_of(text, "org/text", "text-generation", tokenizer=words)
        url = use(starting[1].ready())
        with reading.trace(**ids, use_cache=False, remote=url):
            there = reading.output.logits.save()
        with torch.no_grad():
            assert torch.allclose(there, text(**ids, use_cache=False).logits, atol=1e-5)
    finally:
        assert [one.stop() for one in starting] == [0, 0]
