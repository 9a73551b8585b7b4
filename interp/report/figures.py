"""The figures of the page, in order, each with what is seen and what it must beat.

A caption here never states a result. Results are in `summary.json`, decided by intervals; a
caption that said "attention carries it" would go on saying so over a run in which it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import plotly.graph_objects as go

from interp.report import bars, curves
from interp.report.tables import Summary, Tables


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        name: id of its `div`.
        section: key of the section it belongs to.
        title: what is plotted.
        caption: what is seen and which control it must beat.
        needs: tables it is drawn from; without them it is left out and named as not measured.
        draw: makes it.
        wants: a query that must leave rows of the first table, or there is nothing to draw.
    """

    name: str
    section: str
    title: str
    caption: str
    needs: tuple[str, ...]
    draw: Callable[[Tables, Summary], go.Figure]
    wants: str = ""

    def ready(self, tables: Tables) -> bool:
        """Whether its tables are there and hold something to draw."""
        if not all(name in tables and len(tables[name]) for name in self.needs):
            return False
        return not self.wants or len(tables[self.needs[0]].query(self.wants)) > 0


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, the findings it answers and how it was measured."""

    key: str
    title: str
    findings: tuple[str, ...]
    method: str


SECTIONS = (
    Section(
        "recovery",
        "Drop-off and recovery",
        ("drop_off", "recovery"),
        "A linear probe is fitted at every stage, on images of its own, and reads the class of "
        "each image token on the test images. Where its accuracy falls, what told the classes "
        "apart is no longer linearly there; where it rises, the model has put it back. The image "
        "tokens stand before the question, so in a causal model their states do not depend on it.",
    ),
    Section(
        "knockout",
        "Attention knockout",
        ("knockout",),
        "The probe at the adapter's output calls each token right or wrong. For the wrong ones, "
        "attention to the correct tokens of their own region is blocked before the softmax, and "
        "the frozen probes read them again. It is always the same tokens that are compared, cut "
        "against not cut: tokens chosen for an error get better by themselves.",
    ),
    Section(
        "heads",
        "Heads",
        ("heads",),
        "The gain of a wrong token, measured as the margin of its true class over the one it was "
        "taken for, is split exactly into what the starting state, every head and every MLP "
        "write; a head's part is split again by the tokens it read from.",
    ),
    Section(
        "bidirectional",
        "Bidirectional attention",
        ("bidirectional",),
        "A causal model reads the picture row by row, so an early token cannot see a later anchor. "
        "Here the image tokens may see each other both ways and all else stays causal. Early "
        "tokens are also the top of the picture: what counts is bidirectional minus causal, not "
        "the raw curve.",
    ),
)

FIGURES = (
    Figure(
        "fig-stages", "recovery", "Token accuracy over the stages",
        "Accuracy of the stage's own probe, band: 95% interval. Hollow points are vision layers "
        "that the adapter does not read. The rise over the language model must beat the same model "
        "with its language weights shuffled, whose probes are fitted anew.",
        ("stages",), curves.stages, "metric == 'accuracy'",
    ),
    Figure(
        "fig-zoom", "recovery", "The same from the adapter on",
        "Drop-off is a fall from the layer that is read to the adapter's output, recovery the rise "
        "from there to the last layer. Bands may overlap where the paired difference is clear: "
        "the verdict above is on the difference.",
        ("stages",), curves.stages_zoom, "metric == 'accuracy'",
    ),
    Figure(
        "fig-miou", "recovery", "The same as mIoU, over tokens and over pixels",
        "One confusion matrix over all images, mean over the classes that occur. Over pixels, the "
        "probe's logits are upsampled; the ceiling is what perfect token labels would reach there. "
        "Colours as above.",
        ("stages",), curves.stages_miou, "metric in ['token_miou', 'pixel_miou']",
    ),
    Figure(
        "fig-knockout", "knockout", "Wrong tokens over the layers, clean and cut",
        "Accuracy of the tokens that were wrong at the adapter. Orange: attention to the correct "
        "tokens of their region is cut in every layer. It must fall below every grey control, each "
        "of which cuts edges of the same tokens: as many, where a token has as many (see hover).",
        ("knockout",), curves.knockout, "not probe_free and layers == 'all'",
    ),
    Figure(
        "fig-effects", "knockout", "Share of the recovery that is gone",
        "One minus accuracy cut over accuracy clean at the last layer, all layers cut. The orange "
        "bar must beat the grey ones; a no-op must be at zero.",
        ("knockout_effect",), bars.effects, "layers == 'all'",
    ),
    Figure(
        "fig-windows", "knockout", "Where in depth: windows of layers",
        "The same edges cut in one layer or in two neighbouring ones. If no window comes near "
        "the bar for all layers, the work is spread over depth or repeated.",
        ("knockout_effect",), bars.windows, "layers != 'all' and not is_control",
    ),
    Figure(
        "fig-probe-free", "knockout", "Without a probe in the choice of tokens",
        "Sources are the cells that carry a mark, targets the cells of the same region that carry "
        "none: the drawing chooses, no probe does. Control: as many edges from unmarked cells of "
        "the region.",
        ("knockout",), curves.knockout_probe_free, "probe_free and layers == 'all'",
    ),
    Figure(
        "fig-heads", "heads", "Share of the recovered margin, by head",
        "Blue heads push wrong tokens towards their true class, orange ones away from it. The "
        "interval of each is shown on hover; equal shares would mean that no head specialises.",
        ("head_totals",), bars.head_map,
    ),
    Figure(
        "fig-sources", "heads", "What the strongest heads read",
        "Heads in the order in which they are knocked out below; what each adds to the margin, "
        "split by the tokens it attends to, and the sum (black) with its interval. The "
        "claim needs blue, correct tokens of the same region, to outweigh the rest.",
        ("heads", "head_totals"), bars.sources,
    ),
    Figure(
        "fig-components", "heads", "Every component's part of the margin",
        "Starting state, attention (blue) and MLP (green) of each layer add up to the margin at "
        "the end exactly. Attention must be seen beside the MLPs, which move nothing between "
        "tokens.",
        ("components",), bars.components,
    ),
    Figure(
        "fig-head-knockout", "heads", "The strongest heads knocked out",
        "The edges from correct to wrong tokens are cut in the chosen heads only; heads are ranked "
        "on one half of the images and cut on the other. The top heads must cost more than as many "
        "random ones.",
        ("head_knockout",), bars.head_knockout,
    ),
    Figure(
        "fig-bidirectional", "bidirectional", "All tokens over the layers, causal and opened",
        "Frozen probes ask whether the states move to where the class was read before; probes "
        "refitted under the new mask ask whether it can be read at all. Both must beat the causal "
        "curve.",
        ("bidirectional",), curves.bidirectional,
    ),
    Figure(
        "fig-positions", "bidirectional", "Accuracy by row of the picture",
        "The adapter's curve shows how hard each row is before any attention among image tokens. "
        "Starvation would be a gap between causal and bidirectional that is widest at the top.",
        ("positions",), curves.positions,
    ),
    Figure(
        "fig-dose", "bidirectional", "Accuracy by the number of earlier anchors",
        "Tokens that are wrong at the adapter, by how many correct tokens of their region come "
        "before them. Starvation predicts a causal curve that rises with the dose, and a gain from "
        "bidirectional attention where the dose is low.",
        ("dose",), curves.dose,
    ),
    Figure(
        "fig-thirds", "bidirectional", "Gain by third of the reading order",
        "Bidirectional minus causal, paired over images. The early third must gain more than the "
        "late third. Frozen probes saw causal states only, so they are the stricter reading.",
        ("thirds",), bars.thirds,
    ),
)  # fmt: skip
