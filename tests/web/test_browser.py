"""The page in headless Chromium: playback, microphone, interrupts, keyboard use and accessibility.

`--target HOST:PORT` uses a running gateway instead of the stand-in; `--screenshot docs/web.png` takes a screenshot.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page as Tab
from playwright.async_api import async_playwright, expect

from avatar.store.sessions import SessionStore
from benchmarks.standin.content import PUBLIC
from tests.web.page import ASSETS, Page, serving

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",  # a beep each second
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]
WAIT_MS = 30_000
# Returns the controls without an accessible name.
NAMELESS = """() => [...document.querySelectorAll("button, input, meter, video, summary, img, fieldset, section")]
  .filter((each) => !each.closest("[hidden]"))
  .filter((each) => !(each.getAttribute("aria-label") || each.labels?.[0]?.textContent.trim() || each.alt
    || each.getAttribute("aria-labelledby") || each.querySelector("legend")?.textContent.trim()
    || each.labels?.[0]?.querySelector("img")?.alt
    || (["BUTTON", "SUMMARY"].includes(each.tagName) && each.textContent.trim())
    || each.alt === "")).map((each) => each.outerHTML)"""
# Returns the texts whose WCAG contrast with their background is too low.
FAINT = """() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((each) => each / 255)
    .map((each) => (each <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4))
    .reduce((sum, each, i) => sum + each * [.2126, .7152, .0722][i], 0);
  const behind = (each) => {
    for (let at = each; at; at = at.parentElement) {
      const color = parts(getComputedStyle(at).backgroundColor);
      if ((color[3] ?? 1) > .5) return color;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")].filter((each) => each.offsetParent && !each.closest(":disabled")
    && [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())).map((each) => {
    const [a, b] = [light(parts(getComputedStyle(each).color)), light(behind(each))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), each.textContent.trim()];
  }).filter(([ratio]) => ratio < 4.5);
}"""
LOUDEST = """async () => {
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaStreamSource(document.getElementById("video").srcObject).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  let loudest = 0;
  for (let i = 0; i < 40 && loudest < .02; i += 1) {
    await new Promise((done) => setTimeout(done, 50));
    analyser.getFloatTimeDomainData(samples);
    loudest = Math.max(loudest, ...samples.map(Math.abs));
  }
  return loudest;
}"""


@asynccontextmanager
async def browsing(page: Page, **context: Any) -> AsyncGenerator[Tab, None]:
    """Open the page in a new browser. Exceptions of its script and console errors fail the test."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail("there is no browser; on Debian: apt-get install -y --no-install-recommends chromium")
    problems: list[str] = []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found, args=FLAGS)
        tab = await (await browser.new_context(permissions=["microphone"], **context)).new_page()
        tab.set_default_timeout(WAIT_MS)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        try:
            await tab.goto(page.url)
            yield tab
        finally:
            await browser.close()
    assert problems == []


async def expect_state(tab: Tab, text: str) -> None:
    await expect(tab.get_by_role("status")).to_have_text(text, timeout=WAIT_MS)


async def start(tab: Tab) -> None:
    await tab.get_by_role("button", name="Start").click()
    await expect_state(tab, "Listening")


async def decoded(tab: Tab) -> int:
    """Number of frames that the video element has shown."""
    return int(await tab.evaluate("document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames"))


async def test_a_clip_plays_with_video_and_audio(page: Page) -> None:
    async with browsing(page) as tab:
        await start(tab)
        before, started = await decoded(tab), time.monotonic()
        await tab.get_by_label("Drop an audio file here, or choose one").set_input_files(ASSETS / "speech.wav")
        await expect_state(tab, "Speaking")
        assert await tab.evaluate(LOUDEST) > 0.02
        await asyncio.sleep(2)
        rate_hz = (await decoded(tab) - before) / (time.monotonic() - started)
        assert rate_hz > 5
        assert await tab.evaluate("document.getElementById('video').videoWidth") == 64
        await expect(tab.locator("#reaction")).to_contain_text(" s")
        await expect(tab.locator("#rate")).to_contain_text("/ s")
        await expect(tab.locator("#promise")).to_contain_text(" s")
        await expect_state(tab, "Listening")


async def test_escape_interrupts_and_the_page_says_so(page: Page) -> None:
    async with browsing(page) as tab:
        await start(tab)
        await tab.get_by_label("Drop an audio file here, or choose one").set_input_files(ASSETS / "speech.wav")
        await expect_state(tab, "Speaking")
        await asyncio.sleep(1)
        await tab.keyboard.press("Escape")
        await expect_state(tab, "Listening")
        await tab.get_by_text("Events").click()
        event = await tab.get_by_role("listitem").filter(has_text="Interrupted after").inner_text()
        assert 0 < float(event.split()[-2]) < 7  # of the clip's nine seconds


async def test_the_microphone_is_spoken_until_it_is_stopped(page: Page) -> None:
    async with browsing(page) as tab:
        await start(tab)
        await tab.get_by_role("button", name="Speak through the avatar").click()
        await expect_state(tab, "Speaking")
        assert await tab.evaluate(LOUDEST) > 0.02
        await tab.get_by_role("button", name="Stop the microphone").click()
        await expect_state(tab, "Listening")


async def test_the_avatar_listens_to_the_microphone_while_a_clip_is_spoken(store: SessionStore) -> None:
    content = replace(PUBLIC, inputs=("heard",))
    async with serving(store, content=content) as page, browsing(page) as tab:
        await start(tab)
        await tab.get_by_role("button", name="Talk to the avatar").click()
        await tab.get_by_label("Drop an audio file here, or choose one").set_input_files(ASSETS / "speech.wav")
        await expect_state(tab, "Speaking")
        page.gateway.audio.heard.clear()
        await asyncio.sleep(2)
        assert any(page.gateway.audio.heard), "the beep of each second, while the avatar speaks"
        await tab.get_by_role("button", name="Stop the microphone").click()
        await expect(tab.get_by_role("button", name="Talk to the avatar")).to_have_attribute("aria-pressed", "false")


async def test_the_page_works_by_keyboard_alone(page: Page) -> None:
    async with browsing(page) as tab:
        await press_until(tab, "Tab", "document.activeElement.name == 'portrait'")
        await tab.keyboard.press("ArrowRight")
        assert await tab.locator("[name=portrait]").nth(1).is_checked()
        assert await outlined(tab)
        await press_until(tab, "Shift+Tab", "document.activeElement.id == 'connect'")
        await tab.keyboard.press("Enter")
        await expect_state(tab, "Listening")
        assert len(page.gateway.vae.pictures) == 1
        assert page.gateway.vae.pictures[0] == (ASSETS / "portraits/1.png").read_bytes()
        await tab.get_by_label("Or type a text").focus()
        await tab.keyboard.type("good morning")
        await tab.keyboard.press("Enter")
        await expect_state(tab, "Speaking")


async def press_until(tab: Tab, key: str, state: str) -> None:
    for _ in range(12):
        await tab.keyboard.press(key)
        if await tab.evaluate(state):
            return
    pytest.fail(f"{key} does not lead to where {state}")


async def outlined(tab: Tab) -> bool:
    """Return whether the focus is visible."""
    style = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    return bool(await tab.evaluate(style) == "solid")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_control_has_a_name_and_every_text_is_legible(page: Page, scheme: Any) -> None:
    async with browsing(page, color_scheme=scheme) as tab:
        await start(tab)
        assert await tab.evaluate(NAMELESS) == []
        assert await tab.evaluate(FAINT) == []


async def test_an_uploaded_picture_speaks_and_a_large_one_is_refused(page: Page) -> None:
    async with browsing(page) as tab:
        upload = tab.get_by_label("Upload a picture …")
        await upload.set_input_files(ASSETS / "portraits/2.png")
        await start(tab)
        assert page.gateway.vae.pictures == [(ASSETS / "portraits/2.png").read_bytes()]
        await tab.get_by_role("button", name="Leave").click()
        await expect_state(tab, "Not connected")
        big = {"name": "big.png", "mimeType": "image/png", "buffer": bytes(3 << 20)}
        await tab.locator("#picture").set_input_files(big)  # type: ignore[arg-type]
        await expect(tab.get_by_role("alert")).to_contain_text("at most 2 MB")


async def test_the_notice_about_a_picture_stays_until_the_next_session(page: Page) -> None:
    page.gateway.vae.notice = "No face was found in this picture."
    async with browsing(page) as tab:
        await start(tab)
        await expect(tab.get_by_role("alert")).to_have_text(page.gateway.vae.notice)
        await tab.get_by_label("Or type a text").fill("good morning")
        await tab.keyboard.press("Enter")
        await expect_state(tab, "Speaking")
        await expect_state(tab, "Listening")
        await expect(tab.get_by_role("alert")).to_have_text(page.gateway.vae.notice)
        await tab.get_by_role("button", name="Leave").click()
        page.gateway.vae.notice = ""
        await start(tab)
        await expect(tab.get_by_role("alert")).to_be_empty()


async def test_the_page_says_that_a_slow_machine_will_lag(store: SessionStore) -> None:
    async with serving(store, session_s=0.6) as page, browsing(page) as tab:
        await start(tab)
        alert = tab.get_by_role("alert")
        await expect(alert).to_contain_text("This machine computes 10 seconds of video in 13.")
        await expect(alert).to_contain_text("the picture will lag")
        await expect(tab.locator("#promise")).to_have_text("nothing")
        await tab.get_by_label("Or type a text").fill("good morning")
        await tab.keyboard.press("Enter")
        await expect_state(tab, "Speaking")
        await expect_state(tab, "Listening")
        await expect(alert).to_contain_text("the picture will lag")


async def test_a_session_that_ends_is_reported_and_another_can_start(page: Page) -> None:
    async with browsing(page) as tab:
        await start(tab)
        (session_id,) = page.gateway.audio.sessions
        await (await page.avatar.session(session_id)).delete()
        await expect_state(tab, "Not connected")
        await expect(tab.get_by_role("alert")).not_to_be_empty()
        await start(tab)


async def test_a_screenshot_of_the_page_can_be_taken(page: Page, pytestconfig: pytest.Config) -> None:
    path: Path | None = pytestconfig.getoption("--screenshot")
    if path is None:
        pytest.skip("--screenshot FILE takes one")
    size = {"width": 1120, "height": 856}
    async with browsing(page, viewport=size) as tab:
        await start(tab)
        await tab.get_by_label("Drop an audio file here, or choose one").set_input_files(ASSETS / "speech.wav")
        await expect_state(tab, "Speaking")
        await asyncio.sleep(3)
        await tab.screenshot(path=path)
        assert path.stat().st_size <= 300_000
