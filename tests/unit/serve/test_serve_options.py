"""What ``florence2 serve`` is told about who may ask for what."""

from __future__ import annotations

import socket
import threading

import pytest

from serve import app as app_module
from serve.cli import serve as command
from serve.cli.main import main


class Started:
    """The app that would have been started, and how."""

    local = None

    def __init__(self, local):
        Started.local = local

    def serve(self):
        """Ends at once."""


@pytest.fixture
def start(monkeypatch, capsys):
    monkeypatch.setattr(app_module, "Florence2App", Started)
    monkeypatch.setattr(command, "fetch", lambda model: None)
    monkeypatch.delenv("SERVER_ADDRESS", raising=False)
    Started.local = None

    def start(*options):
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--port", "0", *options])
        return ended.value.code, capsys.readouterr()

    return start


def test_options_can_be_given_more_than_once(start):
    start("--allow-host", "a.example", "--allow-host", "::2", "--allow-deploy", "me/mine")
    assert Started.local.callers.names == {"a.example", "::2"}
    assert Started.local.allow_deploy == ("me/mine",)
    start("--allow-server", "https://app.example.org", "--host", "0.0.0.0")
    assert Started.local.callers.any_address
    assert set(Started.local.servers.allowed.values()) == {"https://app.example.org"}


def test_adapters_are_given_by_name(start):
    start("--adapter", "cats=a/b=c", "--adapter", " dogs = me/lora@main")
    assert Started.local.adapters == (("cats", "a/b=c"), ("dogs", "me/lora@main"))


def test_two_adapters_of_one_name(start):
    code, written = start("--adapter", "cats=a", "--adapter", "cats=b")
    assert code == 2
    assert "'cats' stands for a and for b; give one of them another name" in written.err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--adapter", "cats", "given as NAME=DIR, and 'cats' was received"),
        ("--adapter", "=dir", "given as NAME=DIR, and '=dir' was received"),
        ("--allow-host", "http://a.example", "a name or an address alone"),
        ("--allow-server", "a.example/path", "an address such as"),
    ],
)
def test_what_cannot_be_meant_is_said_before_a_model_is_loaded(start, option, value, says):
    code, written = start(option, value)
    assert code == 2
    assert says in written.err
    assert Started.local is None


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_the_server_can_listen_on_an_address_of_ipv6(capsys):
    try:
        listener = command.listening_socket("::1", 0)
    except command.RequestError:
        pytest.skip("this machine has no loopback of IPv6")
    with listener:
        assert listener.family == socket.AF_INET6
    command.greet("::1", 8000, "demo")
    assert "http://[::1]:8000/inference_image" in capsys.readouterr().err


@pytest.fixture
def no_screen(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


def wait_for_the_browser():
    for thread in threading.enumerate():
        if thread.name == command.BROWSER_THREAD:
            thread.join(10)


def test_the_page_is_opened_in_a_browser_only_when_asked(start, no_screen, monkeypatch, tmp_path):
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\necho $1 >> {opened}\n", encoding="utf-8")
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    assert start()[0] == 0
    wait_for_the_browser()
    assert not opened.exists()
    code, written = start("--open", "--host", "0.0.0.0")
    wait_for_the_browser()
    address = opened.read_text(encoding="utf-8").strip()
    assert code == 0
    assert address.startswith("http://127.0.0.1:")
    assert f"demo answers at {address};" in written.err


def test_where_there_is_no_screen_the_address_is_said_and_no_terminal_taken(no_screen, capsys):
    command.show_page("http://127.0.0.1:8000")
    assert "There is no browser to open here." in capsys.readouterr().err


def test_a_browser_that_fails_is_told_of(no_screen, monkeypatch, capsys):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    command.show_page("http://127.0.0.1:8000")
    assert "The page: http://127.0.0.1:8000" in capsys.readouterr().err
