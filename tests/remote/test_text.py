"""A text-only model on a server of its own: the local numbers, and no vision tower."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from interp import MLLM, Ablate, Knockout
from interp.errors import NotMultimodal, UnknownHook
from tests import zoo
from tests.rehearsal.serving import serve
from tests.remote.pairs import same

TEXTS = ["a red dog", "what is in the picture ?"]


def test_text_only_model_on_a_server(tmp_path, monkeypatch):
    """The client has no weights, asks for "text-generation", and pads the batch itself."""
    torch.manual_seed(0)
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**zoo.TEXT)).eval()
    plain.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    with serve(tmp_path, "--task", "text-generation") as server:
        monkeypatch.setenv("NDIF_API_KEY", server.key)
        model = MLLM.load(tmp_path, remote=server.url)
        local = MLLM.load(tmp_path, remote="local")
        assert next(model.module.parameters()).is_meta
        assert '"task": "text-generation"' in model.host.key
        x = model.prepare(None, TEXTS)
        edits = [
            Knockout(x.edges(src="first", dst="last"), layers=[0, 2]),
            Ablate("attn.hook_z", layers=1, heads=3, positions="last"),
        ]
        run = model.run(x, *edits, read="blocks.*.hook_resid_post", change=True)
        there = local.run(x, *edits, read="blocks.*.hook_resid_post", change=True)
        for name in there:
            same(run[name], there[name], name)
        same(run.logits, there.logits)
        assert len(run.receipts) == 3
        for one, other in zip(run.receipts, there.receipts, strict=True):
            assert (one.edit, one.hook, one.changed) == (other.edit, other.hook, other.changed)
            assert one.size == pytest.approx(other.size, rel=1e-5)
            if other.mass is not None:  # of edges
                assert one.mass == pytest.approx(other.mass, rel=1e-5)
        assert sum(one.mass is not None for one in run.receipts) == 2
        with torch.no_grad():
            stock = plain(**x.tensors, use_cache=False).logits
        attended = x.tensors["attention_mask"].bool()
        with model.trace(x):
            traced = model.nn.output.logits.save()
        same(traced[attended], stock[attended])
        same(model.run_many(x, [edits[1], []])[1].logits[attended], stock[attended])
        sent = model.host.traffic.requests
        with pytest.raises(UnknownHook, match="has no vision tower"):
            model.run(x, read="vision.hook_embed")
        with pytest.raises(NotMultimodal, match="has no vision tower"):
            model.run(x, Knockout(x.edges(src="first", dst="last"), tower="vision"))
        assert model.host.traffic.requests == sent
