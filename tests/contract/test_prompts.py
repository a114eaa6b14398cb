"""Prompts at a deployment with a text encoder; test_sessions.py has the refusals of one without."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from services.local.suite import suite
from tests.conftest import speech
from tests.product import Stub, connected, new_session, speak
from tests.refusals import refused

PROMPT = "a person who smiles"


@pytest.fixture
async def stub(
    request: pytest.FixtureRequest, text_checkpoint: Path, store: SessionStore
) -> AsyncGenerator[Stub, None]:
    """The gateway under test, or one over a checkpoint with text."""
    if given := request.config.getoption("--target"):
        async with connected(given) as stub:
            if not (await stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=10)).prompts:
                pytest.skip("this deployment has no text encoder")
            yield stub
    else:
        settings = GatewaySettings(listen="127.0.0.1:0")
        async with suite(text_checkpoint, store, settings) as target, connected(target) as stub:
            yield stub


async def test_a_prompt_changes_the_frames_of_otherwise_equal_sessions(stub: Stub, portrait: bytes) -> None:
    prompts = ["", PROMPT, PROMPT, "a person who weeps"]
    sessions = [await new_session(stub, portrait, seed=1, prompt=prompt) for prompt in prompts]
    none, one, same, other = [(await speak(stub, session.id, speech(0.96))).pixels for session in sessions]
    assert one == same
    assert len({tuple(pixels) for pixels in (none, one, other)}) == 3


async def test_any_text_is_a_prompt(stub: Stub, portrait: bytes) -> None:
    for prompt in (" \n ", "日本 😀", "\x00", "<b>&amp;", "word " * 1000):
        session = await new_session(stub, portrait, prompt=prompt)
        assert (await speak(stub, session.id, speech(0.48))).frames


async def test_a_prompt_over_the_limit_is_refused(
    stub: Stub, portrait: bytes, capabilities: pb.GetCapabilitiesResponse
) -> None:
    assert capabilities.prompts
    limit = capabilities.max_prompt_bytes
    await new_session(stub, portrait, prompt="a" * limit)
    for prompt in ("a" * (limit + 1), "é" * (limit // 2 + 1)):
        async with refused("MESSAGE_TOO_LARGE") as refusal:
            await new_session(stub, portrait, prompt=prompt)
        assert str(limit) in refusal.message
