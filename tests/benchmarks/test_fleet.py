"""The programs that measure a fleet's costs run, and their stand-ins give every frame."""

import pytest

from benchmarks.fleet import opening
from benchmarks.fleet.content import SIZES
from benchmarks.fleet.gateway import GATEWAY, RELAY, measure


@pytest.mark.slow
@pytest.mark.parametrize("server", [GATEWAY, RELAY])
async def test_the_cost_of_a_live_session_is_measured(server: str) -> None:
    cost = await measure(SIZES["14B"], server, num_sessions=2, seconds=1.0)  # RuntimeError if frames are missing
    assert cost.cpu_ms > 0
    assert cost.wakes > 0


@pytest.mark.slow
async def test_the_cost_of_an_opening_is_measured() -> None:
    per_s, redis = await opening.measure_redis(seconds=0.5)
    gateway = await opening.measure_gateway(num_openings=8)
    assert per_s > 0
    assert 0 < redis.cpu_ms < gateway.cpu_ms
    for cost in (redis, gateway):
        assert cost.num_bytes < opening.MOTION_BYTES + opening.SINK_BYTES + 16384, "one copy of the latents, at most"
