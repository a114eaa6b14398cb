"""The real gateway over stand-in workers, all in this process: real time and the real contract, without models."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from avatar.client import connect
from avatar.errors import InvalidField, StageLost
from avatar.rpc.interceptor import Context
from avatar.rpc.server import serving
from avatar.runtime.admission import StepTimes
from avatar.runtime.device_queue import DeviceQueue
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from avatar.worker.v1 import audio_pb2, vae_pb2
from benchmarks.standin.content import PUBLIC, Content
from benchmarks.standin.service import AudioServicer, DenoiserServicer, Stage, VaeServicer
from benchmarks.standin.step import Step
from services.local.suite import gateway
from services.registration import WorkerServicer, registered

STEP_S = 0.002
READY_S = 10.0


class RecordingAudio(AudioServicer):
    """Records session ids, the audio of all blocks with the silence that the gateway inserts, and what is heard."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.received, self.heard = bytearray(), bytearray()
        self.sessions: list[str] = []

    async def Encode(
        self, requests: AsyncIterator[audio_pb2.EncodeRequest], context: Context
    ) -> AsyncGenerator[audio_pb2.EncodeResponse, None]:
        async def recorded() -> AsyncGenerator[audio_pb2.EncodeRequest, None]:
            async for request in requests:
                self.received += request.piece.data
                self.heard += b"".join(each.data for each in request.piece.heard)
                if request.HasField("open"):
                    self.sessions.append(request.open.session_id)
                yield request

        async for response in super().Encode(recorded(), context):
            yield response


class RecordingVae(VaeServicer):
    """Records pictures and their fits, or refuses them with `refusal` if it is set. Others get the notice `notice`.

    before: awaited before a picture is encoded.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.pictures: list[bytes] = []
        self.fits: list[str] = []
        self.refusal = self.notice = ""
        self.before: Callable[[Context], Awaitable[None]] | None = None

    def info(self) -> vae_pb2.VaeServiceGetInfoResponse:
        info = super().info()
        info.labels = True  # sessions may have one; it draws none
        return info

    async def EncodeReference(
        self, request: vae_pb2.EncodeReferenceRequest, context: Context
    ) -> vae_pb2.EncodeReferenceResponse:
        if self.refusal:
            raise InvalidField.at("picture", self.refusal)
        self.pictures.append(request.picture)
        self.fits.append(request.fit)
        if self.before:
            await self.before(context)
        response = await super().EncodeReference(request, context)
        response.reference.id = hashlib.sha256(request.picture).hexdigest()
        response.reference.notice = self.notice
        return response


@dataclass
class StandInGateway:
    """A gateway's HOST:PORT, and two of its workers."""

    target: str
    audio: RecordingAudio
    vae: RecordingVae

    @property
    def num_streams(self) -> int:
        """Streams that are open at the workers."""
        return self.vae._stage.admission.active


@asynccontextmanager
async def standin_gateway(store: SessionStore, **settings: Any) -> AsyncGenerator[StandInGateway, None]:
    """Run the gateway and its workers while the body runs. settings: of the gateway, and as of `standin_gateways`."""
    async with standin_gateways(store, {}, **settings) as [gateway]:
        yield gateway


@asynccontextmanager
async def standin_gateways(
    store: SessionStore,
    *each: dict[str, Any],
    limit: int = 16,
    token: str = "",
    content: Content = PUBLIC,
    session_s: float = 0.0,
    **settings: Any,
) -> AsyncGenerator[list[StandInGateway], None]:
    """Run gateways over the same workers while the body runs.

    each: further settings of each gateway. limit: streams at a time at a worker. token: of a tenant, if there are any.
    content: sizes of blocks.
    session_s: seconds of each block that the workers pretend to need for a session beyond their steps.
    """
    async with AsyncExitStack() as stack:
        queue = stack.enter_context(DeviceQueue())
        pretended = StepTimes(content.block_s)
        pretended.append(session_s)
        queue.load.add_service(pretended, 1)

        async def serve(servicer: WorkerServicer) -> str:
            target = f"127.0.0.1:{await stack.enter_async_context(serving('127.0.0.1:0', servicer))}"
            await stack.enter_async_context(registered(store.workers("main"), target, servicer))
            return target

        def stage(name: str) -> Stage:
            return Stage(name, Step(STEP_S), queue, limit, history_blocks=3, content=content)

        audio, vae = RecordingAudio(stage("audio")), RecordingVae(stage("vae"))
        levels = [DenoiserServicer(stage("denoiser"), level) for level in range(content.num_levels)]
        given = GatewaySettings(
            listen="127.0.0.1:0",
            audio=(await serve(audio),),
            denoisers=tuple([await serve(level) for level in levels]),
            vae=(await serve(vae),),
            **settings,
        )
        targets = [await stack.enter_async_context(gateway(store, given.model_copy(update=own))) for own in each]
        await _until_ready(targets[0], token)
        yield [StandInGateway(target, audio, vae) for target in targets]


async def _until_ready(target: str, token: str) -> None:
    """Wait until the gateway has found all its workers."""
    async with connect(target, token=token, plaintext_token=bool(token)) as avatar, asyncio.timeout(READY_S):
        while True:
            try:
                await avatar.capabilities()
                return
            except StageLost:
                await asyncio.sleep(0.01)
