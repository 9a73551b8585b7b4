"""From pictures and a question to what the model takes, with the grids of its image tokens.

`prepare` (called as `model.prepare`) hands pictures and text to the model's own processor: the
prompt goes through its chat template if it has one, each placeholder is expanded to as many tokens
as its picture gives, batches are padded on the tokenizer's side. What comes back is an `Inputs`:
the tensors for the forward pass, and the grids that say where each image token came from.

A text-only model, which only a server hosts, is given `None` for the picture.

`from_tensors` (called as `model.inputs(**tensors)`) makes the same of tensors that are ready.

In a causal language model the image tokens precede the question, so their states do not depend on
it: one question serves a whole study.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from interp.errors import ImageError, PositionError
from interp.families import Family
from interp.families.text import encode
from interp.grids import build_grids
from interp.prompt import Prompt
from interp.tokens import TokenGrid

Picture = Image.Image | np.ndarray | str | os.PathLike[str]
#: one, one a row, or those of each row
Pictures = Picture | Sequence[Picture] | Sequence[Sequence[Picture]]

#: inputs that transformers' own forward does without, in the way the layouts take it
OPTIONAL = ("pixel_attention_mask", "batch_num_images")


@dataclass(frozen=True, eq=False)
class Inputs(Prompt):
    """A prepared batch; places in it by name, and edges between them, are `interp.prompt`'s.

    Attributes:
        tensors: keyword arguments of the model's forward (`input_ids`, `pixel_values`, ...).
        grid: its image tokens, in the language model's sequence.
        prompts: the text of each row, as the processor was given it; empty for ready-made tensors.
        patches: the same pictures' patches, in the states of the vision tower's blocks.
        adapter: the same pictures' vectors in `adapter.hook_out`.
        bos_token: the id of the token that begins a text, if there is one.
    """

    tensors: dict[str, Tensor]
    grid: TokenGrid
    prompts: tuple[str, ...]
    patches: TokenGrid
    adapter: TokenGrid
    bos_token: int | None = None

    def __len__(self) -> int:
        return int(self.tensors["input_ids"].shape[0])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in self.tensors.items())
        return f"Inputs({shapes})"

    @property
    def shape(self) -> torch.Size:
        """(rows, positions), so that TransformerLens's tools take this for tokens."""
        return self.tensors["input_ids"].shape

    @property
    def n_pos(self) -> int:
        """Length of the sequence, padding included."""
        return int(self.tensors["input_ids"].shape[1])

    def select(self, view: str) -> Inputs:
        """The same inputs, of whose image tokens only one view a picture counts.

        Args:
            view: "base", "tiles" or "finest", see `TokenGrid.select`.
        """
        grids = {name: getattr(self, name).select(view) for name in ("grid", "patches", "adapter")}
        return replace(self, **grids)

    def until(self, n_pos: int) -> Inputs:
        """The same pictures with the prompt cut off behind position `n_pos - 1`.

        In a causal model that leaves the states before it as they were.

        Raises:
            PositionError: that would cut a picture, or is longer than the prompt.
        """
        last = int(np.flatnonzero(self.grid.is_placeholder.any(0)).max(initial=-1))
        if not last < n_pos <= self.n_pos:
            raise PositionError(
                f"until({n_pos}): the last picture ends at position {last}, and the prompt has "
                f"{self.n_pos}; {last + 1} to {self.n_pos} would do"
            )
        cut = {
            name: tensor[:, :n_pos] if tensor.shape == self.shape else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=cut, grid=replace(self.grid, n_pos=n_pos))


def prepare(
    family: Family,
    config: Any,
    processor: Any,
    image: Pictures | None,
    text: str | Sequence[str],
    **settings: Any,
) -> Inputs:
    """Pictures and text to `Inputs`; `model.prepare` passes the first three arguments.

    Args:
        family: the model's table.
        config: the model's configuration.
        processor: its transformers processor.
        image: a picture; a list of pictures, one batch row each; or a list of lists, the pictures
            of each row. None for a text-only model, whose text is taken as it is.
        text: the question; one for all rows, or one a row. A text that already holds image
            placeholders, one a picture, is taken as the whole prompt; any other goes through the
            chat template, behind its pictures.
        settings: of the image processor, for this call (`do_pan_and_scan=True`).

    Raises:
        ImageError: something that is no picture.
        NotMultimodal: a picture for a text-only model.
        ValueError: a wrong number of texts, or of placeholders in one; an unknown setting.
    """
    if not family.has_vision:
        if image is not None or settings:
            family.require_vision()
        prompts = (text,) if isinstance(text, str) else tuple(text)
        tensors = encode(getattr(processor, "tokenizer", processor), prompts)
        return _assemble(family, config, processor, tensors, None, None, prompts)
    rows = [[_picture(one) for one in row] for row in _rows(image)]
    texts = [text] * len(rows) if isinstance(text, str) else list(text)
    if len(texts) != len(rows) or not rows:
        raise ValueError(
            f"{len(rows)} pictures and {len(texts)} texts; give one text for all pictures, or "
            "one for each"
        )
    if settings:
        processor = _with_settings(processor, settings)
    prompts = tuple(_prompt(processor, one, len(row)) for one, row in zip(texts, rows, strict=True))
    batch = processor(images=rows, text=list(prompts), return_tensors="pt", padding=True)
    tensors = {name: batch[name] for name in family.takes if name in batch}
    sizes = [picture.size for row in rows for picture in row]
    return _assemble(family, config, processor, tensors, sizes, None, prompts)


def from_tensors(
    family: Family,
    config: Any,
    tensors: Mapping[str, Tensor],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    tiles: Sequence[tuple[int, int]] | None = None,
    processor: Any = None,
) -> Inputs:
    """Ready-made model inputs to the same `Inputs` that `prepare` makes.

    A missing `attention_mask` is all ones, as in transformers; a missing `mm_token_type_ids` is 1
    on image placeholders and 0 elsewhere, which is its definition where there is no video.

    Args:
        family: the model's table.
        config: the model's configuration.
        tensors: by the names of the model's forward.
        sizes: (width, height) of each original picture, in order of appearance. By default what
            `image_sizes` says, else the pixels that the model is given.
        tiles: (rows, columns) of tiles that each picture was cut into, (0, 0) if it was not; needed
            where the tensors do not say it and there is no processor.
        processor: the one that made the tensors. Without, pictures are taken to be stretched to
            what the model is given, nothing cropped or padded.

    Raises:
        ValueError: a tensor that is missing or unknown, or an arrangement that is not told.
    """
    wanted = family.takes
    if "pixel_values" in tensors:
        family.require_vision()
    if unknown := sorted(set(tensors) - set(wanted)):
        raise ValueError(
            f"{', '.join(unknown)}: no input(s) of a {family.name} model here; "
            f"they are {', '.join(wanted)}"
        )
    for name in ("input_ids", "pixel_values"):
        if name in wanted and name not in tensors:
            raise ValueError(f"no {name} among {', '.join(tensors) or 'the tensors'}")
    if processor is not None and tiles is not None:
        raise ValueError("the processor tells how pictures are cut: give it or tiles, not both")
    prompts = ("",) * len(tensors["input_ids"])
    return _assemble(family, config, processor, dict(tensors), sizes, tiles, prompts)


def _assemble(
    family: Family,
    config: Any,
    processor: Any,
    tensors: dict[str, Tensor],
    sizes: Sequence[tuple[int, int]] | None,
    tiles: Sequence[tuple[int, int]] | None,
    prompts: tuple[str, ...],
) -> Inputs:
    ids = tensors["input_ids"]
    if "attention_mask" not in tensors:
        tensors["attention_mask"] = torch.ones_like(ids)
    video = (ids == getattr(config, "video_token_id", -1)).any()
    if "mm_token_type_ids" in family.inputs and "mm_token_type_ids" not in tensors and not video:
        tensors["mm_token_type_ids"] = (ids == config.image_token_id).to(ids.dtype)
    missing = [name for name in family.inputs if name not in tensors and name not in OPTIONAL]
    if missing:
        hint = (
            " (Gemma3: 1 on image tokens, else 0; PaliGemma: 0 on the prompt, 1 on an answer)"
            if "token_type_ids" in missing
            else ""
        )
        raise ValueError(
            f"a {family.name} model computes something else without {', '.join(missing)}{hint}; "
            f"given: {', '.join(tensors)}"
        )
    # in the order of the table, whatever order they came in
    tensors = {n: tensors[n] for n in family.takes if n in tensors}
    layouts = family.layout(config, processor, tensors, sizes, tiles)
    grids = build_grids(ids.cpu().numpy(), getattr(config, "image_token_id", None), layouts)
    # the tokenizer knows better: a text model's configuration may have its class's default
    knows = getattr(processor, "tokenizer", processor) or config.get_text_config()
    bos = getattr(knows, "bos_token_id", None)
    return Inputs(tensors, grids.llm, prompts, grids.vision, grids.adapter, bos)


def _with_settings(processor: Any, settings: Mapping[str, Any]) -> Any:
    """The processor with some settings of its image part, checked, for one call."""
    known = set(type(processor.image_processor).valid_kwargs.__annotations__)
    known |= {"do_resize", "size", "do_center_crop", "crop_size", "resample", "do_pad"}
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"{type(processor.image_processor).__name__} has no setting {', '.join(unknown)}; "
            f"it has {', '.join(sorted(known))}"
        )
    made = copy.copy(processor)
    made.images_kwargs = {**getattr(processor, "images_kwargs", {}), **settings}
    return made


def _rows(image: Any) -> list[list[Picture]]:
    """The pictures of each row of the batch."""
    listed = _listed(image)
    if any(isinstance(one, (list, tuple)) for one in listed):
        rows = [list(one) if isinstance(one, (list, tuple)) else [one] for one in listed]
        if not all(rows):
            raise ImageError(f"row {[bool(row) for row in rows].index(False)} has no picture")
        return rows
    return [[one] for one in listed]


def _listed(image: Any) -> list[Any]:
    if isinstance(image, np.ndarray) and image.ndim == 4:
        return list(image)
    if isinstance(image, (Image.Image, np.ndarray, str, os.PathLike)):
        return [image]
    try:
        return list(image)
    except TypeError:
        return [image]  # _picture says what is wrong with it


def _picture(image: Picture) -> Image.Image:
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if not path.is_file():
            raise ImageError(f"no picture at {str(path)!r}")
        try:
            image = ImageOps.exif_transpose(Image.open(path))  # as a viewer shows it
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
    if image.mode.startswith(("I", "F")) or not min(image.size):
        raise ImageError(
            f"a picture of mode {image.mode!r}, {image.size[0]} x {image.size[1]} pixels: Pillow "
            "would clip its values; give 8 bits a channel, and at least one pixel"
        )
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _prompt(processor: Any, text: str, n_pictures: int) -> str:
    placeholder = processor.image_token
    found = text.count(placeholder)
    if found:
        if found != n_pictures:
            raise ValueError(
                f"a text with {found} image placeholders {placeholder!r} for {n_pictures} "
                "picture(s); one a picture, or none"
            )
        return text
    if getattr(processor, "chat_template", None) is None:
        return f"{placeholder}\n" * n_pictures + text
    content = [{"type": "image"}] * n_pictures + [{"type": "text", "text": text}]
    message = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(message, add_generation_prompt=True))
