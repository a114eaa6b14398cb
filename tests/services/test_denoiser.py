"""Tests of services.denoiser.service: a stream's conditions, and the way of its blocks to the device and back."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from avatar.denoiser.denoiser import Denoiser, DenoiserState
from avatar.errors import StageFailed
from avatar.rpc.channel import channel
from avatar.rpc.client import remote_denoiser
from avatar.rpc.codec import block_to_wire, conditions_to_pb, on_host
from avatar.rpc.server import serving
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import DenoiserSettings
from avatar.store.sessions import SessionStore
from avatar.types import Block
from avatar.worker.v1 import types_pb2 as pb
from avatar.worker.v1.denoiser_pb2 import OpenDenoise
from services.denoiser.__main__ import build
from tests.handoff.chains import LATENTS, blocks_of, first_conditions, message_of, random_session


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


@pytest.mark.parametrize("level", [0, 1])
async def test_the_next_block_is_uploaded_while_a_step_runs(
    checkpoint: Path, store: SessionStore, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    session, num_blocks = random_session("a", 1), 3
    is_uploaded = [threading.Event() for _ in range(num_blocks)]
    uploaded: dict[int, Block] = {}
    upload, step = Denoiser.upload, Denoiser.step

    def on_device() -> bool:
        return threading.current_thread().name == "device"

    def noted_upload(self: Denoiser, block: Block) -> Block:
        if on_device():  # of the step itself
            return upload(self, block)
        uploaded[block.index] = block = replace(upload(self, block))
        is_uploaded[block.index].set()
        return block

    def waiting_step(self: Denoiser, block: Block, state: DenoiserState) -> Block:
        assert all(each.wait(30) for each in is_uploaded[: block.index + 2]), "its own inputs, and the next block's"
        assert block is uploaded[block.index]
        assert (block.noise is None) == (level > 0)
        return step(self, block, state)

    async def blocks() -> AsyncGenerator[pb.Block, None]:
        for block in blocks_of(session, checkpoint)[:num_blocks]:
            sent = block_to_wire(replace(block, latent=torch.zeros(LATENTS) if level else None)).to_pb()
            if block.index == 0:
                sent.carried.CopyFrom(conditions_to_pb(first_conditions(session)))
            yield sent

    with DeviceQueue() as queue, patch("services.denoiser.service.on_host") as copied:
        copied.side_effect = lambda block: on_host(block) if on_device() else None
        servicer = build(DenoiserSettings(checkpoint=checkpoint), store, queue)  # and warm
        monkeypatch.setattr(Denoiser, "upload", noted_upload)
        monkeypatch.setattr(Denoiser, "step", waiting_step)
        async with serving("127.0.0.1:0", servicer) as port, channel(f"127.0.0.1:{port}") as connection:
            stage = remote_denoiser(connection, level)
            await stage.open(OpenDenoise(session=message_of(session), level=level))
            assert len([each async for each in stage(blocks())]) == num_blocks
        assert copied.call_count == num_blocks, "each latent is brought to the host on the device's thread"
