"""`experiments/llava_ade20k.py` on the bundled model and drawn pictures in ADE20K's layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from interp.runs import RunFolder
from tests.datasets import drawn
from tests.experiments.test_scripts_c import script

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> str:
    import typer

    app = typer.Typer()
    app.command()(script("llava_ade20k").main)
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_probes_then_findings(tmp_path):
    root, out = drawn.ade20k(tmp_path, size=(120, 96)).root, tmp_path / "out"
    printed = run(
        str(root), "--out", str(out), "--model", "tiny", "--dtype", "float32", "--batch-size", "2",
        "--n-probe", "5", "--n-test", "5",
    )  # fmt: skip
    assert "5 fitted on, 5 scored" in printed
    assert "Recovery in" in printed
    probe, study = (RunFolder.open(out / name) for name in ("probe", "study"))
    for folder in (probe, study):
        folder.verify()
        assert folder.has("report.html")
        assert len(folder.read_json("summary.json")["classes"]) == 150
    kinds = set(probe.read_table("stages")["kind"])
    assert {"vision", "adapter", "llm", "random_features", "shuffled_labels"} <= kinds
    assert set(study.read_json("summary.json")["findings"]) == {
        "drop_off", "recovery", "knockout", "heads", "bidirectional"
    }  # fmt: skip


def test_a_dry_run_says_what_it_takes_and_writes_nothing(tmp_path):
    root, out = drawn.ade20k(tmp_path).root, tmp_path / "out"
    printed = run(
        str(root), "--out", str(out), "--model", "tiny", "--dtype", "float32", "--dry-run"
    )
    assert "150 classes" in printed
    assert not out.exists()


def test_two_processes(tmp_path):
    root, out = drawn.ade20k(tmp_path).root, tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "experiments" / "llava_ade20k.py"), str(root), "--out", str(out),
        "--model", "tiny", "--dtype", "float32", "--batch-size", "1", "--n-probe", "5",
        "--n-test", "5",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    RunFolder.open(out / "probe").verify()
    RunFolder.open(out / "study").verify()
