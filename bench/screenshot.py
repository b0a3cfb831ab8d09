"""The picture of the page in the README: two answers about one demo image, side by side.

python bench/screenshot.py docs/images/page.png [--dark]

Starts the app with the demo checkpoint and uses its page in a headless Chromium, as a person would.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from PIL import Image
from playwright.sync_api import Page, sync_playwright

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
SIZE: Final = {"width": 1500, "height": 1280}
MOST_BYTES: Final = 300_000
# Few enough for a small file, and more than the eye misses in drawn scenes.
COLORS: Final = 256


@contextmanager
def served() -> Iterator[str]:
    """The address of an app with the demo checkpoint."""
    command = [sys.executable, "-m", "serve.cli.main", "serve", "--model", "demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as app:
        try:
            said = iter(app.stderr or ())
            yield next(found[0] for line in said if (found := re.search(r"http://[\d.:]+", line)))
        finally:
            app.terminate()


def use(page: Page, url: str) -> None:
    """Two tasks about one image; the second has its features from the first."""
    page.goto(url)
    page.get_by_role("radio", name="scene bike").check(force=True)
    page.get_by_role("img", name="The image scene_bike.png").wait_for()
    for task in ("OCR with region", "Dense region caption"):
        page.get_by_role("combobox", name="Task", exact=True).select_option(task)
        page.get_by_role("button", name="Ask").click()
        page.get_by_text(re.compile(r"objects? in \d")).wait_for()
        if task == "OCR with region":
            page.get_by_role("button", name="Keep for comparison").click()
    page.get_by_role("article", name="This answer").locator("tbody tr").first.hover()


def small_png(taken: bytes) -> bytes:
    """The picture with a palette of its own."""
    with Image.open(io.BytesIO(taken)) as picture:
        drawn = picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    made = io.BytesIO()
    drawn.save(made, "PNG", optimize=True)
    return made.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise SystemExit("The picture is taken in Chromium, and none was found; install chromium.")
    with served() as url, sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=browser_path, args=flags)
        scheme = "dark" if given.dark else "light"
        page = browser.new_page(viewport=SIZE, color_scheme=scheme)
        use(page, url)
        picture = small_png(page.screenshot())
        browser.close()
    if len(picture) > MOST_BYTES:
        raise SystemExit(f"The picture has {len(picture):,} bytes, and {MOST_BYTES:,} are enough.")
    given.picture.write_bytes(picture)
    print(f"{given.picture}: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
