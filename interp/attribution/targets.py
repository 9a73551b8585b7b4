"""What an attribution explains: one number an image, read from a run.

A target is asked twice. Before anything runs, `on(model, x)` binds it to a batch and gives a
`Score`: at which hook it reads, at which positions (its *queries*), and how to get the numbers from
a `Run`. Afterwards every method calls that score on clean and edited runs, and gradients flow back
through it.

| target | one number an image |
|---|---|
| `ProbeMargin` | mean over chosen tokens of the probe's margin, true class minus the confused one |
| `AnswerLogit` | logit of the answer's first token, by itself or minus that of another word |
| `Custom` | whatever a function makes of the run; a plain function is wrapped in this |

Two of these are linear in the residual stream (the answer's logit once the final norm's scale is
frozen), and say so by `Score.linear`: only those can be split exactly (`method="direct"`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.execution import Run
from interp.families.base import module_at, weight_of
from interp.inputs import Inputs
from interp.model import MLLM
from interp.probes import ProbeBank

SCALE = "ln_final.hook_scale"


@dataclass(frozen=True, eq=False)
class Linear:
    """A score as a linear function of the stream at its queries.

    `score = sum over the row's queries of (state . direction) + constant`.

    Attributes:
        direction: `[n_queries, d_model]` float64.
        constant: `[n_rows]` float64.
    """

    direction: Tensor
    constant: Tensor


@dataclass(frozen=True, eq=False)
class Score:
    """A target on one batch.

    Attributes:
        name: for tables.
        end: the hook it reads, or "logits".
        of: run -> `[n_rows]` float64; NaN for a row about which it says nothing. Differentiable.
        row, position: `[n_queries]` the positions it looks at; None if it does not say.
        linear: run -> `Linear`, where it is one.
        extra: hooks that `linear` needs to be read.
    """

    name: str
    end: str
    of: Callable[[Run], Tensor]
    row: Tensor | None = None
    position: Tensor | None = None
    linear: Callable[[Run], Linear] | None = None
    extra: tuple[str, ...] = ()


class Target:
    """Base of targets."""

    def on(self, model: MLLM, x: Inputs) -> Score:
        """This target on a batch."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ProbeMargin(Target):
    """Mean margin of a frozen probe over chosen tokens of each image.

    Attributes:
        bank: the probes.
        end: the stage that is read, "blocks.{l}.hook_resid_post".
        tokens: `[n_tokens]` bool over the batch's image tokens, those that count.
        true: `[n_tokens]` class that the margin is for.
        confused: `[n_tokens]` class that it is against.
    """

    bank: ProbeBank
    end: str
    tokens: np.ndarray
    true: np.ndarray
    confused: np.ndarray

    def on(self, model: MLLM, x: Inputs) -> Score:
        """This target on a batch."""
        for name in ("tokens", "true", "confused"):
            if getattr(self, name).shape != (len(x.grid),):
                raise ValueError(
                    f"{name} {list(getattr(self, name).shape)} for a batch of {len(x.grid)} image "
                    "tokens: one each, in grid order, as x.grid.labels gives them"
                )
        at = np.flatnonzero(self.tokens)
        row, position = torch.as_tensor(x.grid.row[at]), torch.as_tensor(x.grid.position[at])
        classes = [torch.as_tensor(one[at]).long() for one in (self.true, self.confused)]
        bias = self.bank.bias(self.end, *classes).cpu().double()
        # a row a class that occurs, not a direction a token: this is what travels to a server
        used, number = torch.unique(torch.stack(classes), return_inverse=True)
        weight_of_class = self.bank.weight(self.end).cpu()[used]
        true, confused = number
        made: list[Tensor] = []

        def direction() -> Tensor:
            if not made:
                made.append((weight_of_class[true] - weight_of_class[confused]).double())
            return made[0]

        n = torch.bincount(row, minlength=len(x))
        weight = 1.0 / n.clamp(min=1)[row].double()
        nothing, end, n_rows = n == 0, self.end, len(x)  # so that the probes do not travel along

        def of(run: Run) -> Tensor:
            state = run[end][row, position].cpu().double()
            margin = ((state * direction()).sum(-1) + bias) * weight
            return _by_row(margin, row, n_rows).masked_fill(nothing, torch.nan)

        def linear(run: Run) -> Linear:
            return Linear(direction() * weight[:, None], _by_row(bias * weight, row, n_rows))

        return Score(f"probe margin at {self.end}", self.end, of, row, position, linear)


@dataclass(frozen=True)
class AnswerLogit(Target):
    """Logit of the answer's first token, at the last position of each row.

    Attributes:
        answer: the word (its first token counts, with the space before it if the tokenizer has
            one there), or a token's id.
        against: another, whose logit is subtracted.
    """

    answer: str | int
    against: str | int | None = None
    end: str = field(default="logits", init=False)

    def on(self, model: MLLM, x: Inputs) -> Score:
        """This target on a batch."""
        position = torch.as_tensor(x.is_last.argmax(1))
        n_rows = len(x)
        row = torch.arange(n_rows)
        token = _token(model, self.answer)
        against = None if self.against is None else _token(model, self.against)
        if token == against:
            raise ValueError(
                f"{self.answer!r} against {self.against!r}: both begin with token {token}, so the "
                "difference is 0"
            )

        def of(run: Run) -> Tensor:
            assert run.logits is not None
            logits = run.logits[row, position].cpu().double()
            return logits[:, token] - (0.0 if against is None else logits[:, against])

        def linear(run: Run) -> Linear:
            unembed = module_at(model.module, model.family.unembed)
            weight = weight_of(unembed).detach()
            direction = weight[token].cpu().double()  # of the whole matrix that would be gigabytes
            if against is not None:
                direction = direction - weight[against].cpu().double()
            norm = module_at(model.module, str(model.family.language.final_norm))
            offset = model.family.language.names.norm_offset
            scale = run[SCALE][row, position].cpu().double()
            through = (weight_of(norm).detach().cpu().double() + offset) * direction
            bias = getattr(unembed, "bias", None)
            constant = 0.0
            if bias is not None:
                told = bias.detach()
                constant = float(told[token]) - (0.0 if against is None else float(told[against]))
            return Linear(through / scale, torch.full((n_rows,), constant, dtype=torch.float64))

        config: Any = model.config
        capped = getattr(config.get_text_config(), "final_logit_softcapping", None)
        name = f"logit of {self.answer!r}"
        if against is not None:
            name += f" minus {self.against!r}"
        return Score(name, "logits", of, row, position, None if capped else linear, extra=(SCALE,))


@dataclass(frozen=True, eq=False)
class Custom(Target):
    """Any function of a run.

    Attributes:
        fn: run -> `[n_rows]`; made of torch operations on `run[end]` or `run.logits`, if gradients
            are wanted.
        end: the hook that it reads, or "logits".
    """

    fn: Callable[[Run], Tensor]
    end: str

    def on(self, model: MLLM, x: Inputs) -> Score:
        """This target on a batch."""
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        fn, n_rows = self.fn, len(x)

        def of(run: Run) -> Tensor:
            made = fn(run)
            if not isinstance(made, Tensor) or made.shape != (n_rows,):
                shown = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise ValueError(
                    f"target {name}: {shown} for a batch of {n_rows} rows; one number a row, "
                    f"[{n_rows}], as a tensor"
                )
            return made.cpu().double()

        return Score(name, self.end, of)


def _by_row(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    return values.new_zeros(n_rows).index_add(0, row, values)


def _token(model: MLLM, word: str | int) -> int:
    """The id of a word's first token that is no mere space."""
    if isinstance(word, bool) or not isinstance(word, (str, int, np.integer)):
        raise TypeError(f"{word!r} is neither a word nor a token's id")
    if not isinstance(word, str):
        n = model.cfg.d_vocab
        if not 0 <= word < n:
            raise ValueError(f"no token {word}: the vocabulary has 0..{n - 1}")
        return int(word)
    tokenizer = model.tokenizer
    for text in (f" {word}", word):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        told = [i for i in ids if tokenizer.decode([i]).strip()]
        if told and told[0] != tokenizer.unk_token_id:
            return int(told[0])
    raise ValueError(f"the tokenizer has no token for {word!r}; give a token's id")
