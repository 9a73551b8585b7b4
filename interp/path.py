"""Which way information takes from the picture to the logits, as the configuration decides it.

Many towers have parts that lead nowhere: LLaVA reads the vision tower two blocks before its end,
and an edit behind that does nothing. `model.path()` tells, in words and as data.

>>> print(Path(("vision.blocks.1.hook_resid_post",), False, (), (2,)))
the adapter reads vision.blocks.1.hook_resid_post, before the tower's final norm
off the path: vision blocks 2
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Path:
    """What lies between picture and logits.

    Attributes:
        adapter_reads: the vision stages that the adapter reads; several are concatenated.
        through_norm: whether it reads the last of them through the tower's final norm.
        deepstack: (vision stage, hook of its merger, the language stage it is added behind).
        off_path: vision blocks that nothing on the way to the logits reads.
    """

    adapter_reads: tuple[str, ...]
    through_norm: bool
    deepstack: tuple[tuple[str, str, str], ...]
    off_path: tuple[int, ...]

    def __str__(self) -> str:
        norm = "through" if self.through_norm else "before"
        lines = [
            f"the adapter reads {' and '.join(self.adapter_reads)}, {norm} the tower's final norm"
        ]
        lines += [
            f"{hook} reads {vision}, and is added to the image tokens behind {language}"
            for vision, hook, language in self.deepstack
        ]
        if self.off_path:
            lines.append(f"off the path: vision blocks {', '.join(map(str, self.off_path))}")
        return "\n".join(lines)

    __repr__ = __str__
