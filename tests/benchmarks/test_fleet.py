"""The programs that measure a fleet's costs run, and their stand-ins give every frame."""

import pytest

from benchmarks.fleet.content import SIZES
from benchmarks.fleet.gateway import GATEWAY, RELAY, measure


@pytest.mark.slow
@pytest.mark.parametrize("server", [GATEWAY, RELAY])
async def test_the_cost_of_a_live_session_is_measured(server: str) -> None:
    cost = await measure(SIZES["14B"], server, num_sessions=2, seconds=1.0)  # RuntimeError if frames are missing
    assert cost.cpu_ms > 0
    assert cost.wakes > 0
