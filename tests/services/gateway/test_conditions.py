"""Tests of services.gateway.stream.conditions."""

import asyncio

from avatar.worker.v1 import types_pb2
from services.gateway.stream.conditions import ConditionVersions
from tests.services.gateway.clock import settled


async def test_a_prompt_waits_for_the_sinks_update_and_is_combined_with_it() -> None:
    versions, written = ConditionVersions(types_pb2.Position(), types_pb2.Conditions(), sink_update_block=3), []

    async def write(newest: int, version: int) -> types_pb2.Conditions:
        written.append((newest, version))
        return types_pb2.Conditions(version=version)

    async def admitted() -> tuple[int, int, int]:
        block = types_pb2.Block()
        await versions.admit(block)
        return block.index, block.conditions, block.carried.version

    assert await versions.change(write) == 0
    assert await admitted() == (0, 1, 1)
    changing = asyncio.ensure_future(versions.change(write))
    assert await admitted() == (1, 1, 0)
    await settled()
    assert not changing.done()
    versions.finish(0)
    assert await changing == 3
    assert [await admitted() for _ in range(3)] == [(2, 1, 0), (3, 3, 3), (4, 3, 0)]
    assert written == [(0, 1), (2, 3)], "version 2 is the sink's update, which the last level wrote"
