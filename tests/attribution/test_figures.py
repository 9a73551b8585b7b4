"""Figures of a HeadTable: what is drawn where, and that nothing is dropped unsaid."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from interp.attribution.frames import PLACES
from interp.attribution.table import HeadTable
from interp.errors import ImageError, TableError
from interp.report.palette import RIGHT, WRONG
from interp.report.text import MINUS
from tests.attribution.tables import GROUPS, edges_of, random_values, rows_of, table_of

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8))


def arrows(fig: go.Figure) -> dict[int, go.Scatter]:
    """The traces of edges by their number."""
    return {t.meta: t for t in fig.data if t.meta}


def side(fig: go.Figure) -> str:
    """The list beside the picture."""
    return next(a.text for a in fig.layout.annotations if "reader" in a.text)


def drawn(*edges, n: int = 20, picture=PICTURE, **about) -> go.Figure:
    return table_of(edges=edges_of(*edges), **about).edges_on(0, picture, n=n)


# -- heatmap --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1, 1, 3), (3, 2, 4, 3), (2, 32, 32, 3)])
@pytest.mark.parametrize("source", [None, "elsewhere"])
def test_a_heatmap_shows_every_heads_mean(shape, source, tmp_path):
    values = random_values(shape)
    fig = table_of(values).heatmap(source)
    [cells] = fig.data
    kept = values if source is None else values[..., [GROUPS.index(source)]]
    assert np.array(cells.z, float) == pytest.approx(kept.mean(0).sum(-1))
    assert cells.zmin == -cells.zmax == pytest.approx(-np.abs(kept.mean(0).sum(-1)).max())
    assert [c for _, c in cells.colorscale] == [WRONG, "#ffffff", RIGHT]
    summary = table_of(values).summary(source=source).set_index(["layer", "head"])
    low, high = summary.loc[(0, 0), ["low", "high"]]
    told = cells.customdata[0][0]
    ends = [float(v) for v in told.replace(MINUS, "-").split("[")[1].rstrip("]").split(",")]
    assert ends == pytest.approx([low, high], abs=0.011)
    assert bool(cells.texttemplate) == (shape[2] <= 12)  # numbers where they have room
    assert fig.layout.yaxis.autorange == "reversed"
    assert (source or "exact") in fig.layout.title.text.replace("<br>", " ")
    fig.write_html(tmp_path / "heat.html")


def test_heads_without_an_estimate_are_gaps_that_say_so():
    rows = rows_of(random_values((3, 3, 2, 3)), first_layer=2)
    table = HeadTable(rows[(rows["layer"] != 3) | (rows["head"] == 1)])
    [cells] = table.heatmap().data
    assert list(cells.y) == [2, 3, 4]
    assert cells.z[1][0] is None
    assert cells.customdata[1][0] == "no estimate"
    assert cells.text[1][0] == ""
    assert cells.hoverongaps


# -- edges ----------------------------------------------------------------------------------------


def test_an_arrow_runs_from_the_source_to_the_reader_coloured_and_as_wide_as_it_is_strong():
    fig = drawn((1, 2, 12, 57, 0.4), (3, 0, 57, 99, -0.8), (0, 1, 3, 33, 0.1))
    found = arrows(fig)
    assert sorted(found) == [1, 2, 3]
    first, second, third = (found[i] for i in (1, 2, 3))
    # token 57 of a 10 x 10 raster of 8 px cells: row 5, column 7
    assert (second.x[0], second.y[0]) == pytest.approx((12 * 0 + 20, 12))
    assert (first.x[0], first.y[0]) == pytest.approx((60, 44))
    assert [t.line.color for t in (first, second, third)] == [WRONG, RIGHT, RIGHT]
    widths = [t.line.width for t in (first, second, third)]
    assert widths[0] > widths[1] > widths[2] > 1
    heads = [t for t in fig.data if t.fill == "toself"]
    tips = {(t.x[0], t.y[0]) for t in heads}
    assert tips == {(76.0, 76.0), (60.0, 44.0), (28.0, 28.0)}
    assert "layer 3, head 0" in first.hovertemplate
    assert f"{MINUS}0.800" in first.hovertemplate
    assert "token 57 (position 62) → token 99 (position 104)" in first.hovertemplate
    assert [t.meta for t in fig.data if t.meta] == [3, 2, 1]  # the strongest on top


def test_the_head_of_an_arrow_points_along_it():
    fig = drawn((0, 0, 50, 59, 1.0))
    [head] = [t for t in fig.data if t.fill == "toself"]
    tip, left, right, _ = np.stack([head.x, head.y], 1)
    base = (left + right) / 2
    assert (base[0], abs(base[1] - tip[1])) < (tip[0], 5)  # it comes from the left
    assert np.hypot(*(left - tip)) == pytest.approx(np.hypot(*(right - tip)))
    shaft = arrows(fig)[1]
    assert shaft.x[-1] < tip[0]


def test_numbers_on_the_picture_are_those_of_the_list():
    edges = [(n % 4, n % 3, n, 99 - n, 0.01 * (n + 1) * (-1) ** n) for n in range(30)]
    fig = drawn(*edges, n=20)
    lines = side(fig).split("<br>")[1:]
    assert len(lines) == 20
    assert lines[0].strip().startswith("1 1.2 ")
    assert "29 → 70" in lines[0]
    assert f"{MINUS}0.300" in lines[0]
    assert lines[19].strip().startswith("20 2.1")
    badges = sorted(int(a.text) for a in fig.layout.annotations if a.text.isdigit())
    assert badges == list(range(1, 21))
    assert len(arrows(fig)) == 20
    assert len(arrows(drawn(*edges, n=3))) == 3


def test_edges_on_one_place_lie_apart():
    fig = drawn((0, 0, 12, 57, 0.4), (1, 0, 12, 57, 0.3), (2, 0, 57, 12, 0.2))
    paths = [np.stack([t.x, t.y], 1) for t in arrows(fig).values()]
    middles = [path[len(path) // 2] for path in paths]
    gaps = [math.dist(middles[i], middles[j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    assert min(gaps) > 4  # of 80 pixels


def test_a_token_that_reads_itself_has_a_ring_around_it_and_two_heads_two_rings():
    fig = drawn((0, 0, 44, 44, 0.4), (1, 0, 44, 44, -0.3))
    radii = []
    for trace in arrows(fig).values():
        away = np.hypot(np.array(trace.x) - 36, np.array(trace.y) - 36)
        assert np.ptp(away) < 1e-9
        radii.append(away[0])
    assert 0.5 < radii[1] < radii[0] < 4
    assert not [t for t in fig.data if t.fill == "toself"]
    badges = [(a.x, a.y) for a in fig.layout.annotations if a.text.isdigit()]
    assert math.dist(*badges) > 1.8  # a badge is 1.7 of these pixels wide


def test_edges_from_the_text_are_listed_and_not_lost():
    fig = drawn((0, 0, 44, 55, 0.4), (1, 5, -1, 55, -0.9), (1, 4, -1, 55, 0.2), (2, 0, 3, 4, 0.1))
    assert len(arrows(fig)) == 2
    note = side(fig)
    assert f"from text, not drawn: 2, sum {MINUS}0.700" in note
    assert "1.5" in note
    assert "text@1 → 55" in note
    # with n arrows asked for, those weaker than the weakest arrow are not in the list
    note = side(drawn((0, 0, 44, 55, 0.4), (1, 5, -1, 55, -0.9), (1, 4, -1, 55, 0.2), n=1))
    assert f"not drawn: 1, sum {MINUS}0.90" in note
    many = [(0, n, -1, 7, 0.5) for n in range(12)]
    assert "... and 4 more" in side(drawn(*many))
    assert "none" in side(drawn(*many))
    assert arrows(drawn(*many)) == {}


def test_what_is_read_at_a_text_position_is_a_diamond_on_its_source():
    fig = drawn((0, 0, 44, -1, 0.4), (1, 0, 44, -1, -0.3), (1, 1, 12, -1, 0.2))
    found = arrows(fig)
    assert {t.marker.symbol for t in found.values()} == {"diamond"}
    assert (found[1].x[0], found[1].y[0]) == (36, 36)
    assert found[2].x[0] > 36  # beside the first
    assert found[2].y[0] == 36
    assert (found[3].x[0], found[3].y[0]) == (20, 12)
    assert found[1].marker.size > found[3].marker.size
    assert [found[n].marker.color for n in (1, 2)] == [RIGHT, WRONG]
    assert "token 44 (position 49) → text (position 0)" in found[1].hovertemplate


def test_the_picture_lies_in_its_own_pixels():
    fig = drawn((0, 0, 12, 57, 0.4))
    [image] = fig.layout.images
    assert (image.x, image.y, image.sizex, image.sizey) == (0, 0, 80, 80)
    assert tuple(fig.layout.xaxis.range) == (0, 80)
    assert tuple(fig.layout.yaxis.range) == (80, 0)  # rows of a picture run down
    margin = fig.layout.margin
    wide = fig.layout.width - margin.l - margin.r
    high = fig.layout.height - margin.t - margin.b
    assert wide == high == 560
    shown = Image.open(io.BytesIO(base64.b64decode(image.source.split(",")[1])))
    assert shown.size == (560, 560)  # 7 x 7 screen pixels a pixel, none of them smeared
    assert (np.asarray(shown)[::7, ::7] == np.asarray(PICTURE)).all()

    wide_one = drawn((0, 0, 12, 57, 0.4), picture=np.zeros((500, 3000), np.uint8))
    [image] = wide_one.layout.images
    assert (image.sizex, image.sizey) == (3000, 500)
    assert Image.open(io.BytesIO(base64.b64decode(image.source.split(",")[1]))).width == 1120


def test_what_bends_out_of_the_picture_or_lies_in_its_padding_is_still_seen():
    edges = edges_of((0, 0, 0, 90, 0.4), (1, 0, 0, 90, 0.3), (2, 0, 5, 9, 0.2))
    edges.loc[2, ["src_x", "src_y"]] = [40.0, -12.0]
    fig = table_of(edges=edges).edges_on(0, PICTURE)
    left, right = fig.layout.xaxis.range
    bottom, top = fig.layout.yaxis.range
    for trace in arrows(fig).values():
        assert min(trace.x) > left
        assert max(trace.x) < right
        assert min(trace.y) > top
        assert max(trace.y) < bottom
    margin = fig.layout.margin
    wide = (fig.layout.width - margin.l - margin.r) / (right - left)
    assert wide == pytest.approx((fig.layout.height - margin.t - margin.b) / (bottom - top), 0.01)


def test_a_loaded_table_needs_only_the_picture(tmp_path):
    edges = edges_of((1, 2, 12, 57, 0.4), (0, 0, -1, 57, 0.2))
    table = table_of(edges=edges, sizes=[[80, 80]] * 6)
    table.save(tmp_path / "t.parquet")
    again = HeadTable.load(tmp_path / "t.parquet")
    for picture in (PICTURE, np.asarray(PICTURE), None):
        assert again.edges_on(0, picture).to_dict() == table.edges_on(0, picture).to_dict()
    assert not again.edges_on(0).layout.images
    assert tuple(again.edges_on(0).layout.xaxis.range) == (0, 80)
    html = again.edges_on(0, PICTURE).to_html()
    assert "layer 1, head 2" in html


def test_a_grid_says_where_tokens_lie(tiny, scene):
    grid = tiny.prepare([scene.image, scene.image.rotate(90)], "What is in the picture?").grid
    placed = edges_of((1, 2, 12, 57, 0.4), image=3)
    bare = placed.drop(columns=[*PLACES])
    table, wanted = table_of(edges=bare), table_of(edges=placed).edges_on(3, PICTURE)
    got = table.edges_on(3, PICTURE, grid, image_in_grid=1)
    assert list(arrows(got)[1].x) == pytest.approx(list(arrows(wanted)[1].x))
    alone = tiny.prepare(scene.image, "What is in the picture?").grid
    assert list(arrows(table.edges_on(3, PICTURE, alone))[1].x) == pytest.approx(
        list(arrows(wanted)[1].x)
    )
    with pytest.raises(TableError, match="the grid is of 2 images and the table of 6: say which"):
        table.edges_on(3, PICTURE, grid)
    with pytest.raises(TableError, match=r"do not say where they lie .*: give the batch's grid"):
        table.edges_on(3, PICTURE)
    as_many = table_of(random_values((2, 1, 1, 3)), edges=bare.assign(image=1))
    assert arrows(as_many.edges_on(1, PICTURE, grid))


def test_bad_requests_say_what_would_do():
    table = table_of(edges=edges_of((1, 2, 12, 57, 0.4), image=3), sizes=[[80, 80]] * 6)
    with pytest.raises(TableError, match="no edges: ask for some with edges=N"):
        table_of().edges_on(0)
    with pytest.raises(TableError, match="no edges of image 5; there are some of 3"):
        table.edges_on(5)
    with pytest.raises(TableError, match="n=0 edges; at least one"):
        table.edges_on(3, n=0)
    with pytest.raises(ImageError, match=r"is 40 x 40 pixels, and the edges lie in one of 80 x 80"):
        table.edges_on(3, PICTURE.resize((40, 40)))
    with pytest.raises(ImageError, match=r"array \[8, 8, 3\] float64; a PIL image or a uint8"):
        table.edges_on(3, np.zeros((8, 8, 3)))
    with pytest.raises(ImageError, match="the picture is a str"):
        table.edges_on(3, "beach.jpg")


def test_edges_of_equal_strength_zero_and_none_are_drawn_all_the_same():
    assert len(arrows(drawn((0, 0, 1, 2, 0.0), (0, 1, 3, 4, 0.0)))) == 2
    empty = pd.DataFrame(columns=list(edges_of((0, 0, 1, 2, 0.1))))
    with pytest.raises(TableError, match="there are some of none"):
        table_of(edges=empty).edges_on(0)
