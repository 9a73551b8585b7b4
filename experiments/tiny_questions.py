"""The bundled model's language: its words, its prompt, and questions with their answers.

The model is trained on captions only. There are two kinds, and both say in words what a person
could write under a picture:

- *the whole picture*: "What is in the picture?" -> "sea lake forest", the largest area first;
- *a row*: "What is in row 3?" -> "sea 3 lake 4 forest 3", from left to right, how many patches of
  what.

One picture is asked many questions at once. They share its image tokens: `pack` puts the questions
one behind the other after the image, and a block mask hides each from the others, so that every
question sees `<s> here is a picture`, the image, and itself, at the very positions it would have
if it were asked alone. One forward pass then trains on all of them.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from interp.datasets.scenes import CELL, CLASSES, GRID, Scene

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = ("here", "is", "a", "picture", "what", "in", "the", "row", "answer", "?", ":")
PREFIX = "<s> here is a picture"  # five tokens before the image
N_PREFIX, N_IMAGE = 5, GRID * GRID

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    + PREFIX
    + " <image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] | trim }} {% endfor %}"
    "{% else %}"
    "answer : {% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] | trim }}{% endfor %}</s>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: any case, punctuation apart, unknown words become `<unk>`."""
    numbers = [str(k) for k in range(1, GRID + 1)]
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *numbers, *CLASSES])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\w<>/]"), behavior="isolated"),
        ]
    )
    # The prompt brings its own <s>; nothing is ever added.
    words.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )


def cell_labels(scene: Scene) -> np.ndarray:
    """[10, 10] class that covers most of each patch. For writing captions, never a target."""
    cells = scene.mask.reshape(GRID, CELL, GRID, CELL).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    return (cells[..., None] == np.arange(len(CLASSES))).sum(2).argmax(-1)


def picture_caption(scene: Scene) -> tuple[str, str]:
    """Question and answer about the whole picture: its classes, the largest first."""
    area = np.bincount(scene.mask.ravel(), minlength=len(CLASSES))
    present = [k for k in np.argsort(-area, kind="stable") if area[k]]
    return "what is in the picture ?", " ".join(CLASSES[k] for k in present)


def row_caption(cells: np.ndarray, row: int) -> tuple[str, str]:
    """Question and answer about a row of patches (0 .. 9, asked for as 1 .. 10)."""
    runs = [(CLASSES[k], len(list(run))) for k, run in groupby(cells[row])]
    return f"what is in row {row + 1} ?", " ".join(f"{name} {n}" for name, n in runs)


Pair = tuple[list[int], list[int]]  # token ids of a question with its prompt, and of the answer


def questions_of(scene: Scene, tokenizer: PreTrainedTokenizerFast) -> list[Pair]:
    """All eleven captions of a scene as token ids: the picture's first, then the ten rows'."""
    cells = cell_labels(scene)
    texts = [picture_caption(scene)] + [row_caption(cells, row) for row in range(GRID)]

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return [(ids(f"{q} answer :"), ids(f"{a} </s>")) for q, a in texts]


Packed = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, targets, position_ids, mask


def pack(batch: list[list[Pair]], narrow: list[list[int | None]] | None = None) -> Packed:
    """Put every picture's questions behind its image tokens.

    Args:
        batch: for each picture, its questions with their answers.
        narrow: for each of them, the one row of patches (0 .. 9) that the question and its answer
            may look at, or None for the whole picture, which is also the default.

    Returns:
        ids [batch, n_text] of the text after the image (0 pads), targets [batch, n_text] (-100
        where nothing is asked), position_ids [batch, 105 + n_text] and mask
        [batch, 1, 105 + n_text, 105 + n_text], true where the query (row) sees the key (column).
    """
    n_before = N_PREFIX + N_IMAGE
    n_text = max(sum(len(q) + len(a) for q, a in pairs) for pairs in batch)
    ids = np.zeros((len(batch), n_text), np.int64)
    targets = np.full((len(batch), n_text), -100, np.int64)
    positions = np.tile(np.arange(n_before + n_text), (len(batch), 1))
    block = np.full((len(batch), n_before + n_text), -1)  # -1: seen by all; padding is its own
    block[:, n_before:] = 1_000 + np.arange(n_text)
    for i, pairs in enumerate(batch):
        at = 0
        for number, (question, answer) in enumerate(pairs):
            both = question + answer
            end = at + len(both)
            ids[i, at:end] = both
            # A token is the target of the one before it: the last question word says answer[0].
            targets[i, at + len(question) - 1 : end - 1] = answer
            positions[i, n_before + at : n_before + end] = n_before + np.arange(len(both))
            block[i, n_before + at : n_before + end] = number
            at = end
    earlier = np.tri(n_before + n_text, dtype=bool)
    same = (block[:, None, :] == -1) | (block[:, None, :] == block[:, :, None])
    mask = (earlier & same)[:, None]
    for i, rows in enumerate(narrow or []):
        for number, row in enumerate(rows):
            if row is not None:
                outside = np.arange(N_IMAGE) // GRID != row
                queries = np.flatnonzero(block[i] == number)
                keys = N_PREFIX + np.flatnonzero(outside)
                mask[i, 0, queries[:, None], keys] = False
    return (
        torch.from_numpy(ids),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(mask),
    )
