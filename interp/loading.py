"""Finding and loading a model: the bundled one, a hub id, a local folder, a module in memory.

Everything goes through transformers' own `from_pretrained`; nothing is executed from a model's
repository unless `trust_remote_code=True` is passed by name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from interp.errors import ModelNotFound, NotMultimodal
from interp.families import family_of

#: models that come with the package
BUNDLED = {"tiny": Path(__file__).parent / "assets" / "tiny"}


def load(
    source: str | os.PathLike[str] | nn.Module,
    *,
    processor: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """The transformers module in eval mode, and its processor (None for a bare module).

    Args: see `MLLM.load`.

    Raises:
        ModelNotFound: a path that is not there, or a folder without a model in it.
        NotMultimodal: a model without a vision tower, or of a family without a table.
    """
    if isinstance(source, nn.Module):
        family_of(source)  # refuse early
        if revision is not None:
            raise ValueError("revision= belongs to a hub id; this is a module in memory")
        module = source if dtype is None else source.to(_dtype(dtype))
    else:
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                f"{type(source).__name__} is nothing to load; give a name, a folder or a "
                "transformers module"
            )
        name = os.fspath(source)
        where = _locate(name)
        common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if revision is not None:
            common["revision"] = revision
        module = _read_module(name, where, "auto" if dtype is None else _dtype(dtype), common)
        if processor is None:
            processor = _read_processor(name, where, common)
    if device is not None:
        module = module.to(device)
    return module.eval(), processor


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {dtype!r}; for instance 'float32' or 'bfloat16'")
    return found


def _read_module(
    name: str, where: str, dtype: torch.dtype | str, common: dict[str, Any]
) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(where, **common)
        if not hasattr(config, "vision_config"):
            raise NotMultimodal(
                f"{name!r} is no multimodal LLM: its config (model_type {config.model_type!r}) "
                "has no vision_config. Load a vision-language model, for instance "
                "llava-hf/llava-1.5-7b-hf, or the bundled one with 'tiny'"
            )
        family_of(config)  # before any weights are loaded
        return AutoModelForImageTextToText.from_pretrained(where, dtype=dtype, **common)
    except OSError as error:  # transformers' word for every file that is missing or broken
        raise ModelNotFound(f"no model at {name!r}: {error}") from error


def _read_processor(name: str, where: str, common: dict[str, Any]) -> Any:
    try:
        return AutoProcessor.from_pretrained(where, **common)
    except OSError as error:
        raise ModelNotFound(
            f"the model at {name!r} comes with no processor ({error}); pass one: "
            "MLLM.load(..., processor=AutoProcessor.from_pretrained(...))"
        ) from error


def _locate(source: str) -> str:
    if source in BUNDLED:
        return str(BUNDLED[source])
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(
                f"the folder {source!r} holds no config.json, so no transformers model; "
                "save one there with save_pretrained"
            )
        return str(path)
    # "org/name" may be a hub id; anything that looks like a path is one
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") != 1 or path.exists()
    if looks_like_path:
        raise ModelNotFound(
            f"no model at {source!r}: it is no folder, no bundled model "
            f"({', '.join(sorted(BUNDLED))}) and no hub id of the form org/name"
        )
    return source
