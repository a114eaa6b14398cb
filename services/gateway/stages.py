"""One session's streams at every stage, each of which outlives the worker that it is at."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from google.protobuf.message import Message

from avatar.errors import ConfigMismatch, StageLost
from avatar.failover.pool import Worker, WorkerPool
from avatar.failover.replay import AudioReplay, BlockReplay, Replay
from avatar.failover.stage import FailoverStage, FailoverTimeouts, OpenStream
from avatar.handoff.client import RemoteChain
from avatar.rpc.client import Relayable, remote_audio, remote_denoiser, remote_vae
from avatar.settings import GatewaySettings
from avatar.worker.v1 import audio_pb2, denoiser_pb2, types_pb2, vae_pb2
from services.gateway.options import FRAME_NS, SAMPLE_BYTES

if TYPE_CHECKING:
    from services.gateway.workers import Description, Workers

# How far an encoder frame hears beyond its end.
OVERLAP_NS = 5_000_000
# Nobody waits for an offline block, and live ones go first: only a worker that hangs takes so many times longer.
OFFLINE_PATIENCE = 10
Connect: TypeAlias = Callable[[], Awaitable[tuple[Worker[Any], OpenStream[Any, Any], Any]]]


@dataclass(frozen=True)
class Opening:
    """What a session's streams are opened with.

    sound, video: for the stages of sound and of frames. next_block: the first block that is made.
    statistics: what the audio stage had accumulated before it.
    """

    sound: audio_pb2.OpenEncode
    video: vae_pb2.OpenDecode
    next_block: int = 0
    statistics: bytes = b""


@dataclass
class SessionStages:
    """One session's streams.

    denoisers: one a level, or one in all where levels hand latents to each other.
    remaining_s: what a block takes behind each stage and level.
    lookahead_ns: sound behind a block that the audio stage hears for it.
    block_latency_s: how long a block takes from its sound to its first frame, as the workers have measured it.
    sink_update_block: the first block under a sink of the session's own; None if it stays the picture.
    init_segment: what comes before all frames.
    """

    audio: FailoverStage[audio_pb2.AudioPiece, types_pb2.Block]
    denoisers: list[FailoverStage[Relayable, types_pb2.Block]]
    vae: FailoverStage[Relayable, types_pb2.Frame]
    remaining_s: list[float]
    block_latency_s: float = 0.0
    lookahead_ns: int = 0
    sink_update_block: int | None = None
    init_segment: bytes = b""

    @property
    def all(self) -> list[FailoverStage[Any, Any]]:
        """In the order of the pipeline."""
        return [self.audio, *self.denoisers, self.vae]

    async def open(self) -> None:
        """Open them all at once. ConfigMismatch if the levels do not fit together."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.audio.open())
            decoder = tasks.create_task(self.vae.open())
            levels = [tasks.create_task(stage.open()) for stage in self.denoisers]
        first = levels[0].result()
        if digests := {each.result().digest for each in levels} - {first.digest}:
            raise ConfigMismatch(f"denoisers serve different checkpoints: {first.digest}, {', '.join(sorted(digests))}")
        self.sink_update_block = first.sink_update_block if first.HasField("sink_update_block") else None
        self.init_segment = decoder.result().init_segment


def lasting(pools: "Workers", told: "Description", opening: Opening, settings: GatewaySettings) -> SessionStages:
    """A session's streams, not open yet, at whichever workers of the pools take them."""
    lookahead_ns = _lookahead_ns(opening.sound, told.audio)
    stall_s = settings.stall_s * (1 if opening.sound.is_live else OFFLINE_PATIENCE)
    patience = FailoverTimeouts(stall_s, settings.rebuild_s)
    audio = FailoverStage("audio", *_sound(pools.audio, told, opening, lookahead_ns), patience)
    if told.hands_over:
        denoisers = [FailoverStage("denoiser", *_chain(pools.denoisers, told, opening), patience)]
    else:
        denoisers = [
            FailoverStage(f"denoiser-{level}", *_level(pools.denoisers, told.digest, level, opening), patience)
            for level in range(len(told.denoisers))
        ]
    vae = FailoverStage("vae", *_frames(pools.vae, opening), patience)
    return SessionStages(audio, denoisers, vae, told.remaining_s, told.block_latency_s, lookahead_ns)


def _sound(
    pool: WorkerPool[Any], told: "Description", opening: Opening, lookahead_ns: int
) -> tuple[Replay[audio_pb2.AudioPiece, types_pb2.Block], Connect]:
    message, block_s = opening.sound, told.vae.block_frames / told.vae.frame_rate_hz
    sample_bytes = SAMPLE_BYTES[message.encoding] * message.num_channels
    history = AudioReplay(sample_bytes, message.rate_hz, block_s, opening.statistics)

    def again() -> audio_pb2.OpenEncode:
        message.first_block, message.first_answer = history.first_block, history.next_block
        message.statistics = history.statistics
        return message

    def heard(opened: audio_pb2.EncodeOpened) -> None:
        history.keep_s(opened.history_s, lookahead_ns / 1e9)

    return history, _connect(pool, lambda worker: remote_audio(worker.channel), again, heard)


def _level(
    pool: WorkerPool[Any], digest: str, level: int, opening: Opening
) -> tuple[Replay[Relayable, types_pb2.Block], Connect]:
    def serves(info: denoiser_pb2.DenoiserServiceGetInfoResponse) -> bool:
        return level in info.levels and info.digest == digest

    return _denoising(pool, lambda worker: remote_denoiser(worker.channel, level), opening, serves, level)


def _chain(
    pool: WorkerPool[Any], told: "Description", opening: Opening
) -> tuple[Replay[Relayable, types_pb2.Block], Connect]:
    """All levels, at the workers of one chain; the one of level 0 stands for it, since a chain is lost as one."""

    def remote(head: Worker[Any]) -> RemoteChain:
        assert head.info is not None
        name = head.info.chain
        members = pool.answering(lambda info: info.chain == name)
        channels = {level: worker.channel for worker, info in members for level in info.levels}
        if len(channels) < len(told.denoisers):
            raise StageLost(f"denoiser: not all of chain {name} answer", metadata={"stage": "denoiser"}, retry_s=1.0)
        return RemoteChain([channels[level] for level in range(len(told.denoisers))])

    def serves(info: denoiser_pb2.DenoiserServiceGetInfoResponse) -> bool:
        return bool(info.chain) and 0 in info.levels and info.digest == told.digest

    return _denoising(pool, remote, opening, serves)


def _denoising(
    pool: WorkerPool[Any],
    remote: Callable[[Worker[Any]], Any],
    opening: Opening,
    serves: Callable[[denoiser_pb2.DenoiserServiceGetInfoResponse], bool],
    level: int = 0,
) -> tuple[Replay[Relayable, types_pb2.Block], Connect]:
    history = BlockReplay(opening.next_block)
    message = denoiser_pb2.OpenDenoise(session_id=opening.sound.session_id, level=level, is_live=opening.sound.is_live)

    def again() -> denoiser_pb2.OpenDenoise:
        message.first_block = history.first_block
        return message

    def heard(opened: denoiser_pb2.DenoiseOpened) -> None:
        history.num_past = opened.history_blocks

    return history, _connect(pool, remote, again, heard, serves)


def _frames(pool: WorkerPool[Any], opening: Opening) -> tuple[Replay[Relayable, types_pb2.Frame], Connect]:
    history, message = BlockReplay(opening.next_block), opening.video

    def again() -> vae_pb2.OpenDecode:
        message.first_block = history.first_block
        return message

    def heard(opened: vae_pb2.DecodeOpened) -> None:
        history.num_past = opened.history_blocks

    return history, _connect(pool, lambda worker: remote_vae(worker.channel), again, heard)


def _connect(
    pool: WorkerPool[Any],
    remote: Callable[[Worker[Any]], Any],
    again: Callable[[], Message],
    heard: Callable[[Any], None],
    serves: Callable[[Any], bool] = lambda _: True,
) -> Connect:
    """What opens a stream at a worker of a pool: always at one of the same checkpoint.

    remote: the stage at a worker, not open yet. again: the opening as the stream's history has it now.
    heard: told what the worker answers.
    """
    digest: str | None = None

    async def connect() -> tuple[Worker[Any], OpenStream[Any, Any], Any]:
        async def open_at(worker: Worker[Any]) -> tuple[OpenStream[Any, Any], Any, str]:
            assert worker.info is not None
            served = worker.info.digest
            stage = remote(worker)
            return stage, await stage.open(again()), served

        nonlocal digest
        same = digest
        worker, (stage, opened, digest) = await pool.open(
            open_at, lambda info: serves(info) and same in (None, info.digest)
        )
        heard(opened)
        return worker, stage, opened

    return connect


def _lookahead_ns(sound: audio_pb2.OpenEncode, audio: audio_pb2.AudioServiceGetInfoResponse) -> int:
    """Nanoseconds of sound behind a block that are heard for it."""
    if sound.HasField("right_frames"):
        return OVERLAP_NS + sound.right_frames * FRAME_NS
    return round(audio.lookahead_s * 1e9)
