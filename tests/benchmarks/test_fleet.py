"""The programs that measure a fleet's costs run, and their stand-ins give every frame."""

import pytest

from benchmarks.fleet import discovery, opening, refusals
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


@pytest.mark.slow
async def test_the_cost_of_knowing_workers_is_measured() -> None:
    share, stall_s = await discovery.idle(12)
    assert 0 < share < 1
    assert 0 < stall_s < 1
    assert 0 < await discovery.oldest(seconds=2.0) < 5


@pytest.mark.slow
async def test_refusals_are_measured_and_sessions_of_four_gateways_spread() -> None:
    each = await refusals.refusals(8)
    assert each.alone_s > 0
    assert each.cpu_ms > 0
    assert await refusals.most_at_a_worker() <= 2
