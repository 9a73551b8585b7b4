"""A made-up folder of a probe run, of any depth and number of classes. No model runs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from interp.runs import RunFolder
from tests.report.synthetic import interval

CLASSES = ("sky", "sea", "sand", "rock", "grass", "ghost")
ALPHAS = (1e-4, 1e-2, 1.0)


def about(n_vision: int, n_llm: int) -> pd.DataFrame:
    """Stages with controls behind them; the last vision layer is off the path."""
    hook = "blocks.{}.hook_resid_post"
    rows = [(f"vision.{hook.format(i)}", f"vision {i}", "vision") for i in range(n_vision)]
    rows += [("adapter.hook_in", "adapter in", "adapter")]
    rows += [("adapter.hook_out", "adapter out", "adapter")]
    rows += [(hook.format(i), f"LLM {i}", "llm") for i in range(n_llm)]
    noise = [(f"random features, width {w}", f"noise {w}", "random_features") for w in (96, 128)]
    shuffled = [(f"{s}, shuffled labels", label, "shuffled_labels") for s, label, _ in rows]
    table = pd.DataFrame([*rows, *noise, *shuffled], columns=["stage", "label", "kind"])
    table["order"] = range(len(table))
    off = f"vision.{hook.format(n_vision - 1)}"
    table["on_path"] = [not stage.startswith(off) for stage in table["stage"]]
    return table


def tables(
    n_vision: int = 3, n_llm: int = 4, classes: tuple[str, ...] = CLASSES, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Every table of a probe run; the last class never occurs."""
    rng = np.random.default_rng(seed)
    stages = about(n_vision, n_llm)
    model = stages["kind"].isin(["vision", "adapter", "llm"])
    height = np.where(model, 0.5 + 0.2 * rng.random(len(stages)), 0.1)
    names = list(classes)
    k = len(names)
    true = rng.integers(1000, 9000, k)
    true[-1] = 0
    groups = {"boundary": -0.1, "interior": 0.04, "early": 0.02, "middle": 0.0, "late": -0.02}
    curve, by_group, by_class, places, confused, penalties = [], [], [], [], [], []
    for row, at in zip(stages.to_dict("records"), height, strict=True):
        stage = {"stage": row["stage"]}
        for metric, shift in (("accuracy", 0.0), ("mean_accuracy", -0.01), ("token_miou", -0.08),
                              ("pixel_miou", -0.09)):  # fmt: skip
            curve.append({**row, "metric": metric, "n": 9, **interval(at + shift, 0.01)})
        for group, shift in groups.items():
            by_group.append(
                {**row, "group": group, "metric": "accuracy", "n": 9, **interval(at + shift, 0.02)}
            )
        for unit in ("token", "pixel"):
            iou = np.where(true > 0, rng.random(k), np.nan)
            by_class += [{**stage, "unit": unit, "class": c, "true": int(n), "iou": float(v)}
                         for c, n, v in zip(names, true, iou, strict=True)]  # fmt: skip
        # On a grid of 24 x 24 places a picture of 3 x 4 tokens leaves most places empty.
        places += [{**stage, "row": 8 * r + 4, "col": 6 * c + 3, "accuracy": float(rng.random())}
                   for r, c in np.ndindex(3, 4)]  # fmt: skip
        # Of many classes, most pairs never meet.
        counts = rng.integers(1, 400, (k, k)) * (rng.random((k, k)) < 6 / k)
        i, j = np.nonzero(counts * (true > 0)[:, None])
        pairs = {"true": np.array(names)[i], "said": np.array(names)[j], "n": counts[i, j]}
        confused.append(pd.DataFrame({**stage, **pairs}))
        if row["kind"] != "shuffled_labels":
            penalties += [{**stage, "alpha": a, "error": float(0.6 + 0.1 * rng.random())}
                          for a in ALPHAS]  # fmt: skip
    facts = stages[["stage", "order", "kind"]]
    return {
        "stages": pd.DataFrame(curve),
        "groups": pd.DataFrame(by_group),
        "references": pd.DataFrame(
            [("majority_floor", "accuracy", 0.09), ("majority_floor", "token_miou", 0.01),
             ("token_ceiling", "pixel_miou", 0.87)], columns=["name", "metric", "estimate"],
        ),
        "classes": pd.DataFrame(by_class).merge(facts, on="stage"),
        "map": pd.DataFrame(places).merge(facts, on="stage"),
        "confusion": pd.concat(confused).merge(facts, on="stage"),
        "penalties": pd.DataFrame(penalties),
    }  # fmt: skip


def summary(n_llm: int = 4, classes: tuple[str, ...] = CLASSES) -> dict:
    return {
        "model": "tiny", "data": "scenes", "classes": list(classes),
        "colors": [[0, 0, 0]] * len(classes), "n_probe_images": 20210, "n_test_images": 2000,
        "n_probe_tokens": 11640960, "n_test_tokens": 1152000, "solver": "ridge",
        "reference_stage": "adapter.hook_out",
        "readout_stage": f"blocks.{n_llm - 1}.hook_resid_post", "unseen_pixels": 0.031,
        "findings": {},
        "figures": {
            "drop_off_accuracy": {"estimate": -0.03, "low": -0.04, "high": -0.02},
            "drop_off_miou": {"estimate": -0.003, "low": -0.01, "high": 0.004},
            "recovery_accuracy": {"estimate": 0.079, "low": 0.06, "high": 0.1},
        },
    }  # fmt: skip


def write_folder(path, frames: dict | None = None, told: dict | None = None) -> RunFolder:
    folder = RunFolder.create(path, "probe", {"model": "tiny", "data": "scenes"})
    for name, table in (tables() if frames is None else frames).items():
        folder.write_table(name, table.reset_index(drop=True))
    folder.write_json("summary.json", told or summary())
    return folder
