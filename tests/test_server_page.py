"""The page, in a browser: a file and a microphone become text, and the canvas changes over the steps."""

from __future__ import annotations

import io
import json
import shutil
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spoken import WordModel

from diffusion_gemma_asr.audio.read import SAMPLE_RATE, load_audio

pytest.importorskip("fastapi", reason="needs the extra [server]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
srt = pytest.importorskip("srt", reason="needs srt")
webvtt = pytest.importorskip("webvtt", reason="needs webvtt-py")

from server_fixture import LiveServer, serving  # noqa: E402

from diffusion_gemma_asr.server.settings import ServerSettings  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "en.flac"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

Page = Any


def until(page: Page, expression: str) -> None:
    """Waits until some JavaScript is true. The page's own security policy forbids Playwright's way to do that."""
    end = time.monotonic() + 15
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not true in time: {expression}"
        page.wait_for_timeout(20)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with serving(ServerSettings(models=("mini",))) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium whose microphone plays the example over and over, a pause of two seconds behind it."""
    sound = np.concatenate([load_audio(EXAMPLE), np.zeros(2 * SAMPLE_RATE, np.float32)])
    path = tmp_path_factory.mktemp("microphone") / "en.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, len(sound), "NONE", ""))
        file.writeframes((32767 * sound).astype("<i2").tobytes())
    media = [
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={path}",
    ]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *media])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: LiveServer, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page, with whatever the test's parameter says of the browser; it must log no error."""
    context = browser.new_context(permissions=["microphone"], **getattr(request, "param", {}))
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    until(page, "document.querySelector('[name=model]').value === 'mini'")
    yield page
    context.close()
    assert errors == []


def transcribe(page: Page, start: str) -> str:
    """Drops the example; its transcript."""
    page.get_by_text(start, exact=True).click()
    page.set_input_files("#file", EXAMPLE)
    page.wait_for_selector("#downloads", timeout=20_000)
    return page.inner_text("#segments p")


def cells(page: Page, of: str = "cells") -> list[str]:
    return page.locator(f"[data-{of}] span").all_inner_texts()


def test_a_recording_and_its_canvas(page: Page) -> None:
    text = transcribe(page, "noise")
    assert text.startswith("follow")
    assert page.get_attribute("#segments p", "lang") == "en"

    until(page, "document.querySelector('[data-slider]').value > 1")  # it plays
    last = int(page.get_attribute("[data-slider]", "max"))
    canvases = []
    for step in range(last + 1):
        page.fill("[data-slider]", str(step))
        assert page.inner_text("[data-step]") == f"step {step} of {last}"
        canvases.append(cells(page))
    assert "follow" not in "".join(canvases[0]) and "".join(canvases[-1]) == text.replace(" ", "")
    sure = page.locator("[data-cells] span").evaluate_all(
        "cells => cells.map(cell => cell.style.getPropertyValue('--sure'))"
    )
    assert all(0 <= float(value) <= 1 for value in sure) and float(sure[0]) > 0.5
    assert "".join(cells(page, "draft-cells")).startswith("follow")


def test_a_canvas_from_the_draft_begins_with_the_draft(page: Page) -> None:
    transcribe(page, "draft")
    page.fill("[data-slider]", "0")
    assert cells(page) == cells(page, "draft-cells") != []


def test_times_play_the_sound(page: Page) -> None:
    transcribe(page, "draft")
    page.click("#segments button")
    until(page, "document.querySelector('audio').currentTime > 0.2")
    until(page, "document.querySelector('#segments li').className === 'now'")


def test_files_to_save(page: Page, tmp_path: Path) -> None:
    text = transcribe(page, "draft")
    saved = {}
    for kind in ("txt", "srt", "vtt", "json"):
        with page.expect_download() as download:
            page.click(f"[data-download={kind}]")
        assert download.value.suggested_filename == f"en.{kind}"
        download.value.save_as(tmp_path / kind)
        saved[kind] = (tmp_path / kind).read_text()
    assert saved["txt"] == f"{text}\n"
    for cues in (list(srt.parse(saved["srt"])), list(webvtt.from_buffer(io.StringIO(saved["vtt"])))):
        contents = [getattr(cue, "content", None) or cue.text for cue in cues]
        assert " ".join(contents).replace("\n", " ") == text
    first = next(srt.parse(saved["srt"]))
    assert 0 <= first.start.total_seconds() < first.end.total_seconds() < 3.5
    (segment,) = json.loads(saved["json"])["segments"]
    assert segment["text"] == text and segment["words"][0]["word"].strip() == "follow"


def test_all_of_it_works_from_the_keyboard(page: Page) -> None:
    page.focus("[name=model]")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("6")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("[value=noise]")
    page.set_input_files("#file", EXAMPLE)
    page.wait_for_selector("#downloads", timeout=20_000)
    page.focus("[data-slider]")
    page.keyboard.press("End")  # a slider that is moved pauses what plays
    page.keyboard.press("Home")
    first = cells(page)
    page.keyboard.press("ArrowRight")
    assert page.inner_text("[data-step]").startswith("step 1") and cells(page) != first
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('[data-slider]').value >= 2")


def test_the_microphone(page: Page) -> None:
    page.click("#speak")
    page.wait_for_selector(".partial:not(:empty)", timeout=10_000)  # grey, while it is spoken
    assert page.get_attribute(".partial", "aria-hidden") == "true"
    assert page.inner_text("#state").endswith("s behind")
    until(page, "document.querySelector('#segments p').innerText.includes('river')")
    page.wait_for_timeout(2000)
    page.click("#speak")
    page.wait_for_selector("#again", timeout=10_000)
    assert page.inner_text("#segments p").startswith("follow")
    assert page.locator(".partial:not(:empty)").count() == 0
    page.click("#again")  # the recording is a file like any other
    page.wait_for_selector("#canvas", timeout=10_000)
    until(page, "document.querySelector('#segments p')?.innerText.includes('river')")


def test_a_file_ends_the_recording(page: Page) -> None:
    page.click("#speak")
    page.wait_for_selector(".partial:not(:empty)", timeout=10_000)
    assert transcribe(page, "draft").startswith("follow")
    page.wait_for_timeout(1000)
    assert page.locator("#segments li").count() == 1
    assert page.get_attribute("#speak", "aria-pressed") == "false" and not page.is_visible("#again")


@pytest.mark.parametrize("page", [{"reduced_motion": "reduce"}], indirect=True)
def test_nothing_moves_where_people_do_not_want_it(page: Page) -> None:
    transcribe(page, "noise")
    last = page.get_attribute("[data-slider]", "max")
    assert page.inner_text("[data-step]") == f"step {last} of {last}"
    assert page.locator("[data-cells] span").first.evaluate("cell => getComputedStyle(cell).animationName") == "none"


@pytest.mark.parametrize("page", [{"viewport": {"width": 340, "height": 640}, "color_scheme": "dark"}], indirect=True)
def test_a_phone_at_night(page: Page) -> None:
    transcribe(page, "noise")
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(red, green, blue) < 60


def test_a_file_that_is_no_sound_and_a_key(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no sound")
    settings = ServerSettings(models=("mini",), api_key="s3cret")
    with serving(settings, lambda name: WordModel(), ready=False) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("dialog[open]")
        page.fill("dialog input", "s3cret")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('[name=model]').value === 'mini'")
        page.set_input_files("#file", path)
        page.wait_for_selector("[role=alert]")
        assert "notes.txt" in page.inner_text("[role=alert]")
        page.close()
