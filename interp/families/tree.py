"""What a model's tree looks like, for somebody who is about to write its table.

A family's table (`interp.families.base.Family`) names a dozen places in the module tree. For a
model without one, `describe` prints the tree with everything left out that a table never names,
and says which place looks like which: lists of equal modules with attention in them are stacks of
blocks, what lies beside them with parameters in it is an embedding, a norm, an adapter or a head.
These are guesses from names and shapes. `interp check MODEL` is what proves a table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

GUIDE = (
    "A table is one file of at most 60 lines in interp/families, its entry in FAMILIES, and a line "
    "in tests/zoo.py: docs/families.md shows how, and `interp check MODEL` proves it"
)
#: words in the names of what turns vision states into image tokens
ADAPTER_WORDS = ("proj", "connector", "merger", "adapter", "aligner", "resampler")
VISION_WORDS = ("vision", "visual", "image", "vit")


def describe(model: Any) -> str:
    """The parts of a model's tree that a table names, with guesses, and how to add a table.

    Args:
        model: a transformers module; or its configuration, from which a module without weights is
            then built (nothing is downloaded, and no code from the model's repository is run).
    """
    try:
        module = model if isinstance(model, nn.Module) else _build(model)
    except Exception as error:  # whatever is wrong there, it must not hide why we were asked
        return f"Its tree cannot be shown: {str(error).splitlines()[0]}\n{GUIDE}"
    title = f"The tree of {type(module).__name__}, as far as a table names it (? = a guess):"
    return "\n".join([title, *_lines(module), GUIDE])


def _build(config: Any) -> nn.Module:
    """The model of a configuration, on the meta device: transformers' own classes only."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        module: nn.Module = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    return module


def _lines(root: nn.Module) -> list[str]:
    stacks = {path: blocks for path, blocks in root.named_modules() if _is_stack(blocks)}
    # outermost lists only: a block may hold lists of its own
    stacks = {p: b for p, b in stacks.items() if not any(p.startswith(f"{q}.") for q in stacks)}
    found: list[tuple[str, str]] = []
    for path, module in root.named_modules():
        inside = any(path.startswith(f"{stack}.") for stack in stacks)
        around = any(f"{stack}.".startswith(f"{path}.") for stack in stacks if stack != path)
        if path in stacks:
            found.append((path, _stack(path, stacks[path])))
        elif path and not inside and not around and _is_top(path, root, stacks):
            found.append((path, _single(path, module)))
    width = max((len(path) for path, _ in found), default=0)
    return [
        f"  {path:<{width}}  {text}".replace("\n", "\n" + " " * (width + 6)) for path, text in found
    ]


def _is_stack(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(any("att" in name for name, _ in block.named_children()) for block in module)
    )


def _is_top(path: str, root: nn.Module, stacks: dict[str, Any]) -> bool:
    """Whether `path` is a child of something that a stack lies in, and has parameters."""
    parent = path.rpartition(".")[0]
    beside = any(stack.startswith(f"{parent}." if parent else "") for stack in stacks)
    return beside and any(True for _ in root.get_submodule(path).parameters())


def _stack(path: str, blocks: Any) -> str:
    vision = any(word in path.lower() for word in VISION_WORDS)
    tower = "vision tower" if vision else "language model"
    kinds = " or ".join(dict.fromkeys(type(block).__name__ for block in blocks))
    head = f"{len(blocks)} x {kinds}: the {tower}'s blocks?"
    return "\n".join([head, *(_child(name, part) for name, part in blocks[0].named_children())])


def _child(name: str, part: nn.Module) -> str:
    kind = type(part).__name__
    linear = [path for path, module in part.named_modules() if _is_matrix(module)]
    if "norm" in kind.lower() or "norm" in name.lower():
        return f"{name}: {kind}, a norm"
    if "att" in name.lower():
        return f"{name}: {kind}, attention with {_listed(linear)}"
    if linear and linear != [""]:
        return f"{name}: {kind}, MLP? with {_listed(linear)}"
    return f"{name}: {kind}"


def _single(path: str, module: nn.Module) -> str:
    kind, name = type(module).__name__, path.rpartition(".")[2].lower()
    linear = [inner for inner, part in module.named_modules() if _is_matrix(part)]
    if "norm" in kind.lower():
        return f"{kind}: a norm" if "pre" in name else f"{kind}: the final norm?"
    if isinstance(module, nn.Embedding):
        return f"{kind} {module.num_embeddings} x {module.embedding_dim}: embed?"
    if "head" in name and isinstance(module, nn.Linear):
        return f"{kind} {module.in_features} -> {module.out_features}: unembed?"
    if "embed" in name:
        return f"{kind}: embed?"
    if any(word in name for word in ADAPTER_WORDS):
        return f"{kind} with {_listed(linear)}: adapter?" if linear else f"{kind}: adapter?"
    return kind


def _is_matrix(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or type(module).__name__ == "Conv1D"


def _listed(names: list[str]) -> str:
    return ", ".join(name or "itself" for name in names[:8]) or "no linear layers"
