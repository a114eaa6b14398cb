"""Connectors: each opens one session's stream at a worker of one stage, at first and again after a loss.

A connector owns the replay and the `open` message of its stream. It selects workers that serve it, opens it at one of
them from the first block of the replay, and hands the answer to the replay, which keeps as much as that worker needs.
"""

from collections.abc import AsyncGenerator, Callable
from typing import Any, Generic, Protocol, TypeVar

from avatar.errors import StageLost
from avatar.failover.pool import Worker, WorkerPool
from avatar.failover.replay import AudioReplay, BlockReplay, Replay
from avatar.handoff.client import RemoteChain
from avatar.rpc.client import Answer, Item, Relayable, remote_audio, remote_denoiser, remote_vae
from avatar.rpc.wire import Parts, RelayedBlock
from avatar.worker.v1 import audio_pb2, denoiser_pb2, types_pb2, vae_pb2

Item_contra = TypeVar("Item_contra", contravariant=True)
Answer_co = TypeVar("Answer_co", covariant=True)


class OpenStream(Protocol[Item_contra, Answer_co]):
    """A stream at a worker: a `RemoteStage`, or a `RemoteChain` over several workers."""

    @property
    def closed(self) -> types_pb2.Closed: ...

    async def open(self, message: Any, session: Parts, /) -> Any: ...

    def __call__(self, items: AsyncGenerator[Item_contra, None], /) -> AsyncGenerator[Answer_co, None]: ...

    def cancel(self) -> None: ...


class StageConnector(Generic[Item, Answer]):
    """Opens one session's stream at a worker of its stage, always of the checkpoint of the first worker.

    stage: name that errors carry. replay: the items that rebuild the stream. stream_at: returns a stream at the worker,
    not open yet. serves: returns whether a worker of this description serves the stream. session: the field of that
    name of the `open` message, from `serialize_session`; empty for a stage that needs none. It is kept, so that a
    stream is opened again without the session store.
    """

    def __init__(
        self,
        stage: str,
        pool: WorkerPool[Any],
        replay: Replay[Item, Answer],
        message: Any,
        stream_at: Callable[[Worker[Any]], OpenStream[Item, Answer]],
        serves: Callable[[Any], bool],
    ) -> None:
        """message: the stream's `open` message, in which the replay sets the start."""
        self.stage = stage
        self.replay = replay
        self.stream_at, self.serves = stream_at, serves
        self.session: Parts = ()
        self._former = ""
        self._pool = pool
        self._message = message
        self._digest: str | None = None

    def claim(self, claimed_us: int, former: str) -> None:
        """Set when the session's claim was acquired, and the worker to try first: the one that has a slot of it.

        claimed_us: in microseconds since 1970 of the store's clock. former: HOST:PORT, empty if there is none.
        """
        self._message.claimed_us, self._former = claimed_us, former

    async def connect(self) -> tuple[Worker[Any], OpenStream[Item, Answer], Any]:
        """Open the stream at the least loaded worker that takes it. Return the worker, the stream and its `opened`.

        Raises what `WorkerPool.open` raises.
        """
        worker, (stream, opened) = await self._pool.open(
            self._open_at, self._is_candidate, first=self._former, is_live=self._message.is_live
        )
        self._former = ""
        self.replay.set_window(opened)
        return worker, stream, opened

    def room(self) -> float:
        """Return the free slots of the workers that serve the stream, in sessions; see `WorkerPool.room`."""
        return self._pool.room(self._is_candidate, is_live=self._message.is_live)

    def is_full(self) -> bool:
        """Return whether workers serve the stream, all are known to be full, and none has a slot of the session."""
        return not self._former and self._pool.is_full(self._is_candidate, is_live=self._message.is_live)

    def _is_candidate(self, info: Any) -> bool:
        return self.serves(info) and self._digest in (None, info.digest)

    async def _open_at(self, worker: Worker[Any], max_active: int | None) -> tuple[OpenStream[Item, Answer], Any]:
        assert worker.info is not None
        digest = worker.info.digest
        stream = self.stream_at(worker)
        self.replay.set_start(self._message)
        self._message.ClearField("max_active")
        if max_active is not None:
            self._message.max_active = max_active
        opened = await stream.open(self._message, self.session)
        self._digest = digest
        return stream, opened


def audio_connector(
    pool: WorkerPool[Any], message: audio_pb2.OpenEncode, replay: AudioReplay, block_frames: int
) -> StageConnector[audio_pb2.AudioPiece, RelayedBlock]:
    """Return the connector of the audio stage, at workers with blocks of the session's length."""

    def serves(info: audio_pb2.AudioServiceGetInfoResponse) -> bool:
        return info.block_frames == block_frames

    return StageConnector("audio", pool, replay, message, lambda worker: remote_audio(worker.channel), serves)


def level_connector(
    pool: WorkerPool[Any], message: denoiser_pb2.OpenDenoise, digest: str, next_block: int = 0
) -> StageConnector[Relayable, RelayedBlock]:
    """Return the connector of one denoising level, that of the message.

    digest: of the network that all levels of the session share.
    """
    level, replay = message.level, BlockReplay(next_block)

    def serves(info: denoiser_pb2.DenoiserServiceGetInfoResponse) -> bool:
        return level in info.levels and info.digest == digest

    def stream_at(worker: Worker[Any]) -> OpenStream[Relayable, RelayedBlock]:
        return remote_denoiser(worker.channel, level)

    return StageConnector(f"denoiser-{level}", pool, replay, message, stream_at, serves)


def chain_connector(
    pool: WorkerPool[Any], message: denoiser_pb2.OpenDenoise, digest: str, num_levels: int, next_block: int = 0
) -> StageConnector[Relayable, RelayedBlock]:
    """Return the connector of all levels at the workers of one chain.

    The worker of level 0 stands for its chain, since a chain is lost as a whole. digest: of the network.
    """

    def serves(info: denoiser_pb2.DenoiserServiceGetInfoResponse) -> bool:
        return bool(info.chain) and 0 in info.levels and info.digest == digest

    def stream_at(worker: Worker[Any]) -> OpenStream[Relayable, RelayedBlock]:
        assert worker.info is not None
        name = worker.info.chain
        members = pool.answering(lambda info: info.chain == name)
        channels = {level: member.channel for member, info in members for level in info.levels}
        if len(channels) < num_levels:
            raise StageLost(f"denoiser: not all of chain {name} answer", metadata={"stage": "denoiser"}, retry_s=1.0)
        return RemoteChain([channels[level] for level in range(num_levels)])

    return StageConnector("denoiser", pool, BlockReplay(next_block), message, stream_at, serves)


def vae_connector(
    pool: WorkerPool[Any],
    message: vae_pb2.OpenDecode,
    block_frames: int,
    next_block: int = 0,
    *,
    has_label: bool = False,
) -> StageConnector[Relayable, types_pb2.Frame]:
    """Return the connector of the decoder, at workers with blocks of the session's length.

    It answers a block with its frames. has_label: they show a label, which workers of earlier versions do not draw.
    """

    def serves(info: vae_pb2.VaeServiceGetInfoResponse) -> bool:
        return info.block_frames == block_frames and (info.labels or not has_label)

    replay = BlockReplay(next_block)
    return StageConnector("vae", pool, replay, message, lambda worker: remote_vae(worker.channel), serves)
