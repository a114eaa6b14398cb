"""Tests of services.gateway.promise: the rate that devices sustain, and the times that are promised."""

from collections.abc import AsyncGenerator

import pytest

from avatar.runtime.admission import LIVE_SHARE
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.worker.v1 import audio_pb2, denoiser_pb2, vae_pb2
from avatar.worker.v1.types_pb2 import DeviceLoad
from services.gateway.promise import HOP_S, Promise, promise, sustained_rate
from services.gateway.workers import DeploymentInfo
from tests.product import CLOSE, Stub, connected, finish, new_session, open_stream, pieces
from tests.refusals import refused
from tests.standin import standin_gateway

PATIENCE_S = 0.25
# Of one CPU host with two cores: audio 0.05 s, two levels of 0.12 s and a decoder of 0.09 s for blocks of 0.48 s.
SHARES = (0.05 / 0.48, 0.12 / 0.48, 0.12 / 0.48, 0.09 / 0.48)


def load(
    queue: str, session: float, live: float = 0.0, *, device: str = "", cores: int = 1, threads: int = 1
) -> DeviceLoad:
    """Return a queue's load; by default it has a device of its own."""
    return DeviceLoad(
        device=device or queue,
        num_cores=cores,
        queue=queue,
        num_threads=threads,
        session_share=session,
        live_share=live,
    )


def info(*loads: DeviceLoad, others: tuple[DeviceLoad, ...] = (), block_frames: int = 12) -> DeploymentInfo:
    """Return a deployment of two levels whose audio stage, levels and decoder have these loads."""
    audio, first, second, vae = loads * (4 // len(loads))
    return DeploymentInfo(
        audio_pb2.AudioServiceGetInfoResponse(step_s=0.05, lookahead_s=0.1, load=audio),
        [denoiser_pb2.DenoiserServiceGetInfoResponse(step_s=0.12, load=each) for each in (first, second)],
        vae_pb2.VaeServiceGetInfoResponse(
            step_s=0.09, latent_step_s=0.03, frame_rate_hz=25, block_frames=block_frames, load=vae
        ),
        loads=(*loads, *others),
    )


def test_a_device_of_each_stage_sustains_what_its_slowest_step_does() -> None:
    loads = [load(f"gpu-{number}", share) for number, share in enumerate(SHARES)]
    assert sustained_rate(loads, loads) == pytest.approx(LIVE_SHARE * 0.48 / 0.12)


def test_services_of_one_process_take_turns() -> None:
    shared = load("process", sum(SHARES), device="host", cores=64)
    assert sustained_rate([shared] * 4, [shared]) == pytest.approx(LIVE_SHARE * 0.48 / 0.38)


def test_processes_of_one_cpu_share_its_cores() -> None:
    def rate(cores: int, threads: int = 1) -> float:
        loads = [load(f"{n}", share, device="host", cores=cores, threads=threads) for n, share in enumerate(SHARES)]
        return sustained_rate(loads, loads)

    assert rate(1) == pytest.approx(LIVE_SHARE * 0.48 / 0.38)
    assert rate(2) == pytest.approx(LIVE_SHARE * 0.48 / 0.19)
    assert rate(64) == pytest.approx(LIVE_SHARE * 0.48 / 0.12), "one step alone is the bound"
    assert rate(64, threads=64) == pytest.approx(rate(1))


def test_open_live_streams_of_all_workers_of_a_device_are_counted() -> None:
    own = load("own", 0.25, 0.3)
    assert sustained_rate([own], [own]) == pytest.approx(LIVE_SHARE / 0.55)
    on_host = load("own", 0.25, device="host", cores=2)
    other = load("other", 0.5, 1.5, device="host", cores=2)
    elsewhere = load("elsewhere", 0.5, 5.0)
    assert sustained_rate([on_host], [on_host, other, elsewhere]) == pytest.approx(LIVE_SHARE / (1.75 / 2))


def test_the_rate_is_unknown_before_a_step_is_measured() -> None:
    assert sustained_rate([load("a", 0.0)], []) == 0
    older = DeviceLoad()
    assert sustained_rate([older, older], [older]) == 0
    assert not Promise(sustained_rate=0.0).is_too_slow
    assert promise(info(older), PATIENCE_S).reaction_s > 0, "as measured, without loads"


def test_the_reaction_is_the_sum_of_what_a_sound_passes() -> None:
    steps_s, hops_s = 0.05 + 2 * 0.12 + 0.03, 5 * HOP_S
    loads = [load(f"gpu-{number}", share) for number, share in enumerate(SHARES)]
    promised = promise(info(*loads), PATIENCE_S)
    assert promised.reaction_s == pytest.approx(0.48 + 0.1 + steps_s + 0.12 + hops_s)
    assert promised.reaction_ahead_s == promised.hold_s == pytest.approx(steps_s + 0.12 + hops_s)
    short = promise(info(*loads, block_frames=4), PATIENCE_S)
    assert short.reaction_s - promised.reaction_s == pytest.approx(0.16 - 0.48)


def test_in_a_shared_queue_the_block_before_runs_first_and_so_do_the_streams_of_others() -> None:
    steps_s, hops_s = 0.05 + 2 * 0.12 + 0.03, 5 * HOP_S
    alone = promise(info(load("process", sum(SHARES))), PATIENCE_S)
    assert alone.reaction_ahead_s == pytest.approx(steps_s + 0.38 + hops_s)
    assert alone.reaction_s == pytest.approx(0.58 + steps_s + 0.13 + hops_s), "0.25 s of it before the audio is there"
    second = promise(info(load("process", 0.4, 0.4)), PATIENCE_S)
    first = promise(info(load("process", 0.4)), PATIENCE_S)
    assert second.reaction_s - first.reaction_s == pytest.approx(0.4 * 0.48)


def test_nothing_is_promised_by_a_deployment_that_is_slower_than_real_time() -> None:
    promised = promise(info(load("process", 612 / 480)), PATIENCE_S)
    assert promised == Promise(LIVE_SHARE / (612 / 480))
    assert promised.is_too_slow
    assert "0.74 seconds of video a second" in promised.rate_text


@pytest.fixture
async def stub(store: SessionStore, request: pytest.FixtureRequest) -> AsyncGenerator[Stub, None]:
    """A stub of a gateway whose workers need 0.6 s for 0.48 s of video. Its parameter: the gateway's `slow_live`."""
    async with (
        standin_gateway(store, session_s=0.6, slow_live=request.param) as gateway,
        connected(gateway.target) as stub,
    ):
        yield stub


@pytest.mark.parametrize("stub", ["notice"], indirect=True)
async def test_a_live_stream_of_a_deployment_that_is_too_slow_opens_with_a_notice(stub: Stub) -> None:
    capabilities = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert 0.6 < capabilities.sustained_rate < 0.48 / 0.6
    assert capabilities.reaction_s == capabilities.reaction_ahead_s == capabilities.hold_s == 0
    call, _ = await open_stream(stub, (await new_session(stub, b"picture")).id, mode=pb.OpenAvatar.MODE_LIVE)
    streamed = await finish(call, [*pieces(bytes(15360)), CLOSE])
    first = streamed.events[0]
    assert (first.number, first.notice.kind) == (0, pb.Notice.KIND_TOO_SLOW)
    assert "seconds of video a second" in first.notice.message
    assert streamed.closed.num_frames > 0


@pytest.mark.parametrize("stub", ["refuse"], indirect=True)
async def test_a_live_stream_of_a_deployment_that_is_too_slow_is_refused_if_the_operator_wants_that(stub: Stub) -> None:
    assert (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).free_sessions == 0
    async with refused("NO_CAPACITY") as refusal:
        await open_stream(stub, (await new_session(stub, b"picture")).id, mode=pb.OpenAvatar.MODE_LIVE)
    assert "0.7" in refusal.message
    assert "render offline" in refusal.message
    assert not refusal.retry_s, "another try would not help"
    call, _ = await open_stream(stub, (await new_session(stub, b"picture")).id)
    streamed = await finish(call, [*pieces(bytes(15360)), CLOSE])
    assert (len(streamed.frames), streamed.closed.num_blocks) == (9, 1)
    assert not any(event.HasField("notice") for event in streamed.events)
