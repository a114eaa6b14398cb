"""The deployment's workers: one pool per kind, descriptions of what they serve, and requests that no session needs.

See `avatar.failover.pool`. Denoisers are one pool: each reports the levels and the checkpoint that it serves.
"""

import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc.aio
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from avatar import telemetry
from avatar.errors import REASONS, AvatarError, ConfigMismatch, PromptUnsupported, StageLost
from avatar.failover.discovery import Discovery
from avatar.failover.pool import ANSWER_S, WorkerPool
from avatar.rpc.client import stage_error
from avatar.rpc.status import INPUT_TAKEN
from avatar.rpc.tls import worker_credentials
from avatar.settings import GatewaySettings
from avatar.store.registry import WorkerRegistry
from avatar.worker.v1 import (
    audio_pb2,
    denoiser_pb2,
    text_pb2,
    text_pb2_grpc,
    types_pb2,
    vae_pb2,
    vae_pb2_grpc,
    voice_pb2,
)

ENCODE_S = 60.0
EMBED_S = 60.0
# Sigmas of a setting are rounded to three decimals or more.
SIGMA_TOLERANCE = 5e-4


@dataclass(frozen=True)
class DeploymentInfo:
    """Descriptions of the workers that the next session would use, of the denoisers one per level.

    loads: of the devices of all workers, also of those that it would not use.
    """

    audio: audio_pb2.AudioServiceGetInfoResponse
    denoisers: list[denoiser_pb2.DenoiserServiceGetInfoResponse]
    vae: vae_pb2.VaeServiceGetInfoResponse
    text: text_pb2.TextServiceGetInfoResponse | None = None
    loads: tuple[types_pb2.DeviceLoad, ...] = ()

    @property
    def session_loads(self) -> list[types_pb2.DeviceLoad]:
        """Loads of the devices that the session would use."""
        return [self.audio.load, *(each.load for each in self.denoisers), self.vae.load]

    @property
    def digest(self) -> str:
        """Digest of the network that all levels serve."""
        return self.denoisers[0].digest

    @property
    def is_chained(self) -> bool:
        """True if the denoisers form a chain, and hand latents to each other."""
        return all(each.chain for each in self.denoisers)

    @property
    def encodings(self) -> list[str]:
        """Encodings of frames that the decoder has."""
        return list(self.vae.encodings) or ["rgb24"]

    @property
    def listens(self) -> bool:
        """True if the network takes audio of another person, or face motion, which follows it."""
        return bool(self.denoisers[0].inputs)

    @property
    def schedule(self) -> list[float]:
        """Sigma of each level, descending."""
        return list(self.denoisers[0].schedule)

    @property
    def block_frames(self) -> int:
        """Pixel frames of a block."""
        return self.vae.block_frames

    @property
    def block_s(self) -> float:
        """Duration of a block, in seconds."""
        return self.block_frames / self.vae.frame_rate_hz

    def block_latency_s(self, *, waits_for_block: bool = False) -> float:
        """Return the seconds from a block's last audio to its first frame, with a wait for another block's step.

        waits_for_block: the first frame leaves when the whole block is decoded.
        """
        levels_s = (len(self.denoisers) + 1) * max(each.step_s for each in self.denoisers)
        return self.audio.step_s + levels_s + self.first_frames_s(waits_for_block=waits_for_block)

    def remaining_s(self, *, waits_for_block: bool) -> list[float]:
        """Return the seconds from the end of each stage to a block's first frame, from the audio stage to the decoder.

        waits_for_block: as in `block_latency_s`.
        """
        steps = [*(each.step_s for each in self.denoisers), self.first_frames_s(waits_for_block=waits_for_block)]
        return [sum(steps[at:]) for at in range(len(steps) + 1)]

    def first_frames_s(self, *, waits_for_block: bool = False) -> float:
        """Return the seconds that the decoder needs for a block's first frames."""
        return self.vae.step_s if waits_for_block else self.vae.latent_step_s or self.vae.step_s


class Workers:
    """All workers of a deployment.

    rng: of the pauses between attempts and the times after which refused clients come again.
    """

    def __init__(self, settings: GatewaySettings, registry: WorkerRegistry) -> None:
        self.rng = random.Random()
        self._schedule = settings.schedule
        self._discovery = Discovery(registry.read)
        # The last description, and the pools' versions that it is of: many sessions arrive between two reads.
        self._described: tuple[tuple[int, int, int], DeploymentInfo] | None = None
        credentials = worker_credentials(settings.worker_ca, settings.worker_cert, settings.worker_key)

        def pool(stage: str, targets: Sequence[str], file: FileDescriptor) -> WorkerPool[Any]:
            method = file.services_by_name[f"{stage.capitalize()}Service"].methods_by_name["GetInfo"]
            return WorkerPool(stage, targets, partial(_get_info, method), credentials, self._discovery)

        self.audio = pool("audio", settings.audio, audio_pb2.DESCRIPTOR)
        self.denoisers = pool("denoiser", settings.denoisers, denoiser_pb2.DESCRIPTOR)
        self.vae = pool("vae", settings.vae, vae_pb2.DESCRIPTOR)
        self.text = pool("text", settings.text, text_pb2.DESCRIPTOR) if settings.text else None
        self.voice = pool("voice", settings.voice, voice_pb2.DESCRIPTOR) if settings.voice else None

        if self.voice:
            for reason in REASONS:
                telemetry.TEXT_UNSPOKEN.add(0, {"reason": reason})

    @asynccontextmanager
    async def running(self) -> AsyncGenerator["Workers", None]:
        """Follow all workers while the body runs."""
        async with AsyncExitStack() as stack:
            pools: list[WorkerPool[Any] | None] = [self.audio, self.denoisers, self.vae, self.text, self.voice]
            for pool in filter(None, pools):
                await stack.enter_async_context(pool.running())
            await stack.enter_async_context(self._discovery.running())
            yield self

    async def refresh(self) -> None:
        """Wait for a fresh read of the registry, which all who wait share."""
        await self._discovery.refresh()

    async def describe(self) -> DeploymentInfo:
        """Describe all workers. StageLost if none of a stage answers; ConfigMismatch if they do not fit together."""
        text = (await self.text.workers())[0][1] if self.text else None
        return replace(await self.describe_stages(), text=text)

    def voice_languages(self) -> list[str]:
        """Return the languages that voice workers speak, as far as they are known; none if they take any."""
        infos = [info for _, info in self.voice.answering(lambda _: True)] if self.voice else []
        is_any = not all(info.languages for info in infos)
        return [] if is_any else sorted({tag for info in infos for tag in info.languages})

    def free_sessions(self, info: DeploymentInfo) -> int:
        """Return the number of further live sessions that every stage has room for, by its workers' last reports."""
        rooms = [self.audio.room(is_live=True), self.vae.room(is_live=True)]
        for level in range(len(info.denoisers)):
            serves = partial(_serves_level, level, info.digest)
            rooms.append(self.denoisers.room(serves, is_live=True))
        return int(min(rooms))

    async def describe_stages(self) -> DeploymentInfo:
        """Describe the workers that every stream needs: all but the text worker. Raises as `describe` does."""
        versions = self.audio.version, self.denoisers.version, self.vae.version
        if self._described is None or self._described[0] != versions:
            self._described = versions, await self._describe_stages()
        return self._described[1]

    async def _describe_stages(self) -> DeploymentInfo:
        audio, vae = await self.audio.workers(), await self.vae.workers()
        denoisers = await self._describe_denoisers()
        block_frames = denoisers[0].block_frames
        everyone = [*audio, *await self.denoisers.workers(), *vae]
        return DeploymentInfo(
            _next(_with_blocks_of(block_frames, audio, "audio")),
            denoisers,
            _next(_with_blocks_of(block_frames, vae, "vae")),
            loads=tuple(info.load for _, info in everyone),
        )

    async def _describe_denoisers(self) -> list[denoiser_pb2.DenoiserServiceGetInfoResponse]:
        """Describe one denoiser per level; see `_one_per_level`. A level that nobody serves is looked for once more."""
        try:
            return self._one_per_level([info for _, info in await self.denoisers.workers()])
        except StageLost:
            await self.denoisers.refresh()
            return self._one_per_level([info for _, info in await self.denoisers.workers()])

    def _one_per_level(
        self, all_infos: list[denoiser_pb2.DenoiserServiceGetInfoResponse]
    ) -> list[denoiser_pb2.DenoiserServiceGetInfoResponse]:
        """Describe one denoiser per level, of the first checkpoint, in order of placement, that has all levels.

        Denoisers with another schedule than the gateway's, if it has one, are left out.
        """
        infos = [info for info in all_infos if _has_schedule(info.schedule, self._schedule)]
        digests = list(dict.fromkeys(info.digest for info in infos))
        missing: dict[str, int] = {}
        for digest in digests:
            same = [info for info in infos if info.digest == digest]
            levels = [[info for info in same if level in info.levels] for level in range(same[0].num_levels)]
            if all(levels):
                return [_next_of(found) for found in levels]
            missing[digest] = next(level for level, found in enumerate(levels) if not found)
        if len(infos) < len(all_infos):
            others = sorted({_sigmas(info.schedule) for info in all_infos if info not in infos})
            raise ConfigMismatch(
                f"the gateway's AVATAR_SCHEDULE is {_sigmas(self._schedule)}, denoisers run {' and '.join(others)}; set"
                " it alike for the gateway and all denoisers"
            )
        if len(digests) > 1:
            schedules = {info.digest: _sigmas(info.schedule) for info in infos}
            parts = ", ".join(f"{digest} with {schedules[digest]}" for digest in digests)
            raise ConfigMismatch(f"denoisers serve parts of different checkpoints or schedules: {parts}")
        level = missing[digests[0]]
        raise StageLost(f"no denoiser serves level {level}", metadata={"stage": f"denoiser-{level}"}, retry_s=1.0)

    async def max_right_frames(self) -> int:
        """Return the longest audio context after a block that a session may choose, in encoder frames."""
        info: audio_pb2.AudioServiceGetInfoResponse = _next(await self.audio.workers())
        return info.max_right_frames

    async def embed(self, prompt: str) -> types_pb2.Tensor:
        """Return a prompt's embedding, (n, d).

        PromptUnsupported if there is no text worker; ConfigMismatch if the embedding does not fit the denoisers.
        """
        if not self.text:
            raise PromptUnsupported("this checkpoint takes no text; leave prompt empty")
        reader = (await self._describe_denoisers())[0]
        request = text_pb2.EmbedRequest(prompt=prompt)
        response = await _call(self.text, text_pb2_grpc.TextServiceStub, "Embed", request, EMBED_S)
        text: types_pb2.Tensor = response.text
        rows, width = text.shape
        if width != reader.text_width or rows > reader.text_rows:
            raise ConfigMismatch(
                f"the text worker made {rows} rows of width {width}, denoisers read {reader.text_rows} of width"
                f" {reader.text_width}"
            )
        return text

    async def encode_reference(self, request: vae_pb2.EncodeReferenceRequest) -> types_pb2.Reference:
        """Return the reference that a picture is encoded to."""
        response = await _call(self.vae, vae_pb2_grpc.VaeServiceStub, "EncodeReference", request, ENCODE_S)
        reference: types_pb2.Reference = response.reference
        return reference


async def _get_info(method: MethodDescriptor, channel: grpc.aio.Channel) -> Any:
    """Return the answer of the worker at the end of a channel to its service's GetInfo."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    return await channel.unary_unary(path, request.SerializeToString, response.FromString)(request(), timeout=ANSWER_S)


async def _call(pool: WorkerPool[Any], stub: Any, method: str, request: Any, limit_s: float) -> Any:
    """Return the response of one of a pool's workers to a request that holds a client's input.

    A request that a worker took and did not answer is not repeated at another one, which its input might end as well.
    """

    async def call(worker: Any) -> Any:
        response = getattr(stub(worker.channel), method)(request, timeout=limit_s)
        try:
            return await response
        except grpc.aio.AioRpcError as error:
            failure = stage_error(pool.stage, error, is_request=True)
            is_taken = INPUT_TAKEN in tuple(await response.initial_metadata() or ())
            if is_taken or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return failure  # as an answer: after an error the pool would try the next worker
            raise failure from error

    answer = await pool.call(call)
    if isinstance(answer, AvatarError):
        raise answer
    return answer


def _has_schedule(schedule: Sequence[float], chosen: int | tuple[float, ...] | None) -> bool:
    """Return whether a denoiser's sigmas are the chosen ones, of which there may be only the number."""
    if not isinstance(chosen, tuple):
        return chosen in (None, len(schedule))
    return len(chosen) == len(schedule) and all(
        abs(given - sigma) < SIGMA_TOLERANCE for given, sigma in zip(chosen, schedule, strict=True)
    )


def _sigmas(schedule: int | Sequence[float] | None) -> str:
    """Describe a schedule for a message."""
    if isinstance(schedule, int):
        return f"{schedule} levels"
    return "levels of sigma " + ", ".join(f"{sigma:g}" for sigma in schedule or ())


def _with_blocks_of(block_frames: int, workers: Any, stage: str) -> Any:
    """Return the workers with blocks of the denoisers' length. ConfigMismatch if there are others only."""
    # Denoisers of the version before say nothing of their blocks.
    fitting = [(worker, info) for worker, info in workers if block_frames in (0, info.block_frames)]
    if not fitting:
        others = ", ".join(sorted({f"{info.block_frames}" for _, info in workers}))
        raise ConfigMismatch(
            f"denoisers make blocks of {block_frames} frames, {stage} workers of {others}; all workers of a deployment"
            " need one checkpoint"
        )
    return fitting


def _next(workers: Any) -> Any:
    return _next_of([info for _, info in workers])


def _next_of(infos: Sequence[Any]) -> Any:
    """Return the worker that the next session would use: the least loaded, and of several the slowest."""
    return min(infos, key=lambda info: (info.active / max(1, info.capacity), -getattr(info, "step_s", 0.0)))


def _serves_level(level: int, digest: str, info: denoiser_pb2.DenoiserServiceGetInfoResponse) -> bool:
    return level in info.levels and info.digest == digest
