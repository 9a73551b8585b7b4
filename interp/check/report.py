"""Do the names mean what they claim, on *this* model? The self-check behind `interp check MODEL`.

A family's table says where every hook lives. It may be wrong in ways that raise no error: a norm
taken for another, the gate for its factor, an image token for its neighbour. So before anybody
trusts a table (a new one, or an old one with a new release of transformers), `check` asks the model
itself. The idea is nnterp's: test at load time what the names claim. The equations are in
`interp.check.claims`, the trials (parity, edits, boxes of image tokens) in `interp.check.trials`.

    report = check(MLLM.load("tiny"))
    print(report)          # a table: tower, claim, worst error, verdict, where
    report.passed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from interp.check import claims, trials
from interp.check.claims import Finding
from interp.errors import NotHere
from interp.inputs import Inputs
from interp.model import MLLM

#: how large an error may be, relative to the largest value compared; a wrong place is off by ~1
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

#: what counts as a move of the logits: more than rounding, which moves them too
LEAST_MOVE = 1e-5

Verdict = Literal["pass", "FAIL", "unchecked"]
#: what is said where a run broke off
STOPPED = "its hooks can be reached in their order"
COLOURS = {"pass": "green", "FAIL": "bold red", "unchecked": "yellow"}


@dataclass(frozen=True)
class Row:
    """One claim: about which part, how far off it is at worst, and where.

    Attributes:
        part: "vision", "adapter", "language" or "model".
        claim: in words.
        verdict: "pass", "FAIL" or "unchecked".
        error: the worst error; for an edit that must move the logits, the smallest move.
        bound: what the error must not exceed; for a move, what it must exceed.
        where: the hook or token of the worst case; for what is unchecked, why.
        must_move: the claim is that something moves.
    """

    part: str
    claim: str
    verdict: Verdict
    error: float | None = None
    bound: float | None = None
    where: str = ""
    must_move: bool = False


@dataclass(frozen=True)
class CheckReport:
    """What `check` found: `rows`, and whether all that could be checked `passed`."""

    model: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether no claim failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.verdict == "FAIL")

    @property
    def unchecked(self) -> tuple[Row, ...]:
        """The rows that could not be checked; `where` says why."""
        return tuple(row for row in self.rows if row.verdict == "unchecked")

    def table(self) -> Table:
        """The rows as a table for rich."""
        table = Table(title=self.model, title_justify="left")
        for name in ("part", "claim", "worst", "bound", "", "where"):
            table.add_column(name, justify="right" if name in ("worst", "bound") else "left")
        for row in self.rows:
            verdict = f"[{COLOURS[row.verdict]}]{row.verdict}[/]"
            table.add_row(row.part, row.claim, _number(row.error), _bound(row), verdict, row.where)
        return table

    def __str__(self) -> str:
        console = Console(width=150, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.1e}" if number else "0"


def _bound(row: Row) -> str:
    return f"> {_number(row.bound)}" if row.must_move else _number(row.bound)


def check(model: MLLM, x: Inputs | None = None, *, prompt: str = "what is it ?") -> CheckReport:
    """Check that the hook names of a model mean what they claim; changes nothing in it.

    Takes a forward pass a block and some two hundred more.

    Args:
        model: a loaded model.
        x: a prepared batch to run on. If None, a picture of noise goes through the processor, or
            without a processor random pixels and words of the right shape straight in. The boxes
            of image tokens can only be checked with a processor, and not on a batch that is given.
        prompt: what is asked about the picture of noise.

    Raises:
        ValueError: weights that are offloaded.
        NotHere: a hosted model, which lacks hooks and weights that the check looks at.
    """
    if model.host is not None:
        raise NotHere("the check reads weights and inner hooks: load the model without remote=")
    if any(parameter.is_meta for parameter in model.module.parameters()):
        raise ValueError(
            "part of this model's weights is offloaded, and the check reads weights; load it "
            "without offloading (a smaller model of the family, or a smaller dtype)"
        )
    noise, why = picture(), ""
    if x is not None:
        at, why = x, "needs the picture: leave x out"
    elif model.processor is None:
        at, why = random_inputs(model), "no processor: random pixels and words were used"
    else:
        at = model.prepare(noise, prompt)
    parts: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("vision", lambda: claims.blocks(model, at, vision=True)),
        ("adapter", lambda: trials.adapter(model, at)),
        ("language", lambda: claims.blocks(model, at, vision=False)),
        ("language", lambda: trials.logits(model, at)),
        ("model", lambda: trials.parity(model, at)),
        ("vision", lambda: trials.edits(model, at, vision=True)),
        ("language", lambda: trials.edits(model, at, vision=False)),
        ("vision", lambda: trials.reads(model, at)),
    ]
    if why:
        parts.append(("adapter", lambda: [Finding(trials.BOX, None, why)]))
    else:
        parts.append(("adapter", lambda: trials.boxes(model, noise, prompt)))
    module: Any = model.module
    tolerance = TOLERANCE[module.dtype]
    if getattr(module, "is_quantized", False):
        # a quantised projection rounds its input, too: it is not quite the sum of its heads
        tolerance = max(tolerance, TOLERANCE[torch.float16])
    ledger = Ledger(tolerance)
    for part, ask in parts:
        ledger.ask(part, ask)
    return CheckReport(repr(model), tuple(ledger.rows.values()))


class Ledger:
    """Collects findings: a row a claim, with its worst case."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.rows: dict[tuple[str, str], Row] = {}

    def ask(self, part: str, findings: Callable[[], Iterable[Finding]]) -> None:
        """Note all findings. A table that is wrong enough makes the run itself fail: noted, too."""
        try:
            for finding in findings():
                self.note(part, finding)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            self.rows[part, STOPPED] = Row(part, STOPPED, "FAIL", where=said)

    def note(self, part: str, finding: Finding) -> None:
        """Put a finding into its row, if it is worse than what is there."""
        claim, error, where, bound, must_move = finding
        if error is None:
            self.rows.setdefault((part, claim), Row(part, claim, "unchecked", where=where))
            return
        bound = self.tolerance if bound is None else bound
        bound = LEAST_MOVE if must_move else bound
        good = error > bound if must_move else error <= bound
        old = self.rows.get((part, claim))
        if (
            old
            and old.error is not None
            and (error >= old.error if must_move else error <= old.error)
        ):
            return
        verdict: Verdict = "pass" if good else "FAIL"
        self.rows[part, claim] = Row(part, claim, verdict, error, bound, where, must_move)


def picture(width: int = 320, height: int = 240) -> Image.Image:
    """Noise in squares of 8 pixels, so that it survives being resized."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(squares.repeat(8, axis=0).repeat(8, axis=1))


def random_inputs(model: MLLM) -> Inputs:
    """One picture of random pixels among random words, for a model without a processor."""
    config: Any = model.config
    vision = config.vision_config
    rng = torch.Generator().manual_seed(0)
    pixels: dict[str, Any] = {}
    if "image_grid_thw" in model.family.inputs:  # packed patches
        rows, cols = 2 * vision.spatial_merge_size, 3 * vision.spatial_merge_size
        pixels["image_grid_thw"] = torch.tensor([[1, rows, cols]])
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        shape: tuple[int, ...] = (rows * cols, width)
    else:
        size = vision.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (1, 3, height, width)
        if "image_sizes" in model.family.inputs:  # tiles of one picture
            from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

            pixels["image_sizes"] = torch.tensor([[height, width]])
            pinpoints = config.image_grid_pinpoints
            shape = (1, image_size_to_num_patches([height, width], pinpoints, height), *shape[1:])
        elif "pixel_attention_mask" in model.family.inputs:
            shape = (1, *shape)
    pixels["pixel_values"] = torch.randn(shape, generator=rng)
    here = {
        name: one.to(model.device, model.module.dtype if one.is_floating_point() else None)
        for name, one in pixels.items()
    }
    with torch.no_grad():
        features = model.module.model.get_image_features(**here).pooler_output  # type: ignore[union-attr, operator]
    n_tokens = sum(one.shape[:-1].numel() for one in features)
    special = {v for k, v in config.to_dict().items() if k.endswith(("_token_id", "_token_index"))}
    words = torch.tensor([i for i in range(3, 1000) if i < model.cfg.d_vocab and i not in special])
    picked = words[torch.randint(len(words), (6,), generator=rng)]
    image = torch.full((n_tokens,), config.image_token_id)
    ids = torch.cat([picked[:2], image, picked[2:]])[None]
    if "token_type_ids" in model.family.inputs:
        pixels["token_type_ids"] = (ids == config.image_token_id).long()
    return model.inputs(input_ids=ids, **pixels)
