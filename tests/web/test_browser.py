"""The page in real headless Chromium: it plays, it is heard, it is interrupted, and keys are enough to use it.

`--target HOST:PORT` runs it over a gateway that is up instead of a stand-in; `--screenshot docs/web.png` takes a
picture.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page as Tab
from playwright.async_api import async_playwright, expect

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
# Names each control as assistive technology does, and tells which has none.
NAMELESS = """() => [...document.querySelectorAll("button, input, meter, video, summary, img, fieldset, section")]
  .filter((each) => !each.closest("[hidden]"))
  .filter((each) => !(each.getAttribute("aria-label") || each.labels?.[0]?.textContent.trim() || each.alt
    || each.getAttribute("aria-labelledby") || each.querySelector("legend")?.textContent.trim()
    || each.labels?.[0]?.querySelector("img")?.alt
    || (["BUTTON", "SUMMARY"].includes(each.tagName) && each.textContent.trim())
    || each.alt === "")).map((each) => each.outerHTML)"""
# The contrast of each text with what is behind it, as WCAG counts it.
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
HEARD = """async () => {
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
    """The page in a browser of its own. What its script throws, or the console calls an error, fails."""
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


async def state(tab: Tab, text: str) -> None:
    await expect(tab.get_by_role("status")).to_have_text(text, timeout=WAIT_MS)


async def start(tab: Tab) -> None:
    await tab.get_by_role("button", name="Start").click()
    await state(tab, "Listening")


async def decoded(tab: Tab) -> int:
    """Frames that the video element has shown."""
    return int(await tab.evaluate("document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames"))


async def test_a_clip_plays_with_frames_and_sound(pytestconfig: pytest.Config) -> None:
    async with serving(pytestconfig.getoption("--target")) as page, browsing(page) as tab:
        await start(tab)
        before, began = await decoded(tab), time.monotonic()
        await tab.get_by_label("Drop a clip here, or choose one").set_input_files(ASSETS / "speech.wav")
        await state(tab, "Speaking")
        assert await tab.evaluate(HEARD) > 0.02
        await asyncio.sleep(2)
        rate_hz = (await decoded(tab) - before) / (time.monotonic() - began)
        assert rate_hz > 5
        assert await tab.evaluate("document.getElementById('video').videoWidth") == 128
        await expect(tab.locator("#reaction")).to_contain_text(" s")
        await expect(tab.locator("#rate")).to_contain_text("/ s")
        await expect(tab.locator("#promise")).to_contain_text(" s")
        await state(tab, "Listening")


async def test_escape_interrupts_and_the_page_says_so(pytestconfig: pytest.Config) -> None:
    async with serving(pytestconfig.getoption("--target")) as page, browsing(page) as tab:
        await start(tab)
        await tab.get_by_label("Drop a clip here, or choose one").set_input_files(ASSETS / "speech.wav")
        await state(tab, "Speaking")
        await asyncio.sleep(1)
        await tab.keyboard.press("Escape")
        await state(tab, "Listening")
        await tab.get_by_text("What happened").click()
        told = await tab.get_by_role("listitem").filter(has_text="Interrupted after").inner_text()
        assert 0 < float(told.split()[-2]) < 7  # of the clip's nine seconds


async def test_the_microphone_is_spoken_until_it_is_stopped(pytestconfig: pytest.Config) -> None:
    async with serving(pytestconfig.getoption("--target")) as page, browsing(page) as tab:
        await start(tab)
        await tab.get_by_role("button", name="Speak into the microphone").click()
        await state(tab, "Speaking")
        assert await tab.evaluate(HEARD) > 0.02
        await tab.get_by_role("button", name="Stop the microphone").click()
        await state(tab, "Listening")


async def test_keys_alone_are_enough() -> None:
    async with serving() as page, browsing(page) as tab:
        await press_until(tab, "Tab", "document.activeElement.name == 'portrait'")
        await tab.keyboard.press("ArrowRight")
        assert await tab.locator("[name=portrait]").nth(1).is_checked()
        assert await outlined(tab)
        await press_until(tab, "Shift+Tab", "document.activeElement.id == 'connect'")
        await tab.keyboard.press("Enter")
        await state(tab, "Listening")
        assert len(page.gateway.pictures) == 1
        assert page.gateway.pictures[0] == (ASSETS / "portraits/1.png").read_bytes()
        await tab.get_by_label("Or type what to say").focus()
        await tab.keyboard.type("good morning")
        await tab.keyboard.press("Enter")
        await state(tab, "Speaking")


async def press_until(tab: Tab, key: str, state: str) -> None:
    for _ in range(12):
        await tab.keyboard.press(key)
        if await tab.evaluate(state):
            return
    pytest.fail(f"{key} does not lead to where {state}")


async def outlined(tab: Tab) -> bool:
    """Whether it can be seen where the focus is."""
    style = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    return bool(await tab.evaluate(style) == "solid")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_control_has_a_name_and_every_text_can_be_read(scheme: Any) -> None:
    async with serving() as page, browsing(page, color_scheme=scheme) as tab:
        await start(tab)
        assert await tab.evaluate(NAMELESS) == []
        assert await tab.evaluate(FAINT) == []


async def test_an_uploaded_picture_speaks_and_a_bad_one_is_refused_in_words() -> None:
    async with serving() as page, browsing(page) as tab:
        upload = tab.get_by_label("Upload a picture …")
        await upload.set_input_files(ASSETS / "portraits/2.png")
        await start(tab)
        assert page.gateway.pictures == [(ASSETS / "portraits/2.png").read_bytes()]
        await tab.get_by_role("button", name="Leave").click()
        await state(tab, "Not connected")
        big = {"name": "big.png", "mimeType": "image/png", "buffer": bytes(3 << 20)}
        await tab.locator("#picture").set_input_files(big)  # type: ignore[arg-type]
        await expect(tab.get_by_role("alert")).to_contain_text("at most 2 MB")


async def test_a_gateway_that_ends_is_told_and_can_be_called_again() -> None:
    async with serving() as page, browsing(page) as tab:
        await start(tab)
        page.gateway.hang_up()
        await state(tab, "Not connected")
        await expect(tab.get_by_role("alert")).not_to_be_empty()
        await start(tab)


async def test_a_picture_of_the_page_can_be_taken(pytestconfig: pytest.Config) -> None:
    path: Path | None = pytestconfig.getoption("--screenshot")
    if path is None:
        pytest.skip("--screenshot FILE takes one")
    size = {"width": 1120, "height": 856}
    async with serving(pytestconfig.getoption("--target")) as page, browsing(page, viewport=size) as tab:
        await start(tab)
        await tab.get_by_label("Drop a clip here, or choose one").set_input_files(ASSETS / "speech.wav")
        await state(tab, "Speaking")
        await asyncio.sleep(3)
        await tab.screenshot(path=path)
        assert path.stat().st_size <= 300_000
