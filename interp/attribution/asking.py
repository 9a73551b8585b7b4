"""`ask`: a question about heads, out of what a user says.

Unless another target is given, the question is the paper's: of the image tokens that the probe at
`start` takes for the wrong class, how far does the probe at `end` prefer the true class to the
confused one? Everything that does not fit together is refused here, before anything long runs; and
what cannot matter is left out here: words behind the last picture do not reach it in a causal
model, so the prompt ends there (`Inputs.until`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from interp.attribution.question import Part, Question
from interp.attribution.sources import PLACE, REGION, WHOLE, Sources, by_place, by_region, whole
from interp.attribution.targets import Custom, ProbeMargin, Score, Target
from interp.clean import Clean, clean_run
from interp.errors import Untestable, nearest
from interp.hooks import canonical
from interp.inputs import Inputs
from interp.labels import IGNORE
from interp.model import MLLM
from interp.pooling import pool
from interp.probes import ProbeBank
from interp.probes.readout import Readout
from interp.shipping import at_model

GROUPS = {"region": REGION, "place": PLACE, "whole": WHOLE}
Labels = np.ndarray | Sequence[np.ndarray]


#: what a question is made of, beside model, batch and probes
WORDS = ("labels", "start", "end", "target", "sources", "dst")


def check_words(caller: str, question: dict[str, Any]) -> None:
    """Raise for a keyword that no question has, in the name of the function that got it."""
    for word in question:
        if word not in WORDS:
            raise TypeError(
                f"{caller}() has no option {word!r} {nearest(word, WORDS)}".rstrip()
                + f"; a question is made of {', '.join(WORDS)}"
            )


def ask(
    model: MLLM,
    batch: Inputs | Sequence[Inputs],
    probes: ProbeBank | None = None,
    *,
    labels: Labels | None = None,
    start: str = "adapter.hook_out",
    end: str | None = None,
    target: Target | Sequence[Target] | Callable[..., Any] | None = None,
    sources: str | Sequence[str] | Sequence[Sources] | Sources | None = None,
    dst: str = "queries",
) -> Question:
    """Make a question.

    Args:
        model: of whose heads.
        batch: prepared pictures, one batch or several; one picture a row.
        probes: frozen probes at `start` and `end`, unless a target is given.
        labels: class of each image token: `[n_tokens]` as `x.grid.labels` gives it, one array a
            batch, or `[n_images, n_tokens]` over all batches; `IGNORE` where there is none.
        start: the stage from which on heads are looked at, and at which tokens are called wrong.
        end: the stage at which the target is read; by default the target's, else the last block.
        target: what is explained, a `Target` (`ProbeMargin`s: one a batch), or a function of the
            run, with `end`; by default the probe's margin of tokens wrong at `start`.
        sources: "region" (needs labels and probes), "place" or "whole"; names of groups of one of
            these, to look at those only; or ready-made `Sources`, one a batch, which say who reads,
            too. By default "region" where readers are image tokens with labels, else "place".
        dst: whose reading is looked at: "queries", the positions of which the target speaks;
            "image", all image tokens; "all", every position.

    Raises:
        ValueError: what does not fit together, with what would do.
        Untestable: no image has a wrong token.
    """
    batches = (batch,) if isinstance(batch, Inputs) else tuple(batch)
    if not batches or not all(isinstance(x, Inputs) for x in batches):
        raise TypeError("a batch is what model.prepare(images, text) makes, or several of them")
    for x in batches:
        if len(x) != x.grid.n_images:
            raise ValueError(
                f"{x.grid.n_images} pictures in {len(x)} rows: attribution counts by image, so "
                "give one picture a row"
            )
    start = canonical(start)
    end = _end(model, end, target, probes)
    whole_shapes = [x.shape for x in batches]
    if _of_pictures(target) and dst != "all" and not (_given(sources) or model.family.prefix):
        # what follows the last picture cannot reach it
        batches = tuple(x.until(_end_of_pictures(x)) for x in batches)
    layers = layers_between(model, start, end)
    flat = _flat(labels, batches)
    right, said, kept = [], [], []
    if probes is not None and flat is not None:
        for x, own in zip(batches, flat, strict=True):
            kept.append(Clean())
            said.append(_said(model, x, probes.readout([start]), start, kept[-1]).numpy())
            right.append((said[-1] == own) & (own != IGNORE))
    scores = []
    for number, x in enumerate(batches):
        if target is None:
            if flat is None or not right or probes is None:
                raise ValueError(
                    "the default target asks about tokens that a probe gets wrong: give probes and "
                    "labels=x.grid.labels(masks, n_classes), or another target="
                )
            wrong = ~right[number] & (flat[number] != IGNORE)
            true = np.where(wrong, flat[number], 0)
            scores.append(ProbeMargin(probes, end, wrong, true, said[number]).on(model, x))
        else:
            scores.append(_target(target, number, len(batches), end).on(model, x))
    ready = _ready(sources, scores, batches)
    if ready is None:
        readers = [_readers(x, score, dst) for x, score in zip(batches, scores, strict=True)]
        ready, first = [], batches[0].grid.token_at[tuple(one.numpy() for one in readers[0])]
        kind, groups = kinds(sources, by_labels=bool(right), words=bool((first < 0).any()))
        for number, (x, (row, position)) in enumerate(zip(batches, readers, strict=True)):
            if kind == "region":
                assert flat is not None
                made = by_region(x, row, position, flat[number], right[number])
            else:
                made = (by_place if kind == "place" else whole)(x, row, position)
            ready.append(made if groups is None else made.only(groups))
    if not any(len(one) for one in ready):
        raise Untestable(
            f"no image token is wrong at {start!r}: there is nothing whose recovery could be "
            "attributed; give more pictures, or a target"
        )
    parts, first_image = [], 0
    for number, (x, score, read_from) in enumerate(zip(batches, scores, ready, strict=True)):
        clean = kept[number] if kept else Clean()
        parts.append(Part(x, score, read_from, first_image, clean, whole_shapes[number]))
        first_image += len(x)
    if any(not _same_readers(part.score, part.sources) for part in parts):
        dst = "given" if dst == "queries" else dst
    return Question(model, tuple(parts), start, end, layers, ready[0].names, dst)


@at_model
def _said(model: MLLM, x: Inputs, probes: Readout, stage: str, clean: Clean) -> torch.Tensor:
    """The class that a probe reads at each image token, `[n_tokens]`; what the language model was
    given is kept in `clean`, if that is here."""
    made = clean_run(model, x, [stage])
    clean.inputs = made.inputs
    tokens = _tokens(model, x, stage, made.states[stage]).float().cpu()
    return probes.predict(stage, tokens)


def _tokens(model: MLLM, x: Inputs, stage: str, state: torch.Tensor) -> torch.Tensor:
    """A stage's state at the image tokens of a batch, `[n_tokens, d]` in grid order."""
    grid = model.grid_of(stage, x)
    if grid.uniform:
        return pool(grid.gather(state), grid, x.grid).flatten(0, 1)
    if len(grid) != len(x.grid):
        raise ValueError(
            f"pictures of different sizes, and start={stage!r} has several vectors a token; "
            'start="adapter.hook_out" would do'
        )
    return torch.cat(grid.split(state))


def _end(
    model: MLLM,
    end: str | None,
    target: Any,
    probes: ProbeBank | None,
) -> str:
    one = target[0] if isinstance(target, (list, tuple)) and target else target
    own = getattr(one, "end", None)
    if target is not None and own is None and end is None and callable(target):
        raise ValueError(
            'a function as target: say what it reads by end="logits" or '
            'end="blocks.<layer>.hook_resid_post"'
        )
    if end is not None and own is not None and canonical(end) != own:
        raise ValueError(f"the target is read at {own!r}, and end={end!r}; leave end out")
    chosen = own or end or last_stage(model)
    chosen = chosen if chosen == "logits" else canonical(chosen)
    if target is None and probes is not None:
        probes.weight(chosen)  # raises, naming the stages that there are
    return chosen


def last_stage(model: MLLM) -> str:
    """The residual stream behind the last block."""
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


def layers_between(model: MLLM, start: str, end: str) -> range:
    """The layers whose heads lie between two stages.

    Raises:
        UnknownHook: a stage that the model does not have.
        ValueError: there are none, or something that is no stage.
    """
    first, last = _after(model, start), _until(model, end)
    if first > last:
        raise ValueError(f"no head lies between start={start!r} and end={end!r}")
    return range(first, last + 1)


def _after(model: MLLM, start: str) -> int:
    """The first layer behind a stage."""
    model.hooks.rank(start)
    if not start.startswith("blocks."):
        return 0
    number, suffix = start.removeprefix("blocks.").split(".", 1)
    if suffix not in ("hook_resid_pre", "hook_resid_post"):
        raise ValueError(
            f"start={start!r}; a stage of the residual stream would do, or the adapter"
        )
    return int(number) + (suffix == "hook_resid_post")


def _until(model: MLLM, end: str) -> int:
    """The last layer before a stage."""
    if end == "logits":
        return model.cfg.n_layers - 1
    model.hooks.rank(end)
    parts = end.split(".")
    if parts[0] != "blocks" or parts[2] != "hook_resid_post":
        raise ValueError(
            f"end={end!r}: heads are looked at up to 'blocks.<layer>.hook_resid_post' or 'logits'"
        )
    return int(parts[1])


def _target(target: Any, number: int, n_batches: int, end: str) -> Target:
    """The target of one batch."""
    if isinstance(target, (list, tuple)):
        if len(target) != n_batches:
            raise ValueError(f"{len(target)} targets for {n_batches} batches; one each")
        target = target[number]
    elif isinstance(target, ProbeMargin) and n_batches > 1:
        raise ValueError(
            f"one ProbeMargin for {n_batches} batches: its tokens are those of one; give a list of "
            "them, one a batch"
        )
    if isinstance(target, Target):
        return target
    if not callable(target):
        raise TypeError(f"target={target!r}; a Target or a function of the run would do")
    return Custom(target, end)


def _flat(labels: Labels | None, batches: Sequence[Inputs]) -> list[np.ndarray] | None:
    """Labels of each batch's image tokens, `[n_tokens]`."""
    if labels is None:
        return None
    sizes = [len(x.grid) for x in batches]
    listed = isinstance(labels, (list, tuple)) and len(labels) and np.ndim(labels[0]) > 0
    several = [np.asarray(one).reshape(-1) for one in (labels if listed else [labels])]
    if len(several) == 1:
        if len(several[0]) != sum(sizes):
            raise ValueError(
                f"labels {list(np.shape(labels))} for {sum(sizes)} image tokens in {len(batches)} "
                "batch(es); x.grid.labels(masks, n_classes) gives one a token"
            )
        several = np.split(several[0], np.cumsum(sizes)[:-1])
    if [len(one) for one in several] != sizes:
        raise ValueError(f"labels of {[len(one) for one in several]} tokens for batches of {sizes}")
    if any(one.dtype.kind not in "iu" for one in several):
        raise ValueError(f"labels are whole numbers, not {several[0].dtype}")
    return several


def _ready(
    sources: Any, scores: Sequence[Score], batches: Sequence[Inputs]
) -> list[Sources] | None:
    """Ready-made sources, one a batch, readers in the order of the target's queries."""
    listed = [sources] if isinstance(sources, Sources) else list(sources or ())
    if not _given(sources):
        return None
    if len(listed) != len(batches) or len({one.names for one in listed}) != 1:
        raise ValueError(
            f"{len(listed)} Sources for {len(batches)} batches; one each, all of the same groups"
        )
    for one, x in zip(listed, batches, strict=True):
        if one.group.shape[1] != x.n_pos or (len(one) and int(one.row.max()) >= len(x)):
            raise ValueError(
                f"Sources over {one.group.shape[1]} positions for a batch {list(x.shape)}"
            )
    return [one.in_order(score) for one, score in zip(listed, scores, strict=True)]


def _given(sources: Any) -> bool:
    """Whether these are ready-made `Sources`, and not names."""
    if isinstance(sources, str) or sources is None:
        return False
    return isinstance(sources, Sources) or (len(sources) > 0 and isinstance(sources[0], Sources))


def _of_pictures(target: Any) -> bool:
    """Whether a target looks at image tokens only."""
    listed = target if isinstance(target, (list, tuple)) else [target]
    return all(one is None or isinstance(one, ProbeMargin) for one in listed)


def _end_of_pictures(x: Inputs) -> int:
    """How many positions hold the batch's pictures and what precedes them."""
    return int(np.flatnonzero(x.grid.is_placeholder.any(0)).max()) + 1


def _same_readers(score: Score, sources: Sources) -> bool:
    """Whether those who read are the target's queries."""
    if score.row is None or score.position is None:
        return False
    return torch.equal(score.row, sources.row) and torch.equal(score.position, sources.position)


def kinds(
    sources: Any, *, by_labels: bool, words: bool = False
) -> tuple[str, tuple[str, ...] | None]:
    """(kind of groups, which of them); `words` if readers are no image tokens."""
    if sources is None:
        return ("region" if by_labels and not words else "place"), None
    if isinstance(sources, str) and sources in GROUPS:
        return _usable(sources, by_labels), None
    listed = (sources,) if isinstance(sources, str) else tuple(sources)
    for kind, names in GROUPS.items():
        if listed and set(listed) <= set(names):
            return _usable(kind, by_labels), listed
    known = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in GROUPS.items())
    raise ValueError(f"sources={sources!r}; the kinds of groups, and the groups, are {known}")


def _usable(kind: str, by_labels: bool) -> str:
    if kind == "region" and not by_labels:
        raise ValueError(
            'sources="region" needs probes and labels, which say what is right; sources="place" '
            "does not"
        )
    return kind


def _readers(x: Inputs, score: Score, dst: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, position) of the positions whose reading is looked at."""
    if dst == "queries":
        if score.row is None or score.position is None:
            raise ValueError(
                f'dst="queries", but the target {score.name} does not say at which positions it '
                'looks; dst="image" or dst="all" would do'
            )
        return score.row, score.position
    places = {"image": x.is_image, "all": x.is_attended}
    if dst not in places:
        raise ValueError(f'dst={dst!r}; there are "queries", "image" and "all"')
    row, position = np.nonzero(places[dst])
    return torch.as_tensor(row), torch.as_tensor(position)
