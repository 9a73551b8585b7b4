"""The scripts of the documentation run as they are written there."""

from __future__ import annotations

import contextlib
import io
import runpy

import pytest
import torch

SCRIPT = """
from interp import MLLM, Knockout, Unmask
from interp.datasets import scenes

model = MLLM.load("tiny")            # or "llava-hf/llava-1.5-7b-hf", a local folder, a transformers module; remote=True for NDIF
scene = scenes("test")[0]
x = model.prepare(scene.image, "What is in the picture?")
print(x.grid)                        # 10 x 10 image tokens, positions 5..104, 8 x 8 px each

# read
run = model.run(x, read="blocks.*.hook_resid_post")
run["blocks.3.hook_resid_post"]      # [batch, position, d_model]

# cut edges: layers, heads, who no longer sees whom. Information flows src -> dst: src is the
# key, dst the query; numbers count image tokens in grid order; an edge against the mask is an error
edges = x.grid.edges(src=[12, 13], dst=[22, 23])
cut = model.run(x, Knockout(edges, layers=range(1, 4), heads=[0, 2]), read="blocks.*.hook_resid_post")
print(cut.receipts)                  # edges hit, attention mass removed, rows left empty

# edit the causal mask in place: image tokens see each other both ways
both = model.run(x, Unmask(x.grid.image_block()), read="blocks.*.hook_resid_post")

# TransformerLens habits work
logits, cache = model.run_with_cache(x, names_filter="blocks.*.attn.hook_pattern")
logits = model.run_with_hooks(x, fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: z * 0)])

# and so does a bare nnsight trace, for what no helper covers
with model.trace(x):
    model.hook("blocks.2.attn.hook_z").output[:, :, 3] = 0
    out = model.hook("blocks.4.hook_resid_post").output.save()
"""  # noqa: E501


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the script printed, and the names it left."""
    path = tmp_path_factory.mktemp("scripts") / "script.py"  # nnsight reads a trace's source
    path.write_text(SCRIPT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names = runpy.run_path(str(path))
    return printed.getvalue(), names


def test_script_prints_what_its_comments_say(ran):
    printed, _ = ran
    grid, header, *rows = printed.splitlines()
    assert grid == "10 x 10 image tokens, positions 5..104, 8 x 8 px each"
    assert header.split() == ["edit", "layer", "asked", "open", "changed", "mass", "empty_rows"]
    assert [row.split()[-6:-2] for row in rows] == [[str(i), "4", "4", "4"] for i in (1, 2, 3)]


def test_script_leaves_what_its_lines_promise(ran):
    _, names = ran
    run, cut, both, model, x = (names[n] for n in ("run", "cut", "both", "model", "x"))
    last = "blocks.4.hook_resid_post"
    assert run["blocks.3.hook_resid_post"].shape == (1, x.n_pos, model.cfg.d_model)
    first = "blocks.0.hook_resid_post"
    assert torch.allclose(cut[first], run[first], atol=1e-5)  # cut from layer 1 on
    assert not torch.allclose(both[first], run[first], atol=1e-3)
    assert len(both.receipts) == model.cfg.n_layers
    assert list(names["cache"]) == model.hooks.expand("blocks.*.attn.hook_pattern")
    silenced = model.run_with_hooks(
        x, fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: z.index_fill(2, torch.tensor(3), 0))]
    )
    clean = model.run(x, read=last)
    assert not torch.allclose(names["logits"], clean.logits, atol=1e-3)
    assert not torch.equal(names["out"], clean[last])
    tail = model.module.lm_head(model.module.model.language_model.norm(names["out"]))
    assert torch.allclose(tail, silenced, atol=1e-5)
