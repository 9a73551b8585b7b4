"""A made-up run folder with every table a page can show. No model runs; the numbers are drawn."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from interp.datasets.scenes import CLASSES, COLORS, draw
from interp.report.pictures import picture_file
from interp.runs import RunFolder

LLM = [f"blocks.{layer}.hook_resid_post" for layer in range(5)]
SOURCES = ("same-region correct", "same-region wrong", "other regions", "text and BOS", "self")
N_HEADS = 6


def interval(estimate: float, width: float) -> dict[str, float]:
    return {"estimate": estimate, "low": estimate - width, "high": estimate + 1.1 * width}


def stage_rows() -> list[dict]:
    curve = [
        ("vision.hook_embed", "vision embedding", "vision", True, 0.33),
        ("vision.blocks.0.hook_resid_post", "vision 0", "vision", True, 0.58),
        ("vision.blocks.1.hook_resid_post", "vision 1", "vision", True, 0.655),
        ("vision.blocks.2.hook_resid_post", "vision 2", "vision", False, 0.64),
        ("adapter.hook_in", "adapter in", "adapter", True, 0.655),
        ("adapter.hook_out", "adapter out", "adapter", True, 0.632),
        *((s, f"LLM {i}", "llm", True, 0.7 + 0.012 * i) for i, s in enumerate(LLM)),
    ]
    curve = [(*row, order) for order, row in enumerate(curve)]
    curve += [(s, f"LLM {i}", "random_llm", True, 0.63 - 0.003 * i, 6 + i)
              for i, s in enumerate(LLM)]  # fmt: skip
    rows = []
    for metric, shift in (("accuracy", 0.0), ("token_miou", -0.12), ("pixel_miou", -0.16)):
        for stage, label, kind, on_path, value, order in curve:
            rows.append(
                {"stage": stage, "label": label, "order": order, "kind": kind, "on_path": on_path,
                 "metric": metric, **interval(value + shift, 0.012)}
            )  # fmt: skip
    return rows


def knockout_rows() -> list[dict]:
    chosen = {
        "clean": (0.37, 0), "correct -> wrong": (0.20, 6.3), "random image tokens": (0.355, 6.3),
        "random, same attention mass": (0.345, 9.1), "other regions": (0.362, 6.2),
        "wrong, same region": (0.35, 4.0), "correct, unrelated class": (0.366, 6.1),
        "no-op (cut and reopened)": (0.37, 6.3),
    }  # fmt: skip
    free = {
        "clean": (0.72, 0), "marked -> unmarked": (0.55, 1.9), "unmarked -> unmarked": (0.715, 1.9),
    }  # fmt: skip
    rows = []
    for probe_free, conditions in ((False, chosen), (True, free)):
        start = 0.62 if probe_free else 0.15
        for condition, (end, edges) in conditions.items():
            for order, stage in enumerate(LLM):
                value = end - (end - start) * 0.45**order
                rows.append(
                    {"condition": condition, "probe_free": probe_free, "layers": "all",
                     "stage": stage, "order": order, "n_tokens": 4123, "edges_per_query": edges,
                     **interval(value, 0.018)}
                )  # fmt: skip
    return rows


def group_rows() -> list[dict]:
    """Accuracy by where tokens lie, as a study writes it: without labels and kinds of stages."""
    shift = {"boundary": -0.11, "interior": 0.05, "early": 0.02, "middle": 0.0, "late": -0.01}
    curve = [r for r in stage_rows() if r["metric"] == "accuracy" and r["kind"] != "random_llm"]
    return [
        {"stage": r["stage"], "group": group, "metric": "accuracy", "n": 1000, "order": r["order"],
         **interval(r["estimate"] + by * (1 + r["order"] / 10), 0.015)}
        for r in curve
        for group, by in shift.items()
    ]  # fmt: skip


def tables(seed: int = 0) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    effects = {
        "correct -> wrong": 0.46, "random image tokens": 0.04, "random, same attention mass": 0.07,
        "other regions": 0.02, "wrong, same region": 0.05, "correct, unrelated class": 0.01,
        "no-op (cut and reopened)": 0.0,
    }  # fmt: skip
    effect_rows = [
        {"condition": c, "layers": "all", "is_control": c != "correct -> wrong",
         **interval(v, 0.03 if v else 0.0)} for c, v in effects.items()
    ]  # fmt: skip
    windows = {"0": 0.21, "1": 0.16, "2": 0.05, "3": 0.02, "4": -0.01, "0-1": 0.37, "1-2": 0.2,
               "2-3": 0.08, "3-4": 0.01}  # fmt: skip
    effect_rows += [
        {"condition": "correct -> wrong", "layers": w, "is_control": False, **interval(v, 0.03)}
        for w, v in windows.items()
    ]
    strength = rng.gamma(0.5, 0.12, (len(LLM), N_HEADS)) * (rng.random((len(LLM), N_HEADS)) - 0.15)
    total = strength.sum()
    rank = (-strength).ravel().argsort().argsort().reshape(strength.shape)
    totals, heads = [], []
    for layer, head in np.ndindex(*strength.shape):
        at = {"layer": layer, "head": head}
        value = float(strength[layer, head])
        totals.append({**at, **interval(value, 0.012), "share": value / total,
                       "rank": int(rank[layer, head])})  # fmt: skip
        parts = value * np.array([0.75, -0.1, 0.05, 0.1, 0.2])
        heads += [{**at, "source": s, **interval(float(v), 0.008), "share": float(v) / total}
                  for s, v in zip(SOURCES, parts)]  # fmt: skip
    parts = [("start", -0.4)]
    for layer in range(len(LLM)):
        parts += [(f"attention {layer}", 0.35 / (layer + 1)), (f"mlp {layer}", 0.12)]
    parts.append(("margin", sum(value for _, value in parts)))
    cut = [("top 1", 1, 0.11), ("top 2", 2, 0.19), ("top 4", 4, 0.33), ("top 8", 8, 0.41),
           ("all heads", 30, 0.46), ("4 random heads (10 draws)", 4, 0.03)]  # fmt: skip
    rows, thirds = [], []
    for row in range(10):
        x = row / 9
        rows += [
            {"row": row, "condition": c, **interval(v, 0.025)}
            for c, v in (
                ("causal", 0.58 + 0.15 * x**0.5), ("bidirectional, frozen probes", 0.66 + 0.06 * x),
                ("bidirectional, refitted probes", 0.70 + 0.05 * x), ("adapter", 0.62 + 0.02 * x),
            )
        ]  # fmt: skip
    for third, gain in (("early", 0.08), ("middle", 0.025), ("late", 0.004)):
        thirds += [
            {"third": third, "comparison": "frozen - causal", **interval(gain * 0.7 - 0.01, 0.012)},
            {"third": third, "comparison": "refitted - causal", **interval(gain, 0.012)},
        ]
    dose = []
    for order, (anchors, n, v) in enumerate(
        [
            ("0", 812, 0.2),
            ("1-2", 930, 0.43),
            ("3-5", 1003, 0.57),
            ("6-10", 960, 0.63),
            ("11+", 700, 0.67),
        ]
    ):
        dose += [
            {"anchors": anchors, "order": order, "condition": c, "n_tokens": n, **interval(w, 0.03)}
            for c, w in (("causal", v), ("bidirectional, frozen probes", 0.5 + 0.3 * v),
                         ("bidirectional, refitted probes", 0.55 + 0.26 * v))
        ]  # fmt: skip
    opened = [
        {"condition": c, "stage": stage, "order": order, **interval(v + 0.01 * order, 0.011)}
        for c, v in (("causal", 0.7), ("bidirectional, frozen probes", 0.705),
                     ("bidirectional, refitted probes", 0.72))
        for order, stage in enumerate(LLM)
    ]  # fmt: skip
    return {
        "stages": pd.DataFrame(stage_rows()),
        "groups": pd.DataFrame(group_rows()),
        "references": pd.DataFrame(
            [("majority_floor", "accuracy", 0.131), ("token_ceiling", "accuracy", 1.0),
             ("token_ceiling", "token_miou", 1.0), ("token_ceiling", "pixel_miou", 0.861)],
            columns=["name", "metric", "estimate"],
        ),
        "knockout": pd.DataFrame(knockout_rows()),
        "knockout_effect": pd.DataFrame(effect_rows),
        "heads": pd.DataFrame(heads),
        "head_totals": pd.DataFrame(totals),
        "components": pd.DataFrame([{"component": c, **interval(v, 0.03)} for c, v in parts]),
        "head_knockout": pd.DataFrame(
            [{"set": s, "n_heads": n, "measure": "share", **interval(v, 0.03)}
             for s, n, v in cut]
        ),
        "bidirectional": pd.DataFrame(opened),
        "positions": pd.DataFrame(rows),
        "thirds": pd.DataFrame(thirds),
        "dose": pd.DataFrame(dose),
        "tokens": token_table(rng),
    }  # fmt: skip


def token_table(rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for image in range(6):
        scene = draw("test", image)
        cells = scene.mask[4::8, 4::8].astype(int)
        for token, (row, col) in enumerate(np.ndindex(10, 10)):
            label = int(cells[row, col])

            def said(right: float, label: int = label) -> int:
                return label if rng.random() < right else label ^ 1

            rows.append(
                {"name": scene.name, "image": image, "token": token, "row": row, "col": col,
                 "label": 255 if token in (0, 57) else label, "adapter": said(0.63),
                 "final": said(0.8), "knockout": said(0.66), "bidirectional": said(0.87)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def summary() -> dict:
    def finding(title, unit, values, control, name, holds, text):
        told = None if control is None else {"name": name, **interval(*control)}
        return {"title": title, **interval(*values), "control": told, "holds": holds,
                "unit": unit, "text": text}  # fmt: skip

    return {
        "model": "tiny",
        "data": "scenes",
        "classes": list(CLASSES),
        "colors": [list(c) for c in COLORS],
        "reference_stage": "adapter.hook_out",
        "n_test_images": 300,
        "n_probe_images": 600,
        "findings": {
            "drop_off": finding(
                "Drop-off at the adapter", "points", (-0.023, 0.008), None, "", True,
                "Token accuracy changes by -2.3 [-3.1, -1.4] points at the adapter."),
            "recovery": finding(
                "Recovery in the language model", "points", (0.116, 0.012), (-0.004, 0.006),
                "language model with shuffled weights", True,
                "Over the language model it changes by +11.6 [+10.4, +12.9] points; with the "
                "language model's weights shuffled, by -0.4 [-1.0, +0.3]."),
            "knockout": finding(
                "Correct neighbours cause it", "share", (0.46, 0.03), (0.04, 0.03),
                "as many random edges", True,
                "Cutting what 4123 misclassified tokens read from the correct tokens of their "
                "region removes 46% [43%, 49%] of their recovery; as many random edges remove "
                "4% [1%, 7%]."),
            "heads": finding(
                "A few heads carry it", "share", (0.33, 0.03), (0.03, 0.03), "as many random heads",
                True, "Knocking out the four strongest heads removes 33% [30%, 36%] of the "
                "recovery; four random heads remove 3% [0%, 6%]."),
            "bidirectional": finding(
                "Causal attention starves early tokens", "points", (0.006, 0.012), (0.004, 0.012),
                "late third", False, "Early tokens gain +0.6 [-0.6, +1.9] points from "
                "bidirectional attention: no gain that the interval can tell from none."),
        },
        "figures": {"recovery_beyond_shuffled": interval(0.12, 0.01)},
    }  # fmt: skip


def write_folder(path, *, leave_out=(), seed: int = 0, finish: bool = True) -> RunFolder:
    """A synthetic run: every table but those left out, pictures, summary."""
    folder = RunFolder.create(path, arguments={"model": "tiny", "data": "scenes", "n_test": 300})
    folder.note(seed=seed, fingerprints={"model": "5f0c" * 16, "data": "91ab" * 16})
    for name, table in tables(seed).items():
        if name not in leave_out:
            folder.write_table(name, table)
    for image in range(6):
        scene, buffer = draw("test", image), io.BytesIO()
        scene.image.save(buffer, "PNG")
        folder.write_bytes(picture_file(scene.name), buffer.getvalue())
    folder.write_json("summary.json", summary())
    if finish:
        folder.finish()
    return folder
