"""Makes page.png, the picture of the web page: `python docs/images/screenshot.py [SOUND]`. Needs playwright and chromium."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from diffusion_gemma_asr.server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from server_fixture import serving  # noqa: E402


def main() -> None:
    """Transcribes a recording on the page, and takes a picture of one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sound", nargs="?", default=ROOT / "examples" / "en.flac")
    parser.add_argument("--out", default=Path(__file__).with_name("page.png"))
    parser.add_argument("--model", default="mini")
    parser.add_argument("--start", default="noise", choices=["noise", "draft"])
    parser.add_argument("--step", default="1")
    parser.add_argument("--until", default="#transcript", help="CSS selector of the last part that is to be seen")
    args = parser.parse_args()
    with serving(ServerSettings(models=(args.model,))) as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 1400})
        page.goto(server.url)
        page.wait_for_selector("[name=model] option", state="attached")
        page.get_by_text(args.start, exact=True).click()
        page.set_input_files("#file", args.sound)
        page.wait_for_selector("#downloads")
        page.fill("[data-slider]", args.step)
        page.wait_for_timeout(1000)
        last = page.locator(args.until).bounding_box()
        assert last is not None
        page.screenshot(path=args.out, clip={"x": 0, "y": 0, "width": 900, "height": last["y"] + last["height"] + 12})
        browser.close()


if __name__ == "__main__":
    main()
