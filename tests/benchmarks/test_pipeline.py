"""Metrics from clients' reports, and the pipeline with stand-in stages."""

import asyncio

import psutil
import pytest

from avatar.v1 import types_pb2 as types
from benchmarks import peers
from benchmarks.pipeline.client import Arrival, Client, Job, SessionReport, Voice, run_clients
from benchmarks.pipeline.contenders import Peer
from benchmarks.pipeline.crash import NUM_BLOCKS, WATCH_S, is_watched, lost_or_duplicated, pause
from benchmarks.pipeline.endurance import growth
from benchmarks.pipeline.live import share_on_time
from benchmarks.pipeline.suite import standin_suite
from benchmarks.standin import content
from benchmarks.standin.content import PUBLIC


def session(times: list[float], *, refused: str = "") -> SessionReport:
    """A report of consecutive blocks at these times."""
    arrivals = [Arrival(PUBLIC.first_frame(n), PUBLIC.num_frames(n), at, False) for n, at in enumerate(times)]
    return SessionReport(arrivals, refused=refused)


def test_a_pause_is_the_wait_for_the_next_frame() -> None:
    assert pause(session([0.0, 1.0, 2.5, 3.0]), at=1.2) == 1.5


def test_a_session_that_ended_paused_for_the_whole_watch() -> None:
    assert pause(session([0.0, 1.0], refused="UNAVAILABLE"), at=1.2) == WATCH_S
    assert pause(session([], refused="UNAVAILABLE"), at=1.2) == WATCH_S


def test_a_session_that_finished_before_the_watch_is_not_counted() -> None:
    assert is_watched(session([0.0, 1.0, 1.2 + WATCH_S]), at=1.2)
    assert not is_watched(session([0.0, 1.0, 2.0]), at=1.2)
    assert is_watched(session([0.0], refused="UNAVAILABLE"), at=1.2)


def test_a_session_that_ended_lost_the_frames_it_did_not_show() -> None:
    assert lost_or_duplicated(session([0.0, 1.0])) == (0, 0)
    assert lost_or_duplicated(session([0.0, 1.0], refused="UNAVAILABLE")) == (NUM_BLOCKS * PUBLIC.block_frames - 21, 0)
    assert lost_or_duplicated(SessionReport(wrong=2)) == (2 * PUBLIC.block_frames, 0)


def test_sessions_are_counted_together_once_all_have_started() -> None:
    steady = session([n * PUBLIC.block_s for n in range(10)])
    stalling = session([n * PUBLIC.block_s + 0.19 * (n >= 8) for n in range(10)])
    assert share_on_time([steady]) == 1.0
    assert share_on_time([]) == 0.0
    late = 4  # frames that are overdue by more than a frame
    counted = sum(n * PUBLIC.block_s >= 1.5 for n in range(10)) * PUBLIC.block_frames
    assert share_on_time([steady, stalling]) == pytest.approx(1 - late / (2 * counted))


def test_growth_is_per_process_and_per_media_time() -> None:
    hour = session([float(n) for n in range(7501)])
    samples = [(float(n), {"gateway": 50 + n * PUBLIC.block_s / 3600, "redis": 5.0}) for n in range(0, 7501, 100)]
    grown = growth([hour], samples)
    assert grown["gateway"] == pytest.approx(1.0)
    assert grown["redis"] == pytest.approx(0.0)


def frame(audio: bytes, *, is_idle: bool = False) -> tuple[bytes, types.VideoFrame]:
    data = content.fragment_of(PUBLIC.expected_picture(audio))
    return audio, types.VideoFrame(data=data, num_frames=12, is_idle=is_idle)


def accepted(*frames: tuple[bytes, types.VideoFrame]) -> list[bool]:
    """Return for each frame whether a client that has sent three blocks accepts it as correct."""
    client = Client(None, 0, Job("", "live", 3))
    client._num_sent = 3 * PUBLIC.block_bytes()
    results = []
    for client._audio, shown in frames:
        results.append(client._is_correct(shown))
    return results


def spoken(number: int) -> bytes:
    return Voice(0).at(number * PUBLIC.block_bytes(), PUBLIC.block_bytes())


def test_a_client_accepts_its_speech_in_order_with_idle_frames_between() -> None:
    silence = bytes(PUBLIC.block_bytes())
    results = accepted(frame(silence, is_idle=True), frame(spoken(0)), frame(silence, is_idle=True), frame(spoken(1)))
    assert results == [True] * 4


def test_a_client_detects_a_lost_a_duplicated_and_a_wrong_block() -> None:
    assert accepted(frame(spoken(0)), frame(spoken(2))) == [True, False]
    assert accepted(frame(spoken(0)), frame(spoken(0))) == [True, False]
    assert accepted((spoken(0), frame(spoken(1))[1])) == [False]


def test_late_speech_continues_after_the_padding() -> None:
    half = PUBLIC.block_bytes() // 2
    padded = spoken(0)[:half] + bytes(half)
    rest = spoken(0)[half:] + spoken(1)[:half]
    assert accepted(frame(padded), frame(rest)) == [True, True]


@pytest.mark.slow
async def test_the_real_gateway_shows_every_block_of_standin_stages_and_all_processes_end() -> None:
    async with standin_suite(0.001, workers=2) as suite:
        processes = [psutil.Process(each.pid) for each in suite.processes.values()]
        reports = [await run_clients(Job(suite.gateway, pace, 5, 2), 60) for pace in ("alone", "full", "live")]
    assert [[(each.wrong, each.refused) for each in report.sessions] for report in reports] == [[(0, "")] * 2] * 3
    assert all(len(each.arrivals) >= 5 for report in reports for each in report.sessions)
    assert [each for each in processes if each.is_running()] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.NAMES)
async def test_a_peer_makes_every_picture_correctly_and_ends_with_its_processes(name: str) -> None:
    async with (peer := Peer(name, 0.001)).running():
        for pace in ("alone", "full", "live"):
            report = await peer.work(pace, 3)
            assert (len(report.sent_s), len(report.arrived_s), report.wrong) == (3, 3, 0)
        children = psutil.Process(peer.pid).children()
    await asyncio.to_thread(psutil.wait_procs, children, 10)
    assert [each for each in children if each.is_running()] == []
