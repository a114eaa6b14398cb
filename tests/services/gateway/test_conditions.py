"""Tests of services.gateway.stream.conditions."""

import asyncio

from avatar.worker.v1 import types_pb2
from services.gateway.stream.conditions import ConditionVersions
from tests.services.gateway.clock import settled


async def test_a_prompt_waits_for_the_sinks_update_and_is_combined_with_it() -> None:
    versions, written = ConditionVersions(types_pb2.Position(), types_pb2.Conditions(), 3, max_blocks=8), []

    async def write(newest: int, version: int) -> types_pb2.Conditions:
        written.append((newest, version))
        return types_pb2.Conditions(version=version)

    async def admitted() -> tuple[int, int, bool]:
        block = types_pb2.Block()
        await versions.admit(block)
        return block.index, block.conditions, block.HasField("carried")

    assert await versions.change(write) == 0
    assert await admitted() == (0, 0, True)
    changing = asyncio.ensure_future(versions.change(write))
    assert await admitted() == (1, 0, False)
    await settled()
    assert not changing.done()
    versions.finish(0)
    assert await changing == 3
    assert [await admitted() for _ in range(3)] == [(2, 0, False), (3, 1, True), (4, 1, False)]
    assert written == [(0, 0), (1, 1)], "version 1 is the sink's update, which the last level wrote"


async def test_prompts_between_two_blocks_replace_one_another() -> None:
    versions, written = ConditionVersions(types_pb2.Position(), types_pb2.Conditions(), None, max_blocks=8), []

    async def write(newest: int, version: int) -> types_pb2.Conditions:
        written.append((newest, version))
        return types_pb2.Conditions(version=version, text=types_pb2.Tensor(shape=[len(written)]))

    async def write_late(newest: int, version: int) -> types_pb2.Conditions:
        if newest == version:
            await versions.admit(types_pb2.Block())
            versions.finish(1)
        return await write(newest, version)

    await versions.admit(types_pb2.Block())
    versions.finish(0)
    assert [await versions.change(write) for _ in range(3)] == [1, 1, 1]
    assert written == [(0, 1), (1, 1), (1, 1)]
    assert await versions.change(write_late) == 2, "block 1 was admitted while its version was written"
    await versions.admit(block := types_pb2.Block())
    assert (block.index, block.conditions, list(block.carried.text.shape)) == (2, 2, [5])
    assert [each.version for each in versions.known] == [0, 1, 2]


async def test_a_version_takes_over_once_the_one_before_has_passed_all_levels() -> None:
    versions = ConditionVersions(types_pb2.Position(), types_pb2.Conditions(), None, max_blocks=3)

    async def write(_: int, version: int) -> types_pb2.Conditions:
        return types_pb2.Conditions(version=version)

    await versions.admit(types_pb2.Block())
    assert await versions.change(write) == 3, "at block 3 at the latest, since three blocks are on their way at most"
    assert await versions.change(write) == 3
    versions.finish(0)
    admitted = [types_pb2.Block() for _ in range(3)]
    for block in admitted:
        await versions.admit(block)
    assert [block.conditions for block in admitted] == [0, 0, 1]
    assert await versions.change(write) == 6
    for index in range(1, 4):
        versions.finish(index)
    await versions.admit(types_pb2.Block())
    assert await versions.change(write) == 6, "it is replaced: its block is promised"
    while versions.next_block < 8:
        await versions.admit(types_pb2.Block())
        versions.finish(versions.next_block - 1)
    assert await versions.change(write) == 8
