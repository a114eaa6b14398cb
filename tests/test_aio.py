"""Tests of avatar.aio."""

import asyncio
import gc

import pytest

from avatar.aio import background

WAIT_S = 10.0


async def test_a_background_task_is_cancelled_and_awaited_when_the_body_ends() -> None:
    steps = []

    async def run() -> None:
        steps.append("started")
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            await asyncio.sleep(0.01)
            steps.append("ended")

    async with background(run()) as task:
        await asyncio.sleep(0)
        assert steps == ["started"]
    assert steps == ["started", "ended"]
    assert task.cancelled()


async def test_a_background_task_that_fails_leaves_the_body_running() -> None:
    async def run() -> None:
        raise ConnectionError("lost")

    async with background(run()) as task:
        await asyncio.wait({task})
        await asyncio.sleep(0)
        is_running = True
    assert is_running
    assert isinstance(task.exception(), ConnectionError)


async def test_an_unread_error_of_a_background_task_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            raise ConnectionError("lost while it was closed")

    async with background(run()):
        await asyncio.sleep(0)
    gc.collect()
    assert not caplog.records


async def test_an_error_of_the_body_is_raised_after_the_background_task_has_ended() -> None:
    ended = asyncio.Event()

    async def run() -> None:
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            ended.set()

    async def body() -> None:
        async with background(run()):
            await asyncio.sleep(0)
            raise KeyError("the body's own")

    with pytest.raises(KeyError, match="the body's own"):
        await body()
    assert ended.is_set()
