"""One open session: its pipeline, its record in the store, and the connection of its client.

    run: LiveStream.run -> closed                (once; outlives connections)
    serve: requests -> LiveStream -> responses   (once per connection, one at a time)

When a connection breaks, the pipeline stays as it is and gives no block a slot, until another connection takes its
place or the grace period ends.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import grpc.aio

from avatar import telemetry
from avatar.errors import (
    ConnectionLost,
    SessionBusy,
    SessionClosed,
    SessionNotFound,
    SilentClient,
    StoreUnavailable,
)
from avatar.rpc.status import reason_of
from avatar.settings import GatewaySettings
from avatar.store.claims import CLAIM_TTL_S, Claim, Outcome
from avatar.store.references import LEASE_MARGIN_S, Latents
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.worker.v1 import types_pb2, vae_pb2
from services.gateway.options import MARKS
from services.gateway.stream.live_stream import LiveStream
from services.gateway.stream.outbox import Item, Write

logger = logging.getLogger(__name__)

# Errors of a stream whose session goes on, or has ended, at another gateway.
ELSEWHERE = (SessionBusy.reason, SessionClosed.reason)
# Errors that end a connection and leave its session open.
CONNECTION_ERRORS = (ConnectionLost.reason, StoreUnavailable.reason)


class LiveSession:
    """An open session, with or without a connection.

    opened: the message that opened it. session: its constants, and its current prompt. stream: its pipeline.
    decoding: the decoder's answer to its `open`, with bytes that precede all frames and the frames' marks.
    ended: done when the session has ended, with the error that ended it, if any.
    """

    def __init__(
        self,
        opened: pb.OpenAvatar,
        session: types_pb2.Session,
        stream: LiveStream,
        decoding: vae_pb2.DecodeOpened,
        store: SessionStore,
        settings: GatewaySettings,
    ) -> None:
        self.opened = opened
        self.stream = stream
        self.decoding = decoding
        self.session, self._store, self._settings = session, store, settings
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = loop.create_future()
        # Retrieve the error: no connection may be there to do it.
        self.ended.add_done_callback(lambda ended: ended.exception())
        self._failure: asyncio.Future[None] = loop.create_future()
        self._disconnected = asyncio.Event()
        self._replaced: asyncio.Future[None] | None = None
        self._serving = asyncio.Lock()

    async def serve(
        self,
        describe: Callable[[str], Awaitable[pb.AvatarOpened]],
        requests: AsyncIterator[pb.StreamAvatarRequest],
        write: Write,
        next_frame: int | None,
    ) -> None:
        """Serve a connection until everything is sent; a connection that is there is replaced.

        describe: returns the answer to `open`, given the session's id. next_frame: the first frame to send, if it is
        not the next one. Raises the error that ended the session; ConnectionLost if the connection broke, or was
        replaced.
        """
        # Replace the connection that is served and, of those that wait for it to end, all but the latest.
        former, replaced = self._replaced, asyncio.get_running_loop().create_future()
        self._replaced = replaced
        if former and not former.done():
            former.set_result(None)
        async with self._serving:
            if replaced.done():
                raise _replaced_error()
            self._disconnected.clear()
            self.stream.connect()
            try:
                if next_frame is not None:
                    self.stream.outbox.repeat_from(next_frame)
                opened = await describe(self.opened.session_id)
                opened.init_segment = self.decoding.init_segment
                opened.marks.extend(MARKS[mark] for mark in self.decoding.marks if mark in MARKS)
                opened.num_samples, opened.num_messages = self.stream.acks.num_samples, self.stream.acks.num_messages
                try:
                    await write(pb.StreamAvatarResponse(opened=opened))
                except grpc.aio.BaseError as error:
                    raise ConnectionLost("the client is gone") from error
                async with asyncio.TaskGroup() as tasks:
                    connection = [
                        tasks.create_task(self._receive(requests)),
                        tasks.create_task(self.stream.outbox.drain(write)),
                        tasks.create_task(_until_replaced(replaced)),
                    ]
                    await asyncio.wait({self.ended})
                    self.ended.result()
                    for task in connection:
                        task.cancel()
            except BaseException as error:
                self.stream.disconnect()
                self._disconnected.set()
                if reason_of(error) not in CONNECTION_ERRORS or not self._settings.resume_s:
                    self._fail(error if isinstance(error, Exception) else ConnectionLost("the client is gone"))
                    await asyncio.wait({self.ended})
                raise

    async def _receive(self, requests: AsyncIterator[pb.StreamAvatarRequest]) -> None:
        """Take the client's messages until it closes the stream. ConnectionLost if they end before."""
        async for request in requests:
            if await self.stream.receive(request):
                return
            await self.stream.wait_for_few_items()
        raise ConnectionLost("the stream ended without close")

    def _fail(self, error: Exception) -> None:
        """End the session."""
        if not (self.ended.done() or self._failure.done()):
            self._failure.set_exception(error)

    async def run(self, claim: Claim, latents: Latents) -> None:
        """Run the pipeline until the client has closed the stream and everything is sent; then close the record.

        claim: on the session, committed. latents: of its reference. Raises the error that ends the session before.
        """
        goes_on_elsewhere = False
        try:
            async with asyncio.TaskGroup() as tasks:
                watchers = [
                    tasks.create_task(self._renew(claim, latents)),
                    tasks.create_task(self._expire()),
                    tasks.create_task(self._end_silence()),
                    tasks.create_task(self._until_failure()),
                    *([tasks.create_task(self.stream.speaker.run())] if self.stream.speaker else []),
                ]
                await tasks.create_task(self.stream.run())
                num_blocks = self.stream.position.next_block
                closed = pb.AvatarClosed(num_blocks=num_blocks, stages=self.stream.stage_usage())
                self.stream.outbox.put(Item([pb.StreamAvatarResponse(closed=closed)]))
                self.stream.outbox.finish()
                await self.stream.outbox.is_drained.wait()
                for task in watchers:
                    task.cancel()
        except BaseException as error:
            # If this gateway stops, its clients may resume at another one; if another one has the claim, they have.
            goes_on_elsewhere = isinstance(error, asyncio.CancelledError) or reason_of(error) in ELSEWHERE
            raise
        finally:
            if not goes_on_elsewhere:
                await self._close(claim)

    async def _close(self, claim: Claim) -> None:
        """Close the session's record: everything is sent, or nobody goes on with it."""
        with suppress(StoreUnavailable, SessionNotFound, SessionBusy, SessionClosed):
            await self._store.close(claim, self.session, self.stream.record_position())

    async def _renew(self, claim: Claim, latents: Latents) -> None:
        """Write the position when it is due; renew the claim and the lease of the latents.

        A running stream survives the loss of its store: the workers have all that they need. Once the store is back,
        what it has lost is written again. Raises SessionNotFound if the session was deleted, SessionBusy if another
        stream has the claim.
        """
        record = _Record(self._store, claim, self.session, latents)
        while True:
            # Not asyncio.wait_for: before Python 3.12 it swallows a cancellation that comes with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(CLAIM_TTL_S / 3):
                    await claim.changed.wait()
            record.is_behind |= claim.changed.is_set()
            claim.changed.clear()
            try:
                await record.write(self.stream)
            except StoreUnavailable:
                record.was_away = True
                logger.warning("session not renewed", extra={"session": telemetry.tag(self.session.id)})
                await asyncio.sleep(1)

    async def _expire(self) -> None:
        """Raise ConnectionLost once there has been no connection for `resume_s`."""
        while True:
            await self._disconnected.wait()
            try:
                async with asyncio.timeout(self._settings.resume_s):
                    await self.stream.wait_connected()
            except TimeoutError as error:
                message = f"the connection broke, and nobody resumed in {self._settings.resume_s:g} s"
                raise ConnectionLost(message) from error

    async def _end_silence(self) -> None:
        """Raise SilentClient once the client has sent nothing for too long."""
        limit_s = self.stream.max_silent_s
        while limit_s:
            if (silent_s := self.stream.silent_s()) >= limit_s:
                raise SilentClient(f"the client sent nothing for {limit_s:g} s, and was owed no frames")
            await asyncio.sleep(limit_s - silent_s)

    async def _until_failure(self) -> None:
        await self._failure


async def _until_replaced(replaced: "asyncio.Future[None]") -> None:
    await asyncio.wait({replaced})
    raise _replaced_error()


def _replaced_error() -> ConnectionLost:
    return ConnectionLost("another connection resumed this session")


class _Record:
    """A streaming session's record in the store.

    is_behind: the position has changed since it was written. was_away: the store could not be reached, and may have
    lost what was written.
    """

    def __init__(self, store: SessionStore, claim: Claim, session: types_pb2.Session, latents: Latents) -> None:
        self.is_behind = self.was_away = False
        self._store, self._claim, self._session, self._latents = store, claim, session, latents
        self._tried_s, self._has_stalled = time.monotonic(), False
        self._next_block = 0
        self._leased_s, self._leased_for_s = -math.inf, 0.0

    async def write(self, stream: LiveStream) -> None:
        """Renew the claim, write the position if it has changed, and restore what the store has lost."""
        # A process that was stopped for longer than its claim lasts may have missed the end of its session elsewhere.
        now_s = time.monotonic()
        self._has_stalled |= now_s - self._tried_s > CLAIM_TTL_S
        self._tried_s = now_s
        position, versions = stream.record_position(), stream.versions.known
        next_block = position.next_block  # of a position that goes on changing
        self.is_behind |= next_block > self._next_block
        outcome = Outcome.EXPIRED
        if not self.was_away:
            numbers = [each.version for each in versions]
            outcome = await self._claim.renew(position if self.is_behind else None, numbers)
        if outcome is Outcome.EXPIRED:
            outcome = await self._store.restore(
                self._claim, self._session, self._latents, versions, position, may_create=not self._has_stalled
            )
        if outcome is Outcome.DONE:
            self.is_behind = self.was_away = self._has_stalled = False
            self._next_block = next_block
            await self._lease_latents(now_s)

    async def _lease_latents(self, now_s: float) -> None:
        """Renew the lease of the latents twice in its margin, and at once if the time to live has grown."""
        ttl_s = self._claim.ttl_s or 0.0
        if now_s - self._leased_s > LEASE_MARGIN_S / 2 or ttl_s > self._leased_for_s:
            reference_id, session_id = self._session.reference_id, self._session.id
            await self._store.references.restore(reference_id, self._latents, session_id, ttl_s)
            self._leased_s, self._leased_for_s = now_s, ttl_s
