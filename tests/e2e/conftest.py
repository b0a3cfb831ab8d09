"""The page of ``florence2 serve`` in a browser, against the app with the demo checkpoint.

The browser is Debian's Chromium; without one the tests of the page are left out, unless
``FLORENCE_REQUIRE_BROWSER`` says that they may not be, as CI does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from app_server import AppServer, serve_command
from page_tools import (
    BROWSERS,
    FLAGS,
    PATIENCE_MS,
    open_app,
)
from playwright.sync_api import Browser, Page, expect, sync_playwright


@pytest.fixture(scope="session")
def app(tmp_path_factory) -> Iterator[AppServer]:
    env = {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "all"}
    # It chooses its device itself, so that it warns of a CPU where a GPU could be.
    command = partial(serve_command, device="auto")
    server = AppServer(tmp_path_factory.mktemp("app"), env, command)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        say = pytest.fail if os.environ.get("FLORENCE_REQUIRE_BROWSER") else pytest.skip
        say("The page is tested in Chromium, and none was found; apt-get install chromium.")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reported() -> list[str]:
    """The errors that the browser reports, breaches of the page's content policy among them."""
    return []


@pytest.fixture(scope="module")
def new_page(browser, reported):
    """A page in a profile of its own, which has not gone anywhere yet."""

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: reported.append(str(error)))
        page.on("console", lambda said: said.type == "error" and reported.append(said.text))
        return page

    return open_page


@pytest.fixture
def console(reported) -> Iterator[list[str]]:
    """What is reported during a test, which fails unless the test takes it out."""
    yield reported
    unexpected = reported.copy()
    reported.clear()
    assert unexpected == []


@pytest.fixture(scope="module")
def tab(new_page) -> Page:
    """One for all tests that need nothing special, as opening one takes most of a test's time."""
    return new_page()


@pytest.fixture
def page(tab, app, console) -> Iterator[Page]:
    open_app(tab, app)
    yield tab
    tab.unroute_all()
