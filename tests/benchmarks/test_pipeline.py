"""Figures of the pipeline from what clients heard; and the pipeline itself, with stages that stand in."""

import asyncio

import psutil
import pytest

from avatar.types import BLOCK_FRAMES, BLOCK_S
from avatar.v1 import types_pb2 as types
from benchmarks import peers
from benchmarks.pipeline.client import Client, Heard, Job, Voice
from benchmarks.pipeline.contenders import Peer
from benchmarks.pipeline.crash import NUM_BLOCKS, WATCH_S, is_watched, lost_or_doubled, pause
from benchmarks.pipeline.endurance import growth
from benchmarks.pipeline.live import share_on_time
from benchmarks.pipeline.processes import clients
from benchmarks.pipeline.suite import standing_in
from benchmarks.standin import content


def heard(times: list[float], *, refused: str = "", is_idle: bool = False) -> Heard:
    numbers = [(content.first_frame(n), content.shown_frames(n)) for n in range(len(times))]
    return Heard([(*each, at, is_idle) for each, at in zip(numbers, times, strict=True)], refused=refused)


def test_a_pause_is_what_the_client_waits_for_its_next_frame() -> None:
    assert pause(heard([0.0, 1.0, 2.5, 3.0]), at=1.2) == 1.5


def test_a_session_that_ended_paused_for_all_of_the_watch() -> None:
    assert pause(heard([0.0, 1.0], refused="UNAVAILABLE"), at=1.2) == WATCH_S
    assert pause(heard([], refused="UNAVAILABLE"), at=1.2) == WATCH_S


def test_a_session_that_was_over_before_the_watch_says_nothing_of_it() -> None:
    assert is_watched(heard([0.0, 1.0, 1.2 + WATCH_S]), at=1.2)
    assert not is_watched(heard([0.0, 1.0, 2.0]), at=1.2)
    assert is_watched(heard([0.0], refused="UNAVAILABLE"), at=1.2)


def test_a_session_that_ended_has_lost_what_it_did_not_show() -> None:
    assert lost_or_doubled(heard([0.0, 1.0])) == (0, 0)
    assert lost_or_doubled(heard([0.0, 1.0], refused="UNAVAILABLE")) == (NUM_BLOCKS * BLOCK_FRAMES - 21, 0)
    assert lost_or_doubled(Heard(wrong=2)) == (2 * BLOCK_FRAMES, 0)


def test_sessions_count_together_once_all_have_begun() -> None:
    steady = heard([n * BLOCK_S for n in range(10)])
    stalling = heard([n * BLOCK_S + 0.19 * (n >= 8) for n in range(10)])
    assert share_on_time([steady]) == 1.0
    assert share_on_time([]) == 0.0
    late = 4  # frames whose turn had passed by more than a frame
    counted = sum(n * BLOCK_S >= 1.5 for n in range(10)) * BLOCK_FRAMES
    assert share_on_time([steady, stalling]) == pytest.approx(1 - late / (2 * counted))


def test_growth_is_told_by_the_process_and_by_media_instead_of_time() -> None:
    hour = heard([float(n) for n in range(7501)])
    samples = [(float(n), {"gateway": 50 + n * BLOCK_S / 3600, "redis": 5.0}) for n in range(0, 7501, 100)]
    told = growth([hour], samples)
    assert told["gateway"] == pytest.approx(1.0)
    assert told["redis"] == pytest.approx(0.0)


def frame(sound: bytes, *, is_idle: bool = False) -> tuple[bytes, types.VideoFrame]:
    data = content.fragment(content.expected(sound))
    return sound, types.VideoFrame(data=data, num_frames=12, is_idle=is_idle)


def client_that_heard(*frames: tuple[bytes, types.VideoFrame]) -> list[bool]:
    """Whether a client that has said three blocks takes each frame for right."""
    client = Client(None, 0, Job("", "live", 3))
    client._said = 3 * content.SOUND_BYTES
    rights = []
    for client._sound, shown in frames:
        rights.append(client._is_right(shown))
    return rights


def said(number: int) -> bytes:
    return Voice(0).at(number * content.SOUND_BYTES, content.SOUND_BYTES)


def test_a_client_takes_what_it_said_in_order_and_idle_frames_between() -> None:
    silence = bytes(content.SOUND_BYTES)
    told = client_that_heard(frame(silence, is_idle=True), frame(said(0)), frame(silence, is_idle=True), frame(said(1)))
    assert told == [True] * 4


def test_a_client_notices_a_block_that_is_lost_or_comes_twice_or_has_anothers_picture() -> None:
    assert client_that_heard(frame(said(0)), frame(said(2))) == [True, False]
    assert client_that_heard(frame(said(0)), frame(said(0))) == [True, False]
    assert client_that_heard((said(0), frame(said(1))[1])) == [False]


def test_speech_that_came_late_goes_on_behind_the_silence() -> None:
    half = content.SOUND_BYTES // 2
    padded = said(0)[:half] + bytes(half)
    rest = said(0)[half:] + said(1)[:half]
    assert client_that_heard(frame(padded), frame(rest)) == [True, True]


@pytest.mark.slow
async def test_the_real_gateway_shows_every_block_of_stages_that_stand_in_and_nothing_is_left_behind() -> None:
    async with standing_in(0.001, workers=2) as suite:
        processes = [psutil.Process(each.pid) for each in suite.processes.values()]
        reports = [await clients(Job(suite.gateway, pace, 5, 2), 60) for pace in ("alone", "full", "live")]
    assert [[(each.wrong, each.refused) for each in report.sessions] for report in reports] == [[(0, "")] * 2] * 3
    assert all(len(each.arrivals) >= 5 for report in reports for each in report.sessions)
    assert [each for each in processes if each.is_running()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.NAMES)
async def test_a_peer_makes_every_picture_right_and_ends_with_its_processes(name: str) -> None:
    async with (peer := Peer(name, 0.001)).running():
        for pace in ("alone", "full", "live"):
            report = await peer.work(pace, 3)
            assert (len(report.sent_s), len(report.came_s), report.wrong) == (3, 3, 0)
        children = psutil.Process(peer.pid).children()
    await asyncio.to_thread(psutil.wait_procs, children, 10)
    assert [each for each in children if each.is_running()] == []
