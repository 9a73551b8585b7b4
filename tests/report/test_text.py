"""The findings as a terminal shows them, and the parts that place labels and colours."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from rich.console import Console

from interp.report import findings_table
from interp.report.palette import RIGHT, WRONG
from interp.report.plots import spread
from tests.report.synthetic import summary


def shown(told: dict, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(findings_table(told))
    return out.getvalue()


def test_the_findings_fit_100_columns_with_whole_intervals():
    text = shown(summary()).replace("\N{MINUS SIGN}", "-")
    assert max(map(len, text.splitlines())) <= 100
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    recovery = next(line for title, line in lines.items() if title.startswith("Recovery"))
    assert "+11.6 [+10.4, +12.9] points" in recovery
    assert "-0.4 [-1.0, +0.3] points" in recovery
    assert recovery.rstrip().endswith("yes")
    assert next(line for t, line in lines.items() if "starves" in t).rstrip().endswith("no")
    assert "300 test images" in text


def test_findings_without_title_or_unit_get_the_known_ones():
    told = summary()
    for finding in told["findings"].values():
        del finding["title"], finding["unit"]
    assert shown(told) == shown(summary())


def test_spread_labels_keep_their_order_and_distance():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.random(8).tolist()
        moved = spread(values, 0.08)
        order = np.argsort(values)
        assert (np.diff(np.array(moved)[order]) >= 0.08 - 1e-9).all()
        assert np.mean(moved) == pytest.approx(np.mean(values))
    assert spread([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]


def test_right_and_wrong_differ_for_every_eye():
    """Contrast of luminance, and distance under both red-green blindnesses (Vienot 1999)."""

    def linear(color: str) -> np.ndarray:
        v = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)

    y = sorted(linear(c) @ [0.2126, 0.7152, 0.0722] for c in (RIGHT, WRONG))
    assert (y[1] + 0.05) / (y[0] + 0.05) > 1.8
    blind = {
        "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }
    for matrix in blind.values():
        a, b = (np.array(matrix) @ linear(c) for c in (RIGHT, WRONG))
        assert np.abs(a - b).max() > 0.3


def test_spread_of_equal_values():
    assert all(b - a > 0 for a, b in itertools.pairwise(spread([0.5] * 5, 0.1)))
