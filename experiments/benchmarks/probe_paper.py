"""What a layerwise probe of LLaVA-1.5-7B on ADE20K takes, worked out from sizes alone.

Nothing here was measured: the sizes are the model's and the set's, the rates are assumed and
stated. Only matrix products are counted, which is where the time goes.
"""

from __future__ import annotations

from dataclasses import dataclass

from interp.probes.scores import Scores
from interp.probes.store import bytes_needed
from interp.studies.plan import amount

N_FIT, N_TEST, CLASSES = 20_210, 2_000, 150
TOKENS, POSITIONS = 576, 620  # image tokens of a picture, and with its words
D, D_FF, LAYERS = 4096, 11_008, 32
D_VISION, D_FF_VISION, LAYERS_VISION = 1024, 4096, 24


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second: products in bfloat16 at some share of its peak, in float32."""

    name: str
    half: float
    single: float


RATES = (Rates("A100", 0.4 * 312e12, 0.8 * 19.5e12), Rates("H100", 0.4 * 989e12, 0.8 * 67e12))


def widths() -> dict[str, int]:
    """Stage -> width: 25 of the tower, 2 at the adapter, 32 of the language model."""
    tower = {f"vision {i}": D_VISION for i in range(LAYERS_VISION + 1)}
    blocks = {f"blocks.{i}": D for i in range(LAYERS)}
    return {**tower, "adapter in": D_VISION, "adapter out": D, **blocks}


def forward() -> float:
    """Products of a picture's forward pass, twice one a weight and token, and attention."""
    tower = LAYERS_VISION * (4 * D_VISION**2 + 2 * D_VISION * D_FF_VISION)
    seen = TOKENS + 1
    tower_flops = 2 * seen * tower + 4 * LAYERS_VISION * seen**2 * D_VISION
    adapter = 2 * TOKENS * (D_VISION * D + D * D)
    language = LAYERS * (4 * D**2 + 3 * D * D_FF)
    return float(tower_flops + adapter + 2 * POSITIONS * language + 4 * LAYERS * POSITIONS**2 * D)


def statistics() -> float:
    """Products of a picture's sums: X'X and X'Y at every stage."""
    return float(sum(2 * TOKENS * (d * d + d * CLASSES) for d in widths().values()))


def paper_estimate() -> str:
    """The arithmetic, in words."""
    stages, n_tokens = widths(), N_FIT * TOKENS
    one = 8 * sum(d * d + d * CLASSES for d in stages.values())
    scores = Scores(list(stages), [str(k) for k in range(CLASSES)], pixels=True, majority=0)
    kept = bytes_needed(n_tokens, stages)
    lines = [
        f"LLaVA-1.5-7B on ADE20K, an estimate: {N_FIT:,} + {N_TEST:,} pictures of {TOKENS} tokens, "
        f"{n_tokens / 1e6:.1f} million tokens at {len(stages)} stages",
        f"  kept in bfloat16 they would take {amount(kept['disk'])}, so they are not kept",
        f"  statistics {amount(one)} (float64, for one shard; as much again for a batch, up to "
        f"eight times in main memory), scores {amount(scores.nbytes)}",
        f"  a picture: {forward() / 1e12:.1f} TFLOP forward, {statistics() / 1e12:.2f} TFLOP of "
        "sums in float32",
    ]
    for rates in RATES:
        run = (N_FIT + N_TEST) * forward() / rates.half
        sums = N_FIT * statistics() / rates.single
        lines.append(
            f"  ridge on one {rates.name} (assumed {rates.half / 1e12:.0f} TFLOP/s in bfloat16, "
            f"{rates.single / 1e12:.0f} in float32): {run / 60:.0f} min forward, "
            f"{sums / 60:.0f} min of sums; logistic, 4 more passes: "
            f"{4 * N_FIT * forward() / rates.half / 60:.0f} min more"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(paper_estimate())
