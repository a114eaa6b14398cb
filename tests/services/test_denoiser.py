"""Tests of services.denoiser.service: where a stream's conditions come from."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from avatar.errors import StageFailed
from avatar.rpc.channel import channel
from avatar.rpc.client import remote_denoiser
from avatar.rpc.codec import block_to_wire, conditions_to_pb
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import DenoiserSettings
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.denoiser_pb2 import OpenDenoise
from services.denoiser.__main__ import build
from tests.handoff.chains import blocks_of, first_conditions, message_of, random_session


@pytest.mark.parametrize(
    ("carried", "message"),
    [
        ([None], "block 0 is the stream's first under version 0 .* carries none"),
        ([1], "block 0 .* version 0 of the conditions and carries version 1"),
        ([0, None], "block 1 is the stream's first under version 1 .* carries none"),
        ([0, 0], "block 1 .* version 1 of the conditions and carries version 0"),
    ],
)
async def test_the_first_block_of_a_version_must_carry_it(
    checkpoint: Path, store: SessionStore, carried: list[int | None], message: str
) -> None:
    session = random_session("a", 1)
    versions = [conditions_to_pb(first_conditions(session)) for _ in range(2)]
    versions[1].version = 1

    async def blocks() -> AsyncGenerator[pb.Block, None]:
        for block, version in zip(blocks_of(session, checkpoint), carried, strict=False):
            sent = block_to_wire(block).to_pb()
            sent.conditions = block.index
            if version is not None:
                sent.carried.CopyFrom(versions[version])
            yield sent
        # The last one is refused. A write after that would fail, and could hide the status (grpc issue 36066).
        await asyncio.Event().wait()

    with DeviceQueue() as queue:
        servicer = build(DenoiserSettings(checkpoint=checkpoint), store, queue)
        async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as connection:
            stage = remote_denoiser(connection, 0)
            await stage.open(OpenDenoise(session=message_of(session)))
            with pytest.raises(StageFailed, match=message):
                async for _ in stage(blocks()):
                    pass
