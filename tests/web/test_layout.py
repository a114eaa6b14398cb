"""The page's layout in Chromium at three sizes, its use by keyboard alone, and axe's rules of accessibility."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page as Tab
from playwright.async_api import expect

from avatar.store.sessions import SessionStore
from benchmarks.standin import content
from tests.web.browser import REFUSE, SPEAK, TEXT, browsing, expect_state, say, start
from tests.web.page import ASSETS, Page, serving

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

AXE = Path(__file__).parent / "axe/node_modules/axe-core/axe.min.js"
SIDE = 128
SIZES = {"desktop": (1280, 800), "phone": (390, 844), "phone on its side": (844, 390)}
# As long as the longest of the VAE's notices about faces.
NOTICE = (
    "12 faces were found in this picture, and the largest one was taken. To show another person, send a picture of "
    "that person alone. The face is too small: it is 31 pixels wide and is enlarged 4.1 times, so the video is "
    "blurred. Send a picture in which it is at least 85 pixels wide."
)
# Returns the elements of the talk that are not wholly in the window, are cut, or lie over each other.
MISPLACED = """() => {
  const names = "#screen, .state, #picture-notice, .transcript, #message, #text, .talk button, .talk .file, #level";
  const shown = [...document.querySelectorAll(names)].filter((each) => each.checkVisibility());
  const box = new Map(shown.map((each) => [each, each.getBoundingClientRect()]));
  const outside = shown.filter((each) => {
    const { left, top, right, bottom } = box.get(each);
    return left < 0 || top < 0 || right > innerWidth || bottom > innerHeight || each.scrollWidth > each.clientWidth + 1;
  });
  const over = shown.filter((one) => shown.some((other) => {
    const [a, b] = [box.get(one), box.get(other)];
    return one !== other && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  }));
  const wide = document.documentElement.scrollWidth > innerWidth ? ["the page is too wide"] : [];
  return [...outside, ...over].map((each) => each.outerHTML.slice(0, 80)).concat(wide);
}"""
VIOLATIONS = """async () => (await axe.run(document, { resultTypes: ["violations"] })).violations
  .map(({ id, nodes }) => `${id}: ${nodes.map((each) => each.html.slice(0, 100))}`)"""


class LargeContent(content.Content):
    """Content whose latents have enough bytes for twelve frames of SIDE x SIDE pixels."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return 16, self.block_latents, 100, 64


@pytest.fixture
async def page(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Page, None]:
    """A page whose videos have 128 pixels a side, which are shown at twice their size."""
    monkeypatch.setattr(content, "SIDE", SIDE)
    monkeypatch.setattr(content, "RGB_BYTES", 3 * SIDE**2)
    async with serving(store, content=LargeContent(inputs=("heard",))) as page:
        yield page


@pytest.fixture(params=SIZES)
async def tab(page: Page, request: pytest.FixtureRequest) -> AsyncGenerator[Tab, None]:
    width, height = SIZES[request.param]
    async with browsing(page, viewport={"width": width, "height": height}) as tab:
        yield tab


async def check(tab: Tab, name: str, folder: Path) -> None:
    """Check the layout and accessibility of a state, and keep a screenshot."""
    await tab.screenshot(path=folder / f"{name}.png")
    assert await tab.evaluate(MISPLACED) == []
    if not await tab.evaluate("'axe' in window"):
        assert AXE.exists(), "axe is missing; `make test-web` installs it"
        await tab.evaluate(AXE.read_text(encoding="utf-8"))
    assert await tab.evaluate(VIOLATIONS) == []


async def test_every_state_is_in_sight_and_accessible(page: Page, tab: Tab, tmp_path: Path) -> None:
    await check(tab, "1 before", tmp_path)
    page.gateway.vae.notice = NOTICE
    await tab.locator("#picture").set_input_files(ASSETS / "portraits/2.png")
    await expect(tab.locator("#picture-notice")).to_have_text(NOTICE)
    await check(tab, "2 picture", tmp_path)
    await start(tab)
    await check(tab, "3 ready", tmp_path)
    await tab.evaluate(REFUSE, "NotAllowedError")
    await tab.get_by_role("button", name=SPEAK).click()
    await expect(tab.get_by_role("alert")).not_to_be_empty()
    await check(tab, "4 message", tmp_path)
    for number in range(8):
        await say(
            tab, f"Sentence {number} is long enough to need more than one line on a phone, whichever way it lies."
        )
    await expect_state(tab, "Speaking")
    await check(tab, "5 speaking", tmp_path)
    await tab.keyboard.press("Escape")
    await expect_state(tab, "Ready")
    await check(tab, "6 interrupted", tmp_path)
    await tab.get_by_role("button", name="Leave").click()
    await expect_state(tab, "Not connected")
    await check(tab, "7 left", tmp_path)
    await tab.screenshot(path=tmp_path / "8 whole page.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_both_colour_schemes_are_accessible(page: Page, scheme: Any, tmp_path: Path) -> None:
    async with browsing(page, color_scheme=scheme) as tab:
        await start(tab)
        await say(tab, "good morning")
        await expect_state(tab, "Speaking")
        await check(tab, scheme, tmp_path)


async def test_the_video_is_no_larger_than_its_pixels_bear(tab: Tab) -> None:
    await start(tab)
    box = await tab.locator("#screen").bounding_box()
    assert box is not None
    assert (box["width"], box["height"]) == (2 * SIDE, 2 * SIDE)
    for video, ratio in (((720, 400), 720 / 400), ((400, 720), 400 / 720)):
        await tab.evaluate(
            "([width, height]) => { const { style } = document.getElementById('screen');"
            "style.setProperty('--video-width', width); style.setProperty('--video-height', height); }",
            list(video),
        )
        box = await tab.locator("#screen").bounding_box()
        assert box is not None
        assert box["width"] / box["height"] == pytest.approx(ratio, rel=0.01)
        assert await tab.evaluate(MISPLACED) == []


async def test_the_page_works_by_keyboard_alone(page: Page, tab: Tab) -> None:
    await press_until(tab, "Tab", "document.activeElement.name == 'portrait'")
    await tab.keyboard.press("ArrowRight")
    assert await tab.locator("[name=portrait]").nth(1).is_checked()
    assert await outlined(tab)
    await press_until(tab, "Shift+Tab", "document.activeElement.id == 'connect'")
    await tab.keyboard.press("Enter")
    await expect_state(tab, "Ready")
    assert page.gateway.vae.pictures == [(ASSETS / "portraits/1.png").read_bytes()]
    await press_until(tab, "Shift+Tab", f"document.activeElement.getAttribute('aria-label') == '{TEXT}'")
    await tab.keyboard.type("good morning, and a good day to all of you")
    await tab.keyboard.press("Enter")
    await expect_state(tab, "Speaking")
    await press_until(tab, "Tab", "document.activeElement.id == 'interrupt'")
    await tab.keyboard.press("Space")
    await expect(tab.get_by_role("log")).to_contain_text("interrupted")
    await press_until(tab, "Tab", "document.activeElement.id == 'microphone-speak'")
    await tab.keyboard.press("Space")
    await expect(tab.get_by_role("button", name=SPEAK)).to_have_attribute("aria-pressed", "true")
    await tab.keyboard.press("Space")
    await press_until(tab, "Tab", "document.activeElement.id == 'clip'")
    await press_until(tab, "Shift+Tab", "document.activeElement.id == 'transcript'")
    await press_until(tab, "Tab", "document.activeElement.id == 'connect'")
    await tab.keyboard.press("Enter")
    await expect_state(tab, "Not connected")


async def press_until(tab: Tab, key: str, state: str) -> None:
    for _ in range(14):
        await tab.keyboard.press(key)
        if await tab.evaluate(state):
            return
    pytest.fail(f"{key} does not lead to where {state}")


async def outlined(tab: Tab) -> bool:
    """Return whether the focus is visible."""
    style = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    return bool(await tab.evaluate(style) == "solid")
