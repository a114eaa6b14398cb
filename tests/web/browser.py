"""A headless Chromium on the page, and a person's steps in it."""

import base64
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page as Tab
from playwright.async_api import async_playwright, expect

from tests.web.page import Page

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
WAIT_MS = 15_000
# Names of controls.
TEXT, AUDIO_FILE, PICTURE = "Text to say", "Audio file …", "Upload a picture …"
SPEAK, TALK = "Speak through it", "Talk to it"
# Lets the browser refuse the microphone with an error of this name.
REFUSE = "(name) => { navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', name); }; }"
DROP = """([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type }));
  for (const type of ["dragenter", "dragover", "drop"]) {
    document.querySelector("h1").dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer }));
  }
}"""


@asynccontextmanager
async def browsing(page: Page, tolerated: str = "", **context: Any) -> AsyncGenerator[Tab, None]:
    """Open the page in a new browser. Exceptions of its script and console errors fail the test.

    tolerated: part of the console errors that are expected, if any are. context: options of the browser's context.
    """
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
    assert [each for each in problems if not tolerated or tolerated not in each] == []


async def expect_state(tab: Tab, text: str) -> None:
    await expect(tab.get_by_role("status")).to_have_text(text, timeout=WAIT_MS)


async def start(tab: Tab) -> None:
    await tab.get_by_role("button", name="Start").click()
    await expect_state(tab, "Ready")


async def say(tab: Tab, text: str) -> None:
    await tab.get_by_label(TEXT).fill(text)
    await tab.keyboard.press("Enter")


async def drop(tab: Tab, path: Path, kind: str) -> None:
    """Drop a file on the page's title. kind: its media type, as the browser sees it."""
    await tab.evaluate(DROP, [path.name, kind, base64.b64encode(path.read_bytes()).decode()])
