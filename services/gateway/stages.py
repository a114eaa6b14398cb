"""One session's streams at every stage, each of which outlives the worker that it is at."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

from avatar import telemetry
from avatar.errors import ConfigMismatch, InvalidField, NoCapacity
from avatar.failover.connector import StageConnector, audio_connector, chain_connector, level_connector, vae_connector
from avatar.failover.placement import MAX_ATTEMPTS, pause_s, retry_s, scarcest
from avatar.failover.replay import AudioReplay
from avatar.failover.stage import FailoverStage, FailoverTimeouts
from avatar.rpc.client import Relayable
from avatar.rpc.wire import RelayedBlock, serialize_session
from avatar.settings import GatewaySettings
from avatar.worker.v1 import audio_pb2, denoiser_pb2, types_pb2, vae_pb2
from services.gateway.options import FRAME_NS, StreamOptions
from services.gateway.promise import promise
from services.gateway.workers import DeploymentInfo, Workers

logger = logging.getLogger(__name__)

# Audio that an encoder frame of 20 ms covers beyond its end.
OVERLAP_NS = 5_000_000
# An offline block has no deadline and live blocks run before it: allow it so many times longer than a live one before
# its worker counts as lost.
OFFLINE_STALL_FACTOR = 10


@dataclass
class SessionStages:
    """One session's streams.

    denoisers: one per level, or a single one for all levels if their workers form a chain.
    remaining_s: seconds that a block still needs after the audio stage, after each level and after the decoder.
    block_latency_s: seconds from a block's audio to its first frame, as the workers have measured it.
    lookahead_ns: audio after a block's end that its features depend on, in nanoseconds.
    notice: why the stream will lag, in words for the client; empty if the deployment keeps up with it.
    listens: the network takes audio of another person.
    sink_update_block: the first block under the session's own sink; None if the picture stays the sink.
    decoding: the decoder's answer to its `open`, with bytes that precede all frames and the frames' marks.
    """

    audio: FailoverStage[audio_pb2.AudioPiece, RelayedBlock]
    denoisers: list[FailoverStage[Relayable, RelayedBlock]]
    vae: FailoverStage[Relayable, types_pb2.Frame]
    remaining_s: list[float]
    block_latency_s: float = 0.0
    lookahead_ns: int = 0
    notice: str = ""
    listens: bool = False
    sink_update_block: int | None = None
    decoding: vae_pb2.DecodeOpened = field(default_factory=vae_pb2.DecodeOpened)

    @property
    def all(self) -> list[FailoverStage[Any, Any]]:
        """All stages in the order of the pipeline."""
        return [self.audio, *self.denoisers, self.vae]

    @property
    def workers(self) -> list[str]:
        """HOST:PORT of the worker that each stage's stream is at."""
        return [stage.worker for stage in self.all]

    async def open(self, workers: Workers) -> None:
        """Open all streams or none. NoCapacity if a stage has no slot; ConfigMismatch if levels differ in checkpoint.

        The scarcest stage is opened first and alone, so that a session that gets no slot there keeps none from others.
        """
        for attempts_left in reversed(range(MAX_ATTEMPTS)):
            await self.check_room(workers)
            refusal: BaseException | None = None
            try:
                await self._open_once()
            except* NoCapacity as error:
                refusal = error
            if refusal is None:
                return
            self.cancel()
            if not attempts_left:
                raise refusal
            await asyncio.sleep(pause_s(workers.rng))

    def cancel(self) -> None:
        """End all streams at once."""
        for stage in self.all:
            stage.cancel()

    async def check_room(self, workers: Workers) -> None:
        """Raise NoCapacity if all workers of a stage are known to be full, also by a fresh read of the registry."""
        if any(stage.is_full() for stage in self.all):
            await workers.refresh()
        for stage in self.all:
            if stage.is_full():
                message, metadata = f"all workers of {stage.stage} are full", {"stage": stage.stage}
                raise NoCapacity(message, metadata=metadata, retry_s=retry_s(workers.rng))

    async def _open_once(self) -> None:
        first = self.all[scarcest([stage.room() for stage in self.all])]
        opened = {first.stage: await first.open()}
        async with asyncio.TaskGroup() as tasks:
            opening = {each.stage: tasks.create_task(each.open()) for each in self.all if each is not first}
        opened |= {stage: task.result() for stage, task in opening.items()}
        levels = [opened[each.stage] for each in self.denoisers]
        if digests := {each.digest for each in levels} - {levels[0].digest}:
            digest = levels[0].digest
            raise ConfigMismatch(f"denoisers serve different checkpoints: {digest}, {', '.join(sorted(digests))}")
        self.sink_update_block = levels[0].sink_update_block if levels[0].HasField("sink_update_block") else None
        self.decoding = opened[self.vae.stage]


@asynccontextmanager
async def open_stages(
    workers: Workers,
    settings: GatewaySettings,
    session: types_pb2.Session,
    read_motion: Callable[[], Awaitable[bytes]],
    options: StreamOptions,
    position: types_pb2.Position,
    claimed_us: int,
) -> AsyncGenerator[SessionStages, None]:
    """Open a session's stream at every stage, and keep them open while the body runs.

    read_motion: returns the session's motion latents, a serialized Tensor, megabytes; called if there may be room.
    position: of the first block to make; the workers that it names are tried first. claimed_us: when the session's
    claim was acquired: full workers end the session's streams of earlier claims.
    Raises the error of workers that refuse; NoCapacity if the settings refuse live streams that would lag; InvalidField
    if the decoder has no such encoding of frames; ConfigMismatch if the workers do not fit together.
    """
    info = await workers.describe_stages()
    if session.block_frames != info.block_frames:
        raise ConfigMismatch(
            f"the session was created for blocks of {session.block_frames} frames, workers here make blocks of"
            f" {info.block_frames}; create another session from a new reference"
        )
    if options.video not in info.encodings:
        allowed = ", ".join(info.encodings)
        raise InvalidField.at("open.output.encoding", f"{options.video} cannot be had here, only {allowed}")
    notice = ""
    if options.is_live:
        notice = await _rate_notice(workers, settings, session.id, info, is_resumed=bool(position.opened))
    lookahead_ns = _lookahead_ns(session, info.audio)
    audio = audio_connector(
        workers.audio,
        audio_pb2.OpenEncode(
            session_id=session.id,
            traceparent=telemetry.session_span(session.id),
            encoding=options.encoding,
            rate_hz=options.rate_hz,
            num_channels=options.num_channels,
            is_live=options.is_live,
            right_frames=session.audio_right_frames if session.HasField("audio_right_frames") else None,
            seed=session.seed,
            inputs=info.denoisers[0].inputs,
        ),
        AudioReplay(options.sample_bytes, options.rate_hz, info.block_s, lookahead_ns / 1e9, position.statistics),
        info.block_frames,
    )
    video = vae_pb2.OpenDecode(
        session_id=session.id,
        encoding=options.video,
        quality=options.quality,
        is_live=options.is_live,
        per_latent=options.is_per_latent,
        takes_chunks=True,
        unmarked=not settings.marks,
    )
    denoisers = _denoisers(workers, info, session.id, options, position.next_block)
    vae = vae_connector(workers.vae, video, info.block_frames, position.next_block, has_label=session.label)
    connectors: list[StageConnector[Any, Any]] = [audio, *denoisers, vae]
    formers = chain(position.workers, repeat(""))
    for connector, former in zip(connectors, formers, strict=False):
        connector.claim(claimed_us, former)
    stall_s = settings.stall_s * (1 if options.is_live else OFFLINE_STALL_FACTOR)
    timeouts = FailoverTimeouts(stall_s, settings.rebuild_s)
    stages = SessionStages(
        FailoverStage(audio, timeouts),
        [FailoverStage(each, timeouts) for each in denoisers],
        FailoverStage(vae, timeouts),
        info.remaining_s(waits_for_block=options.waits_for_block),
        info.block_latency_s(waits_for_block=options.waits_for_block),
        lookahead_ns,
        notice,
        info.listens,
    )
    try:
        await stages.check_room(workers)
        motion = await read_motion()
        vae.session = serialize_session(vae_pb2.OpenDecode, session, motion)
        carried = serialize_session(denoiser_pb2.OpenDenoise, session, motion)
        for each in denoisers:
            each.session = carried
        await stages.open(workers)
        yield stages
    finally:
        for stage in stages.all:
            stage.close()


def _denoisers(
    workers: Workers, info: DeploymentInfo, session_id: str, options: StreamOptions, next_block: int
) -> list[StageConnector[Relayable, RelayedBlock]]:
    """Return a connector for each level, or one for all of them if their workers form chains."""
    levels = [
        denoiser_pb2.OpenDenoise(session_id=session_id, level=level, is_live=options.is_live)
        for level in range(len(info.denoisers))
    ]
    if info.is_chained:
        return [chain_connector(workers.denoisers, levels[0], info.digest, len(levels), next_block)]
    return [level_connector(workers.denoisers, level, info.digest, next_block) for level in levels]


async def _rate_notice(
    workers: Workers, settings: GatewaySettings, session_id: str, info: DeploymentInfo, *, is_resumed: bool
) -> str:
    """Return the notice to a live stream that the deployment cannot keep up with; empty if it can.

    NoCapacity if the settings refuse such a stream, unless it was open before.
    """
    promised = promise(info, settings.patience_s)
    if promised.is_too_slow:  # perhaps because of a stream that has just ended
        await workers.refresh()
        info = await workers.describe_stages()
        promised = promise(info, settings.patience_s)
    if not promised.is_too_slow:
        return ""
    if settings.slow_live == "refuse" and not is_resumed:
        # Other live streams may end; a device that is too slow for one stays so.
        later_s = retry_s(workers.rng) if any(load.live_share for load in info.loads) else None
        raise NoCapacity(f"{promised.rate_text}, and a live stream needs 1; render offline", retry_s=later_s)
    rate = round(promised.sustained_rate, 3)
    logger.warning("live stream will lag", extra={"session": telemetry.tag(session_id), "rate": rate})
    return f"{promised.rate_text}: its video will lag"


def _lookahead_ns(session: types_pb2.Session, info: audio_pb2.AudioServiceGetInfoResponse) -> int:
    """Return nanoseconds of audio after a block's end that its features depend on."""
    if session.HasField("audio_right_frames"):
        return OVERLAP_NS + session.audio_right_frames * FRAME_NS
    return round(info.lookahead_s * 1e9)
