"""The page of a probe run: what can be read at every stage, of which tokens and which classes."""

from __future__ import annotations

from interp.report import classes, maps, stages
from interp.report.figures import Figure, Kind, Section
from interp.report.opening import changes
from interp.report.tables import Summary

_SECTIONS = (
    Section(
        "stages",
        "Stage by stage",
        (),
        "A linear probe is fitted at every stage, on images of its own, and reads the class of "
        "each image token on the test images. Stages differ in width, so part of a change between "
        "two of them may be what a wider probe can do.",
    ),
    Section(
        "groups",
        "Where tokens lie",
        (),
        "A token is at a boundary if one of the four beside it has another label. Early and late "
        "are the first and the last third of the reading order.",
    ),
    Section(
        "classes",
        "Classes",
        (),
        "The same two stages for every class: the reference, and the readout, which is the last "
        "stage. A class that neither occurs nor is said is left out.",
    ),
    Section(
        "map",
        "Places in the picture",
        (),
        "The pictures are laid over one another on one grid, whatever grid each has.",
    ),
    Section(
        "solver",
        "Penalties",
        (),
        "A probe that is held too tight or too loose says less of its stage than there is. The "
        "ridge solver chooses a penalty for every stage by its error on held-out pictures of those "
        "that it is fitted on.",
    ),
)

_FIGURES = (
    Figure(
        "fig-stages", "stages", "Token accuracy over the stages",
        "Accuracy of the stage's own probe, band: 95% interval. Hollow points are vision layers "
        "that the adapter does not read. Grey, where measured: probes of the same states fitted on "
        "shuffled labels, and probes of random features of the stages' widths. Both belong "
        "near the floor: what they have beyond it is chance, and a stage must clear them.",
        ("stages",), stages.stages, "metric == 'accuracy'",
    ),
    Figure(
        "fig-zoom", "stages", "The same from the adapter on",
        "From the layer that is read, without the controls, in a scale of its own. Bands may "
        "overlap where the paired difference is clear: the changes above are paired.",
        ("stages",), stages.stages_zoom, "metric == 'accuracy' and kind == 'adapter'",
    ),
    Figure(
        "fig-miou", "stages", "The same as mIoU, over tokens and over pixels",
        "One confusion matrix over all images, mean over the classes that occur. Over pixels, the "
        "probe's logits are upsampled to the picture's own size; the ceiling is what perfect token "
        "labels would reach there. Colours as above.",
        ("stages",), stages.stages_miou, "metric in ['token_miou', 'pixel_miou']",
    ),
    Figure(
        "fig-groups", "groups", "Accuracy at boundaries and inside, early and late",
        "The middle third is in the table. Early is also the top of the picture: what an order of "
        "reading does must be seen against the same gap at the encoder.",
        ("groups", "stages"), stages.groups,
    ),
    Figure(
        "fig-classes", "classes", "Token IoU of each class, reference to readout",
        "Hollow: at the reference; filled: at the readout, blue where it is higher and orange "
        "where it is lower; the change in points at the right. A class's number of tokens is shown "
        "on hover: these have no intervals, and a rare class moves by a few tokens.",
        ("classes", "stages"), classes.class_changes, "unit == 'token'", compares=True,
    ),
    Figure(
        "fig-confusion", "classes", "The most frequent confusions, and what became of them",
        "True class → class said: the pairs with the most tokens at the reference, as shares of "
        "all tokens of the true class, without intervals. What is frequent at one of two stages "
        "tends to be less frequent at the other by chance alone.",
        ("confusion", "stages"), classes.confusions, "true != said", compares=True,
    ),
    Figure(
        "fig-map", "map", "Accuracy by place, and its change",
        "Row 0 is the top of the picture. Left and middle share one scale. In the difference, blue "
        "is higher at the readout, orange lower; there are no intervals, so neighbouring cells are "
        "the measure of chance.",
        ("map", "stages"), maps.position_map, compares=True,
    ),
    Figure(
        "fig-penalties", "solver", "Held-out error by penalty",
        "Squared error on the held-out pictures, relative to the stage's least; the dot is the "
        "penalty that was chosen. A dot at the edge means that one beyond the range might do "
        "better. White columns: the penalty hardly matters.",
        ("penalties", "stages"), maps.penalties,
    ),
)  # fmt: skip


def _facts(summary: Summary) -> list[str]:
    s = summary
    unseen = s.get("unseen_pixels") or 0.0
    return [
        f"probes fitted on {s['n_probe_images']:,} images ({s['n_probe_tokens']:,} tokens), "
        f"scored on {s['n_test_images']:,} others ({s['n_test_tokens']:,} tokens)",
        f"{len(s['classes'])} classes",
        f"solver {s['solver']}",
        *([f"{unseen:.1%} of the labelled pixels lie where no token looks"] if unseen else []),
    ]


PROBE = Kind(
    title="Probes at every stage",
    lead="How much of a picture's segmentation a linear probe can read from the image tokens of "
    "{model}: at every stage, for which tokens, and for which classes.",
    facts=_facts,
    opening=Section(
        "changes",
        "Changes",
        (),
        "Differences between two stages on the same test images, paired, with intervals. Each is a "
        "change, not yet a cause: no control is beaten here. Which control a change beats, and "
        "what brings it about, is what interp study asks.",
    ),
    lines=changes,
    none="the changes take the adapter's input, its output and a later stage, on two images or "
    "more",
    sections=_SECTIONS,
    figures=_FIGURES,
    pictures=False,
)
