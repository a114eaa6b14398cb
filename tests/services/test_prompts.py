"""A session's prompt, from the gateway to the conditions that denoisers attend to."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import torch
from google.protobuf.field_mask_pb2 import FieldMask

from avatar.checkpoints.layouts import open_part
from avatar.rpc.codec import tensor_from_pb
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.text.model import load
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from avatar.worker.v1 import types_pb2 as worker_types
from services.local.suite import suite
from tests.conftest import speech
from tests.product import CLOSE, Stub, connected, finish, frame, new_session, open_stream, pieces, send, speak
from tests.refusals import refused
from tests.services.test_suite import rendered
from tests.stored import write_position
from tests.text import tiny

PROMPT = "a person who smiles"
SETTINGS = GatewaySettings(listen="127.0.0.1:0")


@pytest.fixture
async def stub(text_checkpoint: Path, store: SessionStore) -> AsyncGenerator[Stub, None]:
    """A gateway over a checkpoint with text."""
    async with suite(text_checkpoint, store, SETTINGS) as target, connected(target) as stub:
        yield stub


async def test_every_version_of_the_conditions_has_the_prompt(
    stub: Stub, text_checkpoint: Path, store: SessionStore, picture: bytes
) -> None:
    session = await new_session(stub, picture, prompt=PROMPT)
    versions = [await store.conditions(session.id, 0)]
    call, _ = await open_stream(stub, session.id)
    await send(call, pieces(speech(0.96)))
    await frame(call)
    versions.append(await store.conditions(session.id, 1))
    await finish(call)
    for each in versions:
        assert torch.equal(tensor_from_pb(each.text), load(open_part(text_checkpoint, "text")).embed(PROMPT))


async def test_a_session_without_a_prompt_has_no_text(stub: Stub, text_checkpoint: Path, picture: bytes) -> None:
    session = await new_session(stub, picture, seed=7)
    assert (await speak(stub, session.id, speech(1))).pixels == rendered(text_checkpoint, picture, speech(1), seed=7)


async def test_prompts_are_refused_if_the_text_encoder_does_not_fit_the_network(
    checkpoint: Path, store: SessionStore, picture: bytes, tmp_path: Path
) -> None:
    for part in ("audio", "denoiser", "vae"):
        (tmp_path / part).symlink_to(checkpoint / part)
    tiny.encoder().save(tmp_path / "text")
    async with suite(tmp_path, store, SETTINGS) as target, connected(target) as stub:
        async with refused("CONFIG_MISMATCH") as refusal:
            await new_session(stub, picture, prompt=PROMPT)
        assert "the text worker made 5 rows of width 16, denoisers read 1 of width 8" in refusal.message
        await new_session(stub, picture)


async def test_a_prompt_changed_before_the_stream_replaces_the_first(stub: Stub, picture: bytes) -> None:
    one = await new_session(stub, picture, seed=7, prompt=PROMPT)
    other = await new_session(stub, picture, seed=7, prompt="a person who weeps")
    changed = await change(stub, other.id, PROMPT)
    assert (changed.first_block, changed.session.prompt) == (0, PROMPT)
    assert (await speak(stub, one.id, speech(1.92))).pixels == (await speak(stub, other.id, speech(1.92))).pixels


async def test_a_prompt_changed_before_a_resumption_keeps_the_pending_sink_update(
    stub: Stub, store: SessionStore, picture: bytes
) -> None:
    session = await new_session(stub, picture)
    update = (await store.conditions(session.id, 0)).sink
    update.data = bytes(len(update.data))
    await store.put_conditions(session.id, worker_types.Conditions(version=1, sink=update))
    position = await store.position(session.id)
    position.next_block, position.coming_block, position.coming_conditions = 1, 2, 1
    await write_position(store, session.id, position)
    assert (await change(stub, session.id, PROMPT)).first_block == 2
    position = await store.position(session.id)
    assert (position.conditions, position.coming_block, position.coming_conditions) == (0, 2, 2)
    changed = await store.conditions(session.id, 2)
    assert changed.sink == update
    assert changed.text.shape


async def test_a_prompt_changes_in_mid_stream_at_the_returned_block_and_the_new_sink_stays(
    stub: Stub, store: SessionStore, picture: bytes
) -> None:
    plain = await new_session(stub, picture, seed=7)
    session = await new_session(stub, picture, seed=7)
    call, _ = await open_stream(stub, session.id)
    await send(call, pieces(speech(1.92)))
    await frame(call)
    sink = await store.conditions(session.id, 1)
    changed = await change(stub, session.id, PROMPT)
    # A version that no block was made under yet is replaced.
    prompted = await store.conditions(session.id, 1 if changed.first_block == 2 else 2)
    pixels = (await finish(call, [*pieces(speech(1.92) * 2), CLOSE])).pixels
    unchanged = (await speak(stub, plain.id, speech(1.92) * 3)).pixels[1:]
    same = 12 * changed.first_block - 4
    assert changed.first_block >= 2, "the sink is updated at block 2, and the prompt is added to it"
    assert pixels[:same] == unchanged[:same]
    assert pixels[same] != unchanged[same]
    assert sink.sink == prompted.sink
    assert sink.text != prompted.text


async def test_a_prompt_cannot_be_changed_after_the_stream(stub: Stub, picture: bytes) -> None:
    session = await new_session(stub, picture)
    await speak(stub, session.id, speech(0.48))
    async with refused("SESSION_CLOSED"):
        await change(stub, session.id, PROMPT)


async def change(stub: Stub, session_id: str, prompt: str) -> pb.UpdateSessionResponse:
    session = types.Session(id=session_id, prompt=prompt)
    request = pb.UpdateSessionRequest(session=session, update_mask=FieldMask(paths=["prompt"]))
    return await stub.UpdateSession(request, timeout=30)
