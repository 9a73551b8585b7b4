"""One pass over test pictures: what every probe says, added up into scores.

    scores = Scores(bank.stages, bank.classes, pixels=True)
    score(stream, bank_rows(bank), [scores])

A *row* of scores is a probe and the stage it reads: usually the stage's own, but two probes may
read the same states (the frozen probe and one refitted under an edit, the probe and its
shuffled-label control), and then the model still runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from interp.probes.bank import ProbeBank
from interp.probes.parts import Part
from interp.probes.reading import ModelStream
from interp.probes.readout import Readout
from interp.probes.scores import Scores
from interp.world import World

#: name of a row -> the stage whose states are read, and what reads them
Rows = Mapping[str, tuple[str, Readout]]


def bank_rows(bank: ProbeBank, suffix: str = "") -> dict[str, tuple[str, ProbeBank]]:
    """Every probe of a bank at its own stage; `suffix` tells two banks' rows apart."""
    return {f"{stage}{suffix}": (stage, bank) for stage in bank.stages}


def score(
    stream: ModelStream,
    rows: Rows,
    scores: Sequence[Scores],
    *,
    world: World | None = None,
    on_part: Callable[[Part, dict[str, Tensor]], None] | None = None,
) -> None:
    """Run the stream once and count what the rows say in all of `scores`.

    Args:
        stream: test pictures.
        rows: what is read by which probe; every stage of `scores` is one of them.
        scores: to be added to, here; afterwards they hold all processes' counts.
        world: processes that share the pictures.
        on_part: called with a part and the logits `[n_tokens, K]` of each row.

    Raises:
        ValueError: scores of a row that there is not.
    """
    world = world or World()
    if unknown := sorted({stage for one in scores for stage in one.stages} - set(rows)):
        raise ValueError(f"no probe says {', '.join(unknown)}; the rows are {', '.join(rows)}")
    _ = stream.widths  # may prepare a picture, and no two threads may use one tokenizer
    for part in stream.source.parts(world.share(range(stream.n_parts))):
        features = stream.tokens(part).features
        logits = {}
        for name, (stage, bank) in rows.items():
            states = features[stage]
            logits[name] = bank.only([stage]).to(states.device).logits(stage, states.float())
        del features  # pixels are painted in the room that they leave
        for one in scores:
            one.update(
                part.names,
                part.x.grid,
                part.labels,
                {stage: logits[stage] for stage in one.stages},
                purity=part.purity,
                masks=part.masks if one.spec.pixels else None,
            )
        if on_part is not None:
            on_part(part, logits)
    for one in scores:
        world.sum_(*one.state().values())
