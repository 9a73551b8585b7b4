"""The page of a study: the four claims, each with its figures and the control it must beat."""

from __future__ import annotations

from interp.report import bars, curves, stages
from interp.report.figures import Figure, Kind, Section
from interp.report.opening import findings
from interp.report.tables import Summary, image_counts

_SECTIONS = (
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

_FIGURES = (
    Figure(
        "fig-stages", "recovery", "Token accuracy over the stages",
        "Accuracy of the stage's own probe, band: 95% interval. Hollow points are vision layers "
        "that the adapter does not read. The rise over the language model must beat the same model "
        "with its language weights shuffled, whose probes are fitted anew.",
        ("stages",), stages.stages, "metric == 'accuracy'",
    ),
    Figure(
        "fig-zoom", "recovery", "The same from the adapter on",
        "Drop-off is a fall from the layer that is read to the adapter's output, recovery the rise "
        "from there to the last layer. Bands may overlap where the paired difference is clear: "
        "the verdict above is on the difference.",
        ("stages",), stages.stages_zoom, "metric == 'accuracy'",
    ),
    Figure(
        "fig-miou", "recovery", "The same as mIoU, over tokens and over pixels",
        "One confusion matrix over all images, mean over the classes that occur. Over pixels, the "
        "probe's logits are upsampled; the ceiling is what perfect token labels would reach there. "
        "Colours as above.",
        ("stages",), stages.stages_miou, "metric in ['token_miou', 'pixel_miou']",
    ),
    Figure(
        "fig-groups", "recovery", "Where tokens lie: boundary and interior, early and late",
        "A token is at a boundary if one beside it has another label; early and late are the first "
        "and the last third of the reading order. Early is also the top of the picture: what an "
        "order of reading does must be seen against the same gap at the encoder.",
        ("groups", "stages"), stages.groups,
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


def _facts(summary: Summary) -> list[str]:
    counts = image_counts(summary)
    return [counts, f"{len(summary['classes'])} classes"]


STUDY = Kind(
    title="From drop-off to recovery",
    lead="How much of a picture's segmentation can be read from the image tokens of {model}: at "
    "every stage from the vision encoder through the adapter to the last layer of the language "
    "model, what restores it there, and what happens when that is taken away.",
    facts=_facts,
    opening=Section(
        "findings",
        "Findings",
        (),
        "A finding holds if its interval (blue) excludes zero and it beats its control (grey), "
        "both decided by the numbers alone. One that does not hold is said not to.",
    ),
    lines=findings,
    none="",
    sections=_SECTIONS,
    figures=_FIGURES,
    pictures=True,
)
