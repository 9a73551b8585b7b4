"""Where a key comes from, and that it stays hidden. What all of a run shows: test_hygiene.py."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle

import keyring
import pytest
from keyring.backend import KeyringBackend
from nnsight.schema.config import CONFIG

from interp.remote import keys
from interp.remote.address import address
from interp.remote.errors import NoKey
from interp.remote.keys import Key, find_key, kept_from_logs, redact, unused_key

SECRET = "planted/key+with=odd&parts"
HERE = address("http://127.0.0.1:5001")


@pytest.fixture(autouse=True)
def no_keys_of_this_machine(monkeypatch):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    before = keyring.get_keyring()
    yield
    keyring.set_keyring(before)


class Ring(KeyringBackend):
    """A keyring in memory that refuses to be written to."""

    priority = 1
    held: dict = {}  # noqa: RUF012
    shut = False

    def get_password(self, service, username):
        if self.shut:
            raise keyring.errors.KeyringLocked("locked")
        return self.held.get((service, username))

    def set_password(self, service, username, password):
        raise AssertionError("a key was written")


@dataclasses.dataclass
class Holder:
    key: Key


def test_it_shows_itself_in_the_headers_only():
    key = Key(SECRET)
    assert key.headers() == {"ndif-api-key": SECRET}
    shown = [repr(key), str(key), f"{key}", f"{key:>40}", f"{key!r}", "%s %r" % (key, key)]  # noqa: UP031
    shown += [repr(Holder(key)), repr(dataclasses.asdict(Holder(key))), repr([key]), str({1: key})]
    shown += [repr(copy.copy(key)), repr(copy.deepcopy(key)), json.dumps(key, default=str)]
    shown += [str(getattr(key, "__dict__", ""))]
    for text in shown:
        assert SECRET not in text
    for how in (pickle.dumps, json.dumps):
        with pytest.raises(TypeError) as caught:
            how(key)
        assert SECRET not in str(caught.value)
    with pytest.raises(TypeError):
        hash(key)
    assert copy.deepcopy(key) == key == Key(SECRET) != Key("another")
    assert key != SECRET


@pytest.mark.parametrize("text", ["", "two words", "line\nend", "tab\t", "schlüssel", "a\x00b"])
def test_what_cannot_be_a_key_is_refused_without_showing_it(text):
    with pytest.raises(NoKey) as caught:
        Key(text)
    assert not text or text not in str(caught.value)


def test_the_variable_comes_first_then_the_keyring(monkeypatch):
    ring = Ring()
    keyring.set_keyring(ring)
    assert find_key(HERE) is None
    ring.held = {("interp", "127.0.0.1:5001"): "from-ring", ("interp", "api.ndif.us"): "other"}
    assert find_key(HERE) == Key("from-ring")
    ring.shut = True
    assert find_key(HERE) is None
    monkeypatch.setenv("NDIF_API_KEY", " from-variable\n")
    assert find_key(HERE) == Key("from-variable")


def test_without_the_library_there_is_no_keyring(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "keyring", None)
    assert find_key(HERE) is None


def test_the_key_in_nnsights_file_is_not_used_but_told(monkeypatch):
    keyring.set_keyring(Ring())
    assert unused_key() == ""
    monkeypatch.setattr(CONFIG.API, "APIKEY", SECRET)
    assert find_key(HERE) is None
    assert "config file" in unused_key()
    assert SECRET not in unused_key()
    monkeypatch.setenv("NDIF_API_KEY", "mine")  # nnsight's own copy of it is no news
    assert unused_key() == ""


def test_redact():
    key = Key(SECRET)
    quoted = "planted%2Fkey%2Bwith%3Dodd%26parts"
    assert redact(f"a {SECRET} b {quoted} c", key) == "a [key] b [key] c"
    assert redact(SECRET, None) == SECRET


def test_logs_are_cleaned_while_it_lasts(caplog):
    log = logging.getLogger("websocket")
    with caplog.at_level("DEBUG", "websocket"):
        with kept_from_logs(Key(SECRET)), kept_from_logs(Key("another")):
            log.debug("sent %s", {"ndif-api-key": SECRET})
        log.debug("after")
    assert caplog.messages == ["sent {'ndif-api-key': '[key]'}", "after"]
    assert not log.filters
    assert keys.where_to_put_it(HERE)
