"""Stores hold what was put in, tell beforehand where it goes, and leave nothing behind."""

from __future__ import annotations

import shutil
import signal
from collections import namedtuple

import pytest
import torch

from interp.probes.source import Targets
from interp.probes.store import Disk, Memory, bytes_needed, where_features_go
from interp.probes.stream import Held
from interp.probes.streamed import fit_logistic_stream

WIDTHS = {"a": 3, "b": 5, "c": 3}


def parts(sizes=(4, 0, 7, 1), soft=False):
    g = torch.Generator().manual_seed(0)
    for m in sizes:
        z = {stage: 10 * torch.randn(m, d, generator=g) for stage, d in WIDTHS.items()}
        index = torch.randint(0, 4, (m,), generator=g)
        shares = torch.rand(m, 4, generator=g) if soft else None
        yield z, Targets(index, shares, torch.rand(m, generator=g))


def everything(source, stride=1):
    taken = list(source.chunks(stride))
    index = torch.cat([t.index for _, t in taken])
    weights = torch.cat([t.weights for _, t in taken])
    return torch.cat([z for z, _ in taken], 1), index, weights


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    if request.param == "memory":
        yield Memory(), torch.float32
    else:
        with Disk(tuple(WIDTHS), tmp_path, 1000) as disk:
            yield disk, torch.bfloat16


@pytest.mark.parametrize("stride", [1, 3])
def test_what_was_put_in_comes_out_in_order(store, stride):
    kept, dtype = store
    for z, targets in parts():
        kept.add(z, targets)
    for stages in (["a", "c"], ["b"]):
        source = kept.source(stages, 12, torch.device("cpu"))
        assert source.n_tokens == 12
        z, index, weights = everything(source, stride)
        assert z.dtype == torch.float32
        want = [torch.stack([part[s] for s in stages])[:, ::stride] for part, _ in parts()]
        assert torch.equal(z, torch.cat(want, 1).to(dtype).float())
        assert torch.equal(index, torch.cat([t.index[::stride] for _, t in parts()]))
        assert torch.equal(weights, torch.cat([t.weights[::stride] for _, t in parts()]))


def test_stages_that_are_done_leave(store):
    kept, _ = store
    for z, targets in parts():
        kept.add(z, targets)
    source = kept.source(["a", "c"], 12, torch.device("cpu"))
    both, *_ = everything(source)
    source.keep([1])
    one, *_ = everything(source)
    assert torch.equal(one, both[1:])


def test_soft_labels_are_kept(store):
    kept, _ = store
    for z, targets in parts(soft=True):
        kept.add(z, targets)
    source = kept.source(["b"], 12, torch.device("cpu"))
    shares = torch.cat([t.shares for _, t in source.chunks()])
    assert torch.equal(shares, torch.cat([t.shares for _, t in parts(soft=True)]))


def test_a_store_without_tokens_gives_none(store):
    source = store[0].source(["a"], 12, torch.device("cpu"))
    assert list(source.chunks()) == []


def test_places_are_chosen_by_the_bytes_that_stores_take(tmp_path):
    needed = bytes_needed(12, WIDTHS)
    held = Memory()
    with Disk(tuple(WIDTHS), tmp_path, needed["disk"]) as disk:
        for z, targets in parts():
            held.add(z, Targets(targets.index))
            disk.add(z, Targets(targets.index))
        in_memory = sum(x.nbytes for z in held.z for x in z.values())
        in_memory += sum(t.index.nbytes for t in held.targets)
        assert in_memory == needed["memory"]
        disk.source(list(WIDTHS)[:1], 12, torch.device("cpu"))
        disk.source(list(WIDTHS)[1:2], 12, torch.device("cpu"))
        disk.source(list(WIDTHS)[2:], 12, torch.device("cpu"))
        (folder,) = tmp_path.iterdir()
        assert sum(f.stat().st_size for f in folder.iterdir()) == needed["disk"] - 12 * 8
    assert bytes_needed(12, WIDTHS, 4)["memory"] == needed["memory"] + 12 * 4 * 4
    at = needed["memory"], needed["disk"]
    assert where_features_go(12, WIDTHS, at[0], 0) == "memory"
    assert where_features_go(12, WIDTHS, at[0] - 1, at[1]) == "disk"
    assert where_features_go(12, WIDTHS, at[0] - 1, at[1] - 1) == "stream"


def test_free_space_is_asked_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage(10**9, 10**9 - 999, 999))
    with pytest.raises(OSError, match=r"0\.0 GB are free"):
        Disk(("a",), tmp_path, 1000)
    assert not list(tmp_path.iterdir())
    with Disk(("a",), tmp_path, 999):
        assert list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_folder_goes_whatever_happens(tmp_path, error):
    try:
        with Disk(("a", "b", "c"), tmp_path, 100) as disk:
            for z, targets in parts():
                disk.add(z, targets)
            assert len(list(tmp_path.iterdir())) == 1
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing_on_disk(tmp_path, request):
    """A real interrupt of a real fit, sent while features are being kept."""
    read = []

    class Interrupted(Held):
        def read(self, parts):
            for part, tokens in super().read(parts):
                read.append(part)
                if len(read) == 7:
                    (folder,) = tmp_path.iterdir()
                    read.append(len(list(folder.iterdir())))
                    signal.raise_signal(signal.SIGINT)
                yield part, tokens

    # a shell's background jobs, and what they start, ignore the key
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    features, labels = {"a": torch.randn(100, 4)}, torch.arange(100) % 2
    stream = Interrupted(features, labels, ["x", "y"], tokens_a_part=5)
    with pytest.raises(KeyboardInterrupt):
        fit_logistic_stream(stream, budget=0, disk=10**6, folder=tmp_path)
    assert read == [0, 0, 1, 2, 3, 4, 5, 1]
    assert not list(tmp_path.iterdir())
