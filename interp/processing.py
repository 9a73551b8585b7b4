"""Finding a model's processor, also where transformers would want a video decoder for it.

A processor turns pictures and a prompt into tensors. Those of Qwen-VL, InternVL, LLaVA-OneVision
and SmolVLM hold a third part beside the image processor and the tokenizer: a video processor,
which cannot even be made without torchvision. Pictures need it in no way. So where torchvision is
missing (or the folder has no settings for videos), `read_processor` loads the very same class
without that part, by `stills`: it reads the same files, gives the same tensors for pictures, and
says what is missing when it is handed a video.

    processor = read_processor("Qwen/Qwen2.5-VL-7B-Instruct", config)
    processor(images=[picture], text="<|image_pad|> what is it?", return_tensors="pt")
"""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

from transformers import AutoProcessor, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.processing_auto import (
    PROCESSOR_MAPPING_NAMES,
    processor_class_from_name,
)

from interp.errors import MissingLibrary


class NoVideos:
    """Stands where the video processor would be: has its settings, refuses its work."""

    #: SmolVLM's chat template asks for these before it knows whether there is a video
    num_frames = None
    fps = None

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a video."""
        raise MissingLibrary(
            "this processor was loaded without its video part, for want of torchvision or of the "
            "part's settings; give it pictures, or install torchvision and load it again"
        )


@cache
def stills(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class `kind` without its video processor: for pictures alone.

    It is made, saved and loaded as `kind` is, and its files are the same but for the part left out.

    Usage: `stills(Qwen2VLProcessor)(image_processor, tokenizer)`, or
    `stills(Qwen2VLProcessor).from_pretrained(folder)`.
    """

    class Stills(kind):
        video_processor = NoVideos()

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in super().get_attributes() if part != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: Any, **kwargs: Any) -> Any:
            # SmolVLM's constructor insists on the argument
            return super().from_args_and_dict(args, processor_dict, video_processor=None, **kwargs)

    Stills.__name__ = Stills.__qualname__ = kind.__name__  # the name that is saved
    return Stills


def read_processor(where: str, config: Any, **hub: Any) -> Any:
    """The processor of the model at `where`.

    Args:
        where: a folder or a hub id.
        config: the model's configuration, which decides where no file names a processor class.
        hub: `revision`, `trust_remote_code` and the like, as for `from_pretrained`.

    Raises:
        OSError: no processor files there, or only a tokenizer's.
        MissingLibrary: a library is missing that the pictures need, too.
    """
    try:
        processor = AutoProcessor.from_pretrained(where, config=config, **hub)
    except (ImportError, OSError, ValueError) as error:  # all three are said of a video part
        kind = _class_at(where, config, **hub)
        if kind is None or "video_processor" not in kind.get_attributes():
            if isinstance(error, ValueError):  # transformers' word for "tried all, found nothing"
                raise OSError(str(error)) from error
            raise
        processor = stills(kind).from_pretrained(where, **hub)
    for part in ("image_processor", "tokenizer"):
        if not hasattr(processor, part):
            raise OSError(f"there is only a {type(processor).__name__}, which has no {part}")
    return processor


def _class_at(where: str, config: Any, **hub: Any) -> Any:
    """The processor class that the files at `where` name, or the configuration's."""
    for read in (ProcessorMixin.get_processor_dict, ImageProcessingMixin.get_image_processor_dict):
        settings, _ = read(where, **hub)
        if name := settings.get("processor_class"):
            return processor_class_from_name(name)
    return processor_class_from_name(PROCESSOR_MAPPING_NAMES.get(config.model_type, ""))
