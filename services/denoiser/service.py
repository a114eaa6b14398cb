"""The denoiser's service: blocks in, blocks one level cleaner out."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager
from functools import partial
from typing import Any

import grpc.aio

from avatar import telemetry
from avatar.denoiser.denoiser import Denoiser, DenoiserState
from avatar.denoiser.sampler import NoiseHistory
from avatar.errors import ConfigMismatch, SessionNotFound, StoreUnavailable
from avatar.handoff.chain import Chain, ChainMember, ChainStream
from avatar.rpc.codec import (
    block_from_wire,
    conditions_from_pb,
    conditions_to_pb,
    latent_to_wire,
    load_to_pb,
    on_host,
    session_from_open,
)
from avatar.rpc.interceptor import Context, as_invalid_field, max_active, parts, receive_open
from avatar.rpc.wire import RelayedBlock
from avatar.runtime.admission import AdmissionControl
from avatar.runtime.device_memory import Reservation
from avatar.runtime.device_queue import DeviceQueue
from avatar.runtime.pipeline import StreamUsage, local
from avatar.store.sessions import SessionStore
from avatar.types import Block, Conditions, Session
from avatar.worker.v1 import denoiser_pb2 as pb
from avatar.worker.v1 import denoiser_pb2_grpc, types_pb2
from avatar.worker.v1.types_pb2 import Closed

logger = logging.getLogger(__name__)


class DenoiserServicer(denoiser_pb2_grpc.DenoiserServiceServicer):
    """Serves levels of one network to as many sessions as it has capacity for.

    levels: that it serves, ascending. chain: of the processes that hand latents to each other; None where latents
    travel in messages alone.
    """

    service_name = "avatar.worker.v1.DenoiserService"
    stage = "denoiser"

    def __init__(
        self,
        denoisers: Mapping[int, Denoiser],
        digest: str,
        store: SessionStore,
        queue: DeviceQueue,
        capacity: int,
    ) -> None:
        """denoisers: by level. digest: of their network. capacity: streams of each level."""
        self.levels = sorted(denoisers)
        self._denoisers = denoisers
        self._config = next(iter(denoisers.values())).config
        self._digest = digest
        self._store = store
        self._queue = queue
        num_levels = len(denoisers)
        self._admission = AdmissionControl(
            capacity * num_levels, "denoiser", queue.load, self._config.block_s, num_levels
        )
        self.changed = asyncio.Event()
        self._admission.on_change = self.changed.set
        self.chain: Chain | None = None

    def chain_member(self, backend: str) -> ChainMember:
        """Return this worker as a member of a chain. backend: of its latents, `gloo` or `nccl`."""
        network = next(iter(self._denoisers.values())).network
        return ChainMember(self.levels, self._config.num_levels, self._digest, network.dtype, network.device, backend)

    def warm(self, height: int, width: int) -> None:
        """Step every level through a session of latents of this size, and measure the duration of a step."""
        self._admission.add_size(self._stream_bytes(height, width))
        for denoiser in self._denoisers.values():
            self._admission.measure(partial(denoiser.warm, height, width))

    def _stream_bytes(self, height: int, width: int) -> int:
        """Return the memory of a stream of latents of this size: its state, and its part of what its levels share."""
        state, shared = next(iter(self._denoisers.values())).memory(height, width)
        return state + -(-shared // len(self._denoisers))

    def add_to(self, server: grpc.aio.Server) -> None:
        denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    def info(self) -> pb.DenoiserServiceGetInfoResponse:
        """Describe the worker as it is now."""
        return pb.DenoiserServiceGetInfoResponse(
            levels=self.levels,
            num_levels=self._config.num_levels,
            digest=self._digest,
            sink_update_block=self._config.sink_update_block,
            capacity=self._admission.capacity,
            active=self._admission.active,
            max_streams=self._admission.limit,
            text_width=self._config.text_dim,
            text_rows=self._config.text_len,
            step_s=self._admission.step_times.p90_s,
            chain=self.chain.name if self.chain else "",
            inputs=self._config.inputs,
            block_frames=self._config.frames_per_block,
            schedule=self._config.schedule[:-1],
            num_trained_levels=self._config.num_trained_levels,
            load=load_to_pb(self._queue.load),
        )

    async def GetInfo(
        self, request: pb.DenoiserServiceGetInfoRequest, context: Context
    ) -> pb.DenoiserServiceGetInfoResponse:
        return self.info()

    async def Denoise(self, requests: AsyncIterator[pb.DenoiseRequest], context: Context) -> AsyncGenerator[Any, None]:
        opened: pb.OpenDenoise = await receive_open(requests)
        denoiser = self._denoisers.get(opened.level)
        if denoiser is None:
            raise ConfigMismatch(f"level {opened.level} is not served here, only {self.levels}")
        with as_invalid_field("open.session"):
            session = session_from_open(opened)
            size = denoiser.check(session)
        accepted = self._admission.admit(
            opened.session_id,
            is_live=opened.is_live,
            max_active=max_active(opened),
            claimed_us=opened.claimed_us,
            level=opened.level,
            num_bytes=self._stream_bytes(*size),
        )
        with (
            await accepted as reservation,
            self._chain_stream(opened) as chain_stream,
            as_invalid_field("block"),
            ExitStack() as ending,
        ):
            # Allocated before the answer, so that a lack of memory refuses the stream; and beside the device's thread,
            # whose steps may take longer than a caller waits.
            states = [await asyncio.to_thread(_open_state, denoiser, session, reservation)]
            del reservation  # the state keeps it
            ending.callback(states.clear)  # of a stream that ends before its first item
            usage, num_blocks = StreamUsage(self._admission.step_times), 0
            updates_sink = denoiser.updates_sink(session)
            # The copy to the host belongs to the step: later, a GPU would be computing the next block.
            then = on_host if chain_stream is None or chain_stream.sends_from_host else None
            live_block_s = self._config.block_s if opened.is_live else None
            stage = local(
                denoiser,
                session,
                self._queue,
                usage,
                then=then,
                live_block_s=live_block_s,
                take_state=states.pop,
                prefill=denoiser.prefill,
            )
            yield pb.DenoiseResponse(opened=self._opened(denoiser, session))
            received = self._blocks(opened, session, requests, chain_stream, denoiser)
            async with aclosing(stage(received)) as blocks:
                async for block in blocks:
                    telemetry.block_span(
                        "denoiser", block.index, *usage.last_step, level=opened.level, parent=block.traceparent
                    )
                    num_blocks += 1
                    answer = latent_to_wire(chain_stream.hand_over(block) if chain_stream else block)
                    if updates_sink and block.index == 0:
                        answer.head.carried.CopyFrom(await self._write_sink(opened.session_id, block))
                    yield answer
            yield pb.DenoiseResponse(closed=Closed(num_blocks=num_blocks, busy_s=usage.busy_s))

    def _opened(self, denoiser: Denoiser, session: Session) -> pb.DenoiseOpened:
        return pb.DenoiseOpened(
            history_blocks=denoiser.history_blocks,
            num_levels=self._config.num_levels,
            digest=self._digest,
            sink_update_block=denoiser.sink_update_block(session),
            takes_prefill=True,
        )

    @contextmanager
    def _chain_stream(self, opened: pb.OpenDenoise) -> Iterator[ChainStream | None]:
        """Open the stream in this worker's chain; None if its latents travel in messages."""
        if not opened.handoff:
            yield None
            return
        if self.chain is None:
            raise ConfigMismatch("latents are not handed over here; this worker is in no chain")
        with self.chain.open_stream(opened.handoff, opened.level) as chain_stream:
            yield chain_stream

    async def _blocks(
        self,
        opened: pb.OpenDenoise,
        session: Session,
        requests: AsyncIterator[pb.DenoiseRequest],
        chain_stream: ChainStream | None,
        denoiser: Denoiser,
    ) -> AsyncGenerator[Any, None]:
        """Yield the stream's blocks with their conditions, which the first block of each version carries.

        A block's inputs, level 0's noise among them, are on their way to the device when it is yielded. Conditions that
        come ahead of their blocks are yielded by themselves.
        """
        conditions: Conditions | None = None
        noise = NoiseHistory()
        async with aclosing(parts(requests, "block", "prefill")) as items:
            async for item in items:
                if isinstance(item, types_pb2.Conditions):
                    yield conditions_from_pb(item)
                    continue
                block: RelayedBlock = item
                if conditions is None and block.index != opened.first_block:
                    raise ValueError(f"the first block is {block.index}, expected {opened.first_block} as opened")
                if conditions is None or block.head.conditions != conditions.version:
                    conditions = carried_conditions(block.head)
                received = block_from_wire(block, conditions)
                if chain_stream:
                    received = await chain_stream.receive(received)
                if denoiser.level == 0:
                    # Beside the event loop: the first correlated noise of a stream is computed from many blocks before.
                    received = await asyncio.to_thread(denoiser.with_noise, received, session, noise)
                yield denoiser.upload(received)

    async def _write_sink(self, session_id: str, block: Block) -> types_pb2.Conditions:
        """Store and return the next conditions, whose sink is this block's first latent frame.

        They are stored before the answer, for a gateway that resumes the session. The caller gets them with the answer:
        it goes on with them, and writes them once a store that is away is back.
        """
        assert block.conditions is not None
        assert block.latent is not None
        conditions = conditions_to_pb(block.conditions.with_sink(block.latent))
        try:
            await self._store.put_conditions(session_id, conditions)
        except (StoreUnavailable, SessionNotFound):  # the caller writes them to a store that is back, or was emptied
            logger.warning("sink not stored", extra={"session": telemetry.tag(session_id)})
        return conditions


def _open_state(denoiser: Denoiser, session: Session, reservation: Reservation) -> DenoiserState:
    """Return a session's state, which keeps its memory reserved."""
    state = denoiser.open(session)
    reservation.keep_for(state)
    return state


def carried_conditions(block: types_pb2.Block) -> Conditions:
    """Return the conditions that a block carries. ValueError unless they are of the version that it names."""
    if not block.HasField("carried") or block.carried.version != block.conditions:
        carried = f"carries version {block.carried.version}" if block.HasField("carried") else "carries none"
        raise ValueError(
            f"block {block.index} is the stream's first under version {block.conditions} of the conditions and"
            f" {carried}; it must carry that version"
        )
    return conditions_from_pb(block.carried)
