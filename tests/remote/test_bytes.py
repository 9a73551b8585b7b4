"""How little travels, in numbers.

The study of a model as large as LLaVA-1.5-7B is packed for real, with one picture of 336 x 336, 600
tokens and 32 x 32 heads; nobody computes it, since the answers' sizes are known (and held to what
real runs send, below). What `keep=`, verdicts and float16 save is measured on real runs.
"""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf

from interp import MLLM, ProbeBank
from interp.attribution import attribute, head_attribution
from interp.remote import host
from interp.remote.host import Host
from tests.conftest import random_inputs, random_llava
from tests.remote.pairs import random_bank

N_LAYERS, N_HEADS, N_POS, D_MODEL, N_CLASSES = 32, 32, 600, 4096, 19
N_TOKENS = 24 * 24
Z = N_LAYERS * N_POS * D_MODEL * 4  # bytes of all z
END = f"blocks.{N_LAYERS - 1}.hook_resid_post"
SAID, GRADIENT, EXACT = (
    f"interp.attribution.{name}" for name in ("asking._said", "gradient._part", "exact._part")
)


class Answering:
    """In the place of a transport: notes what was packed, answers with numbers of that shape."""

    progress = None
    address = SimpleNamespace(url="http://nowhere")

    def __init__(self, **answers):
        self.answers, self.plan, self.sizes = answers, [], []

    def run(self, key, env, blob):
        of = self.plan.pop(0)
        value = self.answers[of.rpartition(".")[0].rpartition(".")[2]]
        file = io.BytesIO()
        torch.save(value, file)
        down = len(file.getvalue())
        self.sizes.append((of, len(blob), down))
        answer = {"of": of, "value": value, "rounding": 0.0}
        return SimpleNamespace(result={"answer": answer}, up=len(blob), down=down, seconds=0.0)


@pytest.fixture(scope="module")
def study():
    """(model, a batch of one picture, probes, labels): 500 tokens or so are wrong, in all ways."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=hf.LlamaConfig(
            hidden_size=D_MODEL,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            vocab_size=32064,
            pad_token_id=0,
        ),
        image_token_id=32000,
    )
    with torch.device("meta"):
        module = hf.LlavaForConditionalGeneration(config).eval()
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(1, N_LAYERS, N_HEADS, 5, generator=draw, dtype=torch.float64)
    transport = Answering(
        asking=torch.randint(N_CLASSES, (N_TOKENS,), generator=draw),
        gradient=(values, {}),
        exact=values,
    )
    model = MLLM(module, host=Host("key", transport))
    words = torch.randint(3, 32000, (1, N_POS - N_TOKENS), generator=draw)
    image = torch.full((1, N_TOKENS), 32000)
    x = model.inputs(
        input_ids=torch.cat([words[:, :4], image, words[:, 4:]], 1),
        attention_mask=torch.ones(1, N_POS, dtype=torch.long),
        pixel_values=(photograph() - 0.45) / 0.27,
    )
    stages = ("adapter.hook_out", END)
    bank = ProbeBank(
        stages=stages,
        classes=tuple(str(i) for i in range(N_CLASSES)),
        weights={s: torch.randn(N_CLASSES, D_MODEL, generator=draw) for s in stages},
        intercepts={s: torch.zeros(N_CLASSES) for s in stages},
        seen=(True,) * N_CLASSES,
        n_iter=dict.fromkeys(stages, 1),
        converged=dict.fromkeys(stages, True),
    )
    labels = torch.randint(N_CLASSES, (N_TOKENS,), generator=draw).numpy()
    return model, x, bank, labels


def photograph():
    """`[1, 3, 336, 336]` in 256 steps, as rough as photographs are: 1/f noise."""
    rng, f = np.random.default_rng(0), np.fft.fftfreq(336)
    size = np.hypot(f[:, None], f[None])
    size[0, 0] = 1
    waves = np.fft.fft2(rng.normal(size=(3, 336, 336))) / size
    noise = np.fft.ifft2(waves).real
    pixels = (noise / noise.std() * 50 + 128).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pixels)[None].float() / 255


@pytest.mark.parametrize(
    ("method", "plan"),
    [
        ("attribute", [SAID, GRADIENT, EXACT]),
        ("gradient", [SAID, GRADIENT]),
        ("exact", [SAID, EXACT]),
    ],
)
def test_a_head_study_is_a_hundredth_of_all_z(study, method, plan, monkeypatch):
    """And one request a batch and method step: the plan has no more answers."""
    # the stand-in knows a request by its function's name alone
    monkeypatch.setattr(host, "what_was_asked", lambda f, *_: f"{f.__module__}.{f.__qualname__}")
    model, x, bank, labels = study
    transport, traffic = model.host.transport, model.host.traffic
    transport.plan, transport.sizes[:] = list(plan), []
    before = traffic.requests, traffic.up + traffic.down
    if method == "attribute":
        attribute(model, x, bank, labels=labels)
    else:
        head_attribution(model, x, bank, labels=labels, method=method)
    assert not transport.plan
    assert traffic.requests - before[0] == len(plan)
    went = traffic.up + traffic.down - before[1]
    assert went <= 0.01 * Z, transport.sizes
    assert went > 100_000 * len(plan), "the picture did not travel"


def test_answers_are_as_large_as_taken_above():
    """A real study: what comes back is one number a head and group, and a class a token."""
    there = MLLM.load(random_llava(), remote="local")
    x = random_inputs(there)
    bank = random_bank(there, ["adapter.hook_out", "blocks.2.hook_resid_post"])
    down = []
    count = there.host.count
    there.host.count = lambda up, n, seconds: (down.append(n), count(up, n, seconds))
    labels = np.arange(16) % 4
    attribute(there, x, bank, labels=labels, budget=0.1, k=3)
    said, gradient, exact = down
    n_values = 3 * 6 * 5
    overhead = 3000  # of the file that holds them
    assert 16 * 8 <= said <= 16 * 8 + overhead
    assert n_values * 8 <= gradient <= n_values * 8 + overhead
    assert n_values * 8 <= exact <= n_values * 8 + overhead


def test_requests_grow_with_batches_and_not_with_heads():
    """Of two batches: two for the verdicts at `start`, two for the method."""
    there = MLLM.load(random_llava(), remote="local")
    batches = [random_inputs(there, seed=s) for s in (0, 1)]
    bank = random_bank(there, ["adapter.hook_out", "blocks.2.hook_resid_post"])
    asked = {"labels": [np.arange(16) % 4] * 2, "sources": "place"}
    took = {}
    for method in ("direct", "gradient", "exact"):
        before = there.host.traffic.requests
        head_attribution(there, batches, bank, method=method, **asked)
        took[method] = there.host.traffic.requests - before
    assert took == {"direct": 4, "gradient": 4, "exact": 4}


# -- runs ------------------------------------------------------------------------------------------

READ = "blocks.*.hook_resid_post"


def down(model, x, **options):
    """Bytes that came back from one run without logits."""
    run = model.run(x, read=READ, logits=False, **options)
    return model.host.last.down, run


def test_what_is_kept_is_what_travels(tiny, hosted, x):
    """Over the wire, compressed as it goes: 100 of 113 positions; one byte's worth a token."""
    whole, run = down(hosted, x)
    state = run["blocks.2.hook_resid_post"]
    n_states = hosted.cfg.n_layers
    raw = n_states * state.numel() * 4
    assert 0.85 * raw < whole < 1.05 * raw + 6000
    tokens, _ = down(hosted, x, keep="tokens")
    share = len(x.grid) / x.n_pos
    assert tokens == pytest.approx(share * whole, rel=0.03)
    bank = random_bank(tiny, tiny.hooks.expand(READ))
    verdicts, run = down(hosted, x, keep=bank)
    assert run["blocks.2.hook_resid_post"].shape == (1, len(x.grid))
    assert verdicts < 0.05 * whole
    last, _ = down(hosted, x, keep=lambda state, hook: state[:, -1])
    assert last < 0.05 * whole


def test_float16_halves_it_and_states_its_error(served, load_from, tiny, x, hosted):
    half = load_from(served, transfer="float16")
    whole, exact = down(hosted, x)
    less, rounded = down(half, x)
    assert less == pytest.approx(whole / 2, rel=0.12)
    stated = half.host.last.rounding
    errors = []
    for name in exact:
        there = rounded[name].double()
        errors.append(float((there - exact[name].double()).norm() / exact[name].double().norm()))
    assert 0 < max(errors) <= stated * 1.001
    assert stated < 2**-11
    assert f"{stated:.1e}" in repr(half.host.last) + str(half.host.last)
    assert hosted.host.last.rounding == 0
