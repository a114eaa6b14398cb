"""Frames and audio at their due times, on a clock that the tests move."""

import asyncio

import numpy as np

from avatar.client import Audio, Frame, Item, PlaybackFinished
from tests.services.gateway.clock import Clock
from web.playout import MARGIN_S, MAX_QUEUED, RATE_HZ, TRACK_SAMPLES, AudioTrack, Playout, VideoTrack

FRAME_S = 0.04
FRAME_SAMPLES = round(RATE_HZ * FRAME_S)


def frame(index: int, *, is_idle: bool = False) -> Frame:
    return Frame(index, index * FRAME_S, bytes([index]) * 12, is_idle, True, 1)


def samples(count: int, level: int) -> bytes:
    return np.full(count, level, "<i2").tobytes()


def played(playout: Playout, start: int, pieces: int) -> list[int]:
    """The samples of this many pieces of 20 ms."""
    data = b"".join(playout.audio(start + i * TRACK_SAMPLES) for i in range(pieces))
    return [int(each) for each in np.frombuffer(data, "<i2")]


async def test_frames_wait_until_they_are_due() -> None:
    clock, items = Clock(), list[Item]()
    playout = Playout(items.append, clock)
    await playout.put(frame(3))
    await playout.put(frame(4))
    clock.now_s += MARGIN_S
    assert (await playout.next_frame())[1].index == 3
    waiting = asyncio.ensure_future(playout.next_frame())
    await asyncio.sleep(0.005)
    assert not waiting.done()
    clock.now_s += FRAME_S
    assert (await waiting)[1].index == 4
    assert items == [frame(3), frame(4)]


async def test_a_late_item_delays_video_and_audio_alike() -> None:
    clock = Clock()
    playout = Playout(lambda _: None, clock)
    await playout.put(frame(3))
    clock.now_s += 1.0
    await playout.put(Audio(4 * FRAME_S, samples(FRAME_SAMPLES, 7)))
    await playout.put(frame(4))
    first = round((1.0 + MARGIN_S) * RATE_HZ)
    clock.now_s += MARGIN_S
    await playout.next_frame()
    due_s, shown = await playout.next_frame()
    assert (shown.index, round(due_s * RATE_HZ)) == (4, first)
    assert played(playout, first, 2) == [7] * FRAME_SAMPLES


async def test_audio_is_gapless_across_pieces_and_silent_elsewhere() -> None:
    playout = Playout(lambda _: None, Clock())
    await playout.put(Audio(0.0, samples(FRAME_SAMPLES, 1)))
    await playout.put(Audio(FRAME_S, samples(FRAME_SAMPLES, 2)))
    first = round(MARGIN_S * RATE_HZ)
    assert played(playout, 0, 6) == [0] * first + [1] * FRAME_SAMPLES + [2] * FRAME_SAMPLES + [0] * (
        6 * TRACK_SAMPLES - first - 2 * FRAME_SAMPLES
    )


async def test_overdue_audio_is_skipped() -> None:
    playout = Playout(lambda _: None, Clock())
    await playout.put(Audio(0.0, samples(FRAME_SAMPLES, 1) + samples(FRAME_SAMPLES, 2)))
    assert played(playout, round(MARGIN_S * RATE_HZ) + FRAME_SAMPLES, 2) == [2] * FRAME_SAMPLES


async def test_after_a_drop_the_next_item_is_due_at_once() -> None:
    clock, items = Clock(), list[Item]()
    playout = Playout(items.append, clock)
    finished = PlaybackFinished(0, 0.0, 0, 0.1, True, 9)
    for item in (Audio(3 * FRAME_S, samples(FRAME_SAMPLES, 5)), frame(3), frame(4), finished):
        await playout.put(item)
    playout.drop()
    clock.now_s += MARGIN_S
    assert items == [finished]
    assert played(playout, 0, 5) == [0] * 5 * TRACK_SAMPLES
    await playout.put(frame(20))
    clock.now_s += MARGIN_S
    assert (await playout.next_frame())[1].index == 20


async def test_a_browser_that_reads_nothing_blocks_the_reader() -> None:
    clock = Clock()
    playout = Playout(lambda _: None, clock)

    async def fill() -> None:
        for index in range(3, 100):
            await playout.put(frame(index))

    filling = asyncio.ensure_future(fill())
    await asyncio.sleep(0.01)
    assert not filling.done()
    clock.now_s += 10
    for _ in range(MAX_QUEUED):
        await playout.next_frame()
    async with asyncio.timeout(5):
        await filling


async def test_tracks_share_one_clock() -> None:
    playout = Playout(lambda _: None)
    video, audio = VideoTrack(playout, 2, 2), AudioTrack(playout)
    await audio.recv()
    await playout.put(frame(3))
    shown, piece = await video.recv(), await audio.recv()
    assert shown.time is not None
    assert piece.time is not None
    assert abs(shown.time - piece.time) < 0.1
    assert shown.to_ndarray(format="rgb24").tolist() == np.full((2, 2, 3), 3).tolist()
    assert piece.samples / piece.sample_rate == 0.02
