"""Tests of avatar.aio."""

import asyncio
import gc
import logging
from typing import Any

import pytest

from avatar.aio import Attempts, WaitLimit, background

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


async def wait(limit: WaitLimit, seconds: float | None) -> None:
    """Wait for WAIT_S, or for as long as the limit allows."""
    with limit:
        assert limit.is_unlimited
        if seconds is not None:
            limit.set(seconds)
        await asyncio.sleep(WAIT_S)


async def test_a_wait_that_is_over_its_limit_ends_with_a_timeout_error() -> None:
    limit = WaitLimit()
    for _ in range(2):  # the second wait is limited as the first one was
        with pytest.raises(TimeoutError):
            await wait(limit, 0.01)
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_a_limit_ends_only_the_wait_that_it_was_set_for() -> None:
    limit = WaitLimit()
    with limit:
        limit.set(0.01)
        await asyncio.sleep(0)
    await asyncio.sleep(0.03)
    with limit:
        await asyncio.sleep(0.03)
    with limit:
        limit.set(0.01)
        limit.set(WAIT_S)
        await asyncio.sleep(0.03)
    limit.set(0.0)  # no wait: no effect
    await asyncio.sleep(0.01)


async def test_a_wait_can_be_limited_by_another_task() -> None:
    limit = WaitLimit()
    loop = asyncio.get_running_loop()
    loop.call_later(0.01, limit.set, 0.0)
    assert not limit.is_unlimited
    with pytest.raises(TimeoutError):
        await wait(limit, None)


async def test_a_limited_wait_that_is_cancelled_raises_the_cancellation() -> None:
    waiting = asyncio.get_running_loop().create_task(wait(WaitLimit(), 0.0))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_many_short_waits_set_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, timers = asyncio.get_running_loop(), []
    call_at = loop.call_at

    def counted(when: float, *arguments: Any, **options: Any) -> asyncio.TimerHandle:
        timers.append(when)
        return call_at(when, *arguments, **options)

    monkeypatch.setattr(loop, "call_at", counted)
    limit = WaitLimit()
    for _ in range(100):
        with limit:
            limit.set(WAIT_S)
            await asyncio.sleep(0)
    assert len(timers) == 1


def test_attempts_log_the_first_error_of_its_kind_and_go_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    attempts = Attempts(logging.getLogger("a"), "not written", "written again", expected=TimeoutError, address="b")
    for error in (TimeoutError("late"), TimeoutError("later"), KeyError("own"), None, None):
        with attempts:
            if error:
                raise error
    logged = [(each.levelname, each.message, each.address, bool(each.exc_info)) for each in caplog.records]  # type: ignore[attr-defined]
    assert logged == [
        ("WARNING", "not written", "b", False),
        ("ERROR", "not written", "b", True),
        ("INFO", "written again", "b", False),
    ]


async def test_attempts_end_with_their_task() -> None:
    async def run() -> None:
        while True:
            with Attempts(logging.getLogger("a"), "", ""):
                await asyncio.sleep(WAIT_S)

    async with background(run()) as task:
        await asyncio.sleep(0)
    assert task.cancelled()
