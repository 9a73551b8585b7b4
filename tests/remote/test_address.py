"""Which hosts are trusted: results are unpickled, so whoever sends them can run code here."""

from __future__ import annotations

import pytest
from nnsight.schema.config import CONFIG

from interp.errors import InterpError
from interp.remote.address import NDIF, Address, address
from interp.remote.errors import BadAddress, UntrustedHost


def test_true_is_ndif(monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", "https://api.ndif.us")
    assert address(True) == Address("https://api.ndif.us", ndif=True, loopback=False)
    assert address("https://API.ndif.us/").ndif
    assert address(True).websocket == "wss://api.ndif.us"
    assert NDIF == "https://api.ndif.us"  # if nnsight changes it, somebody should look


def test_the_variable_names_no_trusted_host(monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", "https://evil.example.org")  # what NDIF_HOST does
    with pytest.raises(UntrustedHost, match=r"NDIF_HOST.*can run code here.*allow_host='evil"):
        address(True)
    assert not address(True, allow_host=["evil.example.org"]).ndif


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:5001", "http://localhost:5001", "http://[::1]:5001", "http://127.9.9.9"],
)
def test_this_machine_is_trusted(url):
    found = address(url)
    assert (found.loopback, found.ndif, found.url) == (True, False, url)
    assert found.websocket == url.replace("http", "ws")
    assert found.host == url.removeprefix("http://")


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org",
        "https://api.ndif.us.example.org",
        "https://localhost.example.org",
        "https://127.0.0.1.example.org",
        "https://2130706433",  # 127.0.0.1, to some parsers
        "https://0x7f.1",
        "https://10.0.0.7",
        "https://[::ffff:8.8.8.8]",
        "https://api.ndif.us:444",
        "https://notapi.ndif.us",
    ],
)
def test_others_are_not(url):
    with pytest.raises(UntrustedHost, match="unpickled"):
        address(url)


def test_allow_host_is_exact():
    url = "https://ndif.lab.org:8443"
    assert address(url, "ndif.lab.org").url == url
    assert address(url, ["other", "NDIF.lab.org:8443"]).url == url
    for near in ("lab.org", "*.lab.org", "ndif.lab.org:443", "ndif.lab.or", "", "*"):
        with pytest.raises(UntrustedHost):
            address(url, near)


def test_no_secret_goes_unencrypted():
    with pytest.raises(UntrustedHost, match="without encryption"):
        address("http://ndif.lab.org", allow_host="ndif.lab.org")
    with pytest.raises(UntrustedHost, match="without encryption"):
        address("http://api.ndif.us")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "local",
        "api.ndif.us",
        "ftp://127.0.0.1",
        "http://",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://127.0.0.1/path",
        "http://127.0.0.1?x",
        "http://127.0.0.1#x",
        "http://127.0.0.1\r\nx: y",
        "http://127.0.0.1\\@example.org",
        "http://[::1",
        "http://a_b!",
        False,
        None,
        5001,
    ],
)
def test_what_is_no_address(url):
    with pytest.raises(BadAddress) as caught:
        address(url)
    assert isinstance(caught.value, InterpError)
    assert isinstance(caught.value, ValueError)


def test_a_password_is_refused_and_not_shown():
    with pytest.raises(BadAddress, match="user or password") as caught:
        address("http://me:hunter2@127.0.0.1:5001")
    assert "hunter2" not in str(caught.value)
