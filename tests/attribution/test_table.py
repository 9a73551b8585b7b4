"""HeadTable: sums and means against loops, files to the bit, and bad input told."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pandas.testing import assert_frame_equal
from rich.console import Console

from interp.attribution.frames import PLACES, place_edges
from interp.attribution.table import HeadTable
from interp.errors import TableError
from interp.stats import bootstrap, ratio
from tests.attribution.tables import GROUPS, edges_of, random_values, rows_of, table_of

FLOATS = st.floats(-1e6, 1e6, allow_subnormal=True)
SHAPES = st.tuples(*[st.integers(1, 3)] * 4)


@st.composite
def tables(draw, min_images: int = 1):
    shape = draw(SHAPES)
    values = draw(arrays(np.float64, (max(shape[0], min_images), *shape[1:]), elements=FLOATS))
    names = draw(st.lists(st.text(max_size=5), min_size=shape[3], max_size=shape[3], unique=True))
    gaps = draw(st.lists(st.integers(1, 3), min_size=len(values), max_size=len(values)))
    images = (np.cumsum(gaps) - 1).tolist()  # some images have no rows
    rows = rows_of(values, names, images)
    if draw(st.booleans()):
        rows["verified"] = draw(arrays(bool, len(rows)))
    edges = None
    if draw(st.booleans()):
        ends = st.tuples(st.integers(-1, 9), st.integers(-1, 9), FLOATS)
        found = draw(st.lists(ends, max_size=6, unique_by=lambda e: e[:2]))
        parts = [
            edges_of(*[(n, 0, *e) for n, e in enumerate(found)], image=image)
            for image in draw(st.lists(st.sampled_from(images), unique=True))
        ]
        columns = list(edges_of((0, 0, 1, 2, 0.5)))
        edges = pd.concat([p for p in parts if len(p)] or [pd.DataFrame(columns=columns)])
        edges = edges.sample(frac=1, random_state=0)
    n_images = images[-1] + 1 + draw(st.integers(0, 2))
    about = {
        "method": draw(st.text(max_size=5)),
        "n_images": n_images,
        "cost": draw(st.dictionaries(st.text(max_size=3), st.none() | FLOATS, max_size=3)),
        "groups": draw(st.permutations(names)),
    }
    shuffled = rows.sample(frac=1, random_state=draw(st.integers(0, 99)))
    return HeadTable(shuffled, edges, about)


def same(a: HeadTable, b: HeadTable) -> None:
    assert_frame_equal(a.rows, b.rows, check_exact=True)
    assert a.rows["estimate"].to_numpy().tobytes() == b.rows["estimate"].to_numpy().tobytes()
    assert (a.edges is None) == (b.edges is None)
    if a.edges is not None:
        assert_frame_equal(a.edges, b.edges, check_exact=True)


# -- numbers --------------------------------------------------------------------------------------


def test_a_head_is_the_mean_over_images_of_the_sum_over_what_it_reads():
    values = random_values((7, 2, 3, 3))
    table = HeadTable(rows_of(values, first_layer=4))
    summary = table.summary().set_index(["layer", "head"])
    for layer, head in np.ndindex(2, 3):
        one = bootstrap(ratio, values[:, layer, head].sum(1), np.ones(7))
        got = summary.loc[(layer + 4, head), ["estimate", "low", "high"]]
        assert got.tolist() == pytest.approx([one.estimate, one.low, one.high], abs=1e-12)
        share = one.estimate / values.mean(0).sum()
        assert summary.loc[(layer + 4, head), "share"] == pytest.approx(share)
    assert (np.diff(table.summary()["estimate"]) <= 0).all()
    assert table.matrix()[4:] == pytest.approx(values.mean(0).sum(-1))
    assert np.isnan(table.matrix()[:4]).all()
    assert table.matrix("elsewhere")[4:] == pytest.approx(values.mean(0)[..., 1])


@pytest.mark.parametrize("by", [(), "source", ("head", "layer"), ("layer", "head", "source")])
def test_any_grouping_is_what_pandas_makes_of_it(by):
    table = table_of()
    names = [by] if isinstance(by, str) else list(by)
    per_image = table.rows.groupby(["image", *names])["estimate"].sum()
    wanted = per_image.groupby(names).mean() if names else pd.Series([per_image.mean()])
    got = table.summary(by)
    assert list(got)[: len(names)] == names
    assert len(got) == len(wanted)
    values = got.set_index(names)["estimate"].reindex(wanted.index) if names else got["estimate"]
    assert values.to_numpy() == pytest.approx(wanted.to_numpy())
    only = table.rows[table.rows["source"] == "text"].groupby("image")["estimate"].sum().mean()
    text = table.summary((), source="text")
    assert text["estimate"].tolist() == pytest.approx([only])
    whole = table.rows.groupby("image")["estimate"].sum().mean()
    assert text["share"].tolist() == pytest.approx([only / whole])


def test_sources_come_in_order_with_shares_that_have_intervals():
    values = random_values((8, 2, 2, 3)) + 2
    sources = table_of(values).sources()
    assert sources["source"].tolist() == list(GROUPS)
    added = values.sum((1, 2))
    for group in range(3):
        share = bootstrap(ratio, added[:, group], added.sum(1))
        got = sources.loc[group, ["share", "share_low", "share_high"]]
        assert got.tolist() == pytest.approx([share.estimate, share.low, share.high])
    assert sources["share"].sum() == pytest.approx(1)
    assert sources["estimate"].sum() == pytest.approx(values.mean(0).sum())
    nothing = table_of(np.zeros((3, 1, 2, 3))).sources()
    assert nothing[["share", "share_low", "share_high"]].isna().all(axis=None)


@given(tables())
@settings(max_examples=30)
def test_sources_add_up_to_heads_and_heads_to_the_whole(table):
    heads = table.matrix()
    parts = [np.nan_to_num(table.matrix(name)) for name in table.groups]
    size = 1e-9 * (1 + table.rows["estimate"].abs().sum())
    assert np.nan_to_num(heads) == pytest.approx(sum(parts), abs=size)
    [total] = table.summary(())["estimate"]
    assert np.nansum(heads) == pytest.approx(total, abs=size)
    assert table.sources()["estimate"].sum() == pytest.approx(total, abs=size)


def test_top_names_what_a_head_mostly_reads_in_its_direction():
    values = np.zeros((2, 1, 3, 3))
    values[:, 0, 0] = [0.1, 0.5, -0.9]  # -0.3: mostly "text", which is the largest against
    values[:, 0, 1] = [1.0, 0.2, -0.1]
    values[:, 0, 2] = [-2.0, 0.0, 2.5]
    top = table_of(values).top()
    assert top["head"].tolist() == [1, 2, 0]
    assert top["mostly"].tolist() == ["same region", "text", "text"]
    assert table_of(values).top(1, source="text")["head"].tolist() == [2]
    assert "mostly" not in table_of(values).top(1, source="text")
    assert len(table_of(values).top(2)) == 2


def test_verified_is_the_share_of_what_was_added_up():
    rows = rows_of(random_values((3, 1, 2, 3)))
    rows["verified"] = (rows["head"] == 1) & (rows["source"] != "text")
    heads = HeadTable(rows).summary().set_index("head")["verified"]
    assert heads.to_dict() == pytest.approx({0: 0, 1: 2 / 3})
    units = HeadTable(rows).summary(("head", "source")).set_index(["head", "source"])["verified"]
    assert units[(1, "same region")] == 1
    assert units[(1, "text")] == 0


def test_one_image_has_no_interval_and_an_empty_table_says_so():
    table = table_of(random_values((1, 2, 2, 3)))
    assert table.summary()[["low", "high"]].isna().all(axis=None)
    assert table.summary()["estimate"].notna().all()
    assert "No intervals: they are over images, and there is one." in str(table)
    assert "[" not in str(table).split("No intervals")[0].split("mostly from")[1]

    empty = HeadTable(table.rows.iloc[:0], about={"method": "exact", "n_images": 3})
    assert len(empty.summary()) == 0
    assert empty.matrix().shape == (0, 0)
    assert "No image has an estimate." in str(empty)
    assert repr(empty).endswith("0 of 3 images with an estimate)")
    assert "No image has an estimate." in empty._repr_html_()
    with pytest.raises(TableError, match="nothing to draw"):
        empty.heatmap()


def test_images_weigh_the_same_and_those_without_rows_do_not_count():
    rows = rows_of(np.array([1.0, 3.0]).reshape(2, 1, 1, 1), images=[0, 7])
    table = HeadTable(rows, about={"n_images": 9})
    assert table.summary()["estimate"].tolist() == [2.0]
    assert repr(table).endswith("2 of 9 images with an estimate)")


# -- comparisons ----------------------------------------------------------------------------------


@given(
    arrays(np.float64, (2, 1, 5, 2), elements=st.integers(-3, 3).map(float)),
    arrays(np.float64, (3, 1, 5, 2), elements=st.integers(-3, 3).map(float)),
)
@settings(max_examples=30)
def test_spearman_is_scipys_with_ties(a, b):
    mine, theirs = (HeadTable(rows_of(v)) for v in (a, b))
    x, y = (v.mean(0).sum(-1).ravel() for v in (a, b))
    if np.ptp(x.round(12)) == 0 or np.ptp(y.round(12)) == 0:
        return
    wanted = scipy.stats.spearmanr(x.round(9), y.round(9)).statistic
    assert mine.spearman(theirs) == pytest.approx(wanted)


def test_spearman_by_units_and_of_ties():
    values = random_values((3, 2, 3, 3))
    other = random_values((4, 2, 3, 3), seed=1)
    wanted = scipy.stats.spearmanr(values.mean(0).ravel(), other.mean(0).ravel()).statistic
    unit = ("layer", "head", "source")
    assert table_of(values).spearman(table_of(other), unit) == pytest.approx(wanted)
    assert np.isnan(table_of(values).spearman(table_of(np.ones((2, 2, 3, 3)))))
    # columns in another order are the same heads
    flipped = table_of(values, groups=GROUPS)
    assert table_of(values).spearman(flipped) == pytest.approx(1)


def test_overlap_counts_heads_in_both_tops():
    a, b = np.zeros((2, 1, 1, 6, 1))
    a[..., 0] = [6, -5, 4, 3, 2, -1]  # of either sign
    b[..., 0] = [1, 6, 5, 2, 3, 4]
    mine, theirs = (table_of(v, groups=("all",)) for v in (a, b))
    assert mine.overlap(theirs, 3) == pytest.approx(2 / 3)  # 0, 1, 2 and 1, 2, 5
    assert mine.overlap(theirs, 1) == 0
    assert mine.overlap(mine, 6) == 1
    with pytest.raises(TableError, match="k=10: the tables have 6"):
        mine.overlap(theirs)
    with pytest.raises(TableError, match="only one of them has layer 0, head 5"):
        mine.spearman(table_of(b[:, :, :5], groups=("all",)))


# -- files ----------------------------------------------------------------------------------------


@given(tables())
@settings(max_examples=30)
def test_a_saved_table_comes_back_bit_for_bit(table):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heads.parquet"
        table.save(path)
        again = HeadTable.load(path)
        first = path.read_bytes()
        again.save(path)
        assert path.read_bytes() == first
        assert [p.name for p in path.parent.iterdir()] == ["heads.parquet"]
        plain = pd.read_parquet(path)  # without this library
    same(table, again)
    assert again.about == table.about
    assert_frame_equal(plain[list(table.rows)], table.rows)


def test_the_file_says_what_it_is_and_keeps_minus_zero(tmp_path):
    values = np.array([-0.0, 5e-324, 1 / 3]).reshape(1, 1, 1, 3)
    edges = edges_of((0, 0, -1, 4, -0.0), (0, 0, 4, 4, 0.1))
    table = table_of(values, edges, cost={"forwards": 3})
    table.save(tmp_path / "t.parquet")
    note = json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[b"interp"])
    assert note["format"] == "interp.HeadTable/1"
    assert note["about"]["cost"] == {"forwards": 3}
    again = HeadTable.load(tmp_path / "t.parquet")
    same(table, again)
    assert np.signbit(again.rows["estimate"][0])
    assert np.signbit(again.edges["estimate"][0])
    assert again.edges[list(PLACES)].isna().sum().tolist() == [0, 0, 1, 1]


def test_edges_stand_at_their_images_first_row(tmp_path):
    edges = pd.concat([edges_of((0, 0, 1, n, 0.1), image=n) for n in (4, 1)])
    table_of(edges=edges).save(tmp_path / "t.parquet")
    plain = pd.read_parquet(tmp_path / "t.parquet")
    full = plain[plain["edges"].map(len) > 0]
    assert full["image"].tolist() == [1, 4]
    assert [row[0]["dst"] for row in full["edges"]] == [1, 4]
    assert full.index.tolist() == [18, 72]  # 18 units an image


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    table_of().save(path)
    before = path.read_bytes()

    def broken(table, where, **_):
        Path(where).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError, match="disk full"):
        table_of(random_values(seed=3)).save(path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    monkeypatch.setattr(Path, "replace", lambda self, to: broken(None, self))  # the last step
    with pytest.raises(OSError, match="disk full"):
        table_of(random_values(seed=3)).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_other_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError):
        HeadTable.load(tmp_path / "none.parquet")
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(TableError, match=r"a\.parquet is not a file that HeadTable.save wrote"):
        HeadTable.load(tmp_path / "a.parquet")
    table_of().rows.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(TableError, match=r"b\.parquet is a parquet file, but not one"):
        HeadTable.load(tmp_path / "b.parquet")
    table_of().save(tmp_path / "c.parquet")
    whole = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TableError, match=r"c\.parquet is not a file"):
        HeadTable.load(tmp_path / "c.parquet")


# -- concat ---------------------------------------------------------------------------------------


@given(tables(min_images=2), st.data())
@settings(max_examples=30)
def test_concat_of_splits_is_the_whole(table, data):
    cuts = data.draw(st.lists(st.integers(1, table.n_images - 1), max_size=2, unique=True))
    ends = [0, *sorted(cuts), table.n_images]
    parts = []
    for first, last in pairwise(ends):
        pieces = [
            None if frame is None else frame[frame["image"].between(first, last - 1)]
            for frame in (table.rows, table.edges)
        ]
        moved = [None if p is None else p.assign(image=p["image"] - first) for p in pieces]
        parts.append(HeadTable(*moved, {**table.about, "n_images": last - first}))
    again = HeadTable.concat(parts)
    same(table, again)
    assert again.about == table.about


def test_concat_keeps_what_differs_and_renumbers_images():
    parts = [
        table_of(random_values((2, 1, 2, 3), seed), edges_of((0, 0, 3, 4, 0.5), image=1),
                 n_images=3, sizes=[[80, 80]] * 3, cost={"forwards": seed})
        for seed in range(3)
    ]  # fmt: skip
    whole = HeadTable.concat(parts)
    assert whole.rows["image"].unique().tolist() == [0, 1, 3, 4, 6, 7]
    assert whole.edges["image"].tolist() == [1, 4, 7]
    assert whole.about["parts"] == [{"cost": {"forwards": n}} for n in range(3)]
    assert (whole.about["n_images"], len(whole.about["sizes"])) == (9, 9)
    assert "cost" not in whole.about
    in_steps = HeadTable.concat([HeadTable.concat(parts[:2]), parts[2]])
    assert in_steps.about == whole.about
    same(in_steps, whole)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"method": "direct"}, "tables 0 and 1 differ in method: 'exact' and 'direct'"),
        ({"target": "answer"}, "differ in target: 'probe margin' and 'answer'"),
        ({"groups": [*GROUPS, "self"]}, "differ in groups"),
    ],
)
def test_tables_of_another_question_do_not_join(other, message):
    with pytest.raises(TableError, match=message):
        HeadTable.concat([table_of(), table_of(**other)])


def test_tables_of_other_columns_do_not_join():
    checked = HeadTable(table_of().rows.assign(verified=True), about=table_of().about)
    with pytest.raises(TableError, match="differ in columns: verified"):
        HeadTable.concat([table_of(), checked])
    with pytest.raises(TableError, match="some of the tables have edges"):
        HeadTable.concat([table_of(), table_of(edges=edges_of((0, 0, 1, 2, 0.1)))])
    with pytest.raises(TableError, match="concat of no tables"):
        HeadTable.concat([])
    narrow = table_of(random_values((2, 2, 2, 3)))
    with pytest.raises(TableError, match="image 6 has no row for layer 0, head 2"):
        HeadTable.concat([table_of(), narrow])


# -- words ----------------------------------------------------------------------------------------

CHECKED = {
    "n_units": 18, "n_verified": 4, "n_sampled": 6, "spearman": 0.913, "recall": 0.9, "k": 10,
    "missed_at_most": 2, "confidence": 0.95, "threshold": 0.0312,
}  # fmt: skip


def test_the_text_answers_what_on_how_much_which_how_sure_and_whether_checked():
    values = random_values((20, 4, 3, 3)) * 0.01
    values[:, 2, 1, 0] += 0.5
    table = table_of(values, verification=CHECKED, start="adapter.hook_out", n_images=24)
    told = str(table)
    first = table.top(1).iloc[0]
    line = next(line for line in told.split("\n") if line.strip().startswith("2.1"))
    assert told.startswith("exact: probe margin, from adapter.hook_out\n")
    assert "36 units (layer, head, source), 20 of 24 images with an estimate" in told
    for key in ("estimate", "low", "high"):
        assert f"{first[key]:+.3f}" in line
    assert f"{first['share']:.0%}" in line
    assert "same region" in line
    assert sum(line.strip()[:3].replace(".", "").isdigit() for line in told.split("\n")) >= 10
    assert "all 12 heads" in told
    assert "Pulls away most" in told
    assert "Verified exactly: 4 of 18 units (and 6 drawn at random); Spearman 0.91" in told
    assert "recall of the exact top 10 0.90" in told.replace("\n", " ")
    assert "at most 2 others have an effect of 0.0312 or more (95% sure)" in told.replace("\n", " ")
    assert max(map(len, told.split("\n"))) <= 100
    assert "\x1b" not in told

    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    assert capture.get().split() == told.split()


def test_a_verification_that_could_not_be_scored_leaves_it_out():
    bare = {**dict.fromkeys(CHECKED), "n_units": 18, "n_verified": 4}
    assert "Verified exactly: 4 of 18 units.\n" in str(table_of(verification=bare)) + "\n"
    assert "Verified" not in str(table_of())


def test_shares_of_nothing_are_not_told():
    values = random_values((9, 1, 3, 3))
    values -= values.mean()
    assert "No shares: the sum over all heads cannot be told from zero" in str(table_of(values))
    assert "%" not in str(table_of(values)).split("Intervals")[0]
    assert "No shares" not in str(table_of(values + 5))


def test_names_with_brackets_and_angles_stay_as_they_are():
    groups = ("[bold]a[/bold]", "<b>", "c")
    values = np.zeros((2, 1, 1, 3))
    values[..., 0] = 1
    target = "a <i>margin</i> [red]x[/red]"
    table = table_of(values, groups=groups, target=target, model="<i>tiny</i>")
    assert "[bold]a[/bold]" in str(table)
    assert "[red]x[/red]" in str(table)
    assert "<i>" not in table._repr_html_()
    assert "&lt;i&gt;margin" in table._repr_html_()
    values[..., 1] = 2
    assert "&lt;b&gt;" in table_of(values, groups=groups)._repr_html_()


# -- bad input ------------------------------------------------------------------------------------


def changed(**columns):
    return rows_of(random_values((2, 1, 2, 3))).assign(**columns)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed().drop(columns=["head"]), "rows lack head; they have layer, source, image"),
        ([1, 2], "rows are a list; a pandas DataFrame would do"),
        (changed(layer=0.5), "layer is float64, whole numbers would do"),
        (changed(head=-1), "head counts from 0"),
        (changed(source=3), "the source 3 is no text"),
        (changed(verified=1), "verified is int64, bool would do"),
        (changed(estimate="a"), "floats would do"),
        (
            changed(estimate=np.nan),
            "estimate of image 0, layer 0, head 0, .* is nan; an image without",
        ),
        (pd.concat([changed(), changed().iloc[[4]]]), "image 0 has 2 rows for layer 0, head 1, s"),
        (changed().drop(index=7), "image 1 has no row for layer 0, head 0, source elsewhere"),
    ],
)
def test_bad_rows_are_told(rows, message):
    with pytest.raises(TableError, match=message):
        HeadTable(rows)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (edges_of((0, 0, 1, 2, 0.1)).drop(columns=["src"]), "edges lack src"),
        (edges_of((0, 0, 1, 2, 0.1)).drop(columns=["src_x"]), "edges with a place lack src_x"),
        (edges_of((0, 0, 1, 2, np.inf)), "estimate of image 0, .* is inf"),
        (edges_of((0, 0, -2, 2, 0.1)), "src counts from -1"),
        (
            pd.concat([edges_of((0, 1, 1, 2, e)) for e in (0.1, 0.2)]),
            "head 1, dst_position 7, src_position 6 is there twice",
        ),
        (edges_of((0, 0, 1, 2, 0.1), image=6), "edges of image 6, which has no rows"),
        (edges_of((0, 0, 1, 2, 0.1)).assign(src_y=np.nan), "src_y of token 1 is missing"),
    ],
)
def test_bad_edges_are_told(edges, message):
    with pytest.raises(TableError, match=message):
        table_of(edges=edges)


def test_bad_questions_are_told():
    table = table_of()
    with pytest.raises(TableError, match=r"no source 'txt'; there are .* did you mean text"):
        table.top(source="txt")
    with pytest.raises(TableError, match=r"by=\['image'\]; any of layer, head, source"):
        table.summary("image")
    with pytest.raises(TableError, match="each once"):
        table.summary(("head", "head"))
    with pytest.raises(TableError, match="the source 'same region' is none of the groups a, b"):
        HeadTable(table.rows, about={"groups": ["a", "b"]})
    with pytest.raises(TableError, match="go up to image 5, and about says n_images=5"):
        HeadTable(table.rows, about={"n_images": 5})
    with pytest.raises(TableError, match="1 sizes for 6 images"):
        table_of(sizes=[[8, 8]])
    with pytest.raises(ValueError, match=r"about\.cost\.gb is nan"):
        table_of(cost={"gb": float("nan")})


# -- places ---------------------------------------------------------------------------------------


def test_places_are_the_centres_of_the_grids_boxes(x, tiny, scene):
    larger = scene.image.resize((160, 160))
    grid = tiny.prepare([scene.image, larger], "What is in the picture?").grid
    bare = edges_of((0, 0, 12, 57, 0.1), (0, 0, -1, 99, 0.1), image=4).drop(columns=[*PLACES])
    # 10 x 10 tokens of 8 px, as the README prints it; in the second picture of 16
    placed = place_edges(bare, grid, first_image=4)
    assert placed[list(PLACES)].iloc[0].tolist() == [60, 44, 20, 12]
    placed = place_edges(bare, grid, first_image=3)
    assert placed[list(PLACES)].iloc[0].tolist() == [120, 88, 40, 24]
    assert placed[["dst_x", "dst_y"]].iloc[1].tolist() == [152, 152]
    assert placed[["src_x", "src_y"]].iloc[1].isna().all()
    with pytest.raises(TableError, match=r"image 4 for a grid of the images 0\.\.1"):
        place_edges(bare, grid)
    with pytest.raises(TableError, match="image 4 has no token 100: its 100 tokens"):
        place_edges(bare.assign(src=100), grid, first_image=4)
