"""The workers of every stage: what they say of themselves, what they are asked, and where sessions' streams are opened.

A pool a kind; see `avatar.failover.pool`. Denoisers are one pool: each says which levels it serves, and of which
checkpoint.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import grpc.aio

from avatar.errors import ConfigMismatch, InvalidField, PromptUnsupported, StageLost
from avatar.failover.pool import ANSWER_S, WorkerPool
from avatar.rpc.client import stage_error
from avatar.rpc.tls import worker_credentials
from avatar.settings import GatewaySettings
from avatar.worker.v1 import (
    audio_pb2,
    audio_pb2_grpc,
    denoiser_pb2,
    denoiser_pb2_grpc,
    text_pb2,
    text_pb2_grpc,
    types_pb2,
    vae_pb2,
    vae_pb2_grpc,
)
from services.gateway.stages import Opening, SessionStages, lasting

ENCODE_S = 60.0
EMBED_S = 60.0
# What the transport between the stages may take of a reaction.
REACTION_SLACK_S = 0.03


@dataclass(frozen=True)
class Description:
    """What the workers say of themselves: of each stage the slowest, of the denoisers one a level."""

    audio: audio_pb2.AudioServiceGetInfoResponse
    denoisers: list[denoiser_pb2.DenoiserServiceGetInfoResponse]
    vae: vae_pb2.VaeServiceGetInfoResponse
    text: text_pb2.TextServiceGetInfoResponse | None = None

    @property
    def digest(self) -> str:
        """Of the network that all levels serve."""
        return self.denoisers[0].digest

    @property
    def hands_over(self) -> bool:
        """Whether levels hand latents to each other: where their workers are in chains."""
        return all(each.chain for each in self.denoisers)

    @property
    def encodings(self) -> list[str]:
        """Of frames."""
        return list(self.vae.encodings) or ["rgb24"]

    @property
    def hold_s(self) -> float:
        """From the beginning of a block, once it is encoded, to its first frame, less one step."""
        return len(self.denoisers) * self._step_s + self.vae.step_s

    @property
    def block_latency_s(self) -> float:
        """The promise: from a block's sound, all of it, to its first frame; it may wait for another's step."""
        return self.audio.step_s + self._step_s + self.hold_s

    @property
    def reaction_s(self) -> float:
        """The promise: from the piece that carries a sound to the frame that shows it."""
        block_s = self.vae.block_frames / self.vae.frame_rate_hz
        return block_s + self.audio.lookahead_s + self.block_latency_s + REACTION_SLACK_S

    @property
    def remaining_s(self) -> list[float]:
        """What a block takes behind each stage, to its first frame: audio, each level, the decoder."""
        steps = [*(each.step_s for each in self.denoisers), self.vae.step_s]
        return [sum(steps[at:]) for at in range(len(steps) + 1)]

    @property
    def _step_s(self) -> float:
        return max(each.step_s for each in self.denoisers)


class Workers:
    """All workers of a deployment."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        credentials = worker_credentials(settings.worker_ca, settings.worker_cert, settings.worker_key)
        self.audio: WorkerPool[audio_pb2.AudioServiceGetInfoResponse] = WorkerPool(
            "audio",
            settings.audio,
            _ask(audio_pb2_grpc.AudioServiceStub, audio_pb2.AudioServiceGetInfoRequest()),
            credentials,
        )
        self.denoisers: WorkerPool[denoiser_pb2.DenoiserServiceGetInfoResponse] = WorkerPool(
            "denoiser",
            settings.denoisers,
            _ask(denoiser_pb2_grpc.DenoiserServiceStub, denoiser_pb2.DenoiserServiceGetInfoRequest()),
            credentials,
        )
        self.vae: WorkerPool[vae_pb2.VaeServiceGetInfoResponse] = WorkerPool(
            "vae",
            settings.vae,
            _ask(vae_pb2_grpc.VaeServiceStub, vae_pb2.VaeServiceGetInfoRequest()),
            credentials,
        )
        self.text: WorkerPool[text_pb2.TextServiceGetInfoResponse] | None = None
        if settings.text:
            asking = _ask(text_pb2_grpc.TextServiceStub, text_pb2.TextServiceGetInfoRequest())
            self.text = WorkerPool("text", settings.text, asking, credentials)

    async def __aenter__(self) -> "Workers":
        pools: list[WorkerPool[Any]] = [self.audio, self.denoisers, self.vae, *filter(None, [self.text])]
        for pool in pools:
            await self._stack.enter_async_context(pool.running())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def describe(self) -> Description:
        """What the workers serve. StageLost if none of a stage answers; ConfigMismatch if they do not fit together."""
        text = _slowest(await self.text.workers()) if self.text else None
        return replace(await self._describe_stages(), text=text)

    async def _describe_stages(self) -> Description:
        """The same of the workers that every stream needs."""
        audio, vae = _slowest(await self.audio.workers()), _slowest(await self.vae.workers())
        return Description(audio, await self._describe_denoisers(), vae)

    async def _describe_denoisers(self) -> list[denoiser_pb2.DenoiserServiceGetInfoResponse]:
        """One denoiser a level, all of one checkpoint: that of the least loaded which has all levels."""
        infos = [info for _, info in await self.denoisers.workers()]
        digests = list(dict.fromkeys(info.digest for info in infos))
        missing: dict[str, int] = {}
        for digest in digests:
            same = [info for info in infos if info.digest == digest]
            levels = [[info for info in same if level in info.levels] for level in range(same[0].num_levels)]
            if all(levels):
                return [max(found, key=lambda info: info.step_s) for found in levels]
            missing[digest] = next(level for level, found in enumerate(levels) if not found)
        if len(digests) > 1:
            raise ConfigMismatch(f"denoisers serve parts of different checkpoints: {', '.join(digests)}")
        level = missing[digests[0]]
        raise StageLost(f"no denoiser serves level {level}", metadata={"stage": f"denoiser-{level}"}, retry_s=1.0)

    async def max_right_frames(self) -> int:
        """Most encoder frames behind a block that a session may choose."""
        told: audio_pb2.AudioServiceGetInfoResponse = _slowest(await self.audio.workers())
        return told.max_right_frames

    async def embed(self, prompt: str) -> types_pb2.Tensor:
        """A prompt's embedding.

        PromptUnsupported if there is no text worker; ConfigMismatch if the denoisers cannot read what it makes.
        """
        if not self.text:
            raise PromptUnsupported("this checkpoint knows no text; leave prompt empty")
        reader = (await self._describe_denoisers())[0]

        async def ask(worker: Any) -> types_pb2.Tensor:
            method = text_pb2_grpc.TextServiceStub(worker.channel).Embed
            try:
                response: text_pb2.EmbedResponse = await method(text_pb2.EmbedRequest(prompt=prompt), timeout=EMBED_S)
            except grpc.aio.AioRpcError as error:
                raise stage_error("text", error, is_request=True) from error
            return response.text

        text = await self.text.call(ask)
        rows, width = text.shape
        if width != reader.text_width or rows > reader.text_rows:
            raise ConfigMismatch(
                f"the text worker made {rows} rows of width {width}, denoisers read {reader.text_rows} of width"
                f" {reader.text_width}"
            )
        return text

    async def encode_reference(self, request: vae_pb2.EncodeReferenceRequest) -> types_pb2.Reference:
        """Have a picture prepared."""

        async def ask(worker: Any) -> types_pb2.Reference:
            try:
                method = vae_pb2_grpc.VaeServiceStub(worker.channel).EncodeReference
                response: vae_pb2.EncodeReferenceResponse = await method(request, timeout=ENCODE_S)
            except grpc.aio.AioRpcError as error:
                raise stage_error("vae", error, is_request=True) from error
            return response.reference

        return await self.vae.call(ask)

    @asynccontextmanager
    async def open(self, opening: Opening) -> AsyncGenerator[SessionStages, None]:
        """A session's stream at every stage, for as long as the body runs.

        Raises what the workers that refuse say; InvalidField if the encoding of frames is none of the decoder's;
        ConfigMismatch if the workers do not fit together.
        """
        told = await self._describe_stages()
        if opening.video.encoding not in ("", *told.encodings):
            allowed = ", ".join(told.encodings)
            raise InvalidField.at(
                "open.output.encoding", f"{opening.video.encoding} cannot be had here, only {allowed}"
            )
        streams = lasting(self, told, opening, self._settings)
        try:
            await streams.open()
            yield streams
        finally:
            for stage in streams.all:
                stage.cancel()


def _ask(stub: Callable[[grpc.aio.Channel], Any], request: Any) -> Callable[[grpc.aio.Channel], Awaitable[Any]]:
    """What asks a worker of this kind what it serves."""

    async def ask(connection: grpc.aio.Channel) -> Any:
        return await stub(connection).GetInfo(request, timeout=ANSWER_S)

    return ask


def _slowest(workers: Any) -> Any:
    return max((info for _, info in workers), key=lambda info: getattr(info, "step_s", 0.0))
