"""The self-check: it passes on right tables, and each kind of wrong table fails at its claim."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import interp.instrumented
from interp import MLLM
from interp.check import trials
from interp.check.claims import Finding
from interp.check.report import LEAST_MOVE, CheckReport, Ledger, Row, check, random_inputs
from interp.families import family_of
from tests.conftest import plain_logits
from tests.record import proved
from tests.zoo import ZOO, build, picture


def loaded(name, dtype=torch.float32):
    return MLLM.load(*build(name, dtype=dtype)[:1], processor=build(name)[1])


def without_edits(monkeypatch):
    """Spare a check the two hundred runs that most mistakes do not need."""
    monkeypatch.setattr(trials, "edits", lambda *args, **kwargs: [])


def verdicts(report: CheckReport):
    return {(row.part, row.claim): row.verdict for row in report.rows}


# -- right tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    # bounds on scores and logits, norms behind, 1 + weight; packed, deepstack
    [*((name, "float32") for name in ZOO), ("paligemma2", "bfloat16"), ("qwen3-vl", "bfloat16")],
)
def test_right_table_passes_and_nothing_is_left_unchecked(name, dtype):
    report = check(loaded(name, getattr(torch, dtype)), prompt=ZOO[name].prompt)
    assert report.passed, report
    assert not report.unchecked
    parts = {row.part for row in report.rows}
    assert parts == {"vision", "adapter", "language", "model"}
    assert len(report.rows) > 40
    proved(name, "self-check")


def test_model_is_left_as_it_was():
    model = loaded("llava-clip-llama")
    x = model.prepare(picture(), ZOO["llava-clip-llama"].prompt)
    before, weights = model.run(x).logits, model.fingerprint()
    hooks = {path: len(m._forward_hooks) for path, m in model.module.named_modules()}
    check(model, x)
    assert torch.equal(model.run(x).logits, before)
    assert torch.equal(plain_logits(model.module, x), before)
    assert model.module.config._attn_implementation == "interp"
    assert model.fingerprint() == weights
    assert {path: len(m._forward_hooks) for path, m in model.module.named_modules()} == hooks


@pytest.mark.parametrize("name", ZOO)
def test_random_inputs_fit_every_family(name):
    model = MLLM.load(build(name)[0])
    x = random_inputs(model)
    assert x.grid.is_image.any()
    assert model.run(x).logits.isfinite().all()


def test_without_a_processor_it_says_what_is_unchecked(monkeypatch):
    without_edits(monkeypatch)
    report = check(MLLM.load(build("llava-clip-llama")[0]))
    assert report.passed
    (row,) = report.unchecked
    assert row.claim == "a token answers to its own box"
    assert "no processor" in row.where
    assert "unchecked" in str(report)


def test_offloaded_weights_are_refused():
    model = loaded("llava-clip-llama")
    model.module.lm_head.to("meta")
    with pytest.raises(ValueError, match="is offloaded, and the check reads weights"):
        check(model)


# -- wrong tables ----------------------------------------------------------------------------------


def block(tower, **parts):
    def wrong(family):
        old = getattr(family, tower)
        return replace(family, **{tower: replace(old, block=replace(old.names, **parts))})

    return wrong


def tower(name, **fields):
    return lambda family: replace(family, **{name: replace(getattr(family, name), **fields)})


def table(**fields):
    return lambda family: replace(family, **fields)


def views(change):
    """A layout that changes each view of the right one."""

    def wrong(family):
        def layout(*args):
            return [
                replace(one, views=tuple(change(view) for view in one.views))
                for one in family.layout(*args)
            ]

        return replace(family, layout=layout)

    return wrong


def mirrored(view):
    rows, cols = view.shape
    return replace(view, boxes=view.boxes.reshape(rows, cols, 4)[:, ::-1].reshape(-1, 4))


def shifted(view):
    return replace(view, slots=np.roll(view.slots, 1))


WRONG = {
    "gemma's offset on llama's norms": (
        "llava-clip-llama",
        block("language", norm_offset=1.0),
        ("language", "normalized x weight = what goes on"),
    ),
    "another block's norm as the final one": (
        "llava-clip-llama",
        tower("language", final_norm="model.language_model.layers.2.input_layernorm"),
        ("language", "its hooks can be reached in their order"),
    ),
    "the gate taken for its factor": (
        "llava-clip-llama",
        block("language", mlp_pre="up_proj", mlp_gated=""),
        ("language", "mlp.post = act(mlp.pre) (x pre_linear)"),
    ),
    "queries taken for keys": (
        "llava-clip-llama",
        block("vision", q="k_proj", k="q_proj"),
        ("vision", "its hooks can be reached in their order"),
    ),
    "positions that are rotated and not said to be": (
        "llava-clip-llama",
        tower("language", rotary=False),
        ("language", "attn_scores = scale x q k"),
    ),
    "a stage too early": (
        "llava-clip-llama",
        table(adapter_reads=lambda config: (-3,)),
        ("vision", "blocks off the path do not reach the logits"),
    ),
    "a stage too late": (
        "llava-clip-llama",
        table(adapter_reads=lambda config: (-1,)),
        ("vision", "blocks on the path reach the logits"),
    ),
    "another module as the adapter": (
        "llava-clip-llama",
        table(adapter="model.vision_tower.post_layernorm"),
        ("adapter", "adapter.hook_in is the stage it reads"),
    ),
    "another module as the embedding": (
        "llava-clip-llama",
        tower("vision", embed="model.vision_tower.post_layernorm"),
        ("vision", "a real edit moves the logits (least move)"),
    ),
    "boxes mirrored": (
        "llava-clip-llama",
        views(mirrored),
        ("adapter", "a token answers to its own box"),
    ),
    "placeholders off by one": (
        "qwen2.5-vl",
        views(shifted),
        ("adapter", "a token answers to its own box"),
    ),
    "mergers in the wrong order": (
        "qwen3-vl",
        table(deepstack_reads=lambda config: (1, 0)),
        ("adapter", "deepstack mergers read their stages"),
    ),
    "norms behind attention and MLP forgotten": (
        "gemma3",
        block("language", ln1_post="", ln2_post=""),
        ("language", "resid_pre + attn_out = resid_mid"),
    ),
    "the final norm before the adapter forgotten": (
        "gemma3",
        tower("vision", final_norm=""),
        ("adapter", "adapter.hook_in is the stage it reads"),
    ),
    "scales swapped": (
        "internvl",
        block("vision", attn_scale="lambda_2", mlp_scale="lambda_1"),
        ("vision", "resid_pre + attn_out = resid_mid"),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_table_fails_at_its_claim(mistake, monkeypatch):
    name, wrong, claim = WRONG[mistake]
    monkeypatch.setattr(interp.instrumented, "family_of", lambda m: wrong(family_of(m)))
    if "edit" not in claim[1]:
        without_edits(monkeypatch)
    report = check(loaded(name), prompt=ZOO[name].prompt)
    assert verdicts(report)[claim] == "FAIL", report
    assert not report.passed


def test_an_attention_function_that_is_not_the_model_s_fails_parity(monkeypatch):
    from interp import attention

    model = loaded("llava-clip-llama")
    sdpa = attention.sdpa_attention_forward

    def twice(*args, **kwargs):
        z, weights = sdpa(*args, **kwargs)
        return z * 2, weights

    monkeypatch.setattr(attention, "sdpa_attention_forward", twice)
    without_edits(monkeypatch)
    found = verdicts(check(model, prompt=ZOO["llava-clip-llama"].prompt))
    assert found["model", "the clean run is plain transformers'"] == "FAIL"


# -- the table -------------------------------------------------------------------------------------


def test_a_row_keeps_the_worst_case_of_its_claim():
    ledger = Ledger(1e-3)
    found = [
        Finding("close", 1e-5, "blocks.0"),
        Finding("close", 1e-2, "blocks.1"),
        Finding("close", 1e-6, "blocks.2"),
        Finding("exact", 1e-5, "here", bound=0.0),
        Finding("moves", 0.5, "here", must_move=True),
        Finding("moves", 0.0, "there", must_move=True),
        Finding("unknown", None, "why not"),
    ]
    ledger.ask("language", lambda: found)
    assert list(ledger.rows.values()) == [
        Row("language", "close", "FAIL", 1e-2, 1e-3, "blocks.1"),
        Row("language", "exact", "FAIL", 1e-5, 0.0, "here"),
        Row("language", "moves", "FAIL", 0.0, LEAST_MOVE, "there", must_move=True),
        Row("language", "unknown", "unchecked", None, None, "why not"),
    ]


def test_what_is_not_finite_fails():
    ledger = Ledger(1e-3)
    ledger.ask("vision", lambda: [Finding("finite", float("inf"), "blocks.0")])
    assert not CheckReport("model", tuple(ledger.rows.values())).passed


def test_a_run_that_breaks_off_is_a_failure_with_its_reason():
    def broken():
        yield Finding("first", 0.0, "blocks.0")
        raise RuntimeError("the model ran past it\nand more")

    ledger = Ledger(1e-3)
    ledger.ask("vision", broken)
    first, stopped = ledger.rows.values()
    assert first.verdict == "pass"
    assert stopped.verdict == "FAIL"
    assert stopped.where == "RuntimeError: the model ran past it"


def test_report_prints_as_a_table():
    rows = (Row("vision", "a claim", "pass", 1.5e-7, 1e-4, "blocks.0"),)
    text = str(CheckReport("MLLM(tiny)", rows))
    for word in ("MLLM(tiny)", "vision", "a claim", "1.5e-07", "1.0e-04", "pass", "blocks.0"):
        assert word in text
