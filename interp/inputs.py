"""From pictures and a question to what the model takes, with the grid of its image tokens.

`prepare` (called as `model.prepare`) hands pictures and text to the model's own processor: the
prompt goes through its chat template if it has one, the placeholder is expanded to as many tokens
as the picture gives, batches are padded. What comes back is an `Inputs`: the tensors for the
forward pass, and the `TokenGrid` that says where each image token came from.

In a causal language model the image tokens precede the question, so their states do not depend on
it: one question serves a whole study.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from interp.errors import ImageError
from interp.families import Family
from interp.tokens import TokenGrid

Picture = Image.Image | np.ndarray | str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Inputs:
    """A prepared batch.

    Attributes:
        tensors: keyword arguments of the model's forward (`input_ids`, `pixel_values`, ...).
        grid: its image tokens.
        prompts: the text of each row, as the processor was given it.
    """

    tensors: dict[str, Tensor]
    grid: TokenGrid
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.tensors["input_ids"].shape[0])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in self.tensors.items())
        return f"Inputs({shapes})"

    @property
    def n_pos(self) -> int:
        """Length of the sequence, padding included."""
        return int(self.tensors["input_ids"].shape[1])

    @property
    def is_text(self) -> np.ndarray:
        """`[batch, pos]` bool: tokens of the prompt that are neither image nor padding."""
        attended = self.tensors["attention_mask"].cpu().numpy().astype(bool)
        return np.asarray(attended & ~self.grid.is_image)


def prepare(
    family: Family,
    config: Any,
    processor: Any,
    image: Picture | Sequence[Picture],
    text: str | Sequence[str],
) -> Inputs:
    """Pictures and text to `Inputs`; `model.prepare` passes the first three arguments.

    Args:
        family: the model's table.
        config: the model's configuration.
        processor: its transformers processor.
        image: a picture, or a list of pictures: one batch row each.
        text: the question; one for all pictures, or one a picture. A text that already holds the
            image placeholder is taken as the whole prompt; any other goes through the chat
            template.

    Raises:
        ImageError: something that is no picture.
        ValueError: as many texts as pictures are needed, or exactly one.
    """
    pictures = [_picture(one) for one in _listed(image)]
    texts = [text] * len(pictures) if isinstance(text, str) else list(text)
    if len(texts) != len(pictures) or not pictures:
        raise ValueError(
            f"{len(pictures)} pictures and {len(texts)} texts; give one text for all pictures, or "
            "one for each"
        )
    prompts = tuple(_prompt(processor, one) for one in texts)
    batch = processor(images=pictures, text=list(prompts), return_tensors="pt", padding=True)
    tensors = {name: batch[name] for name in family.inputs if name in batch}
    sizes = [picture.size for picture in pictures]
    grid = family.grid(config, processor, tensors["input_ids"].numpy(), sizes)
    return Inputs(tensors, grid, prompts)


def _listed(image: Picture | Sequence[Picture]) -> list[Picture]:
    if isinstance(image, np.ndarray) and image.ndim == 4:
        return list(image)
    if isinstance(image, (Image.Image, np.ndarray, str, os.PathLike)):
        return [image]
    try:
        return list(image)
    except TypeError:
        return [image]  # type: ignore[list-item]  # _picture says what is wrong with it


def _picture(image: Picture) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if not path.is_file():
            raise ImageError(f"no picture at {str(path)!r}")
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            raise ImageError(f"{str(path)!r} is no picture that Pillow can read") from None
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(
                f"an array of {image.dtype} {list(image.shape)} is no picture; "
                "uint8 [height, width, 3] is"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        hint = (
            "; ready-made pixel tensors are the processor's output, give it the picture"
            if isinstance(image, torch.Tensor)
            else ""
        )
        raise ImageError(
            f"{type(image).__name__} is no picture; a PIL image, a uint8 array "
            f"[height, width, 3] or a path would do{hint}"
        )
    return image.convert("RGB")


def _prompt(processor: Any, text: str) -> str:
    placeholder = processor.image_token
    if placeholder in text:
        return text
    if getattr(processor, "chat_template", None) is None:
        return f"{placeholder}\n{text}"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    message = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(message, add_generation_prompt=True))
