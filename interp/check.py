"""Do the names mean what they claim, on *this* model? The self-check behind `interp check MODEL`.

A family's table says where every hook lives. It may be wrong in ways that raise no error: a norm
taken for another, the gate for its factor, an image token for its neighbour. So before anybody
trusts a table (a new one, or an old one with a new release of transformers), `check` asks the model
itself. The idea is nnterp's: test at load time what the names claim.

Four kinds of claims:

* **equations** between the hooks of each block, in both towers (`interp.claims`), and between the
  last of them and the logits;
* **parity**: the clean run is plain transformers' run;
* **edits**: at every hook of a block in the middle of each tower, an identity edit changes nothing
  (0.0) and a real one moves the logits; the adapter reads the stages it is said to read, no others;
* **places**: with attention in the vision tower switched off, repainting the picture inside a
  token's box changes that token more than any other.

    report = check(MLLM.load("tiny"))
    print(report)          # a table: tower, claim, worst error, pass or fail
    report.passed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from interp import attention
from interp.claims import SOFTCAP, BlockClaims, affine, block_modules, precise, watch, worst
from interp.execution import execute
from interp.families.base import module_at
from interp.inputs import Inputs
from interp.model import MLLM

#: how large an error may be, relative to the largest value compared; a wrong place is off by ~1
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
#: how many tokens of each view are repainted
N_TOKENS = 6

Verdict = Literal["pass", "FAIL", "unchecked"]


@dataclass(frozen=True)
class Row:
    """One claim: of which tower, how far off it is at worst, and where.

    Attributes:
        tower: "vision", "adapter", "language" or "model".
        claim: in words.
        verdict: "pass", "FAIL" or "unchecked".
        error: the worst error; for an edit that must move the logits, the smallest move.
        bound: what the error must not exceed; for a move, 0, which it must exceed.
        where: the hook or token of the worst case; for "unchecked", why.
    """

    tower: str
    claim: str
    verdict: Verdict
    error: float | None = None
    bound: float | None = None
    where: str = ""


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
        for name in ("tower", "claim", "worst", "bound", "", "where"):
            table.add_column(name, justify="right" if name in ("worst", "bound") else "left")
        colours = {"pass": "green", "FAIL": "bold red", "unchecked": "yellow"}
        for row in self.rows:
            error, bound = (
                f"{n:.1e}" if n else "0" if n == 0 else "" for n in (row.error, row.bound)
            )
            verdict = f"[{colours[row.verdict]}]{row.verdict}[/]"
            table.add_row(row.tower, row.claim, error, bound, verdict, row.where)
        return table

    def __str__(self) -> str:
        console = Console(width=150, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def check(model: MLLM, x: Inputs | None = None, *, prompt: str = "what is it ?") -> CheckReport:
    """Check that the hook names of a model mean what they claim; changes nothing in it.

    Takes a forward pass a block and about a hundred more.

    Args:
        model: a loaded model.
        x: a prepared batch to run on. If None, a picture of noise goes through the processor; the
            boxes of image tokens can only be checked there, since they need the picture.
        prompt: what is asked about that picture.

    Raises:
        ValueError: neither a batch nor a processor to make one.
    """
    noise = picture()
    own = x is None
    if x is None:
        x = model.prepare(noise, prompt)
    ledger = Ledger(TOLERANCE[model.module.dtype])  # type: ignore[index]
    for vision in (True, False):
        _blocks(model, x, ledger, vision=vision)
    _logits(model, x, ledger)
    _parity(model, x, ledger)
    for tower in ("vision", "language"):
        _edits(model, x, ledger, tower)
    _reads(model, x, ledger)
    if model.processor is None or not own:
        why = "no processor" if model.processor is None else "needs the picture: leave x out"
        ledger.skip("adapter", BOX, why)
    else:
        _boxes(model, noise, prompt, ledger)
    return CheckReport(repr(model), tuple(ledger.rows()))


BOX = "a token answers to its own box"


class Ledger:
    """Collects findings: a row a claim, with its worst case."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._rows: dict[tuple[str, str], Row] = {}

    def rows(self) -> list[Row]:
        """All rows, in the order in which their claims were first asked."""
        return list(self._rows.values())

    def error(
        self, tower: str, claim: str, error: float, where: str, bound: float | None = None
    ) -> None:
        """A finding that must not exceed the bound (the tolerance, if None)."""
        bound = self.tolerance if bound is None else bound
        row = Row(tower, claim, "pass" if error <= bound else "FAIL", error, bound, where)
        self._keep(row, lambda old: error > (old.error or 0.0))

    def move(self, tower: str, claim: str, size: float, where: str) -> None:
        """A finding that must exceed 0."""
        row = Row(tower, claim, "pass" if size > 0 else "FAIL", size, 0.0, where)
        self._keep(row, lambda old: size < (old.error or 0.0))

    def skip(self, tower: str, claim: str, why: str) -> None:
        """A claim that cannot be checked."""
        self._rows.setdefault((tower, claim), Row(tower, claim, "unchecked", where=why))

    def _keep(self, row: Row, worse: Callable[[Row], bool]) -> None:
        key = (row.tower, row.claim)
        if key not in self._rows or worse(self._rows[key]):
            self._rows[key] = row


# -- equations -------------------------------------------------------------------------------------


def _blocks(model: MLLM, x: Inputs, ledger: Ledger, *, vision: bool) -> None:
    tower, prefix = ("vision", "vision.") if vision else ("language", "")
    n_layers = model.cfg.n_vision_layers if vision else model.cfg.n_layers
    for layer in range(n_layers):
        here = f"{prefix}blocks.{layer}"
        following = f"{prefix}blocks.{layer + 1}.hook_resid_pre"
        read = [name for name in model.hooks.names if name.startswith(f"{here}.")]
        deepstack = f"deepstack.{layer}.hook_out"
        deep = not vision and deepstack in model.hooks.names
        last = layer + 1 == n_layers
        read += [following] * (not last) + [deepstack] * deep
        with watch(block_modules(model, layer, vision=vision)) as seen:
            # a run that stops at the last hook read stops before torch sees the block's output
            run = model.run(x, read=read, logits=last)
        for finding in BlockClaims(model, run, seen, layer, vision=vision).findings():
            ledger.error(tower, finding.claim, finding.error, here, finding.bound)
        if not last:
            left = precise(run[f"{here}.hook_resid_post"]).clone()
            if deep:
                image = model.config.image_token_id  # type: ignore[union-attr]
                # Qwen3-VL adds what an extra merger read, at the image tokens
                added = precise(run[deepstack]).flatten(0, -2)
                left[x.tensors["input_ids"].to(left.device) == image] += added
            claim = "resid_post = resid_pre of the next block"
            ledger.error(tower, claim, worst(precise(run[following]), left), here)


def _logits(model: MLLM, x: Inputs, ledger: Ledger) -> None:
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    run = model.run(x, read=[last, "ln_final.hook_scale", "ln_final.hook_normalized"])
    tower = model.family.language
    norm: Any = module_at(model.module, tower.final_norm)
    normalized = precise(run["ln_final.hook_normalized"])
    stream = precise(run[last])
    if isinstance(norm, nn.LayerNorm):
        stream = stream - stream.mean(-1, keepdim=True)
    scaled = normalized * precise(run["ln_final.hook_scale"])
    ledger.error(
        "language", "last resid_post / scale = ln_final", worst(scaled, stream), "ln_final"
    )
    unembed: Any = module_at(model.module, model.family.unembed)
    with torch.no_grad():
        out = affine(norm, normalized, tower.names.norm_offset)
        logits = precise(unembed(out.to(model.module.dtype)))  # type: ignore[arg-type]
    cap = getattr(getattr(model.config, tower.config), "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    assert run.logits is not None
    where = "lm_head" if cap is None else f"lm_head, softcap {cap:g}"
    error = worst(precise(run.logits), logits)
    ledger.error("language", "ln_final, then unembed, gives the logits", error, where)


def _parity(model: MLLM, x: Inputs, ledger: Ledger) -> None:
    """The clean run against plain transformers, whose attention function is put back in."""
    ours = model.run(x).logits
    text = getattr(model.config, model.family.language.config)
    # transformers' sdpa leaves Gemma 2's bound on the scores out
    kernel = "sdpa" if getattr(text, SOFTCAP, None) is None else "eager"
    try:
        model.module.set_attn_implementation(kernel)  # type: ignore[operator]
        plain = _plain(model, x)
    finally:
        attention.register(model.module, model.family)
    assert ours is not None
    error = worst(precise(ours), precise(plain))
    ledger.error("model", "the clean run is plain transformers'", error, kernel)


def _plain(model: MLLM, x: Inputs) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.module(**model.to_device(x), use_cache=False).logits
    return logits


# -- edits -----------------------------------------------------------------------------------------


def _edits(model: MLLM, x: Inputs, ledger: Ledger, tower: str) -> None:
    """Identity and real edits at every hook of the tower's middle block, and at its ends."""
    untouched = model.run(x).logits
    assert untouched is not None
    for name in _sample(model, tower):
        # the same hook is read in the run to compare with: looking inside attention changes the
        # kernel, and so the last bit
        clean = model.run(x, read=name).logits
        assert clean is not None
        ledger.error(
            tower, "reading changes nothing but the kernel", _moved(clean, untouched), name
        )
        same = model.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: value.clone())])
        ledger.error(tower, "an identity edit changes nothing", _moved(same, clean), name, bound=0)
        moved = _moved(model.run_with_hooks(x, fwd_hooks=[(name, _disturb)]), clean)
        ledger.move(tower, "a real edit moves the logits (least move)", moved, name)


def _sample(model: MLLM, tower: str) -> list[str]:
    if tower == "language":
        here = f"blocks.{model.cfg.n_layers // 2}."
        ends = ["hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized"]
    else:
        read = model.vision_reads[0].split(".")
        here = f"vision.blocks.{int(read[2]) // 2}."
        ends = ["vision.hook_embed", "adapter.hook_in", "adapter.hook_out"]
        ends += [
            name for name in model.hooks.names if name.startswith(("vision.ln_", "deepstack."))
        ]
    names = [name for name in model.hooks.names if name.startswith(here)]
    return [*ends, *names]


def _disturb(value: Tensor, hook: Any) -> Tensor:
    """An edit that no norm undoes: a factor that differs along the last axis.

    Of a mask, the first open key of each query that has another one is closed.
    """
    if value.dtype == torch.bool:
        first = value & (value.cumsum(-1) == 1) & (value.sum(-1, keepdim=True) > 1)
        return value & ~first
    wave = 1 + 0.5 * torch.sin(1 + torch.arange(value.shape[-1], device=value.device))
    return value * wave.to(value.dtype)


def _moved(logits: Tensor, clean: Tensor) -> float:
    """The largest change of a logit, relative to the largest logit."""
    return float((logits - clean).abs().max() / clean.abs().max())


def _reads(model: MLLM, x: Inputs, ledger: Ledger) -> None:
    """Which vision blocks reach the logits, asked with torch's own hooks, not with ours."""
    clean = _plain(model, x)
    for layer in range(model.cfg.n_vision_layers):
        name = f"vision.blocks.{layer}.hook_resid_post"
        block = module_at(model.module, model.family.block_path(layer, vision=True))
        # first in line: transformers collects the states by a hook of its own
        handle = block.register_forward_hook(_disturb_output, prepend=True)
        try:
            moved = _moved(_plain(model, x), clean)
        finally:
            handle.remove()
        if model.off_path(name):
            claim = "blocks off the path do not reach the logits"
            ledger.error("vision", claim, moved, name, bound=0)
        else:
            ledger.move("vision", "blocks on the path reach the logits", moved, name)


def _disturb_output(module: nn.Module, args: Any, out: Any) -> Any:
    if isinstance(out, tuple):
        return (_disturb(out[0], None), *out[1:])
    return _disturb(out, None)


# -- places ----------------------------------------------------------------------------------------


def picture(width: int = 320, height: int = 240) -> Image.Image:
    """Noise in squares of 8 pixels, so that it survives being resized."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1))


def _boxes(model: MLLM, noise: Image.Image, prompt: str, ledger: Ledger) -> None:
    """Repaint the middle of a token's box: of the tokens of its view, it must change most."""
    before, grid = _entries(model, noise, prompt)
    for view in np.unique(grid.view):
        members = np.flatnonzero(grid.view == view)
        for token in members[:: max(1, len(members) // N_TOKENS)]:
            after, _ = _entries(model, _repainted(noise, grid.box[token]), prompt)
            change = (after - before).norm(dim=-1).cpu().numpy()[members]
            others = np.delete(change, np.flatnonzero(members == token))
            own = change[members == token][0]
            ratio = float(others.max() / own) if own > 0 else float("inf")
            where = f"token {token} of {len(grid.view)}, box {np.round(grid.box[token]).tolist()}"
            ledger.error("adapter", BOX, ratio, where, bound=0.99)


def _entries(model: MLLM, image: Image.Image, prompt: str) -> tuple[Tensor, Any]:
    """What enters the language model at each image token, if no patch sees another one."""
    x = model.prepare(image, prompt)
    silent = [
        (name, lambda z, hook: torch.zeros_like(z))
        for name in model.hooks.expand("vision.blocks.*.attn.hook_z")
        if not model.off_path(name)
    ]
    entry = "blocks.0.hook_resid_pre"
    run = execute(model, x, functions=silent, read=[entry], logits=False)
    rows, positions = (torch.as_tensor(at) for at in (x.grid.row, x.grid.position))
    return precise(run[entry])[rows, positions], x.grid


def _repainted(image: Image.Image, box: np.ndarray) -> Image.Image:
    """The picture with the middle of a box inverted: its edges belong to the neighbours, too."""
    pixels = np.array(image)
    left, top, right, bottom = box
    dx, dy = (right - left) / 4, (bottom - top) / 4
    x0, x1 = int(np.floor(left + dx)), int(np.ceil(right - dx))
    y0, y1 = int(np.floor(top + dy)), int(np.ceil(bottom - dy))
    part = pixels[max(y0, 0) : y1, max(x0, 0) : x1]
    part[:] = 255 - part
    return Image.fromarray(pixels)
