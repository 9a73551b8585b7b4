"""Putting the model back as it was, once a job has had it.

What a job did on purpose must not be met by the next. Put back are: which parameters want a
gradient, and the gradients; training mode; the attention implementation and the adapter; forward
and backward hooks that the job left on modules; torch's switches for gradients and for the default
dtype; and nnsight's memory of source code, in which a script that was edited since would otherwise
be run as it was.

Weights are not copied, for want of room. They are compared instead, by identity, by torch's own
count of changes, and by a sum of their bits (which an edit through `.data` does not escape); where
one differs, `put_back` says so, and the server starts another worker. What cannot be seen is a job
that patches functions of torch or transformers.
"""

from __future__ import annotations

import gc
import linecache
from collections.abc import Iterator
from typing import Any

import torch
from nnsight.tracing import globals as sources
from nnsight.tracing import tracer as tracing
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers installs hooks at first use and notes that it has: removing them would break it
LIBRARIES = ("transformers", "accelerate", "torch", "nnsight")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Pristine:
    """Remembers how a model was when it was loaded.

    Args:
        model: nnsight's wrapper around it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._module: nn.Module = model._module
        self._env = model._remoteable_get_env()
        self._wants = {n: p.requires_grad for n, p in self._module.named_parameters()}
        self._training = {n: m.training for n, m in self._module.named_modules()}
        self._hooks = {id(hooks): set(hooks) for hooks in self._all_hooks()}
        self._dtype = torch.get_default_dtype()
        self._lines = set(linecache.cache)
        self._prints = self._fingerprints()
        gc.collect()
        gc.freeze()  # the libraries' objects stay: looking through them takes 0.15 s each time

    def put_back(self) -> bool:
        """Undo what can be undone; whether the weights or the tree differ from what was loaded."""
        torch.set_grad_enabled(True)
        torch.set_default_dtype(self._dtype)
        tracing._local.depth = 0  # a job that was broken off may not have left its traces
        tracing._saves().clear()
        sources.SOURCES.clear()
        sources.BLOCKS.clear()
        for name in set(linecache.cache) - self._lines:
            del linecache.cache[name]
        for hooks in self._all_hooks():
            known = self._hooks.get(id(hooks), set())
            for number in [n for n, hook in hooks.items() if n not in known and not _ours(hook)]:
                del hooks[number]
        for name, parameter in self._module.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(self._wants.get(name, True))
        for name, module in self._module.named_modules():
            module.training = self._training.get(name, False)
        self._model._remoteable_set_env(self._env)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._model._module is not self._module or self._fingerprints() != self._prints

    def _all_hooks(self) -> Iterator[dict[int, Any]]:
        for module in self._module.modules():
            for kind in HOOKS:
                yield getattr(module, kind)

    def _fingerprints(self) -> dict[str, tuple[Any, ...]]:
        return {
            name: _fingerprint(t) for name, t in self._module.state_dict(keep_vars=True).items()
        }


def _ours(hook: Any) -> bool:
    """Whether a hook is a library's, not a job's."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0] in LIBRARIES


def _fingerprint(tensor: torch.Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().reshape(-1)
    bits = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    if bits.dtype != torch.bool:
        bits = bits.view(BITS[bits.element_size()])
    return id(tensor), tensor.data_ptr(), tensor._version, tuple(tensor.shape), int(bits.sum())
