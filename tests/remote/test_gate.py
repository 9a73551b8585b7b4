"""Everything that opens a trace ships, and what would not is refused here, by its name.

The functions are *found*: whatever in the package is decorated with `at_model` must be sent at
least once by the public calls below, and run from what was sent. So a new one needs its line here;
and a trace that is opened anywhere else fails, too.
"""

from __future__ import annotations

import ast
import functools
import importlib
import io
import pickle
import pkgutil
import re
import types
from pathlib import Path

import numpy as np
import pandas
import pytest
from pandas import DataFrame

import interp
import interp.attribution.table
from interp import MLLM, Knockout, Scale
from interp.attribution import (
    attribute,
    head_attribution,
    minimal_heads,
    path_attribution,
    verify_edges,
)
from interp.errors import UnknownHook, WouldNotShip
from interp.execution import execute
from interp.remote.here import Unpacked
from interp.remote.host import Host
from interp.remote.payload import SHIPPED, dumps
from interp.shipping import at_model
from tests.attribution.planted import planted, planted_module
from tests.conftest import random_inputs
from tests.remote import pairs
from tests.remote.pairs import random_pair, same

ROOT = Path(interp.__file__).parent
#: where nnsight's own traces are opened: the one forward pass, and traces and requests of users
OPENERS = {"execution.py": 1, "instrumented.py": 1, "remote/host.py": 2}
#: packages that are no client of a model: the server, and the program that starts one
ASIDE = ("interp.rehearsal",)


def functions_at_the_model() -> set[str]:
    """Names of all functions of the package that `at_model` decorates, methods included."""
    found = set()
    for info in pkgutil.walk_packages([str(ROOT)], "interp."):
        if info.name.startswith(ASIDE):
            continue
        module = importlib.import_module(info.name)
        owners = [module, *(v for v in vars(module).values() if isinstance(v, type))]
        for value in (v for owner in owners for v in vars(owner).values()):
            if isinstance(value, types.FunctionType) and value.__code__ is SHIPPED:
                found.add(f"{value.__module__}.{value.__qualname__}")
    return found


@pytest.fixture(scope="module")
def models():
    return random_pair()


@pytest.fixture
def sent(monkeypatch):
    """Names of the functions that were sent, from here on."""
    names = set()
    call = Host.call

    def recorded(self, function, *args, **kwargs):
        names.add(f"{function.__module__}.{function.__qualname__}")
        return call(self, function, *args, **kwargs)

    monkeypatch.setattr(Host, "call", recorded)
    return names


def answers(model, bank, batches, labels):
    """One call of each public function that opens a trace; what came of it."""
    study, one = (model, batches, bank), (model, batches[0], bank)
    asked = {"labels": labels, "sources": "place"}
    first = {**asked, "labels": labels[0]}
    x = batches[0]
    top = attribute(*one, budget=0.1, k=3, edges=3, **first)
    return {
        "run": [model.run(x, Knockout(x.grid.edges(src=[0], dst=[5]))).logits],
        "run_many": [
            r.logits for r in model.run_many(x, [[], Scale("hook_embed", 2.0, positions=[0])])
        ],
        "direct": head_attribution(*one, method="direct", **first),
        "gradient": head_attribution(*study, **asked),
        "attribute": top,
        "edges": verify_edges(top, *one, n=2, **first),
        "paths": path_attribution(*one, top=2, labels=labels[0]),
        "minimal": minimal_heads(*study, candidates=3, n_random=2, share=0.5, **asked),
    }


def test_every_function_that_opens_a_trace_is_sent(sent):
    halves = [planted(2, seed=s) for s in (0, 1)]
    asked = halves[0].bank, [h.x for h in halves], [h.labels for h in halves]
    ours = answers(halves[0].model, *asked)
    assert not sent
    theirs = answers(MLLM.load(planted_module(), remote="local"), *asked)
    assert sent == functions_at_the_model()
    assert len(sent) >= 9
    for name in ours:
        agree(ours[name], theirs[name], name)


def agree(a, b, name):
    if isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            same(one, other, name)
        return
    u, v = (t.rows if hasattr(t, "rows") else t.to_frame() for t in (a, b))
    numbers = list(u.select_dtypes("number"))
    assert list(u.columns) == list(v.columns), name
    assert len(u) > 0, name
    np.testing.assert_allclose(u[numbers], v[numbers], atol=1e-5, rtol=1e-4, err_msg=name)
    words = u.columns.difference(numbers)
    assert u[words].equals(v[words]), name


def test_traces_are_opened_in_one_place():
    """By the syntax tree: `.trace(` and `.session(` of nnsight, all over the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("rehearsal/"):
            continue
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("trace", "session")
            and ast.unparse(node.func.value) != "np"
        ]
        if calls:
            found[name] = len(calls)
    assert found.pop("instrumented.py") == OPENERS["instrumented.py"] + 1  # one hands on to host
    assert found == {name: n for name, n in OPENERS.items() if name != "instrumented.py"}


# -- what would not ship ---------------------------------------------------------------------------


class Base:
    def twice(self, z):
        return z * 2


class WithSuper(Base):
    def twice(self, z):
        return super().twice(z) + 1


def imports_inside(z, hook):
    from interp.errors import nearest

    return z * len(nearest("a", ["a"]))


def logged(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapped


@logged
def decorated(z, hook):
    return z * 2


def with_pandas(z, hook):
    return z * len(pandas.DataFrame({"a": [1, 2]}))


def with_name_from_pandas(z, hook):
    return z * len(DataFrame({"a": [1, 2]}))


def with_module(z, hook):
    return z * len(interp.attribution.table.__name__)


def with_own_module(z, hook):
    return z * len(pairs.CLASSES)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (imports_inside, "imports inside itself, 'from interp.errors import nearest'"),
        (decorated, "decorated is decorated"),
        (with_pandas, "with_pandas needs pandas"),
        (with_name_from_pandas, "with_name_from_pandas needs pandas"),
        (with_module, "the module interp"),
        (with_own_module, "the module tests.remote.pairs as a value"),
    ],
)
def test_a_function_that_would_not_ship_is_refused_by_name(models, function, told):
    """Before anything is sent, through a whole run, wherever the function is handed in."""
    _, there = models
    x, before = random_inputs(there), there.host.traffic.requests
    for call in (
        lambda: there.run(x, read="blocks.1.attn.hook_z", keep=function),
        lambda: there.run_with_hooks(x, fwd_hooks=[("blocks.1.attn.hook_z", function)]),
    ):
        with pytest.raises(WouldNotShip, match=re.escape(told)):
            call()
    assert there.host.traffic.requests == before


def test_super_is_a_stub_that_says_so(models):
    _, there = models
    x, before = random_inputs(there), there.host.traffic.requests
    handed = WithSuper()
    with pytest.raises(NotImplementedError, match=r"WithSuper\.twice needs super\(\)"):
        there.run(x, read="blocks.1.attn.hook_z", keep=lambda z, hook: handed.twice(z))
    kept = there.run(x, read="blocks.1.attn.hook_z", keep=lambda z, hook: Base().twice(z))
    assert kept["blocks.1.attn.hook_z"].shape[1] == x.n_pos
    assert there.host.traffic.requests == before + 1


def test_a_trace_of_ones_own_is_held_to_the_same(models):
    _, there = models
    x = random_inputs(there)

    def with_pandas_in_it():
        with there.trace(x):
            n = len(pandas.DataFrame({"a": [1, 2]}))
            (there.hook("blocks.1.attn.hook_z").output * n).save()

    with pytest.raises(WouldNotShip, match="pandas"):
        with_pandas_in_it()


def test_nothing_of_the_package_goes_by_its_name():
    """All of it, the library's own functions: none as a reference that a server would look up."""
    for name in sorted(functions_at_the_model()):
        module, _, attribute_name = name.rpartition(".")
        raw = dumps(getattr(importlib.import_module(module), attribute_name))
        refused = Unpacked(io.BytesIO(raw), {})
        assert callable(refused.load()), name


def test_a_package_reference_would_be_noticed():
    class Plain(pickle.Pickler):
        pass

    file = io.BytesIO()
    Plain(file).dump(interp.attribution.table.HeadTable)
    with pytest.raises(WouldNotShip, match=r"refers to interp\.attribution\.table\.HeadTable"):
        Unpacked(io.BytesIO(file.getvalue()), {}).load()


def test_a_class_with_a_base_that_servers_lack(models):
    class Frame(pandas.DataFrame):
        pass

    Frame.__module__ = "interp.somewhere"
    with pytest.raises(WouldNotShip, match=r"Frame is a pandas\."):
        dumps(Frame)


def test_at_model_itself_is_no_decorator_that_is_lost(models):
    """A function of one's own with it runs there, under its own name."""
    local, there = models
    x = random_inputs(local)
    assert_norm = [norm_at(model, x, "blocks.1.attn.hook_z") for model in models]
    assert assert_norm[0] == pytest.approx(assert_norm[1], abs=1e-4)
    with pytest.raises(UnknownHook, match="no hook"):
        norm_at(there, x, "blocks.1.attn.hook_zz")


@at_model
def norm_at(model, x, name):
    return float(execute(model, x, read=[name]).states[name].norm())
