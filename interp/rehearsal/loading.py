"""Loading the model as NDIF does: nnsight's own wrapper around transformers' own pipeline.

Some processors cannot be made here: those of Qwen-VL, InternVL, LLaVA-OneVision and SmolVLM have a
part for videos that needs torchvision. Their models are served nevertheless. The module is loaded
by itself, and in place of the processor stands a `Parts`, which holds what could be loaded and
refuses to process: clients prepare their inputs themselves and send tensors.
"""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import transformers
from nnsight.modeling.transformers import TransformersModel
from transformers.pipelines import check_task

log = logging.getLogger("rehearsal")

READERS = {"tokenizer": "AutoTokenizer", "image_processor": "AutoImageProcessor"}


class Parts:
    """Stands where a processor would be that cannot be loaded here."""

    def __init__(self, why: str, parts: dict[str, Any]) -> None:
        self.why = why
        self.tokenizer = parts.get("tokenizer")
        self.image_processor = parts.get("image_processor")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to process anything."""
        raise ValueError(
            "this server has no processor for its model; prepare the inputs where the script runs, "
            f"and send tensors ({self.why})"
        )


def load(settings: dict[str, Any]) -> TransformersModel:
    """The wrapped model, its weights loaded.

    Args:
        settings: `model`, `task`, `revision`, `dtype`, `device`, as on the command line.

    Raises:
        Exception: whatever transformers has to say of a model that cannot be loaded.
    """
    where, task, revision = settings["model"], settings["task"], settings["revision"]
    options = {"dtype": settings["dtype"]}
    if settings["device"]:
        options["device"] = settings["device"]
    try:
        model = TransformersModel(where, task=task, revision=revision, dispatch=True, **options)
    except (ImportError, OSError, ValueError) as error:  # all three are said of a video part
        try:
            model = _without_processor(settings, str(error))
        except Exception:
            raise error from None  # the model itself cannot be loaded: its own words are better
        log.warning("%s is served without its processor: %s", where, str(error).splitlines()[0])
    model._module.eval()
    return model


def _without_processor(settings: dict[str, Any], why: str) -> TransformersModel:
    where, hub = settings["model"], {"revision": settings["revision"] or "main"}
    _, targeted, _ = check_task(settings["task"])
    module = targeted["pt"][0].from_pretrained(where, dtype=settings["dtype"], **hub)
    if settings["device"]:
        module = module.to(settings["device"])
    parts = {}
    for part, reader in READERS.items():
        try:
            parts[part] = getattr(transformers, reader).from_pretrained(where, **hub)
        except (ImportError, OSError, ValueError) as error:
            log.warning("%s has no %s: %s", where, part, str(error).splitlines()[0])
    return TransformersModel(
        module, task=settings["task"], processor=Parts(why.splitlines()[0], parts), **parts
    )
