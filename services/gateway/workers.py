"""The workers that the gateway composes, one address a stage."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import grpc.aio
from google.protobuf.message import Message

from avatar.errors import ConfigMismatch, InvalidField, PromptUnsupported
from avatar.rpc.client import RemoteStage, channel, remote_audio, remote_denoiser, remote_vae, stage_error
from avatar.settings import GatewaySettings
from avatar.tls import worker_credentials
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
from services.gateway.choices import FRAME_NS

ENCODE_S = 60.0
EMBED_S = 60.0
INFO_S = 5.0
# What the transport between the stages may take of a reaction.
REACTION_SLACK_S = 0.03
# How far an encoder frame hears beyond its end.
OVERLAP_NS = 5_000_000


@dataclass(frozen=True)
class Description:
    """What the workers say of themselves."""

    audio: audio_pb2.AudioServiceGetInfoResponse
    denoisers: list[denoiser_pb2.DenoiserServiceGetInfoResponse]
    vae: vae_pb2.VaeServiceGetInfoResponse
    text: text_pb2.TextServiceGetInfoResponse | None = None

    @property
    def encodings(self) -> list[str]:
        """Of frames."""
        return list(self.vae.encodings) or ["rgb24"]

    @property
    def hold_s(self) -> float:
        """From the beginning of a block, once it is encoded, to its first frame, less one step."""
        return len(self.denoisers) * self._step_s + self.vae.step_s

    @property
    def begun_s(self) -> float:
        """The promise: from a block's sound, all of it, to its first frame; it may wait for another's step."""
        return self.audio.step_s + self._step_s + self.hold_s

    @property
    def reaction_s(self) -> float:
        """The promise: from the piece that carries a sound to the frame that shows it."""
        block_s = self.vae.block_frames / self.vae.frame_rate_hz
        return block_s + self.audio.lookahead_s + self.begun_s + REACTION_SLACK_S

    @property
    def _step_s(self) -> float:
        return max(each.step_s for each in self.denoisers)


@dataclass(frozen=True)
class Streams:
    """One session's opened streams at every stage.

    behind_ns: sound behind a block that the audio stage hears for it, in nanoseconds.
    begun_s: how long a block takes from its sound to its first frame, as the workers have measured it.
    init_segment: what comes before all frames.
    """

    audio: RemoteStage[audio_pb2.AudioPiece, types_pb2.Block]
    denoisers: list[RemoteStage[types_pb2.Block, types_pb2.Block]]
    vae: RemoteStage[types_pb2.Block, types_pb2.Frame]
    sink_update_block: int | None = None
    behind_ns: int = 0
    begun_s: float = 0.0
    init_segment: bytes = b""

    @property
    def all(self) -> list[RemoteStage[Any, Any]]:
        """In the order of the pipeline."""
        return [self.audio, *self.denoisers, self.vae]


class Workers:
    """Channels to one audio worker, one denoiser a level, one VAE worker, and one text worker if there is text."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._stack = AsyncExitStack()
        credentials = worker_credentials(settings)
        self._audio = channel(settings.audio, credentials)
        self._denoisers = [channel(target, credentials) for target in settings.denoisers]
        self._vae = channel(settings.vae, credentials)
        self._text = channel(settings.text, credentials) if settings.text else None

    async def __aenter__(self) -> "Workers":
        for each in (self._audio, *self._denoisers, self._vae, self._text):
            if each is not None:
                await self._stack.enter_async_context(each)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def describe(self) -> Description:
        """Ask every worker what it serves. StageLost if one does not answer."""
        stages, text = await asyncio.gather(self.describe_stages(), self._describe_text())
        return replace(stages, text=text)

    async def describe_stages(self) -> Description:
        """The same of the workers that every stream needs."""
        audio, vae, *denoisers = await asyncio.gather(
            self._describe_audio(),
            _ask("vae", vae_pb2_grpc.VaeServiceStub(self._vae).GetInfo, vae_pb2.VaeServiceGetInfoRequest()),
            *(self._describe_denoiser(level) for level in range(len(self._denoisers))),
        )
        return Description(audio, denoisers, vae)

    async def max_right_frames(self) -> int:
        """Most encoder frames behind a block that a session may choose."""
        return (await self._describe_audio()).max_right_frames

    async def _describe_audio(self) -> audio_pb2.AudioServiceGetInfoResponse:
        method = audio_pb2_grpc.AudioServiceStub(self._audio).GetInfo
        told: audio_pb2.AudioServiceGetInfoResponse = await _ask(
            "audio", method, audio_pb2.AudioServiceGetInfoRequest()
        )
        return told

    async def _describe_text(self) -> text_pb2.TextServiceGetInfoResponse | None:
        if self._text is None:
            return None
        told: text_pb2.TextServiceGetInfoResponse = await _ask(
            "text", text_pb2_grpc.TextServiceStub(self._text).GetInfo, text_pb2.TextServiceGetInfoRequest()
        )
        return told

    async def _describe_denoiser(self, level: int) -> denoiser_pb2.DenoiserServiceGetInfoResponse:
        method = denoiser_pb2_grpc.DenoiserServiceStub(self._denoisers[level]).GetInfo
        told: denoiser_pb2.DenoiserServiceGetInfoResponse = await _ask(
            f"denoiser-{level}", method, denoiser_pb2.DenoiserServiceGetInfoRequest()
        )
        return told

    async def embed(self, prompt: str) -> types_pb2.Tensor:
        """A prompt's embedding.

        PromptUnsupported if there is no text worker; ConfigMismatch if the denoisers cannot read what it makes.
        """
        if self._text is None:
            raise PromptUnsupported("this checkpoint knows no text; leave prompt empty")
        reader = await self._describe_denoiser(0)
        try:
            method = text_pb2_grpc.TextServiceStub(self._text).Embed
            text = (await method(text_pb2.EmbedRequest(prompt=prompt), timeout=EMBED_S)).text
        except grpc.aio.AioRpcError as error:
            raise stage_error("text", error, is_request=True) from error
        rows, width = text.shape
        if width != reader.text_width or rows > reader.text_rows:
            raise ConfigMismatch(
                f"the text worker made {rows} rows of width {width}, denoisers read {reader.text_rows} of width"
                f" {reader.text_width}"
            )
        return text

    async def encode_reference(self, request: vae_pb2.EncodeReferenceRequest) -> types_pb2.Reference:
        """Have a picture prepared."""
        try:
            response = await vae_pb2_grpc.VaeServiceStub(self._vae).EncodeReference(request, timeout=ENCODE_S)
        except grpc.aio.AioRpcError as error:
            raise stage_error("vae", error, is_request=True) from error
        return response.reference

    @asynccontextmanager
    async def open(self, sound: audio_pb2.OpenEncode, video: vae_pb2.OpenDecode) -> AsyncGenerator[Streams, None]:
        """Open a session's stream at every stage at once, for as long as the body runs.

        Raises what a worker that refuses says; InvalidField if the encoding of frames is none of the decoder's;
        ConfigMismatch if the workers do not fit together.
        """
        told = await self.describe_stages()
        if video.encoding and video.encoding not in told.encodings:
            allowed = ", ".join(told.encodings)
            raise InvalidField.at("open.output.encoding", f"{video.encoding} cannot be had here, only {allowed}")
        streams = Streams(
            remote_audio(self._audio),
            [remote_denoiser(each, level) for level, each in enumerate(self._denoisers)],
            remote_vae(self._vae),
            behind_ns=_behind_ns(sound, told.audio),
            begun_s=told.begun_s,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(streams.audio.open(sound))
                decoder = tasks.create_task(streams.vae.open(video))
                opened = [
                    tasks.create_task(stage.open(denoiser_pb2.OpenDenoise(session_id=sound.session_id, level=level)))
                    for level, stage in enumerate(streams.denoisers)
                ]
            sink_update_block = _sink_update([each.result() for each in opened])
            init_segment = decoder.result().init_segment
            yield replace(streams, sink_update_block=sink_update_block, init_segment=init_segment)
        finally:
            for stage in streams.all:
                stage.cancel()


async def _ask(stage: str, method: Any, request: Message) -> Any:
    try:
        return await method(request, timeout=INFO_S)
    except grpc.aio.AioRpcError as error:
        raise stage_error(stage, error) from error


def _sink_update(opened: list[denoiser_pb2.DenoiseOpened]) -> int | None:
    """The block at which all levels want the new sink."""
    first = opened[0]
    if len(opened) != first.num_levels:
        raise ConfigMismatch(f"the checkpoint has {first.num_levels} levels, the gateway has {len(opened)} denoisers")
    if digests := {each.digest for each in opened} - {first.digest}:
        raise ConfigMismatch(f"denoisers serve different checkpoints: {first.digest}, {', '.join(sorted(digests))}")
    return first.sink_update_block if first.HasField("sink_update_block") else None


def _behind_ns(sound: audio_pb2.OpenEncode, audio: audio_pb2.AudioServiceGetInfoResponse) -> int:
    """Nanoseconds of sound behind a block that are heard for it."""
    if sound.HasField("right_frames"):
        return OVERLAP_NS + sound.right_frames * FRAME_NS
    return round(audio.lookahead_s * 1e9)
