"""Finding and loading a model: the bundled one, a hub id, a local folder, a module in memory.

Everything goes through transformers' own `from_pretrained`, so all it can do is had here by the
same words: `device_map="auto"` with `max_memory` and `offload_folder`, a `quantization_config`,
`token`, `cache_dir`. Three things are ours:

* the configuration is read before the weights: a model that this library cannot take apart is
  refused before gigabytes are loaded, and the error shows what its tree looks like;
* nothing is executed from a model's repository unless `trust_remote_code=True` is passed by name;
* weights that are quantised or spread over devices stay where and what they are: nothing here
  moves or casts them, and who asks for that is told so.

    load("llava-hf/llava-1.5-7b-hf", device_map="auto", load_in_4bit=True)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from interp.errors import MissingLibrary, ModelNotFound, NotMultimodal
from interp.families import Family, family_of, remote_hint
from interp.processing import read_processor

#: models that come with the package
BUNDLED = {"tiny": Path(__file__).parent / "assets" / "tiny"}

#: transformers' loaders by the task of a family
AUTO: dict[str, Any] = {
    "image-text-to-text": AutoModelForImageTextToText,
    "text-generation": AutoModelForCausalLM,
}

#: options that say where files come from: for the configuration, the weights and the processor
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def load(
    source: str | os.PathLike[str] | nn.Module,
    *,
    processor: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    hosted: bool = False,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """The transformers module in eval mode, and its processor (None for a bare module).

    Args: see `MLLM.load`; `hosted` lets a text-only model through, whose processor is its
    tokenizer.

    Raises:
        ModelNotFound: a path that is not there, or a folder without a model in it.
        NotMultimodal: a model without a vision tower, or of a family without a table.
        MissingLibrary: a library that this way of loading needs is not installed.
        ValueError: options that do not go together.
    """
    _check(options, device)
    if isinstance(source, nn.Module):
        family_of(source, hosted=hosted)  # refuse early
        if options:
            raise ValueError(
                f"{', '.join(options)}: for a model that is read from files; this is a module in "
                "memory"
            )
        return _move(source, device, dtype).eval(), processor
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"{type(source).__name__} is nothing to load; give a name, a folder or a "
            "transformers module"
        )
    name = os.fspath(source)
    where = _locate(name)
    hub = {key: options.pop(key) for key in HUB_OPTIONS if options.get(key) is not None}
    hub["trust_remote_code"] = trust_remote_code
    config, family = _read_config(name, where, hub, hosted)
    if processor is None:  # before the weights, which take longer
        processor = _read_processor(name, where, config, family, hub)
    module = _read_module(name, where, config, family, device, dtype, {**options, **hub})
    return module.eval(), processor


def load_hosted(
    source: str | os.PathLike[str] | nn.Module,
    *,
    weights: bool,
    processor: Any = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[nn.Module, Any, str]:
    """A model as a server has it, its processor, and the name it goes by.

    Args:
        source: a hub id, a bundled name or a folder; with `weights` also a module in memory.
        weights: load them; without, the module is on the meta device, which takes no memory.
        processor, trust_remote_code, options: as of `load`.

    Raises: as `load`.
    """
    name = source if isinstance(source, str) else getattr(source, "name_or_path", str(source))
    if weights:
        options |= {"processor": processor, "trust_remote_code": trust_remote_code}
        module, processor = load(source, hosted=True, **options)
        module.set_attn_implementation(fast_kernel(module))  # type: ignore[operator]
        return module, processor, name
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"{type(source).__name__}: a server knows models by name; give a hub id or a folder"
        )
    where = _locate(name := os.fspath(source))
    hub = {key: options.pop(key) for key in HUB_OPTIONS if options.get(key) is not None}
    hub["trust_remote_code"] = trust_remote_code
    if options:
        raise ValueError(
            f"{', '.join(options)}: the server has the weights, and loads them its way"
        )
    config, family = _read_config(name, where, hub, hosted=True)
    if processor is None:
        processor = _read_processor(name, where, config, family, hub)
    with torch.device("meta"):
        module = AUTO[family.task].from_config(config, trust_remote_code=trust_remote_code)
    return module.eval(), processor, name


def fast_kernel(module: nn.Module) -> str:
    """The fastest of transformers' own kernels that gives a model's numbers.

    Its SDPA function knows no cap on the scores, which Gemma 2 has, alone or behind a vision tower.
    """
    parts = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    return "sdpa" if all(part._supports_sdpa for part in parts) else "eager"


def _check(options: dict[str, Any], device: Any) -> None:
    if device is not None and options.get("device_map") is not None:
        raise ValueError(
            f"device={device!r} and device_map={options['device_map']!r} both say where the "
            "weights go; give one of them"
        )
    if "attn_implementation" in options:
        raise ValueError(
            "attn_implementation= has no effect here: attention goes through interp's own "
            "function, which is transformers' sdpa where nobody looks inside; leave it out"
        )


# -- a module in memory ----------------------------------------------------------------------------


def _move(module: nn.Module, device: Any, dtype: torch.dtype | str | None) -> nn.Module:
    """The module on another device or in another precision, if it can be had."""
    if device is None and dtype is None:
        return module
    if why := _immovable(module):
        asked = f"device={device!r}" if dtype is None else f"dtype={dtype!r}"
        raise ValueError(
            f"{asked}: this {type(module).__name__} is {why}, and so neither moved nor cast; "
            "leave it out, or say it where the model is first loaded"
        )
    return module.to(device=device, dtype=None if dtype is None else _dtype(dtype))


def _immovable(module: Any) -> str:
    """Why a module must not be handed to `.to`, or nothing."""
    if getattr(module, "is_quantized", False):
        return "quantised"
    places = set(getattr(module, "hf_device_map", {}).values())
    if len(places) > 1 or places & {"cpu", "disk"}:
        return "spread out by a device_map"
    return ""


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {dtype!r}; for instance 'float32' or 'bfloat16'")
    return found


# -- a model in files ------------------------------------------------------------------------------


def _read_config(name: str, where: str, hub: dict[str, Any], hosted: bool) -> tuple[Any, Family]:
    try:
        config = AutoConfig.from_pretrained(where, **hub)
    except OSError as error:  # transformers' word for every file that is missing or broken
        raise ModelNotFound(f"no model at {name!r}: {error}") from error
    except ValueError as error:  # a model_type it doesn't know, or that wants code from there
        raise NotMultimodal(f"{name!r} is no model that can be loaded here: {error}") from error
    if not (hosted or hasattr(config, "vision_config")):
        raise NotMultimodal(
            f"{name!r} is no multimodal LLM: its config (model_type {config.model_type!r}) "
            "has no vision_config. Load a vision-language model, for instance "
            "llava-hf/llava-1.5-7b-hf, or the bundled one with 'tiny'"
            f"{remote_hint(config.model_type)}"
        )
    return config, family_of(config, hosted=hosted)  # before any weights are loaded


def _read_module(
    name: str,
    where: str,
    config: Any,
    family: Family,
    device: Any,
    dtype: torch.dtype | str | None,
    options: dict[str, Any],
) -> nn.Module:
    options = _quantised(options)
    quantised = options.get("quantization_config") or getattr(config, "quantization_config", None)
    if quantised and device is not None:  # may be put somewhere only while they are made
        options["device_map"], device = {"": device}, None
    try:
        module: nn.Module = AUTO[family.task].from_pretrained(
            where, config=config, dtype="auto" if dtype is None else _dtype(dtype), **options
        )
    except OSError as error:
        raise ModelNotFound(f"no model at {name!r}: {error}") from error
    except ImportError as error:
        raise MissingLibrary(f"{name!r} cannot be loaded like this here: {error}") from error
    return module if device is None else module.to(device)


def _quantised(options: dict[str, Any]) -> dict[str, Any]:
    """The short forms `load_in_4bit=True` and `load_in_8bit=True`, spelt out."""
    options = dict(options)
    short = {
        key: options.pop(key) for key in ("load_in_4bit", "load_in_8bit") if options.get(key, 0)
    }
    if short and (len(short) > 1 or options.get("quantization_config") is not None):
        raise ValueError(
            "load_in_4bit, load_in_8bit and quantization_config exclude each other; give one"
        )
    if short:
        options["quantization_config"] = BitsAndBytesConfig(**short)
    return options


def _read_processor(name: str, where: str, config: Any, family: Family, hub: dict[str, Any]) -> Any:
    try:
        if not family.has_vision:
            return AutoTokenizer.from_pretrained(where, **hub)
        return read_processor(where, config, **hub)
    except OSError as error:
        raise ModelNotFound(
            f"the model at {name!r} comes with no processor ({error}); pass one: "
            "MLLM.load(..., processor=AutoProcessor.from_pretrained(...))"
        ) from error
    except ImportError as error:
        raise MissingLibrary(
            f"the processor of {name!r} needs a library that is missing: {error}"
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
