"""Which requests a server without a log-in takes for a web page's, as browsers send them."""

import asyncio
import json

import pytest
from asgi_requests import Inner, ask, parts, scope_of

from florence2.errors import RequestError
from serve.http import guard as callers_module
from serve.http.guard import Callers, Guard, Limits
from serve.http.json_bodies import Servers, entries_of

STATE = b'{"state": {}}'
JSON = ("content-type", "application/json")
FORM = ("content-type", "multipart/form-data; boundary=x")


def answer(callers, headers, path="/is_deployed", method="POST", body=STATE):
    guard = Guard(Inner(), Limits(), lambda uuid: True, callers, Servers())
    status, content, _, _ = ask(guard, scope_of(path, headers, method), parts(body))
    return status, content


def status_of(callers, *headers, **more):
    return answer(callers, headers, **more)[0]


LAPTOP = Callers.of("127.0.0.1")
NAMED = Callers.of("127.0.0.1", ["Label.Example.org."])
NETWORK = Callers.of("0.0.0.0")
SIX = Callers.of("fe80::1")

OWN_HOSTS = {
    "localhost": (LAPTOP, "localhost"),
    "with a port": (LAPTOP, "localhost:8000"),
    "another port, as through a tunnel": (LAPTOP, "localhost:9999"),
    "capitals": (LAPTOP, "LocalHost:8000"),
    "a final dot": (LAPTOP, "localhost.:8000"),
    "IPv4": (LAPTOP, "127.0.0.1:8000"),
    "all of the loopback network": (LAPTOP, "127.1.2.3"),
    "IPv6": (LAPTOP, "[::1]:8000"),
    "IPv4 in IPv6": (LAPTOP, "[::ffff:127.0.0.1]:8000"),
    "what the SDK's client asks": (LAPTOP, "0.0.0.0:8000"),
    "a name it was given": (NAMED, "label.example.org"),
    "that name in capitals": (NAMED, "LABEL.example.ORG:443"),
    "localhost beside the name": (NAMED, "localhost:8000"),
    "an address of the network": (NETWORK, "192.168.1.7:8000"),
    "an address that is translated": (NETWORK, "203.0.113.9:80"),
    "an IPv6 address of the network": (NETWORK, "[fe80::1]:8000"),
    "the address it listens on": (SIX, "[fe80:0::1]:8000"),
}
FOREIGN_HOSTS = {
    "a name that leads here": (LAPTOP, "evil.example"),
    "with our port": (LAPTOP, "evil.example:8000"),
    "localhost in front": (LAPTOP, "localhost.evil.example"),
    "localhost behind": (LAPTOP, "evil-localhost"),
    "userinfo": (LAPTOP, "localhost@evil.example"),
    "an address in the name": (LAPTOP, "127.0.0.1.evil.example"),
    "a number that only some read as one": (LAPTOP, "2130706433"),
    "two": (LAPTOP, "localhost, evil.example"),
    "nothing": (LAPTOP, ""),
    "no port": (LAPTOP, "localhost:"),
    "a slash": (LAPTOP, "localhost/"),
    "an address of the network, on a laptop": (LAPTOP, "192.168.1.7:8000"),
    "an IPv6 address, on a laptop": (LAPTOP, "[fe80::1]:8000"),
    "brackets around a name": (LAPTOP, "[localhost]"),
    "a name, where all addresses are ours": (NETWORK, "evil.example:8000"),
    "below a name that was given": (NAMED, "a.label.example.org"),
    "above a name that was given": (NAMED, "example.org"),
}


@pytest.mark.parametrize(("callers", "host"), OWN_HOSTS.values(), ids=OWN_HOSTS)
def test_the_server_answers_under_its_own_names(callers, host):
    assert status_of(callers, JSON, ("host", host)) == 200


@pytest.mark.parametrize(("callers", "host"), FOREIGN_HOSTS.values(), ids=FOREIGN_HOSTS)
def test_a_name_of_others_is_refused(callers, host):
    status, content = answer(callers, [JSON, ("host", host)])
    body = json.loads(content)
    assert (status, body["code"], body["success"]) == (403, "forbidden", False)
    assert "--allow-host" in body["message"]


def test_two_hosts_are_refused_and_none_is_no_browser():
    assert status_of(LAPTOP, JSON, ("host", "localhost"), ("host", "localhost")) == 403
    assert status_of(LAPTOP, JSON) == 200


def test_on_every_address_the_machine_s_own_name_is_one_too(monkeypatch):
    monkeypatch.setattr(callers_module.socket, "gethostname", lambda: "Box7.lan")
    for host in ("0.0.0.0", "::", ""):
        everywhere = Callers.of(host)
        assert status_of(everywhere, JSON, ("host", "box7.lan:8000")) == 200
        assert status_of(everywhere, JSON, ("host", "box7.local")) == 200
        assert status_of(everywhere, JSON, ("host", "box8.lan")) == 403


HERE = ("host", "localhost:8000")
OWN_PAGES = {
    "none: a program": (LAPTOP, []),
    "the own page": (LAPTOP, [("origin", "http://localhost:8000")]),
    "in capitals": (LAPTOP, [("origin", "HTTP://LOCALHOST:8000")]),
    "the own page, by its site": (LAPTOP, [("sec-fetch-site", "same-origin")]),
    "typed by a person": (LAPTOP, [("sec-fetch-site", "none")]),
    "a proxy's page": (NAMED, [("origin", "https://label.example.org")]),
    "a named page that is another site": (
        NAMED,
        [("origin", "https://label.example.org"), ("sec-fetch-site", "cross-site")],
    ),
}
FOREIGN_PAGES = {
    "another site": [("origin", "https://evil.example")],
    "no site, such as a file or a frame without rights": [("origin", "null")],
    "another port of this machine": [("origin", "http://localhost:3000")],
    "the same machine by its other name": [("origin", "http://127.0.0.1:8000")],
    "the default port": [("origin", "http://localhost")],
    "userinfo": [("origin", "http://localhost:8000@evil.example")],
    "a name that begins like ours": [("origin", "http://localhost:8000.evil.example")],
    "an extension": [("origin", "chrome-extension://localhost:8000")],
    "empty": [("origin", "")],
    "no scheme": [("origin", "localhost:8000")],
    "two": [("origin", "http://localhost:8000"), ("origin", "https://evil.example")],
    "a list": [("origin", "http://localhost:8000 https://evil.example")],
    "by its site": [("sec-fetch-site", "cross-site")],
    "a neighbour, by its site": [("sec-fetch-site", "same-site")],
    "a form's answer that opens": [
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-mode", "navigate"),
        ("sec-fetch-dest", "document"),
    ],
}


@pytest.mark.parametrize(("callers", "headers"), OWN_PAGES.values(), ids=OWN_PAGES)
def test_programs_and_the_own_page_are_answered(callers, headers):
    assert status_of(callers, JSON, HERE, *headers) == 200


@pytest.mark.parametrize("headers", FOREIGN_PAGES.values(), ids=FOREIGN_PAGES)
@pytest.mark.parametrize(
    ("path", "kind", "method"),
    [
        ("/is_deployed", JSON, "POST"),
        ("/freeze_model", ("content-type", "text/plain"), "POST"),
        ("/inference_batch_async", FORM, "POST"),
        ("/metrics", ("accept", "*/*"), "GET"),
    ],
)
def test_a_page_of_others_is_refused(headers, path, kind, method):
    status = status_of(LAPTOP, kind, HERE, *headers, path=path, method=method)
    assert status == 403


@pytest.mark.parametrize("callers", [NAMED, NETWORK], ids=["named", "network"])
def test_a_page_of_others_is_refused_wherever_the_server_listens(callers):
    assert status_of(callers, JSON, HERE, ("origin", "https://evil.example")) == 403
    own = ("host", "192.168.1.7:8000"), ("origin", "http://192.168.1.7:8000")
    assert status_of(NETWORK, JSON, *own) == 200


def link(path="/", method="GET", dest="document"):
    headers = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate")]
    headers += [HERE, ("sec-fetch-dest", dest)]
    return status_of(LAPTOP, *headers, path=path, method=method, body=b"")


def test_a_link_opens_the_page_and_nothing_else():
    assert link() == 200
    assert link(dest="iframe") == 403
    assert link(path="/metrics") == 403
    assert link(method="POST") == 403


def test_the_platform_s_page_is_not_asked_where_it_comes_from():
    elsewhere = ("host", "10.0.0.3:8000"), ("origin", "https://app.example.org")
    assert status_of(None, JSON, *elsewhere, ("sec-fetch-site", "cross-site")) == 200


def connect(callers, headers):
    """The scopes that reached the app, and what was sent to the client."""
    inner, sent = Inner(), []
    guard = Guard(inner, Limits(), lambda uuid: True, callers, Servers())
    scope = {**scope_of("/sly/ws", headers), "type": "websocket"}

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, None, send))
    return inner.scopes, sent


def test_a_websocket_is_only_for_the_own_page():
    for headers in ([HERE, ("origin", "https://evil.example")], [("host", "evil.example")]):
        reached, sent = connect(LAPTOP, headers)
        assert reached == []
        assert sent == [{"type": "websocket.close", "code": 1008}]
    reached, sent = connect(LAPTOP, [HERE, ("origin", "http://localhost:8000")])
    assert (len(reached), sent) == (1, [])


@pytest.mark.parametrize(
    "name", ["https://a.example", "a.example:80", "a b", "", "*", "a/b", "me@a.example"]
)
def test_what_is_no_name_of_a_host_is_refused_at_the_start(name):
    with pytest.raises(RequestError, match="a name or an address alone"):
        Callers.of("127.0.0.1", [name])


def test_names_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("FLORENCE_ALLOW_HOSTS", "gpu1.example.org, ::2 10.0.0.9")
    callers = Callers.from_environment("127.0.0.1", ["more.example.org"])
    for host in ("gpu1.example.org", "[::2]:8000", "10.0.0.9", "more.example.org", "localhost"):
        assert status_of(callers, JSON, ("host", host)) == 200
    assert entries_of(None) == entries_of(" , ") == []
