"""The benchmark of a pass for probes: all ways run, the reference is the model, sizes are sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments/benchmarks"))

import probe_paper  # noqa: E402
import probe_pass  # noqa: E402


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("pass")
    page, out = folder / "page.md", folder / "numbers.json"
    page.write_text(f"before\n\n{probe_pass.BEGIN}\nstale words\n{probe_pass.END}\n\nafter\n")
    found = probe_pass.main(
        ["--quick", "--json", str(out), "--docs", str(page), "--threads", str(threads)]
    )
    return found, page.read_text(), json.loads(out.read_text())


def test_every_way_has_times_and_the_page_its_own_words(ran):
    found, page, numbers = ran
    assert set(found) == {"read", "sums", "logistic", "score", "pixels"} == set(numbers)
    for way, timing in found.items():
        assert len(timing.seconds) == (1 if way in probe_pass.ONCE else 2)
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "stale words" not in page
    assert "probe_pass.py --quick" in page
    assert "11.6 million tokens" in page


def test_the_reference_is_the_same_forward_pass():
    bench = probe_pass.Bench.build(probe_pass.QUICK, 4, 2)
    part = next(bench.parts.parts([1]))
    read = bench.stream().tokens(part).features
    last = list(read)[-1]
    module = bench.model.module.model
    with torch.no_grad():
        out = module(**bench.model.to_device(part.x), use_cache=False, output_hidden_states=True)
    states = part.x.grid.gather(out.hidden_states[-2]).flatten(0, 1)
    torch.testing.assert_close(read[list(read)[-2]], states, atol=1e-5, rtol=1e-4)
    assert last == f"blocks.{bench.model.cfg.n_layers - 1}.hook_resid_post"


def test_the_papers_forward_is_counted_right(monkeypatch):
    """The formula on a small model, against torch's own count of its products."""
    sizes = {
        "D": 64, "D_FF": 96, "LAYERS": 3, "D_VISION": 32, "D_FF_VISION": 48, "LAYERS_VISION": 2,
        "TOKENS": 16, "POSITIONS": 22,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(probe_paper, name, value)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                image_size=32, patch_size=8,
            ),
            text_config=LlamaConfig(
                hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                vocab_size=64,
            ),
            image_token_index=63,
            vision_feature_layer=-1,
        )
    )  # fmt: skip
    model.set_attn_implementation(
        "eager"
    )  # the fast kernel's products are not all counted on a CPU
    ids = torch.cat([torch.ones(1, 3), torch.full((1, 16), 63), torch.ones(1, 3)], 1).long()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(
            input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32),
            attention_mask=torch.ones_like(ids), use_cache=False,
        )  # fmt: skip
    patches = 2 * 16 * 32 * 3 * 8 * 8  # the embedding of patches is left out of the estimate
    assert probe_paper.forward() == pytest.approx(counter.get_total_flops() - patches, rel=0.01)


def test_the_papers_stages_are_the_pipelines():
    widths = probe_paper.widths()
    assert len(widths) == 25 + 2 + 32
    assert probe_paper.statistics() == sum(2 * 576 * (d * d + 150 * d) for d in widths.values())
    text = probe_paper.paper_estimate()
    assert "20,210 + 2,000 pictures" in text
    assert "3.8 TB" in text
