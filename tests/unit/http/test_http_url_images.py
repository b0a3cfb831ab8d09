"""Images from addresses: real connections to a server of this machine, invented host names."""

import asyncio
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from florence2.errors import RequestError
from serve.http.errors import TooLargeError
from serve.http.url_fetch import UrlLimits, fetch_image, is_public

LOCAL = UrlLimits(allow_private=True, total_s=10)
PICTURE = b"\x89PNG not looked at here"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.server.targets[self.path])
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/slow":
            self.server.stopping.wait(5)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, *args):
        pass


@pytest.fixture
def web():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.seen, server.targets = [], {}
        server.stopping = threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.stopping.set()
        server.shutdown()


class Names:
    """A resolver that knows the given names and remembers what it was asked."""

    def __init__(self, **addresses):
        self.asked = []
        self._addresses = addresses

    def __call__(self, host, port):
        self.asked.append(host)
        return self._addresses.get(host.replace(".example", ""), ["127.0.0.1"])


def url_of(web, path="/cat.png", host="images.example"):
    return f"http://{host}:{web.server_port}{path}"


def test_the_bytes_behind_an_address_come_back(web):
    assert fetch_image(url_of(web, host="127.0.0.1"), LOCAL) == PICTURE


def test_the_name_is_resolved_once_and_the_server_hears_the_name(web):
    names = Names(images=["127.0.0.1"])
    assert fetch_image(url_of(web), LOCAL, names) == PICTURE
    assert names.asked == ["images.example"]
    assert web.seen == [("/cat.png", f"images.example:{web.server_port}")]


def test_a_name_that_changes_after_the_check_leads_nowhere_else(web):
    """The second answer of the resolver, an internal address, is never asked for."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    assert fetch_image(url_of(web), LOCAL, lambda host, port: next(answers)) == PICTURE
    assert next(answers) == ["10.0.0.1"]


def test_the_next_address_is_tried_where_one_refuses(web):
    # nothing listens on the server's port of 127.0.0.9
    assert fetch_image(url_of(web), LOCAL, Names(images=["127.0.0.9", "127.0.0.1"])) == PICTURE


PRIVATE = {
    "loopback": "127.0.0.1",
    "loopback, version 6": "::1",
    "loopback inside version 6": "::ffff:127.0.0.1",
    "private 10": "10.1.2.3",
    "private 172": "172.16.0.1",
    "private 192": "192.168.1.1",
    "private inside version 6": "::ffff:10.0.0.1",
    "private by 6to4": "2002:0a00:0001::1",
    "private by NAT64": "64:ff9b::10.0.0.1",
    "private as a compatible address": "::10.0.0.1",
    "private by 6to4 in its own words": "2002:c0a8:0101::",
    "tunneled by Teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "link-local, where clouds keep their keys": "169.254.169.254",
    "link-local, version 6": "fe80::1",
    "unique local": "fd00::1",
    "multicast": "224.0.0.1",
    "multicast, version 6": "ff02::1",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "unspecified": "0.0.0.0",
    "unspecified, version 6": "::",
    "of carriers": "100.64.0.1",
    "for documents": "192.0.2.1",
    "not an address": "somewhere",
    "with a zone": "fe80::1%eth0",
    "metadata of a cloud": "192.0.0.192",
    "metadata in version 6": "::ffff:169.254.169.254",
    "metadata by version 6": "fd00:ec2::254",
    "a relay": "192.88.99.1",
    "site-local": "fec0::1",
    "documentation in version 6": "3fff::1",
    "a translation of one's own": "64:ff9b:1::7f00:1",
    "IPv4 as it was once written": "::127.0.0.1",
    "IPv4 translated": "::ffff:0:127.0.0.1",
    "Teredo": "2001:0:7f00:1::",
}


@pytest.mark.parametrize("address", PRIVATE.values(), ids=PRIVATE)
def test_an_address_that_is_not_public_is_refused_unvisited(web, address):
    with pytest.raises(RequestError, match="public addresses only"):
        fetch_image(url_of(web), UrlLimits(), Names(images=[address]))
    assert web.seen == []


def test_one_private_address_among_public_ones_refuses_the_host(web):
    with pytest.raises(RequestError, match="public addresses only"):
        fetch_image(url_of(web), UrlLimits(), Names(images=["8.8.8.8", "127.0.0.1"]))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_a_public_address_is_public(address):
    assert is_public(address)


SPELLINGS = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "017700000001",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "localhost",
]


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_of_this_machine_gets_through(web, host):
    with pytest.raises(RequestError, match=r"public addresses only|cannot be found"):
        fetch_image(url_of(web, host=host), UrlLimits())
    assert web.seen == []


BAD_ADDRESSES = {
    "a file": "file:///etc/passwd",
    "another scheme": "ftp://example.com/cat.png",
    "data": "data:image/png;base64,AAAA",
    "no scheme": "example.com/cat.png",
    "no host": "http:///cat.png",
    "empty": "",
    "a password in it": "http://user:secret@example.com/cat.png",
    "a port out of range": "http://example.com:99999/",
    "port 0": "http://example.com:0/",
    "control characters": "http://example.com/\r\nHost: x",
    "missing": None,
    "a list": ["http://example.com"],
}


@pytest.mark.parametrize("url", BAD_ADDRESSES.values(), ids=BAD_ADDRESSES)
def test_what_is_no_web_address_is_refused_in_one_sentence(url):
    names = Names()
    with pytest.raises(RequestError) as refused:
        fetch_image(url, UrlLimits(), names)
    assert str(refused.value).endswith(".")
    assert "secret" not in str(refused.value)
    assert names.asked == []


def test_redirects_are_followed_to_the_image(web):
    web.targets = {
        "/to/1": "/to/2",
        "/to/2": "/to/3",
        "/to/3": url_of(web, "/cat.png", "b.example"),
    }
    names = Names()
    assert fetch_image(url_of(web, "/to/1"), LOCAL, names) == PICTURE
    assert names.asked == ["images.example"] * 3 + ["b.example"]


def test_more_than_three_redirects_are_refused(web):
    web.targets = {"/to/1": "/to/1"}
    with pytest.raises(RequestError, match="more than 3 times"):
        fetch_image(url_of(web, "/to/1"), LOCAL, Names())
    assert len(web.seen) == 4


TARGETS = {
    "another scheme": ("file:///etc/passwd", "http and https only"),
    "a private address": ("http://inner.example/", "public addresses only"),
    "with a password": ("http://a:b@other.example/", "user name or password"),
}


@pytest.mark.parametrize(("target", "words"), TARGETS.values(), ids=TARGETS)
def test_a_redirect_is_checked_like_the_first_address(web, target, words, monkeypatch):
    web.targets = {"/to/1": target}
    # The server of this test counts as public, as if it were on the internet.
    monkeypatch.setattr("serve.http.url_fetch.is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(RequestError, match=words):
        fetch_image(url_of(web, "/to/1"), UrlLimits(), Names(inner=["10.0.0.1"]))


def test_a_status_other_than_success_is_told(web):
    with pytest.raises(RequestError, match="status 404"):
        fetch_image(url_of(web, "/missing"), LOCAL, Names())


def test_a_file_above_the_limit_is_left(web):
    exact = UrlLimits(allow_private=True, max_bytes=len(PICTURE))
    assert fetch_image(url_of(web), exact, Names()) == PICTURE
    with pytest.raises(TooLargeError, match="at most 5 bytes"):
        fetch_image(url_of(web), UrlLimits(allow_private=True, max_bytes=5), Names())


def test_a_server_that_does_not_answer_is_left(web):
    with pytest.raises(RequestError, match=r"within 100 ms"):
        fetch_image(url_of(web, "/slow"), UrlLimits(allow_private=True, total_s=0.1), Names())


def test_a_server_that_gives_a_byte_at_a_time_is_left():
    """Each part comes in time; only the whole does not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                try:
                    while True:
                        connection.sendall(b"x")
                        threading.Event().wait(0.02)
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with pytest.raises(RequestError, match=r"within 300 ms"):
            fetch_image(url, UrlLimits(allow_private=True, total_s=0.3))


def test_nobody_listening_is_told():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch_image(f"http://127.0.0.1:{port}/", LOCAL)


def test_an_unknown_host_is_told():
    def unknown(host, port):
        raise socket.gaierror("no such name")

    with pytest.raises(RequestError, match=r"'nowhere\.example' .* cannot be found"):
        fetch_image("http://nowhere.example/", UrlLimits(), unknown)


@pytest.mark.parametrize(
    ("value", "allowed"), [("1", True), ("true", True), ("0", False), ("", False)]
)
def test_an_administrator_can_allow_private_addresses(web, monkeypatch, value, allowed):
    monkeypatch.setenv("FLORENCE_ALLOW_PRIVATE_URLS", value)
    assert UrlLimits.from_environment().allow_private is allowed


def test_private_addresses_are_refused_without_the_variable(web, monkeypatch):
    monkeypatch.delenv("FLORENCE_ALLOW_PRIVATE_URLS", raising=False)
    with pytest.raises(RequestError, match="public addresses only"):
        fetch_image(url_of(web, host="127.0.0.1"))


def test_proxies_of_the_environment_are_not_asked(web, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch_image(url_of(web, host="127.0.0.1"), LOCAL) == PICTURE


def test_requests_of_many_threads_do_not_meet(web):
    async def all_at_once():
        calls = [asyncio.to_thread(fetch_image, url_of(web), LOCAL, Names()) for _ in range(8)]
        return await asyncio.gather(*calls)

    assert asyncio.run(all_at_once()) == [PICTURE] * 8
