"""Tests of services.gateway.workers: which requests with a client's input are repeated at another worker."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest

from avatar.errors import AvatarError, InvalidField, NoCapacity, StageFailed, StageLost
from avatar.rpc.interceptor import Context
from avatar.rpc.server import serving
from avatar.rpc.status import INPUT_TAKEN
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import audio_pb2, denoiser_pb2, vae_pb2_grpc
from avatar.worker.v1 import vae_pb2 as pb
from benchmarks.standin.service import Stage
from benchmarks.standin.step import Step
from services.gateway import workers as workers_module
from services.gateway.workers import DeploymentInfo, Workers
from tests.proxy import Proxy, proxied
from tests.standin import RecordingVae

REQUEST = pb.EncodeReferenceRequest(picture=b"picture")


@pytest.mark.parametrize(("latent_step_s", "first_frames_s"), [(0.25, 0.25), (0.0, 0.75)])
def test_a_blocks_first_frames_need_one_latent_frame_unless_they_wait_for_the_block(
    latent_step_s: float, first_frames_s: float
) -> None:
    info = DeploymentInfo(
        audio_pb2.AudioServiceGetInfoResponse(step_s=1.0),
        [denoiser_pb2.DenoiserServiceGetInfoResponse(step_s=2.0)] * 2,
        pb.VaeServiceGetInfoResponse(step_s=0.75, latent_step_s=latent_step_s),
    )
    assert info.block_latency_s() == 1 + 3 * 2 + first_frames_s
    assert info.remaining_s(waits_for_block=False) == [4 + first_frames_s, 2 + first_frames_s, first_frames_s, 0]
    assert info.block_latency_s(waits_for_block=True) == 7.75
    assert info.remaining_s(waits_for_block=True) == [4.75, 2.75, 0.75, 0]


class Deployment:
    """Two VAE workers behind proxies, which treat pictures alike, and a gateway's view of them.

    takes_input: they say that they begin with a picture before they fail. error: that `raise_error` raises.
    """

    def __init__(self, *, takes_input: bool, error: Exception | None = None) -> None:
        self.vaes: list[RecordingVae] = []
        self._workers: Workers | None = None
        self._takes_input = takes_input
        self._error = error

    @property
    def num_requests(self) -> int:
        return sum(len(vae.pictures) for vae in self.vaes)

    async def raise_error(self, _: Proxy) -> None:
        assert self._error
        raise self._error

    async def break_connection(self, proxy: Proxy) -> None:
        # A question and its answer, on the same connection: what the worker has said before has arrived.
        assert self._workers
        for worker, _ in self._workers.vae.answering(lambda _: True):
            await vae_pb2_grpc.VaeServiceStub(worker.channel).GetInfo(pb.VaeServiceGetInfoRequest())
        proxy.cut()
        await self.hang(proxy)

    async def hang(self, _: Proxy) -> None:
        await asyncio.Event().wait()

    @asynccontextmanager
    async def running(
        self, store: SessionStore, fail: Callable[[Proxy], Awaitable[None]]
    ) -> AsyncGenerator[Workers, None]:
        """Serve two workers that fail in this way while the body runs."""

        async def before(context: Context, proxy: Proxy) -> None:
            if self._takes_input:
                await context.send_initial_metadata((INPUT_TAKEN,))
            await fail(proxy)

        async with AsyncExitStack() as stack:
            queue, targets = stack.enter_context(DeviceQueue()), []
            for _ in range(2):
                vae = RecordingVae(Stage("vae", Step(0.0), queue, limit=4, history_blocks=1))
                port = await stack.enter_async_context(serving("127.0.0.1:0", vae))
                self.vaes.append(vae)
                proxy = await stack.enter_async_context(proxied(f"127.0.0.1:{port}"))
                vae.before = partial(before, proxy=proxy)
                targets.append(proxy.target)
            unused = ("127.0.0.1:1",)
            workers = Workers(
                GatewaySettings(audio=unused, denoisers=unused, vae=tuple(targets)), store.workers("main")
            )
            self._workers = workers
            await stack.enter_async_context(workers.running())
            yield workers


async def test_a_picture_that_a_worker_lost_in_the_middle_is_not_given_to_another(store: SessionStore) -> None:
    deployment = Deployment(takes_input=True)
    async with deployment.running(store, deployment.break_connection) as workers:
        with pytest.raises(StageLost):
            await workers.encode_reference(REQUEST)
    assert deployment.num_requests == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("a defect"), StageFailed),
        (NoCapacity("full"), NoCapacity),
        (InvalidField.at("picture", "damaged"), InvalidField),
    ],
    ids=["defect", "full", "invalid"],
)
async def test_a_picture_that_a_worker_began_with_and_did_not_finish_is_not_given_to_another(
    store: SessionStore, error: Exception, expected: type[AvatarError]
) -> None:
    deployment = Deployment(takes_input=True, error=error)
    async with deployment.running(store, deployment.raise_error) as workers:
        with pytest.raises(expected):
            await workers.encode_reference(REQUEST)
    assert deployment.num_requests == 1


@pytest.mark.parametrize("takes_input", [True, False])
async def test_a_picture_whose_time_has_passed_is_not_given_to_another(
    store: SessionStore, takes_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "ENCODE_S", 0.2)
    deployment = Deployment(takes_input=takes_input)
    async with deployment.running(store, deployment.hang) as workers:
        with pytest.raises(StageLost):
            await workers.encode_reference(REQUEST)
    assert deployment.num_requests <= 1


async def test_a_picture_that_no_worker_began_with_is_given_to_the_next(store: SessionStore) -> None:
    for error in (None, NoCapacity("full")):
        deployment = Deployment(takes_input=False, error=error)
        async with deployment.running(
            store, deployment.raise_error if error else deployment.break_connection
        ) as workers:
            with pytest.raises(NoCapacity if error else StageLost):
                await workers.encode_reference(REQUEST)
        assert deployment.num_requests == 2
