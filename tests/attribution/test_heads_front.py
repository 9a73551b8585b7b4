"""`head_attribution`: options reach the methods, the table holds their values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from interp.attribution import heads
from interp.attribution.asking import ask
from interp.attribution.cost import Cost
from interp.attribution.direct import direct
from interp.attribution.exact import exact
from interp.attribution.gradient import gradient
from interp.attribution.heads import METHODS, as_table, head_attribution
from interp.attribution.sources import PLACE, REGION
from interp.attribution.strongest import Strongest, edge_table
from interp.attribution.table import HeadTable
from interp.attribution.targets import AnswerLogit
from interp.errors import SumMismatch, Untestable
from tests.attribution.plain import Case, load, predicted


@pytest.fixture(scope="module")
def case():
    return Case("llava-clip-llama", n_images=3)


def attribute(case, **options):
    return head_attribution(case.model, case.x, case.bank, labels=case.labels, **options)


def assert_holds(table, values, first_layer=0, groups=REGION):
    """Row by row: one an image and unit that has a value, none for others."""
    rows = table.rows
    assert isinstance(table, HeadTable)
    assert list(rows.columns[:5]) == ["layer", "head", "source", "image", "estimate"]
    assert len(rows) == int((~values.isnan()).sum())
    for row in rows.itertuples():
        value = values[row.image, row.layer - first_layer, row.head, groups.index(row.source)]
        assert row.estimate == pytest.approx(float(value), abs=1e-9)
    assert not rows.duplicated(["layer", "head", "source", "image"]).any()


@pytest.mark.parametrize(
    ("options", "of"),
    [
        ({"method": "direct"}, lambda q: direct(q).heads),
        ({}, gradient),
        ({"method": "gradient"}, gradient),
        ({"corrected": False}, lambda q: gradient(q, corrected=False)),
        ({"steps": 3}, lambda q: gradient(q, steps=3)),
        ({"method": "exact"}, exact),
    ],
)
def test_the_table_holds_what_the_method_gives(case, options, of):
    assert_holds(attribute(case, **options), of(case.ask()))


@pytest.mark.parametrize("method", METHODS)
def test_stages_groups_and_readers_reach_the_question(case, method):
    options = {
        "start": "blocks.0.hook_resid_post",
        "end": "blocks.2.hook_resid_post",
        "sources": ("other regions", "self"),
        "dst": "queries" if method == "direct" else "image",
    }
    of = {"direct": lambda q: direct(q).heads, "gradient": gradient, "exact": exact}[method]
    table = attribute(case, method=method, **options)
    assert_holds(table, of(case.ask(**options)), 1, ("other regions", "self"))
    for name in ("start", "end", "dst"):
        assert table.about[name] == options[name]


@pytest.mark.parametrize("method", ["gradient", "exact"])
def test_a_patch_alone_or_in_a_list(case, method):
    pixels = case.x.tensors["pixel_values"] * 0.5
    there = case.model.inputs(**{**case.x.tensors, "pixel_values": pixels})
    of = {"gradient": gradient, "exact": exact}[method]
    values = of(case.ask(sources="whole"), patch=[there])
    for patch in (there, [there]):
        table = attribute(case, method=method, sources="whole", patch=patch)
        assert_holds(table, values, groups=("all",))
        assert table.about["patched"] is True
    assert attribute(case, method=method).about["patched"] is False


def test_a_target_without_probes(case):
    table = head_attribution(
        case.model, case.x, target=AnswerLogit("dog"), sources="place", method="gradient"
    )
    question = ask(case.model, case.x, target=AnswerLogit("dog"), sources="place")
    assert_holds(table, gradient(question), groups=PLACE)
    assert "dog" in table.about["target"]


@pytest.mark.parametrize("method", METHODS)
def test_images_without_a_wrong_token_have_no_rows(case, method):
    """And means over images are over the same images for every method."""
    labels = case.labels.copy()
    first = case.x.grid.image == 0
    labels[first] = predicted(case.model, case.x, case.bank)[first]
    table = head_attribution(case.model, case.x, case.bank, labels=labels, method=method)
    assert sorted(table.rows["image"].unique()) == [1, 2]
    assert table.about["n_images"] == 3
    rows = table.rows[(table.rows["layer"] == 1) & (table.rows["head"] == 2)]
    by_hand = rows.groupby("image")["estimate"].sum().mean()
    summary = table.summary().set_index(["layer", "head"])
    assert summary.loc[(1, 2), "estimate"] == pytest.approx(by_hand)


def test_several_batches_number_images_through(case):
    one = attribute(case, method="gradient", edges=4)
    model, x = load("llava-clip-llama", n_images=3)
    two = head_attribution(
        model, [x, x], case.bank, labels=[case.labels, case.labels], method="gradient", edges=4
    )
    assert two.about["n_images"] == 6
    half = len(one.rows)
    assert two.rows["image"][half:].tolist() == (one.rows["image"] + 3).tolist()
    np.testing.assert_allclose(two.rows["estimate"][half:], one.rows["estimate"], atol=1e-6)
    assert two.edges["image"].tolist() == [*one.edges["image"], *(one.edges["image"] + 3)]
    assert two.edges["src"].tolist() == one.edges["src"].tolist() * 2


@pytest.mark.parametrize("method", ["direct", "gradient"])
def test_edges_are_kept_on_demand(case, method):
    assert attribute(case, method=method).edges is None
    table, kept = attribute(case, method=method, edges=7), Strongest(7)
    of = {"direct": direct, "gradient": lambda q, s: gradient(q, strongest=s)}[method]
    asked = case.ask()
    of(asked, kept)
    edges = edge_table(kept, asked)
    assert edges.groupby("image").size().tolist() == [7, 7, 7]
    for name in ("image", "layer", "head", "dst", "src"):
        assert table.edges[name].tolist() == edges[name].tolist()
    np.testing.assert_allclose(table.edges["estimate"], edges["estimate"])


def test_about_says_what_was_done_and_what_it_cost(case):
    about = attribute(case, steps=2, corrected=False).about
    assert about["method"] == "gradient"
    assert (about["corrected"], about["steps"]) == (False, 2)
    assert about["groups"] == list(REGION)
    assert about["cost"]["forwards"] == 3
    assert about["cost"]["backwards"] == 3


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_told_up_to_all_of_them(case, method):
    told = []
    attribute(case, method=method, on_step=lambda done, total: told.append((done, total)))
    done, totals = zip(*told, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert done[-1] == totals[0]


def test_a_dry_run_is_a_cost(case, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a dry run attributes nothing")

    for name in METHODS:
        monkeypatch.setattr(heads, name, never)
    for method in METHODS:
        cost = attribute(case, method=method, dry_run=True)
        assert isinstance(cost, Cost)
        assert cost.seconds > 0
    small = attribute(case, method="exact", dry_run=True, memory=0.002)
    assert small.batch_size < attribute(case, method="exact", dry_run=True).batch_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exactly"}, "method='exactly'; there are direct, gradient, exact"),
        ({"method": "direct", "steps": 3}, "steps= is for method='gradient', not 'direct'"),
        ({"method": "exact", "steps": 3}, "steps= is for method='gradient', not 'exact'"),
        ({"method": "exact", "corrected": False}, "corrected= is for"),
        ({"method": "exact", "edges": 5}, "edges= is for method='direct' or 'gradient'"),
        ({"method": "gradient", "memory": 1.0}, "memory= is for method='exact'"),
        ({"method": "gradient", "edges": -1}, "edges=-1"),
        ({"method": "gradient", "steps": -2}, "steps=-2"),
        ({"method": "exact", "memory": 1e-9}, "give more, or fewer pictures a batch"),
        ({"method": "direct", "dst": "all"}, "dst="),
        ({"method": "exact", "sources": "whole", "labels": None}, "labels="),
    ],
)
def test_options_that_do_not_fit(case, options, message):
    with pytest.raises(ValueError, match=message):
        head_attribution(case.model, case.x, case.bank, **{"labels": case.labels, **options})


def test_a_patch_is_for_gradient_and_exact(case):
    with pytest.raises(ValueError, match="patch= is for method='gradient' or 'exact'"):
        attribute(case, method="direct", patch=case.x)
    for method in ("gradient", "exact"):
        with pytest.raises(ValueError, match='sources="whole" would do'):
            attribute(case, method=method, patch=case.x)
        for patch in ([case.x, case.x], load("llava-clip-llama", n_images=1)[1]):
            with pytest.raises(ValueError, match="position by position"):
                attribute(case, method=method, sources="whole", patch=patch)


def test_a_patch_that_changes_nothing_has_no_effect(case):
    table = attribute(case, method="exact", sources="whole", patch=case.x)
    assert (table.rows["estimate"] == 0).all()


def test_an_unknown_option_is_no_option(case):
    with pytest.raises(TypeError, match="edgs"):
        attribute(case, edgs=5)


def test_errors_of_the_methods_come_through(case, monkeypatch):
    right = predicted(case.model, case.x, case.bank)
    with pytest.raises(Untestable):
        head_attribution(case.model, case.x, case.bank, labels=right)
    from interp.attribution.reading import Look

    values = Look.values
    monkeypatch.setattr(Look, "values", lambda self, row: values(self, row) * 1.01)
    with pytest.raises(SumMismatch):
        attribute(case, method="direct")


def test_more_columns_go_along(case):
    question = case.ask()
    values = gradient(question)
    flags = torch.zeros(values.shape, dtype=torch.bool)
    flags[1, 2, 3, 4] = True
    table = as_table(question, values, {"method": "gradient"}, verified=flags.numpy())
    rows = table.rows[table.rows["verified"]]
    assert rows[["image", "layer", "head", "source"]].values.tolist() == [[1, 2, 3, "self"]]


def test_methods_agree_on_sign_and_order(case):
    """One unit, one sign: the gradient's whole heads against the exact ones."""
    assert isinstance(METHODS, Sequence)
    tables = [attribute(case, method=m, sources="whole") for m in ("gradient", "exact")]
    a, b = (table.rows["estimate"].to_numpy() for table in tables)
    assert np.corrcoef(a, b)[0, 1] > 0.8
