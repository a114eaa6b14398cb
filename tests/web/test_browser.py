"""The page in headless Chromium: playback, microphone, interrupts, pictures and messages.

`--target HOST:PORT` uses a running gateway instead of the stand-in; `--screenshot docs/web.png` takes a screenshot.
"""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.async_api import Page as Tab
from playwright.async_api import expect

from avatar.errors import VoiceFailed
from avatar.store.sessions import SessionStore
from benchmarks.standin.content import PUBLIC
from tests.web.browser import AUDIO_FILE, PICTURE, REFUSE, SPEAK, TALK, browsing, drop, expect_state, say, start
from tests.web.page import ASSETS, MAX_PEERS, Page, serving

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

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


async def decoded(tab: Tab) -> int:
    """Number of frames that the video element has shown."""
    return int(await tab.evaluate("document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames"))


async def test_a_clip_plays_with_video_and_audio(page: Page) -> None:
    async with browsing(page) as tab:
        await start(tab)
        before, started = await decoded(tab), time.monotonic()
        await tab.get_by_label(AUDIO_FILE).set_input_files(ASSETS / "speech.wav")
        await expect_state(tab, "Speaking")
        assert await tab.evaluate(LOUDEST) > 0.02
        await asyncio.sleep(2)
        rate_hz = (await decoded(tab) - before) / (time.monotonic() - started)
        assert rate_hz > 5
        assert await tab.evaluate("document.getElementById('video').videoWidth") == 64
        await expect(tab.locator("#reaction")).to_contain_text(" s")
        await expect(tab.locator("#rate")).to_contain_text("/ s")
        await expect(tab.locator("#expected")).to_contain_text(" s")
        await expect_state(tab, "Ready")


async def test_escape_interrupts_and_the_page_says_so(page: Page) -> None:
    async with browsing(page) as tab:
        await start(tab)
        await tab.get_by_label(AUDIO_FILE).set_input_files(ASSETS / "speech.wav")
        await expect_state(tab, "Speaking")
        await asyncio.sleep(1)
        await tab.keyboard.press("Escape")
        await expect_state(tab, "Ready")
        await tab.get_by_text("Events").click()
        event = await tab.get_by_role("listitem").filter(has_text="Interrupted after").inner_text()
        assert 0 < float(event.split()[-2]) < 7  # of the clip's nine seconds


async def test_the_microphone_is_spoken_until_it_is_stopped(page: Page) -> None:
    async with browsing(page) as tab:
        await start(tab)
        microphone = tab.get_by_role("button", name=SPEAK)
        await microphone.click()
        await expect_state(tab, "Speaking")
        assert await tab.evaluate(LOUDEST) > 0.02
        await expect(tab.get_by_role("log")).to_contain_text("Your voice")
        await microphone.click()
        await expect(microphone).to_have_attribute("aria-pressed", "false")
        await expect_state(tab, "Ready")


async def test_the_avatar_listens_to_the_microphone_while_a_clip_is_spoken(store: SessionStore) -> None:
    content = replace(PUBLIC, inputs=("heard",))
    async with serving(store, content=content) as page, browsing(page) as tab:
        await start(tab)
        await tab.get_by_role("button", name=TALK).click()
        await tab.get_by_label(AUDIO_FILE).set_input_files(ASSETS / "speech.wav")
        await expect_state(tab, "Speaking")
        page.gateway.audio.heard.clear()
        await asyncio.sleep(2)
        assert any(page.gateway.audio.heard), "the beep of each second, while the avatar speaks"
        await tab.get_by_role("button", name=TALK).click()
        await expect(tab.get_by_role("button", name=TALK)).to_have_attribute("aria-pressed", "false")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("NotAllowedError", "This page may not use the microphone. Allow it in the browser"),
        ("NotFoundError", "No microphone was found. Connect one"),
        ("NotReadableError", "in use by another program. Close that"),
        ("AbortError", "The microphone does not work (AbortError). Choose an audio file."),
    ],
)
async def test_a_microphones_refusal_and_absence_are_told_apart(page: Page, error: str, words: str) -> None:
    async with browsing(page) as tab:
        await tab.evaluate(REFUSE, error)
        await start(tab)
        await tab.get_by_role("button", name=SPEAK).click()
        await expect(tab.get_by_role("alert")).to_contain_text(words)
        await expect_state(tab, "Ready")


async def test_the_page_prepares_until_the_avatar_speaks_and_lists_what_it_says(page: Page) -> None:
    released = asyncio.Event()
    page.engine.before = released.wait
    async with browsing(page) as tab:
        await start(tab)
        await say(tab, "good morning")
        await expect_state(tab, "Preparing …")
        await expect(tab.get_by_role("log")).to_contain_text("good morningwaiting")
        released.set()
        await expect_state(tab, "Speaking")
        await expect(tab.get_by_role("log")).to_contain_text("good morningspeaking")
        await expect_state(tab, "Ready")
        await expect(tab.get_by_role("log").get_by_role("listitem")).to_have_text(["good morning"])


async def test_an_interrupt_strikes_out_what_was_not_spoken(page: Page) -> None:
    async with browsing(page) as tab:
        await start(tab)
        text = "one two three four five six seven eight nine ten " * 4
        await say(tab, text)
        await say(tab, "and then this")
        await expect_state(tab, "Speaking")
        await asyncio.sleep(1)
        await tab.keyboard.press("Escape")
        await expect_state(tab, "Ready")
        first, second = await tab.get_by_role("log").get_by_role("listitem").all()
        await expect(first).to_contain_text("interrupted")
        spoken, unspoken = await first.locator("span").inner_text(), await first.locator("del").inner_text()
        assert spoken.startswith("one")
        assert f"{spoken} {unspoken.strip()}" == text.strip()
        await expect(second).to_contain_text("not spoken")


async def test_a_failed_voice_leaves_a_message_and_the_next_text_is_spoken(page: Page) -> None:
    page.engine.failure = VoiceFailed("the speech endpoint fails (status 503)")
    async with browsing(page) as tab:
        await start(tab)
        await say(tab, "good morning")
        await expect(tab.get_by_role("alert")).to_contain_text("The voice did not speak all of the text.")
        await expect_state(tab, "Ready")
        page.engine.failure = None
        await say(tab, "good evening")
        await expect(tab.get_by_role("alert")).to_be_empty()
        await expect_state(tab, "Speaking")
        await expect(tab.get_by_role("log").get_by_role("listitem").nth(0)).to_contain_text("not spoken")


async def test_an_uploaded_picture_is_checked_at_once_and_speaks(page: Page) -> None:
    async with browsing(page) as tab:
        upload = tab.get_by_label(PICTURE)
        page.gateway.vae.notice = "The face is too small."
        await upload.set_input_files(ASSETS / "portraits/2.png")
        notice = tab.locator("#picture-notice")
        await expect(notice).to_have_text("The face is too small.")
        await expect(tab.locator("[name=portrait]:checked")).to_have_count(0)
        await start(tab)
        assert page.gateway.vae.pictures == [(ASSETS / "portraits/2.png").read_bytes()] * 2
        await say(tab, "good morning")
        await expect_state(tab, "Speaking")
        await expect_state(tab, "Ready")
        await expect(notice).to_have_text("The face is too small.")
        await tab.get_by_role("button", name="Leave").click()
        await expect(notice).to_be_visible()
        await tab.locator("[name=portrait]").nth(1).check()
        await expect(notice).to_be_hidden()


async def test_a_picture_that_cannot_be_used_leaves_the_one_before(page: Page) -> None:
    page.gateway.vae.refusal = "not a PNG picture; send the bytes of such a file"
    async with browsing(page, tolerated="400 (Bad Request)") as tab:
        big = {"name": "big.png", "mimeType": "image/png", "buffer": bytes(3 << 20)}
        await tab.locator("#picture").set_input_files(big)  # type: ignore[arg-type]
        alert = tab.get_by_role("alert")
        await expect(alert).to_contain_text("at most 2 MB are accepted. Choose a smaller one.")
        await tab.locator("#picture").set_input_files(ASSETS / "speech.wav")
        await expect(alert).to_have_text("This picture cannot be used: it is not a PNG picture. Choose another one.")
        page.gateway.vae.refusal = ""
        assert await tab.locator("[name=portrait]").nth(0).is_checked()
        await start(tab)
        assert page.gateway.vae.pictures == [(ASSETS / "portrait.png").read_bytes()]


async def test_portraits_that_cannot_be_changed_say_why(page: Page) -> None:
    async with browsing(page) as tab:
        hint = "The face cannot change during a session. Press Leave to choose another one."
        await start(tab)
        panel = tab.get_by_role("group", name="Portrait")
        await expect(panel).to_have_accessible_description(hint)
        await expect(panel.locator("#portrait-hint")).to_be_visible()
        await drop(tab, ASSETS / "portraits/2.png", "image/png")
        await expect(tab.get_by_role("alert")).to_have_text(hint)
        await tab.get_by_role("button", name="Leave").click()
        await expect(panel.locator("#portrait-hint")).to_contain_text("It is cropped around the face.")


async def test_a_clip_dropped_anywhere_is_spoken_even_before_a_session(page: Page) -> None:
    async with browsing(page) as tab:
        await drop(tab, ASSETS / "speech.wav", "audio/wav")
        await expect_state(tab, "Speaking")
        await expect(tab.get_by_role("log")).to_contain_text("speech.wav")
        await tab.keyboard.press("Escape")
        await expect_state(tab, "Ready")
        await drop(tab, ASSETS / "portrait.png", "text/plain")
        await expect(tab.get_by_role("alert")).to_contain_text("portrait.png is no audio file")


async def test_another_tab_is_told_that_places_are_taken_and_when_to_try_again(page: Page) -> None:
    async with browsing(page, tolerated="503 (Service Unavailable)") as tab:
        tabs = [tab, *[await tab.context.new_page() for _ in range(MAX_PEERS)]]
        for each in tabs[1:]:
            await each.goto(page.url)
            await start(each)
        await tab.get_by_role("button", name="Start").click()
        words = f"All {MAX_PEERS} places are taken. Try again in 10 seconds."
        await expect(tab.get_by_role("alert")).to_have_text(words)
        await expect_state(tab, "Not connected")
        await tabs[1].get_by_role("button", name="Leave").click()
        await asyncio.sleep(0.5)
        await start(tab)
        await expect(tab.get_by_role("alert")).to_be_empty()


async def test_the_page_says_that_a_slow_machine_will_lag(store: SessionStore) -> None:
    async with serving(store, session_s=0.6) as page, browsing(page) as tab:
        await start(tab)
        alert = tab.get_by_role("alert")
        await expect(alert).to_contain_text("This machine computes 10 seconds of video in 13.")
        await expect(alert).to_contain_text("the picture will lag")
        await expect(tab.locator("#expected")).to_have_text("unknown")
        await say(tab, "good morning")
        await expect_state(tab, "Speaking")
        await expect_state(tab, "Ready")
        await expect(alert).to_contain_text("the picture will lag")


async def test_a_session_that_ends_is_reported_and_another_can_start(page: Page) -> None:
    async with browsing(page) as tab:
        await start(tab)
        (session_id,) = page.gateway.audio.sessions
        await (await page.avatar.session(session_id)).delete()
        await expect_state(tab, "Not connected")
        words = "The session has ended. Press Start for another one."
        await expect(tab.get_by_role("alert")).to_have_text(words)
        await start(tab)


async def test_a_screenshot_of_the_page_can_be_taken(page: Page, pytestconfig: pytest.Config) -> None:
    path: Path | None = pytestconfig.getoption("--screenshot")
    if path is None:
        pytest.skip("--screenshot FILE takes one")
    async with browsing(page, viewport={"width": 1120, "height": 720}) as tab:
        await start(tab)
        await tab.get_by_label(AUDIO_FILE).set_input_files(ASSETS / "speech.wav")
        await expect_state(tab, "Speaking")
        await asyncio.sleep(3)
        await tab.screenshot(path=path)
        assert path.stat().st_size <= 300_000
