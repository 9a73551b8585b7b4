"""What a request holds: source and no bytecode, dataclasses made again, files as they were read."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import pickletools
import sys
import time
import types

import pytest
import torch
import zstandard

from interp import MLLM, Knockout
from interp.edges import EdgeSet
from interp.edits.receipts import Receipt
from interp.errors import WouldNotShip
from interp.families.base import Place
from interp.remote import host, payload
from interp.remote.here import Unpacked
from tests.conftest import random_inputs, random_llava


def there(value):
    """What a server unpickles of a value, its classes made of what was shipped."""
    return Unpacked(io.BytesIO(payload.dumps(value)), {}).load()


def test_a_request_holds_no_bytecode(monkeypatch):
    """A server of another Python can run it."""
    model, blobs = MLLM.load(random_llava(), remote="local"), []
    pack = payload.pack_block

    def spy(tracer, model):
        blobs.append(pack(tracer, model))
        return blobs[-1]

    monkeypatch.setattr(host, "pack_block", spy)
    x = random_inputs(model)
    edges = x.grid.edges(src=[1], dst=[5])
    model.run(x, Knockout(edges), read="blocks.*.hook_resid_post")
    raw = zstandard.ZstdDecompressor().decompress(blobs[0])
    words = {arg for _, arg, _ in pickletools.genops(raw) if isinstance(arg, str)}
    assert "_execute" in words  # it is the request that was looked into
    assert not words & {"CodeType", "_make_function"}


def test_dataclasses_are_made_again():
    receipt = Receipt("e", "h", 1, 2, None, 3)
    copy = there(receipt)
    assert type(copy) is not Receipt
    assert vars(copy) == vars(receipt)
    assert repr(copy) == repr(receipt)
    assert [f.name for f in dataclasses.fields(copy)] == [
        f.name for f in dataclasses.fields(Receipt)
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy.asked = 4
    assert type(copy)("e", "h", 1, 2, None, 3) == copy  # the same class, defaults filled in
    assert hash(type(copy)("e", "h", 1, 2, None, 3)) == hash(copy)


def test_inherited_fields_and_written_methods_survive():
    edges = EdgeSet.of([(0, 1, 3), (0, 2, 3)], 1, 8)
    edit = Knockout(edges, layers=[1, 2], heads=0)
    copy = there(edit)
    assert type(copy) is not Knockout
    assert repr(copy) == repr(edit)
    assert copy.applies(2)
    assert not copy.applies(0)
    place = there(Place("a.b", "output", d_head=4))
    assert place.viewed
    assert place.part is None


def module_from(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's module, written just now, which nnsight would ship by value."""
    import nnsight

    path = tmp_path / "mine_to_ship.py"
    path.write_text(
        "from __future__ import annotations\n\n\n"
        "def twice(z):\n    def inner(a: object) -> object:\n        return a * 2\n\n"
        "    return inner(z)\n"
    )
    future = time.time() + 5
    os.utime(path, (future, future))
    module = module_from(path, "mine_to_ship")
    nnsight.register("mine_to_ship")
    yield module, path
    del sys.modules["mine_to_ship"]


def test_a_file_as_it_was_imported_ships(mine):
    module, _ = mine
    z = torch.ones(3)
    assert isinstance(module.twice, types.FunctionType)
    payload.dumps(module.twice)
    assert torch.equal(module.twice(z), z * 2)


def test_a_file_that_was_edited_since_is_refused(mine):
    module, path = mine
    path.write_text(path.read_text().replace("a * 2", "a * 3 + 1"))
    future = time.time() + 9
    os.utime(path, (future, future))
    with pytest.raises(WouldNotShip, match="edited since"):
        payload.dumps(module.twice)


@dataclasses.dataclass(frozen=True)
class Mine:
    """A user's dataclass, as one may stand beside a hook function."""

    by: float
    names: list[str] = dataclasses.field(default_factory=list)

    def scaled(self, z: torch.Tensor) -> torch.Tensor:
        return z * self.by


def test_a_users_dataclass_ships():
    model = MLLM.load(random_llava(), remote="local")
    x, mine = random_inputs(model), Mine(2.0, ["a"])
    copy = there(mine)
    assert type(copy) is not Mine
    assert (repr(copy), copy.names) == (repr(mine), ["a"])
    hook = "blocks.1.hook_mlp_out"
    seen = model.run_with_hooks(x, fwd_hooks=[(hook, lambda z, hook: mine.scaled(z))])
    wanted = model.run_with_hooks(x, fwd_hooks=[(hook, lambda z, hook: z * 2.0)])
    assert torch.equal(seen, wanted)
