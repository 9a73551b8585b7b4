"""Processors for pictures alone, where transformers would also want a video processor.

The processors of the Qwen-VL family, InternVL, LLaVA-OneVision and SmolVLM hold a third part that
decodes videos, and that part needs torchvision. Pictures need it in no way, so here a processor is
put together from its image processor and its tokenizer, and videos are left out.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import processor_class_from_name


@cache
def stills(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class that may be made without its video processor.

    Usage: `stills(Qwen2VLProcessor)(image_processor, tokenizer, None)`.
    """

    class Stills(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    Stills.__name__ = Stills.__qualname__ = kind.__name__
    return Stills


def read_stills(where: str, model_type: str, **common: Any) -> Any:
    """The processor of the model at `where`, without its video part.

    Args:
        where: a folder or a hub id.
        model_type: `config.model_type`, used if no file there names the processor's class.
        common: passed on to `from_pretrained`.

    Raises:
        OSError: no image processor or no tokenizer there.
    """
    settings, _ = ProcessorMixin.get_processor_dict(where, **common)
    kind = processor_class_from_name(settings.get("processor_class", "")) or _class_of(model_type)
    tokenizer = AutoTokenizer.from_pretrained(where, **common)
    images = AutoImageProcessor.from_pretrained(where, **common)
    template = settings.get("chat_template") or getattr(tokenizer, "chat_template", None)
    known = inspect.signature(kind.__init__).parameters
    parts = {"image_processor", "tokenizer", "video_processor", "chat_template"}
    rest = {k: v for k, v in settings.items() if k in known and k not in parts}
    return stills(kind)(images, tokenizer, None, chat_template=template, **rest)


def _class_of(model_type: str) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])
