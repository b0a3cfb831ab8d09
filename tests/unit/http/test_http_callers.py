"""Who is answered, and which platform is talked to then.

A server without a log-in takes some requests for a web page's, as browsers send them; and a body
may name a platform.
"""

import asyncio
import json

import pytest
from asgi_requests import FORM, JSON, Inner, ask, guard_around, parts, scope_of

from florence2.errors import RequestError
from serve.http import guard as callers_module
from serve.http.errors import ForbiddenError
from serve.http.guard import Callers
from serve.http.json_bodies import Servers, entries_of

[JSON], [FORM] = JSON, FORM


def answer(callers, headers, path="/is_deployed", method="POST", body=b'{"state": {}}'):
    guard = guard_around(Inner(), callers=callers)
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
    guard = guard_around(inner, callers=callers)
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


OWN = "https://app.example.org"
OTHER = "http://10.0.0.5:8080"


def settled(servers, named, **body):
    content = {"api_token": "secret", "server_address": named, **body}
    servers.settle(content)
    return content.get("server_address")


SAME = {
    "as it is": OWN,
    "a slash behind": OWN + "/",
    "capitals": "HTTPS://APP.Example.org",
    "its default port": OWN + ":443",
    "http": "http://app.example.org",
    "no scheme": "app.example.org",
    "a final dot": OWN + ".",
    "spaces": f" {OWN} ",
}
ELSE = {
    "another host": "https://evil.example",
    "the metadata of a cloud": "http://169.254.169.254/latest",
    "this machine": "http://localhost:22",
    "another port": OWN + ":8443",
    "userinfo": "https://app.example.org@evil.example",
    "a backslash": "https://evil.example\\@app.example.org",
    "a name that begins like ours": "https://app.example.org.evil.example",
    "below ours": "https://a.app.example.org",
    "another scheme": "ftp://app.example.org",
    "a path": OWN + "/../evil",
    "a query": OWN + "?x",
    "a fragment": OWN + "#@evil.example",
    "a port that is none": OWN + ":x",
    "brackets": "http://[evil",
}


@pytest.mark.parametrize("named", SAME.values(), ids=SAME)
def test_the_app_s_own_platform_may_be_named(named):
    assert settled(Servers.of(OWN), named) is None


@pytest.mark.parametrize("named", ELSE.values(), ids=ELSE)
@pytest.mark.parametrize("own", [OWN, None], ids=["own", "none"])
def test_any_other_server_is_refused(named, own):
    with pytest.raises(ForbiddenError, match=r"--allow-server or FLORENCE_ALLOW_SERVERS"):
        settled(Servers.of(own), named)


def test_without_a_platform_none_may_be_named():
    for named in SAME.values():
        with pytest.raises(ForbiddenError, match="no platform"):
            settled(Servers.of(None), named)


@pytest.mark.parametrize("named", [None, ""])
def test_a_body_that_names_none_leaves_the_choice_to_the_environment(named):
    for servers in (Servers.of(None), Servers.of(OWN), Servers.of(OWN, [OTHER])):
        content = {"server_address": named}
        servers.settle(content)
        assert content == {}


def test_an_allowed_server_is_talked_to_as_it_was_set_up():
    servers = Servers.of(OWN, [OTHER, "https://second.example.org"])
    assert settled(servers, "10.0.0.5:8080/") == OTHER
    assert settled(servers, "http://second.example.org") == "https://second.example.org"
    assert settled(servers, OWN) is None
    with pytest.raises(ForbiddenError):
        settled(servers, "http://10.0.0.5:8081")


def test_another_server_never_gets_the_environment_s_token_nor_its_place():
    servers = Servers.of(OWN, [OTHER])
    with pytest.raises(RequestError, match="api_token"):
        settled(servers, OTHER, api_token=None)
    assert settled(servers, OTHER, api_token=None, context={"apiToken": "mine"}) == OTHER


def test_a_session_of_the_platform_talks_to_its_own_whatever_a_body_says():
    session = Servers(is_session=True)
    assert settled(session, OWN) is settled(session, "https://evil.example") is None


def test_servers_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("FLORENCE_ALLOW_SERVERS", f"{OTHER}, https://second.example.org")
    monkeypatch.delenv("SERVER_ADDRESS", raising=False)
    servers = Servers.from_environment(["third.example.org"])
    for named in (OTHER, "second.example.org", "third.example.org"):
        assert settled(servers, named)
    monkeypatch.setenv("SERVER_ADDRESS", OWN)
    assert settled(Servers.from_environment(), OWN) is None
    with pytest.raises(RequestError, match="address such as"):
        Servers.of(None, ["https://a.example/path"])


@pytest.mark.parametrize("path", ["/inference_image_id", "/tasks", "/Widget1/clicked"])
def test_no_body_reaches_the_sdk_with_another_server(path):
    inner = Inner()
    guard = guard_around(inner, servers=Servers.of(OWN))
    for named in ("https://evil.example", OWN):
        body = json.dumps({"state": {}, "server_address": named, "api_token": "x"}).encode()
        status, _, _, _ = ask(guard, scope_of(path, [JSON]), parts(body))
        assert status == (200 if named == OWN else 403)
    [reached] = inner.bodies
    assert "server_address" not in json.loads(reached)
