"""Text-only models, taken as a server has them: plain transformers' numbers, and no vision tower.

The reference is another copy of the same weights that this library never touches, in which edits
are made by torch's own hooks.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as hf

from interp import MLLM, Ablate, Knockout
from interp.attribution import AnswerLogit, head_attribution
from interp.edits import Patch
from interp.errors import NotMultimodal, UnknownHook
from interp.families import TEXT_ONLY, family_of
from interp.families.text import encode
from interp.loading import fast_kernel, load_hosted
from tests import zoo

TEXTS = ["what is in the picture ?", "a red dog on green grass"]
SHORT = ["a red dog", "what is in the picture ?"]
LAST = zoo.TEXT["num_hidden_layers"] - 1
NO_VISION = "has no vision tower: it is text-only"


@cache
def words() -> hf.PreTrainedTokenizerFast:
    return zoo.tokenizer()


@cache
def plain(kind: str) -> torch.nn.Module:
    """A random model by the type of its configuration, as transformers makes it."""
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(kind, **zoo.TEXT, head_dim=8, sliding_window=4)
    module = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.25)
    return module.eval()


@cache
def hosted(kind: str) -> MLLM:
    """The same weights, as a server has them."""
    copy = hf.AutoModelForCausalLM.from_config(plain(kind).config)
    copy.load_state_dict(plain(kind).state_dict())
    return MLLM.load(copy, processor=words(), remote="local")


ALL = TEXT_ONLY.model_types
#: plain, biased, capped and with norms behind, sliding
EDITED = ["llama", "qwen2", "gemma2", "gemma3_text"]


def logits(module, x, **kwargs):
    with torch.no_grad():
        return module(**x.tensors, use_cache=False, **kwargs)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_clean_run_is_plain_transformers(kind):
    """Of a padded batch; what enters block i is `hidden_states[i]`."""
    model = hosted(kind)
    x = model.prepare(None, SHORT)
    assert not x.is_attended.all()
    run = model.run(x, read="blocks.*.hook_resid_pre")
    there = logits(plain(kind), x, output_hidden_states=True)
    attended = x.tensors["attention_mask"].bool()
    assert close(run.logits[attended], there.logits[attended])
    for layer in range(LAST + 1):
        state = run[f"blocks.{layer}.hook_resid_pre"]
        assert close(state[attended], there.hidden_states[layer][attended])


@pytest.mark.parametrize("kind", TEXT_ONLY.model_types)
def test_hooks_are_those_of_the_language_model(kind):
    """All of them can be read; a multimodal model with the same language tower has no other."""
    model = hosted(kind)
    assert not [n for n in model.hooks.names if n.startswith(("vision.", "adapter.", "deepstack."))]
    run = model.run(model.prepare(None, TEXTS), read="*")
    assert list(run) == model.hooks.names
    assert "blocks.0.attn.hook_rot_q" in run.states
    pattern = run["blocks.1.attn.hook_pattern"]
    assert close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    if kind == "llama":
        llava, processor = zoo.build("llava-clip-llama")
        names = MLLM.load(llava, processor=processor, remote="local").hooks.names
        own = [n for n in names if not n.startswith(("vision.", "adapter."))]
        assert sorted(own) == sorted(model.hooks.names)


def closing(mask_of, layers):
    """Torch hooks that close an edge in the attention mask of some layers."""

    def pre(module, args, kwargs):
        n = kwargs["hidden_states"].shape[1]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask_of(mask.clone())}

    return [layer.self_attn.register_forward_pre_hook(pre, with_kwargs=True) for layer in layers]


@pytest.mark.parametrize("kind", EDITED)
def test_knockout_is_an_edge_closed_by_hand(kind):
    """In the logits, and in the receipt: the weight that the edge had in the last layer."""
    model, module = hosted(kind), plain(kind)
    x = model.prepare(None, TEXTS)
    edges = x.edges(src=[3], dst="last")  # within the sliding window, where there is one
    run = model.run(x, Knockout(edges, layers=[1, 2]))

    def close_edge(mask):
        mask[:, :, -1, 3] = torch.finfo(torch.float32).min
        return mask

    kernel = module.config._attn_implementation
    hooks = closing(close_edge, module.model.layers[1:])
    try:
        there = logits(module, x).logits
        module.set_attn_implementation("eager")
        # what the last layer would have read through the edge, its own left open
        hooks.pop().remove()
        weights = logits(module, x, output_attentions=True).attentions[2]
    finally:
        module.set_attn_implementation(kernel)
        for hook in hooks:
            hook.remove()
    assert close(run.logits, there)
    assert not close(run.logits, model.run(x).logits)
    receipt = run.receipts[1]
    assert (receipt.layer, receipt.asked, receipt.changed) == (2, 2, 2)
    assert receipt.mass == pytest.approx(float(weights[:, :, -1, 3].mean()), abs=1e-5)


@pytest.mark.parametrize("kind", EDITED[::2])
def test_value_edit_is_a_head_silenced_by_hand(kind):
    """By the edit, by a hook function, in a bare trace, and among many; all alike."""
    model, module = hosted(kind), plain(kind)
    x = model.prepare(None, TEXTS)
    edit = Ablate("attn.hook_z", layers=[1], heads=[4], positions="last")

    def silence(_, args):
        z = args[0].clone()
        z[:, -1, 4 * 8 : 5 * 8] = 0
        return (z,)

    hook = module.model.layers[1].self_attn.o_proj.register_forward_pre_hook(silence)
    try:
        there = logits(module, x).logits
    finally:
        hook.remove()
    run = model.run(x, edit)
    assert close(run.logits, there)
    assert (run.receipts[0].asked, run.receipts[0].changed) == (2, 2)

    def function(z, hook):
        z[:, -1, 4] = 0

    assert close(model.run_with_hooks(x, fwd_hooks=[("blocks.1.attn.hook_z", function)]), there)
    with model.trace(x, attn=fast_kernel(model.module)):
        model.hook("blocks.1.attn.hook_z").output[:, -1, 4] = 0
        traced = model.nn.output.logits.save()
    assert close(traced, there)
    knockout = Knockout(x.edges(src=[3], dst="last"))
    many = model.run_many(x, [edit, knockout])
    assert close(many[0].logits, there)
    assert close(many[1].logits, model.run(x, knockout).logits)


def test_cache_and_patch():
    model = hosted("llama")
    x, other = model.prepare(None, TEXTS[0]), model.prepare(None, TEXTS[1])
    made, cache = model.run_with_cache(other, names_filter="blocks.1.hook_resid_post")
    assert close(made, logits(plain("llama"), other).logits)
    edit = Patch("blocks.1.hook_resid_post", cache, positions="last")
    patched = model.run(x, edit, read="blocks.1.hook_resid_post")
    state = patched["blocks.1.hook_resid_post"]
    assert torch.equal(state[:, -1], cache["blocks.1.hook_resid_post"][:, -1])
    assert not torch.equal(state[:, -2], cache["blocks.1.hook_resid_post"][:, -2])


# -- what there is not -----------------------------------------------------------------------------

REFUSED = {
    "a picture": lambda m, x: m.prepare(zoo.picture(), "a red dog"),
    "a setting of pictures": lambda m, x: m.prepare(None, "a red dog", do_pan_and_scan=True),
    "pixels": lambda m, x: m.inputs(**x.tensors, pixel_values=torch.zeros(1, 3, 8, 8)),
    "sizes": lambda m, x: m.inputs(**x.tensors, sizes=[(8, 8)]),
    "image places": lambda m, x: x.edges(src="image", dst="last"),
    "a cell": lambda m, x: x.grid.at((0, 0)),
    "neighbours": lambda m, x: x.grid.neighbours(1),
    "patches": lambda m, x: x.patches.edges(None, None),
    "a view": lambda m, x: x.select("finest"),
    "tokens of a state": lambda m, x: m.run(x, read="hook_embed").tokens("hook_embed"),
    "tokens kept": lambda m, x: m.run(x, read="blocks.0.hook_resid_post", keep="tokens"),
    "attribution": lambda m, x: head_attribution(m, x, target=AnswerLogit("red")),
    "stages": lambda m, x: m.stages,
    "the path": lambda m, x: m.path(),
    "vision weights": lambda m, x: m.vision.W_Q,
    "vision edges": lambda m, x: m.run(x, Knockout(x.edges(src=0, dst="last"), tower="vision")),
    "vision edges among many": lambda m, x: m.run_many(
        x, [Knockout(x.edges(src=0, dst="last"), tower="vision")]
    ),
    "image positions": lambda m, x: m.run(x, Ablate("blocks.0.hook_mlp_out", positions="image")),
    "the grid as positions": lambda m, x: m.run(
        x, Ablate("blocks.0.hook_mlp_out", positions=x.grid)
    ),
}
UNKNOWN = {
    "a vision hook": lambda m, x: m.hook("vision.blocks.0.hook_resid_post"),
    "TransformerLens's name": lambda m, x: m.run(x, read="vision_encoder.*"),
    "one of several": lambda m, x: m.run(x, read=["hook_embed", "adapter.hook_out"]),
    "layers": lambda m, x: m.run(x, read="vision.blocks.[0-1].attn.hook_q"),
    "a vision edit": lambda m, x: m.run(x, Ablate("vision.attn.hook_z", layers=0)),
    "a function": lambda m, x: m.run_with_hooks(x, fwd_hooks=[("adapter.hook_out", print)]),
    "deepstack": lambda m, x: m.run(x, read="deepstack.0.hook_out"),
}


@pytest.mark.parametrize("what", [*REFUSED, *UNKNOWN])
def test_what_is_about_pictures_says_that_there_is_no_vision_tower(what):
    model = hosted("llama")
    x = model.prepare(None, TEXTS)
    error = UnknownHook if what in UNKNOWN else NotMultimodal
    with pytest.raises(error, match=NO_VISION):
        {**REFUSED, **UNKNOWN}[what](model, x)


def test_a_misspelt_hook_is_told_the_nearest():
    with pytest.raises(UnknownHook, match=r"did you mean .*blocks\.0\.hook_resid_post"):
        hosted("llama").hook("blocks.0.hook_resid_past")


def test_what_can_be_said_without_pictures_is_said():
    model = hosted("llama")
    x = model.prepare(None, SHORT)
    attended = x.tensors["attention_mask"].bool().numpy()
    assert (x.is_text == attended).all()
    assert x.is_last.sum(1).tolist() == x.is_first.sum(1).tolist() == [1, 1]
    assert (len(x.grid), repr(x.grid), len(x.patches)) == (0, "no image tokens", 0)
    assert x.until(4).n_pos == x.until(4).grid.n_pos == 4
    assert "no vision tower, LLM 3 layers x 6 heads" in repr(model)
    assert model.cfg.n_vision_layers == 0
    assert model.tokenizer is words()


# -- texts to tensors ------------------------------------------------------------------------------


def test_texts_are_padded_on_the_tokenizers_side_without_a_padding_token():
    model = hosted("llama")
    for side in ("left", "right"):
        tokenizer = zoo.tokenizer()
        tokenizer.padding_side = side
        rows = [tokenizer(text)["input_ids"] for text in SHORT]
        x = encode(tokenizer, SHORT)
        tokenizer.pad_token = None
        again = encode(tokenizer, SHORT)
        for row, ids, mask, other in zip(
            rows, x["input_ids"], x["attention_mask"], again["input_ids"], strict=True
        ):
            assert ids[mask.bool()].tolist() == other[mask.bool()].tolist() == row
        assert (
            x["attention_mask"][0].tolist() == ([0, 0, 0, 1, 1, 1][:: -1 if side[0] == "r" else 1])
        )
        assert torch.equal(x["attention_mask"], again["attention_mask"])
    x = model.prepare(None, TEXTS[0])
    assert x.prompts == (TEXTS[0],)
    assert torch.equal(
        model.inputs(input_ids=x.tensors["input_ids"]).tensors["attention_mask"][0],
        x.tensors["attention_mask"][0],
    )


def test_bos_is_there_once():
    """Also before a text that begins with it, as those of chat templates do."""
    tokenizer = zoo.tokenizer()
    from tokenizers import processors

    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    plain_text, chat = encode(tokenizer, ["a red dog", "<bos> a red dog"])["input_ids"].tolist()
    assert plain_text == chat
    assert plain_text.count(bos) == 1


@pytest.mark.parametrize("texts", [[], [""], ["a red dog", ""]])
def test_a_text_without_tokens_is_refused(texts):
    with pytest.raises(ValueError, match="no token"):
        hosted("llama").prepare(None, texts)


# -- which models ----------------------------------------------------------------------------------


def test_every_block_of_a_causal_model_is_covered():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from interp.families.blocks import TEXT

    causal = [kind for kind in TEXT if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    assert list(TEXT_ONLY.model_types) == causal


def test_only_what_a_server_hosts_may_be_text_only(tmp_path):
    """In this process it is refused as ever, and told how it is had."""
    plain("llama").save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    for source in (tmp_path, hf.LlamaForCausalLM(plain("llama").config)):
        with pytest.raises(NotMultimodal, match=r'is no multimodal LLM.*remote="local" to try it'):
            MLLM.load(source)
    model = MLLM.load(tmp_path, remote="local")
    x = model.prepare(None, TEXTS)
    assert close(model.run(x).logits, logits(plain("llama"), x).logits)
    module, tokenizer, name = load_hosted(str(tmp_path), weights=False)
    assert next(module.parameters()).is_meta
    assert (type(module), name) == (hf.LlamaForCausalLM, str(tmp_path))
    assert tokenizer("a red dog")["input_ids"] == words()("a red dog")["input_ids"]


def test_types_without_a_block_are_refused():
    config = hf.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)
    with pytest.raises(NotMultimodal, match=r"'gpt2'\) is no multimodal LLM.*llama, mistral") as no:
        family_of(config, hosted=True)
    assert "remote=" not in str(no.value)
