"""The scripts print the same with `--remote`, and heads are found alike, on a real server."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from interp import MLLM
from interp.attribution import (
    attribute,
    head_attribution,
    minimal_heads,
    path_attribution,
    verify_edges,
)
from interp.datasets import scenes
from interp.studies import Split
from tests.experiments.test_scripts_c import QUESTION, script

#: script -> (pictures, words of its table); fewer pictures leave nothing to cut
SCRIPTS = {
    "knockout_global": (30, ["none", "right -> wrong", "as many random"]),
    "knockout_windows": (30, ["1 around", "5 around", "head 0"]),
    "look_ahead": (12, ["0 rows ahead", "9 rows ahead"]),
}


class Narrow:
    """Models of which a script sees two layers and one head: `knockout_windows` asks for each."""

    @staticmethod
    def load(*args, **kwargs):
        model = MLLM.load(*args, **kwargs)
        model.cfg = dataclasses.replace(model.cfg, n_layers=2, n_heads=1)
        return model


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_the_same(name, served, capsys, monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", served.key)
    n, words = SCRIPTS[name]
    module = script(name)
    if name == "knockout_windows":
        module.MLLM = Narrow
    printed = []
    for remote in ("", served.url):
        before = len(served.executed)
        module.main(n=n, remote=remote)
        printed.append(capsys.readouterr().out)
        assert (len(served.executed) > before) == bool(remote)
    assert printed[0] == printed[1]
    assert all(word in printed[0] for word in words)


def table(made):
    return made.rows if hasattr(made, "rows") else made.to_frame()


@pytest.fixture(scope="module")
def bank(tiny):
    probe = Split.prepare(tiny, scenes("probe"), 60, QUESTION, batch_size=20)
    stages = ["adapter.hook_out", tiny.stages[-1]]
    return probe.fit(stages)


def test_heads_are_found_alike(tiny, hosted, served, bank):
    """Every method, on two batches of two pictures; one request a batch and method step."""
    results = []
    for model in (tiny, hosted):
        test = Split.prepare(model, scenes("test"), 4, QUESTION, batch_size=2)
        study, labels = (model, test.batches, bank), test.labels
        asked = {"labels": labels, "sources": "same-region correct"}
        top = attribute(*study, budget=0.1, k=3, edges=3, seed=0, **asked)
        results.append(
            {
                "direct": head_attribution(*study, method="direct", **asked),
                "gradient": head_attribution(*study, corrected=False, **asked),
                "steps": head_attribution(*study, steps=2, **asked),
                "exact": head_attribution(*study, method="exact", **asked),
                "attribute": top,
                "edges": verify_edges(top, *study, n=2, **asked),
                "paths": path_attribution(*study, labels=labels, top=2),
                "minimal": minimal_heads(
                    *study, share=0.8, seed=0, candidates=3, n_random=2, **asked
                ),
            }
        )
    for name, ours in results[0].items():
        a, b = table(ours), table(results[1][name])
        numbers = list(a.select_dtypes("number"))
        assert len(a), name
        np.testing.assert_allclose(a[numbers], b[numbers], atol=1e-5, rtol=1e-4, err_msg=name)
    edges = [one["edges"].edges for one in results]
    assert (edges[0].estimate - edges[1].estimate).abs().max() < 1e-5
    assert set(served.executed.values()) == {1}
