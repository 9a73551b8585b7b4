"""interp: mechanistic interpretability for multimodal LLMs.

    from interp import MLLM, Knockout, Unmask
    from interp.datasets import scenes

Hook names say where, edits say what, a run does it, a probe reads it, a study decides. The public
names below are loaded when first used, so `import interp` (and the datasets, which need neither
transformers nor nnsight) stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.edges import EdgeSet
    from interp.edits import Ablate, EditMask, Knockout, Patch, Scale, Steer, Unmask, window
    from interp.errors import EditHadNoEffect
    from interp.generation import answer_edges
    from interp.model import MLLM
    from interp.probes import ProbeBank
    from interp.tokens import TokenGrid

__version__ = "0.1.0"

_HOMES = {
    "Ablate": "interp.edits",
    "EdgeSet": "interp.edges",
    "EditHadNoEffect": "interp.errors",
    "EditMask": "interp.edits",
    "Knockout": "interp.edits",
    "MLLM": "interp.model",
    "Patch": "interp.edits",
    "ProbeBank": "interp.probes",
    "Scale": "interp.edits",
    "Steer": "interp.edits",
    "TokenGrid": "interp.tokens",
    "Unmask": "interp.edits",
    "answer_edges": "interp.generation",
    "window": "interp.edits",
}

__all__ = [
    "MLLM",
    "Ablate",
    "EdgeSet",
    "EditHadNoEffect",
    "EditMask",
    "Knockout",
    "Patch",
    "ProbeBank",
    "Scale",
    "Steer",
    "TokenGrid",
    "Unmask",
    "answer_edges",
    "window",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'interp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
