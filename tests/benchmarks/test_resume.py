"""A client whose connection is cut resumes at another gateway of a full cell within a second, every time."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from benchmarks.fleet.resume import GATEWAYS, LIMIT_S, ROUNDS, full_cell, resume_times
from tests.proxy import proxied


@pytest.mark.slow
async def test_a_session_is_resumed_in_a_full_cell_within_a_second(tmp_path: Path) -> None:
    """Each gateway lives on and holds the slots; another client waits for them the whole time."""
    async with full_cell(tmp_path) as suite, AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(proxied(suite.targets[name])) for name in GATEWAYS]
        times_s = await resume_times([each.target for each in proxies], lambda _, number: proxies[number].cut())
    assert len(times_s) == ROUNDS
    assert max(times_s) < LIMIT_S, sorted(times_s)
