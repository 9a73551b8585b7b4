"""A clean run is plain transformers, whatever was done before; and the loaded model's own facts."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file

from interp import MLLM, Knockout, Unmask
from interp.errors import AlreadyRunning
from interp.loading import BUNDLED
from tests.conftest import plain_logits, random_inputs, random_llava


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def use_everything(model, x) -> None:
    """A run with every read, edits of both kinds, functions, a bare trace and a HookPoint hook."""
    block = x.grid.image_block()
    model.run(x, Unmask(block), Knockout(x.grid.edges([0, 1], [3, 4]), heads=0), read="*")
    model.run_with_hooks(x, fwd_hooks=[("blocks.*.attn.hook_pattern", lambda p, hook: p * 0)])
    with model.trace(x):
        model.hook("vision.blocks.0.hook_resid_post").output[:] = 0
    point = model.module.model.language_model.layers[1].self_attn.hook_pattern
    point.add_hook(lambda pattern, hook: pattern * 0)
    model.run(x)
    point.remove_hooks()


# -- equality with transformers --------------------------------------------------------------------


@pytest.mark.parametrize("plain_attention", ["sdpa", "eager"])
def test_clean_run_of_the_bundled_model_is_plain_transformers(tiny, x, plain_tiny, plain_attention):
    plain = copy.deepcopy(plain_tiny)
    plain.set_attn_implementation(plain_attention)
    expected = plain_logits(plain, x)
    # eager rounds each float32 product elsewhere than the fused kernel: 1e-6 of the logits' size
    assert relative(tiny.run(x).logits, expected) < 1e-6
    if plain_attention == "sdpa":
        assert torch.equal(tiny.run(x).logits, expected)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("batch", [(1, 0), (2, 0), (2, 3)], ids=["one", "two", "padded"])
def test_clean_run_of_random_models_is_plain_transformers(n_kv_heads, batch):
    module = random_llava(n_kv_heads=n_kv_heads)
    plain = copy.deepcopy(module)
    model = MLLM.load(module)
    x = random_inputs(model, batch[0], padding=batch[1])
    assert torch.equal(model.run(x).logits, plain_logits(plain, x))
    plain.set_attn_implementation("eager")
    attended = x.tensors["attention_mask"].bool()  # eager attends at random where nothing is open
    # weights of std 0.25 (ten times a trained model's) amplify the kernels' different rounding
    assert relative(model.run(x).logits[attended], plain_logits(plain, x)[attended]) < 1e-5


def test_clean_run_in_bfloat16_is_plain_transformers():
    module = random_llava(dtype=torch.bfloat16)
    plain = copy.deepcopy(module)
    model = MLLM.load(module)
    x = random_inputs(model)
    assert torch.equal(model.run(x).logits, plain_logits(plain, x))
    read = model.run(x, read="*")  # attention written out, norms computed a second time
    # reading may cost what bfloat16 itself costs, which is measured against float32
    exact = plain_logits(plain.float(), x)
    assert relative(read.logits, exact) < 1.5 * relative(model.run(x).logits, exact) < 0.1
    assert read["blocks.0.attn.hook_pattern"].dtype == torch.bfloat16
    assert read["blocks.0.ln1.hook_scale"].dtype == torch.float32
    cut = model.run(x, Knockout(x.grid.edges([0, 1], [3, 4])))
    assert cut.receipts[0].changed == 4


def test_loading_in_another_precision_casts_pictures_too(scene):
    model = MLLM.load("tiny", dtype=torch.bfloat16)
    x = model.prepare(scene.image, "what is in the picture ?")
    run = model.run(x)
    given = {name: tensor.dtype for name, tensor in model.to_device(x).items()}
    assert (given["pixel_values"], given["input_ids"]) == (torch.bfloat16, torch.int64)
    assert run.logits.dtype == torch.bfloat16
    assert "bfloat16" in repr(model)


def test_clean_run_after_everything_is_still_plain_transformers():
    module = random_llava()
    plain = copy.deepcopy(module)
    model = MLLM.load(module)
    x = random_inputs(model)
    use_everything(model, x)
    assert torch.equal(model.run(x).logits, plain_logits(plain, x))
    assert torch.equal(plain_logits(model.module, x), plain_logits(plain, x))


def test_generate_is_plain_generate_also_after_everything(tiny, scene, plain_tiny):
    question = "what is in the picture ?"
    x = tiny.prepare([scene.image, scene.image.rotate(90)], question)
    plain = plain_tiny.generate(**x.tensors, do_sample=False, max_new_tokens=12)[:, x.n_pos :]
    expected = tiny.processor.batch_decode(plain, skip_special_tokens=True)
    assert tiny.generate(x, max_new_tokens=12) == expected
    use_everything(tiny, x)
    assert tiny.generate(x, max_new_tokens=12) == expected


def test_module_keeps_its_weights_and_saves_them_unchanged(tiny, tmp_path):
    saved = load_file(BUNDLED["tiny"] / "model.safetensors")
    tiny.module.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_copy_of_a_loaded_module_can_be_loaded_itself(rand, rx):
    model = MLLM.load(copy.deepcopy(rand.module))
    name = "blocks.1.attn.hook_pattern"
    assert torch.equal(model.run(rx, read=name)[name], rand.run(rx, read=name)[name])


# -- the loaded model ------------------------------------------------------------------------------


def test_sizes_and_stages_of_the_bundled_model(tiny):
    c, text, vision = tiny.cfg, tiny.config.text_config, tiny.config.vision_config
    assert (c.n_layers, c.n_heads, c.d_model) == (
        text.num_hidden_layers,
        text.num_attention_heads,
        text.hidden_size,
    )
    assert (c.n_vision_layers, c.d_vision) == (vision.num_hidden_layers, vision.hidden_size)
    assert tiny.stages[0] == "vision.hook_embed"
    assert tiny.stages.index("adapter.hook_in") == 1 + c.n_vision_layers
    assert tiny.stages[-1] == f"blocks.{c.n_layers - 1}.hook_resid_post"
    assert [tiny.hooks.rank(s) for s in tiny.stages] == sorted(map(tiny.hooks.rank, tiny.stages))


def test_fingerprint_tells_weights_apart_and_nothing_else(rand):
    assert MLLM.load(random_llava()).fingerprint() == rand.fingerprint()
    other = MLLM.load(random_llava())
    with torch.no_grad():
        other.module.lm_head.weight[3, 3] += 1e-6
    assert other.fingerprint() != rand.fingerprint()
    half = MLLM.load(random_llava(dtype=torch.bfloat16))
    assert half.fingerprint() != rand.fingerprint()


def test_w_o_writes_what_hook_result_reads(rand, rx):
    run = rand.run(rx, read="blocks.*.attn.{hook_z,hook_result}")
    for layer in range(3):
        z = run[f"blocks.{layer}.attn.hook_z"]
        result = torch.einsum("bphd,hdm->bphm", z, rand.W_O[layer])
        assert torch.allclose(run[f"blocks.{layer}.attn.hook_result"], result, atol=1e-5)


# -- asking for a run ------------------------------------------------------------------------------


def test_run_refuses_what_is_no_edit_and_nothing_to_do(rand, rx):
    with pytest.raises(TypeError, match=r"is no edit; Knockout\(edges\) and Ablate\(hook\) are"):
        rand.run(rx, rx.grid.edges(0, 1))
    with pytest.raises(ValueError, match="nothing to do: no read, no edit, and logits=False"):
        rand.run(rx, logits=False)


def test_pictures_and_words_need_a_processor(rand, rx, picture):
    for call in (lambda: rand.prepare(picture, "what ?"), lambda: rand.generate(rx)):
        with pytest.raises(ValueError, match=r"loaded without a processor.*processor=AutoProc"):
            call()


def test_run_with_cache_speaks_transformerlens(rand, rx):
    logits, cache = rand.run_with_cache(rx)
    assert not [name for name in cache if name.endswith("hook_result")]
    assert torch.equal(cache["pattern", 1], cache["blocks.1.attn.hook_pattern"])
    assert torch.equal(cache["resid_post", 2], rand.run(rx, read="*")["blocks.2.hook_resid_post"])
    assert cache.accumulated_resid().shape == (4, 1, rx.n_pos, 48)  # three layers and the end
    _, few = rand.run_with_cache(rx, Knockout(rx.grid.edges(0, 3)), names_filter="*.hook_mask")
    assert not few["blocks.0.attn.hook_mask"][0, :, 5, 2].any()
    assert logits.shape == (1, rx.n_pos, 64)


def test_a_float_mask_is_refused(rand, rx):
    """It would be added to the scores, and the causal mask gone."""
    hook = ("blocks.1.attn.hook_mask", lambda mask, hook: mask * 1.0)
    with pytest.raises(ValueError, match=r"'blocks\.1\.attn\.hook_mask' was given torch\.float32"):
        rand.run_with_hooks(rx, fwd_hooks=[hook])
    with pytest.raises((TypeError, ValueError), match="hook_mask"), rand.trace(rx):  # noqa: PT012
        site = rand.hook("blocks.1.attn.hook_mask")
        site.output = site.output.float()


def test_a_hook_function_cannot_run_its_own_model(rand, rx):
    def nested(value, hook):
        return rand.run(rx, read=hook.name)[hook.name]

    with pytest.raises(AlreadyRunning, match="run the other batch first"):
        rand.run_with_hooks(rx, fwd_hooks=[("blocks.1.hook_resid_post", nested)])
    rand.run(rx)


def test_threads_take_turns(rand, rx):
    clean, found = rand.run(rx).logits, []

    def work():
        found.extend(torch.equal(rand.run(rx).logits, clean) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 15


def test_a_copy_is_a_model_of_its_own(rand, rx):
    again = copy.deepcopy(rand)
    with torch.no_grad():
        again.module.lm_head.weight.mul_(2)
    assert torch.allclose(again.run(rx).logits, 2 * rand.run(rx).logits, atol=1e-4)
