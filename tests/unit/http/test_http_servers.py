"""Which platform a body may name, and which is talked to then."""

import json

import pytest
from asgi_requests import Inner, ask, parts, scope_of

from florence2.errors import RequestError
from serve.http.errors import ForbiddenError
from serve.http.guard import Guard, Limits
from serve.http.json_bodies import Servers

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
    guard = Guard(inner, Limits(), lambda uuid: True, None, Servers.of(OWN))
    headers = [("content-type", "application/json")]
    for named in ("https://evil.example", OWN):
        body = json.dumps({"state": {}, "server_address": named, "api_token": "x"}).encode()
        status, _, _, _ = ask(guard, scope_of(path, headers), parts(body))
        assert status == (200 if named == OWN else 403)
    [reached] = inner.bodies
    assert "server_address" not in json.loads(reached)
