"""A process of each stage is killed while two sessions listen: one that speaks meanwhile, and a live one that idles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from avatar.aio import background
from tests.chaos.faults import Fault
from tests.chaos.report import MAX_UNREAD_FRAMES
from tests.chaos.speaker import Speaker, num_frames, speaking
from tests.chaos.suite import ChaosSuite, chaos_suite
from tests.chaos.test_chaos import BEFORE_BLOCKS, BEFORE_S, NUM_BLOCKS, SECONDS, SEED, speaker_and_processes
from tests.conftest import speech
from tests.services.test_listening import rendered_listening

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

PIECE_S = 0.04
OWN, OTHER = speech(SECONDS), speech(SECONDS, 2)
CUT = round(len(OWN) * BEFORE_S / SECONDS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(
    listening_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[ChaosSuite, None]:
    async with chaos_suite(listening_checkpoint, tmp_path_factory.mktemp("listening")) as suite:
        yield suite


async def talk_to(speaker: Speaker) -> None:
    """Send the other person's audio in real time, for ever."""
    piece_bytes = round(32000 * PIECE_S)
    while True:
        for start in range(0, len(OTHER), piece_bytes):
            await speaker.listen(OTHER[start : start + piece_bytes])
            await asyncio.sleep(PIECE_S)


@pytest.mark.parametrize("service", ["audio", "denoiser", "vae", "gateway"])
async def test_sessions_that_listen_outlive_a_process_of_each_stage(
    suite: ChaosSuite, listening_checkpoint: Path, picture: bytes, service: str
) -> None:
    await suite.until_healthy(service)
    await suite.until_idle()
    async with (
        speaking(suite.target, picture, seed=SEED, live=True) as idle,
        background(talk_to(idle)),
        speaker_and_processes(suite, picture) as (speaker, serving),
    ):
        await speaker.listen(OTHER[:CUT])
        await speaker.say(OWN[:CUT])
        await speaker.until(num_frames(BEFORE_BLOCKS))
        await idle.until(num_frames(2))
        async with Fault("kill", service).at(suite, min(each for each in serving if each.startswith(service))):
            await speaker.listen(OTHER[CUT:])
            await speaker.say(OWN[CUT:])
            await speaker.finish()
            await idle.until(len(idle.received) + 24)
    assert (speaker.num_lost, speaker.num_repeated, idle.num_lost, idle.num_repeated) == (0, 0, 0, 0)
    assert len(speaker.jumps) == 1
    if service == "gateway":
        assert abs(num_frames(NUM_BLOCKS) - len(speaker.received)) <= MAX_UNREAD_FRAMES
    else:
        assert speaker.pixels == rendered_listening(listening_checkpoint, picture, OWN, OTHER)
