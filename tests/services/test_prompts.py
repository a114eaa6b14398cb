"""A session's prompt, from the gateway to the conditions that denoisers attend to."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import torch
from grpc import StatusCode

from avatar.layouts import open_part
from avatar.rpc.codec import tensor_from_pb
from avatar.session import SessionStore
from avatar.settings import GatewaySettings
from avatar.text.model import load
from avatar.v1 import avatar_service_pb2_grpc as pb_grpc
from services.__main__ import suite
from tests.conftest import sound
from tests.contract.refusals import refused
from tests.product import connected, new_session, speak
from tests.services.test_suite import rendered
from tests.text import tiny

PROMPT = "a person who smiles"
SETTINGS = GatewaySettings(listen="127.0.0.1:0")


@pytest.fixture
async def stub(text_checkpoint: Path, store: SessionStore) -> "AsyncGenerator[pb_grpc.AvatarServiceAsyncStub, None]":
    """A gateway over a checkpoint with text."""
    async with suite(text_checkpoint, store, SETTINGS) as target, connected(target) as stub:
        yield stub


async def test_a_prompt_stands_in_every_version_of_the_conditions(
    stub: "pb_grpc.AvatarServiceAsyncStub", text_checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    session = await new_session(stub, picture, prompt=PROMPT)
    await speak(stub, session.id, sound(0.48))
    for version in (0, 1):
        kept = await store.conditions(session.id, version)
        assert torch.equal(tensor_from_pb(kept.text), load(open_part(text_checkpoint, "text")).embed(PROMPT))


async def test_a_session_without_a_prompt_is_what_it_is_without_text(
    stub: "pb_grpc.AvatarServiceAsyncStub", text_checkpoint: Path, picture: bytes
) -> None:
    session = await new_session(stub, picture, seed=7)
    assert (await speak(stub, session.id, sound(1))).pixels == rendered(text_checkpoint, picture, sound(1), seed=7)


async def test_a_text_encoder_that_the_network_cannot_read_is_refused(
    checkpoint: Path, store: SessionStore, picture: bytes, tmp_path: Path
) -> None:
    for part in ("audio", "denoiser", "vae"):
        (tmp_path / part).symlink_to(checkpoint / part)
    tiny.encoder().save(tmp_path / "text")
    async with suite(tmp_path, store, SETTINGS) as target, connected(target) as stub:
        async with refused(StatusCode.FAILED_PRECONDITION, "CONFIG_MISMATCH") as refusal:
            await new_session(stub, picture, prompt=PROMPT)
        assert "the text worker made 5 rows of width 16, denoisers read 1 of width 8" in refusal.message
        await new_session(stub, picture)


async def test_a_published_checkpoint_takes_prompts(published: Path, store: SessionStore, picture: bytes) -> None:
    async with suite(published, store, SETTINGS) as target, connected(target) as stub:
        prompts = ("a person", "speaks")
        sessions = [await new_session(stub, picture, seed=1, prompt=prompt) for prompt in prompts]
        one, other = [(await speak(stub, session.id, sound(0.48))).pixels for session in sessions]
    assert one != other
