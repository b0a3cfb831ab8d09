"""The SDK's own page in a browser: what people see and press before the platform's tools are used.

Its scripts come from the platform's servers. In their place stand Vue and Element UI, which the
platform's bundle is made of, from the npm registry (``make sdk-page``), and ``sdk_page.js`` for
what only the platform has; the templates, their texts and what buttons do are the SDK's and the
app's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from app_server import AppServer
from hub_standin import Faults, HubStandin
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright
from production_app import hub_environment, production_environment, published_checkpoints

# The double, and what is done with a browser.
sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from contract_calls import DEMO, TRAINING
from page_tools import BROWSERS, FLAGS
from platform_double import TASK_ID, TOKEN, PlatformDouble
from platform_state import TEAM_ID

from serve.platform.experiments import write_experiment
from serve.platform.team_files import upload_experiment
from serve.sdk import sly

pytestmark = pytest.mark.soak

PACKAGES = Path(os.environ.get("FLORENCE_SDK_PAGE", Path(sys.prefix) / "sdk-page")) / "node_modules"
SCRIPTS = (
    PACKAGES / "vue/dist/vue.js",
    PACKAGES / "element-ui/lib/index.js",
    PACKAGES / "lodash/lodash.min.js",
    PACKAGES / "fast-json-patch/dist/fast-json-patch.js",
    Path(__file__).with_name("sdk_page.js"),
)
STYLES = (PACKAGES / "element-ui/lib/theme-default/index.css",)
# Of the platform's servers; what is not named here may not be asked for.
FROM_THE_PLATFORM = {
    r"/sly-app-widgets-[\d.]+\.bundle\.js$": ("text/javascript", SCRIPTS),
    r"/sly-app-widgets-[\d.]+\.bundle\.css$": ("text/css", STYLES),
    r"/SlyApp\.js$|/socket\.io\.js$": ("text/javascript", ()),
    r"/fonts/element-icons\.(woff|ttf)": ("font/woff", ()),
    r"\.gif$|/favicon\.ico$": ("image/gif", ()),
}
PATIENCE_MS = 20_000
MARKUP = "<img src=x onerror=window.taken=1>"
MODELS = ["Florence-2-base", "Florence-2-large", "Florence-2-base-ft", "Florence-2-large-ft"]


@pytest.fixture(scope="module")
def platform() -> Iterator[PlatformDouble]:
    double = PlatformDouble()
    double.start()
    yield double
    double.stop()


@pytest.fixture(scope="module")
def fine_tune(platform, tmp_path_factory) -> str:
    """Its path in the team files; whoever uploaded it is no friend."""
    out = tmp_path_factory.mktemp("trained") / "street"
    shutil.copytree(DEMO, out / "best")
    (out / "training.json").write_text(json.dumps(TRAINING), encoding="utf-8")
    api = sly.Api(platform.address, TOKEN, retry_count=1)
    checkpoint = upload_experiment(api, TEAM_ID, write_experiment(out))
    path = f"{checkpoint.rpartition('/checkpoints/')[0]}/experiment_info.json"
    info = json.loads(platform.state.files[path].content)
    info |= {"experiment_name": f"street {MARKUP}", "datetime": f"today {MARKUP}"}
    info |= {"evaluation_report_id": MARKUP}
    platform.state.add_file(TEAM_ID, path, json.dumps(info).encode())
    return checkpoint


@pytest.fixture(scope="module")
def hub_and_app(platform, fine_tune, tmp_path_factory) -> Iterator[tuple[HubStandin, AppServer]]:
    folder = tmp_path_factory.mktemp("session")
    with published_checkpoints() as (hub, command):
        more = {"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_VISIBLE_DEVICES": ""}
        env = production_environment(platform.address, TOKEN, TASK_ID, **more)
        env |= hub_environment(hub, {"FLORENCE2_CACHE": str(folder / "cache")})
        app = AppServer(folder, env, command)
        app.start(until="/is_alive")
        yield hub, app
        app.stop()


@pytest.fixture(scope="module")
def hub(hub_and_app) -> HubStandin:
    return hub_and_app[0]


@pytest.fixture(scope="module")
def app(hub_and_app) -> AppServer:
    return hub_and_app[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("The page is tested in Chromium, and none was found; apt-get install chromium.")
    if missing := [path for path in (*SCRIPTS, *STYLES) if not path.is_file()]:
        pytest.skip(f"The page needs its libraries, and {missing[0]} is missing; make sdk-page.")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def wrong() -> list[str]:
    """What the browser reports, and what was asked of servers that nobody named."""
    return []


def is_wrong(said: ConsoleMessage) -> bool:
    # In a template of the SDK's; the event is not lost.
    return said.type == "error" and "The .native modifier" not in said.text


@pytest.fixture(scope="module")
def tab(browser, app, wrong) -> Page:
    page = browser.new_context(viewport={"width": 1200, "height": 1400}).new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: is_wrong(said) and wrong.append(said.text))

    def answer(route: Route) -> None:
        url = route.request.url
        if url.startswith((app.url, "data:")):
            route.continue_()
            return
        for pattern, (kind, files) in FROM_THE_PLATFORM.items():
            if re.search(pattern, url):
                body = "\n;".join(path.read_text("utf-8") for path in files)
                route.fulfill(content_type=kind, body=body)
                return
        wrong.append(f"asked for {url}")
        route.abort()

    page.route("**/*", answer)
    return page


@pytest.fixture
def page(tab, app, hub, wrong) -> Iterator[Page]:
    tab.goto(app.url)
    tab.wait_for_function("window.isConnected")
    # What was chosen last is still there.
    tab.get_by_text("Publicly available models").click()
    yield tab
    hub.faults = Faults()
    folder = os.environ.get("FLORENCE_SCREENSHOTS")
    if folder:
        name = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0]
        tab.screenshot(path=f"{folder}/{name}.png", full_page=True)
    seen = [*wrong]
    wrong.clear()
    assert seen == []
    assert tab.evaluate("window.taken") is None


def deployed(app: AppServer) -> dict:
    answer = requests.post(f"{app.url}/get_deploy_info", json={}, timeout=60)
    return answer.json() if answer.ok else {}


def rows(page: Page):
    return page.locator("table.beautiful-table tbody tr")


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def stop(page: Page) -> None:
    press(page, "STOP AND CHOOSE ANOTHER MODEL")
    expect(page.get_by_role("button", name="SERVE", exact=True)).to_be_visible()


def test_a_browser_that_cannot_reach_the_platforms_servers_is_told_so(browser, app):
    page = browser.new_page()
    page.route(re.compile(r"^https://"), lambda route: route.abort())
    page.goto(app.url)
    expect(page.get_by_role("alert")).to_contain_text("which this browser cannot reach")
    expect(page.locator("#app-global-loading-icon")).to_have_count(0)
    page.close()


def test_four_models_are_listed_and_large_is_chosen(page):
    assert [row.locator("td").first.inner_text() for row in rows(page).all()] == MODELS
    chosen = page.locator("table.beautiful-table .el-radio__input.is-checked")
    expect(chosen).to_have_count(1)
    expect(rows(page).nth(1).locator(".is-checked")).to_have_count(1)
    expect(page.get_by_role("button", name="SERVE", exact=True)).to_be_visible()
    expect(page.get_by_text("STOP AND CHOOSE ANOTHER MODEL")).to_be_hidden()


def test_another_row_is_deployed_while_a_bar_moves_and_stop_frees_it(page, app, hub):
    rows(page).first.locator(".el-radio").click()
    hub.faults.delay_s_per_chunk = 0.01
    press(page, "SERVE")
    expect(page.get_by_text("Downloading Florence-2-base")).to_be_visible()
    bars = page.locator(".el-progress-bar__inner")
    widths = set()
    while page.get_by_text("Downloading Florence-2-base").is_visible():
        widths |= set(bars.evaluate_all("all => all.map(one => one.style.width)"))
        page.wait_for_timeout(20)
    assert len(widths) > 3
    expect(page.get_by_text("successfully loaded on CPU device")).to_be_visible()
    assert deployed(app)["checkpoint_name"] == "Florence-2-base"
    # Seen again by whoever opens the page now.
    page.reload()
    expect(page.get_by_text("successfully loaded on CPU device")).to_be_visible()
    warning = page.get_by_role("region", name="Select Model").get_by_text("A GPU can be expected")
    expect(warning).to_be_visible()
    expect(page.locator(".sly-editor", has_text="task_prompt")).to_be_visible()
    stop(page)
    assert deployed(app) == {}
    expect(warning).to_be_hidden()


def test_a_fine_tune_of_the_team_is_listed_as_text_and_served(page, app, fine_tune):
    page.get_by_text("Models trained in Supervisely").click()
    row = page.locator(".fast-table tbody tr")
    expect(row).to_have_count(1)
    expect(row).to_contain_text(f"street {MARKUP}")
    expect(row).to_contain_text("2 classes: vehicle, moon")
    expect(row).not_to_contain_text("-1")
    expect(row.get_by_role("link", name="Preview")).to_have_count(0)
    row.locator("input[type=radio], .el-radio").first.click()
    press(page, "SERVE")
    expect(page.get_by_text("successfully loaded on CPU device")).to_be_visible()
    assert deployed(app)["custom_checkpoint_path"] == fine_tune
    stop(page)


def test_what_is_chosen_beside_the_model_is_deployed_too(page, app):
    rows(page).nth(1).locator(".el-radio").click()
    card = page.get_by_role("region", name="Select Model")
    for field, value in (("Runtime", "PyTorch"), ("Precision", "bf16")):
        card.locator(".sly-field", has_text=field).locator(".el-select").first.click()
        page.locator(".el-select-dropdown:visible").get_by_text(value, exact=True).click()
    press(page, "SERVE")
    expect(page.get_by_text("successfully loaded on CPU device")).to_be_visible()
    found = deployed(app)
    assert (found["checkpoint_name"], found["model_precision"]) == ("Florence-2-large", "BF16")
    expect(page.get_by_role("alertdialog")).to_have_count(0)
    stop(page)


def test_what_cannot_be_served_is_said_on_the_page(page, hub, wrong):
    rows(page).nth(3).locator(".el-radio").click()
    hub.faults.status = 500
    press(page, "SERVE")
    said = "Florence-2-large-ft is not on this machine"
    info = page.get_by_role("region", name="Full model info")
    expect(page.get_by_role("alertdialog")).to_contain_text(said)
    expect(info.get_by_text(said)).to_be_visible()
    wrong.clear()
    hub.faults.status = None
    press(page, "SERVE")
    expect(page.get_by_text("successfully loaded on CPU device")).to_be_visible()
    stop(page)
    info.get_by_role("heading").click()
    expect(info.get_by_text("Deploy model to see the information.")).to_be_visible()


def test_a_model_that_a_client_deployed_is_shown(page, app):
    state = {"deploy_params": {"device": "cpu"}, "model_name": "Florence-2-base-ft"}
    body = {"state": state, "context": {}}
    assert requests.post(f"{app.url}/deploy_from_api", json=body, timeout=60).ok
    expect(page.get_by_text("Model was deployed from API request")).to_be_visible()
    stop(page)
    expect(rows(page).first).to_be_visible()
