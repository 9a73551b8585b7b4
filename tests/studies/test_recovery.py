"""The curve: probes equal to scikit-learn's, scores equal to a plain count, the control is real."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.preprocessing import StandardScaler

from interp.studies import recovery as study
from interp.studies.controls import random_projection, shuffled_llm
from interp.studies.stages import label


@pytest.fixture(scope="module")
def states(splits, tiny):
    probe, test = splits
    return probe.read(tiny.stages), test.read(tiny.stages)


def test_probes_reach_scikit_learns_accuracy_at_every_stage(base, splits, states):
    probe, test = splits
    for stage in base.bank.stages:
        x_fit, x_test = (s[stage].flatten(0, 1).numpy() for s in states)
        scaler = StandardScaler().fit(x_fit)
        reference = LogisticRegression(C=1 / base.bank.penalty[stage], max_iter=2000)
        reference.fit(scaler.transform(x_fit), probe.labels.ravel())
        theirs = reference.score(scaler.transform(x_test), test.labels.ravel())
        ours = base.right(stage).mean()
        assert abs(ours - theirs) <= 0.005, stage


def test_table_holds_the_plain_scores(base, recovered, splits):
    table = recovered[1][0].tables["stages"].set_index(["kind", "stage", "metric"])["estimate"]
    said = base.predicted[base.readout].ravel()
    truth = splits[1].labels.ravel()
    accuracy = table["llm", base.readout, "accuracy"]
    assert accuracy == pytest.approx((said == truth).mean())
    miou = jaccard_score(truth, said, average="macro", labels=np.unique([*truth, *said]))
    assert table["llm", base.readout, "token_miou"] == pytest.approx(miou)


def test_every_stage_of_the_pipeline_is_there(recovered, tiny):
    table = recovered[1][0].tables["stages"]
    on_model = table[table.kind != "random_llm"]
    assert list(on_model.stage.unique()) == tiny.stages
    assert (table.low <= table.estimate).all()
    assert (table.estimate <= table.high).all()


def test_shuffled_control_changes_only_the_language_models_matrices(tiny):
    before = {k: v.clone() for k, v in tiny.module.state_dict().items()}
    with shuffled_llm(tiny, seed=1) as control:
        after = {k: v.clone() for k, v in control.module.state_dict().items()}
    assert all(torch.equal(before[k], v) for k, v in tiny.module.state_dict().items())
    assert before.keys() == after.keys()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    assert all(".language_model.layers." in k and before[k].ndim > 1 for k in moved)
    for k in moved:  # the same entries, elsewhere
        assert torch.equal(before[k].flatten().sort().values, after[k].flatten().sort().values)


def test_names_and_path(recovered, tiny):
    assert label("blocks.3.hook_resid_post") == "LLM 3"
    assert label("vision.blocks.1.hook_resid_post") == "vision 1"
    on_path = recovered[1][0].tables["stages"].set_index("stage").on_path
    assert on_path[tiny.adapter_reads].all()
    last = f"vision.blocks.{tiny.cfg.n_vision_layers - 1}.hook_resid_post"
    assert not on_path[last].any()


def test_random_projection_keeps_lengths_within_it():
    down = random_projection(7, 3, seed=0)
    torch.testing.assert_close(down.T @ down, torch.eye(3))
    assert random_projection(3, 3, seed=0) is None


def test_recovery_holds_only_if_it_beats_its_control(base):
    def judged(control: np.ndarray | None) -> study.Finding:
        drop_off, recovery = study._findings(base, control, None, {}, 0)
        assert "shuffled" not in drop_off.finding.text
        return recovery.finding

    worse = judged(np.zeros_like(base.test.labelled))
    assert worse.effect.low > 0
    assert worse.holds
    as_right = judged(base.right(base.readout))
    assert as_right.effect == as_right.control == worse.effect
    assert not as_right.holds
    missing = judged(None)
    assert missing.effect == worse.effect
    assert missing.control is None
    assert not missing.holds
    assert "its control is missing" in missing.text
