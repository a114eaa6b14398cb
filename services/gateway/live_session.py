"""One open session: its pipeline, its record in the store, and the connection of its client.

    run: LiveStream.run -> closed                (once; outlives connections)
    serve: requests -> LiveStream -> responses   (once per connection, one at a time)

When a connection breaks, the pipeline stays as it is and gives no block a slot, until another connection takes its
place or the grace period ends.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import grpc.aio

from avatar import telemetry
from avatar.errors import ConnectionLost, SessionBusy, SessionNotFound, SilentClient, StoreUnavailable
from avatar.rpc.status import reason_of
from avatar.settings import GatewaySettings
from avatar.store.sessions import LOCK_TTL_S, SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.worker.v1 import types_pb2
from services.gateway.stream.live_stream import LiveStream
from services.gateway.stream.outbox import Item, Write

logger = logging.getLogger(__name__)

# Errors that end a connection and leave its session open.
CONNECTION_ERRORS = (ConnectionLost.reason, StoreUnavailable.reason)


class LiveSession:
    """An open session, with or without a connection.

    opened: the message that opened it. session: its constants, and its current prompt. stream: its pipeline.
    init_segment: bytes that precede all frames.
    ended: done when the session has ended, with the error that ended it, if any.
    """

    def __init__(
        self,
        opened: pb.OpenAvatar,
        session: types_pb2.Session,
        stream: LiveStream,
        init_segment: bytes,
        store: SessionStore,
        settings: GatewaySettings,
    ) -> None:
        self.opened = opened
        self.stream = stream
        self.init_segment = init_segment
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
        if self._replaced and not self._replaced.done():
            self._replaced.set_result(None)
        async with self._serving:
            replaced = self._replaced = asyncio.get_running_loop().create_future()
            self._disconnected.clear()
            self.stream.connect()
            try:
                if next_frame is not None:
                    self.stream.outbox.repeat_from(next_frame)
                opened = await describe(self.opened.session_id)
                opened.init_segment = self.init_segment
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

    async def run(self, owner: str) -> None:
        """Run the pipeline until the client has closed the stream and everything is sent; then close the record.

        owner: of the session's lock. Raises the error that ends the session before.
        """
        goes_on_elsewhere = False
        try:
            async with asyncio.TaskGroup() as tasks:
                watchers = [
                    tasks.create_task(self._renew(owner)),
                    tasks.create_task(self._expire()),
                    tasks.create_task(self._end_silence()),
                    tasks.create_task(self._until_failure()),
                ]
                await tasks.create_task(self.stream.run())
                await self._close()
                num_blocks = self.stream.position.next_block
                closed = pb.AvatarClosed(num_blocks=num_blocks, stages=self.stream.stage_usage())
                self.stream.outbox.put(Item([pb.StreamAvatarResponse(closed=closed)]))
                self.stream.outbox.finish()
                await self.stream.outbox.is_drained.wait()
                for task in watchers:
                    task.cancel()
        except BaseException as error:
            # If this gateway stops, its clients may resume at another one; if another one has the lock, they have.
            goes_on_elsewhere = isinstance(error, asyncio.CancelledError) or reason_of(error) == SessionBusy.reason
            raise
        finally:
            if not goes_on_elsewhere:
                await self._close()

    async def _close(self) -> None:
        """Mark the session's record as closed, unless that is done."""
        position = self.stream.position
        if position.is_closed and position.next_frame == self.stream.outbox.next_frame:
            return
        self.stream.record_position().is_closed = True
        with suppress(StoreUnavailable, SessionNotFound):
            await self._store.renew(self.session.id, position)

    async def _renew(self, owner: str) -> None:
        """Write the position after every block, and renew the lock. SessionNotFound if the session was deleted.

        A running stream survives the loss of its store: the workers have all that they need. Once the store is back,
        what it has lost is written again.
        """
        session_id, was_away = self.session.id, False
        advanced = self.stream.advanced
        while True:
            # Not asyncio.wait_for: before Python 3.12 it swallows a cancellation that comes with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(LOCK_TTL_S / 3):
                    await advanced.wait()
            has_advanced, position = advanced.is_set(), self.stream.record_position()
            advanced.clear()
            changed = position if has_advanced else None
            try:
                while was_away or not await self._store.renew_lock(session_id, owner, changed):
                    await self._store.acquire_lock(session_id, owner)
                    await self._store.restore(self.session, self.stream.versions.known, position)
                    was_away = False
            except StoreUnavailable:
                was_away = True
                if has_advanced:  # still to be written, although there may be no other block
                    advanced.set()
                logger.warning("session not renewed", extra={"session": telemetry.tag(session_id)})
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
    raise ConnectionLost("another connection resumed this session")
