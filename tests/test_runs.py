"""Run folders: refusals, whole files only, hashes, and what a manifest may say."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from interp.errors import FolderInUse, RunDamaged, RunNotFound
from interp.runs import MANIFEST, PARTIAL, RunFolder
from interp.stats import Interval

ARGUMENTS = {"model": "tiny", "data": "scenes", "n": 300}


def finished(path, text="old", **arguments):
    folder = RunFolder.create(path, arguments={**ARGUMENTS, **arguments})
    folder.write_text("notes.txt", text)
    folder.finish({"seed": 3, "fingerprints": {"model": "ab", "data": "cd"}})
    return folder


def test_round_trip(tmp_path):
    folder = RunFolder.create(tmp_path / "run", arguments=ARGUMENTS)
    table = pd.DataFrame({"stage": ["a", "b"], "estimate": [0.5, np.nan]})
    folder.write_table("stages", table)
    folder.write_json("summary.json", {"drop": Interval(-0.02, -0.03, -0.01), "n": np.int64(4)})
    folder.write_bytes("pictures/test/17.png", b"\x89PNG")
    with folder.writing("probes.safetensors") as temporary:
        assert temporary.suffix == ".safetensors"
        temporary.write_bytes(b"weights")
    folder.finish({"seed": 0})

    again = RunFolder.open(tmp_path / "run")
    again.verify()
    assert again.files == [
        "pictures/test/17.png", "probes.safetensors", "summary.json", "tables/stages.parquet",
    ]  # fmt: skip
    pd.testing.assert_frame_equal(again.read_table("stages"), table)
    assert again.read_json("summary.json") == {
        "drop": {"estimate": -0.02, "low": -0.03, "high": -0.01},
        "n": 4,
    }


def test_manifest_says_what_ran_and_nothing_of_the_machine(tmp_path):
    model = tmp_path / "models" / "llava"
    folder = finished(tmp_path / "run", model=str(model), out=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    assert list(manifest)[:8] == [
        "kind", "interp", "versions", "seed", "arguments", "fingerprints", "started",
        "duration_seconds",
    ]  # fmt: skip
    assert manifest["seed"] == 3
    assert {"python", "torch", "numpy", "plotly", "scikit-learn"} <= set(manifest["versions"])
    assert manifest["files"]["notes.txt"]["bytes"] == 3
    assert manifest["arguments"]["model"].startswith("llava (path ")
    assert str(tmp_path) not in (tmp_path / "run" / MANIFEST).read_text()
    assert folder.manifest == manifest


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderInUse, match=r"thesis\.tex.*another --out, or --overwrite"):
        RunFolder.create(tmp_path, arguments=ARGUMENTS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("other", [{"model": "llava"}, {"data": "ade20k"}])
def test_a_folder_of_another_study_is_refused(tmp_path, other):
    finished(tmp_path)
    with pytest.raises(FolderInUse, match=r"study of model tiny.*not a study of"):
        RunFolder.create(tmp_path, arguments={**ARGUMENTS, **other})
    with pytest.raises(FolderInUse, match="not a circuits of"):
        RunFolder.create(tmp_path, kind="circuits", arguments=ARGUMENTS)
    assert (tmp_path / "notes.txt").read_text() == "old"
    RunFolder.open(tmp_path).verify()


def test_a_manifest_of_someone_else_is_no_run(tmp_path):
    (tmp_path / MANIFEST).write_text('{"name": "a web app"}')
    with pytest.raises(FolderInUse, match="no run of interp"):
        RunFolder.create(tmp_path, arguments=ARGUMENTS)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FolderInUse, match="is a file"):
        RunFolder.create(tmp_path / "out")


def test_overwrite_replaces_what_the_run_writes_and_no_more(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "thesis.tex").write_text("years of work")
    folder = RunFolder.create(tmp_path, arguments=ARGUMENTS, overwrite=True)
    folder.write_text("notes.txt", "the run's")
    folder.finish()
    assert (tmp_path / "notes.txt").read_text() == "the run's"
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_second_run_replaces_its_own_files_only(tmp_path):
    finished(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FolderInUse, match="n was 300, now 10: give another --out, or --overwrite"):
        RunFolder.create(tmp_path, arguments={**ARGUMENTS, "n": 10})
    folder = RunFolder.create(tmp_path, arguments=ARGUMENTS)
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert not folder.has("notes.txt")  # a page must not be drawn from the earlier run's files
    with pytest.raises(FolderInUse, match=r"mine\.txt is there"):
        folder.write_text("mine.txt", "x")
    folder.write_text("notes.txt", "new")
    folder.finish()
    assert (tmp_path / "notes.txt").read_text() == "new"
    assert (tmp_path / "mine.txt").read_text() == "mine"
    RunFolder.open(tmp_path).verify()


def test_a_run_that_wrote_nothing_holds_no_folder(tmp_path):
    RunFolder.create(tmp_path, arguments=ARGUMENTS)  # and stopped there
    other = RunFolder.create(tmp_path, "probe", arguments={"model": "another"})
    other.write_text("a.txt", "a")  # now it does
    with pytest.raises(FolderInUse, match="probe of model another"):
        RunFolder.create(tmp_path, arguments=ARGUMENTS)
    modes = {(tmp_path / name).stat().st_mode for name in ("a.txt", "manifest.partial.json")}
    assert len(modes) == 1


def test_what_the_second_run_no_longer_writes_goes_when_it_is_done(tmp_path):
    first = RunFolder.create(tmp_path, arguments=ARGUMENTS)
    first.write_text("a.txt", "a")
    first.write_text("b.txt", "b")
    first.write_text("edited.txt", "c")
    first.finish()
    (tmp_path / "edited.txt").write_text("changed by hand")
    second = RunFolder.create(tmp_path, arguments=ARGUMENTS)
    second.write_text("a.txt", "a2")
    assert (tmp_path / "b.txt").exists()
    second.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "edited.txt", MANIFEST]


def test_an_interrupted_run_can_be_started_again(tmp_path):
    RunFolder.create(tmp_path, arguments=ARGUMENTS).write_text("a.txt", "half of the run")
    with pytest.raises(RunNotFound, match="not finished"):
        RunFolder.open(tmp_path)
    with pytest.raises(FolderInUse):
        RunFolder.create(tmp_path, arguments={**ARGUMENTS, "model": "other"})
    again = RunFolder.create(tmp_path, arguments=ARGUMENTS)
    again.write_text("a.txt", "all of it")
    again.finish()
    assert not (tmp_path / PARTIAL).exists()
    RunFolder.open(tmp_path).verify()


def test_a_rerun_that_was_interrupted_is_seen(tmp_path):
    finished(tmp_path)
    RunFolder.create(tmp_path, arguments=ARGUMENTS).write_text("notes.txt", "new")
    with pytest.raises(RunDamaged, match=r"not finished; notes\.txt is not the file"):
        RunFolder.open(tmp_path).verify()


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    folder = RunFolder.create(tmp_path, arguments=ARGUMENTS)
    folder.write_text("probes.bin", "whole")

    def write_half():
        with folder.writing("probes.bin") as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert (tmp_path / "probes.bin").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == [PARTIAL, "probes.bin"]
    folder.finish()
    folder.verify()


def test_verify_names_what_differs(tmp_path):
    folder = finished(tmp_path)
    folder.verify()
    (tmp_path / "notes.txt").write_text("odl")
    with pytest.raises(RunDamaged, match=r"notes\.txt is not the file that was written"):
        folder.verify()
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(RunDamaged, match=r"notes\.txt is missing"):
        folder.verify()


def test_a_file_written_after_the_end_keeps_the_manifest_true(tmp_path):
    finished(tmp_path)
    folder = RunFolder.open(tmp_path)
    folder.write_text("notes.txt", "drawn again")
    RunFolder.open(tmp_path).verify()


@pytest.mark.parametrize("number", [float("nan"), np.float32("inf")])
def test_nan_is_refused_by_key_path(tmp_path, number):
    folder = RunFolder.create(tmp_path, arguments=ARGUMENTS)
    data = {"findings": {"heads": [{"low": 0.1}, {"low": number}]}}
    with pytest.raises(ValueError, match=r"summary\.json\.findings\.heads\[1\]\.low is (nan|inf)"):
        folder.write_json("summary.json", data)
    assert not (tmp_path / "summary.json").exists()


def test_other_bad_input(tmp_path):
    folder = RunFolder.create(tmp_path, arguments=ARGUMENTS)
    with pytest.raises(TypeError, match=r"a\.json\.x is a object"):
        folder.write_json("a.json", {"x": object()})
    for name in ("../a", "/a", "", MANIFEST):
        with pytest.raises(ValueError, match="inside its folder"):
            folder.write_text(name, "")
    with pytest.raises(ValueError, match=r"reset_index\(\)"):
        folder.write_table("t", pd.DataFrame({"a": [1]}, index=["x"]))
    with pytest.raises(ValueError, match="files"):
        folder.finish({"files": {}})
    folder.write_table("stages", pd.DataFrame({"a": [1]}))
    with pytest.raises(RunNotFound, match=r"no tables/stage\.parquet did you mean"):
        folder.read_table("stage")
    with pytest.raises(RunNotFound, match="no such folder"):
        RunFolder.open(tmp_path / "nothing")
