"""The conversations of this gateway: each lives in a task of its own, and outlives its connection for a while.

    begin -> serve -> (the connection breaks) -> resume -> serve -> ... -> all is sent

A connection reads what its client sends and sends what is put into the outbox. When it breaks, the pipeline stays as it
is and admits nothing, until another connection takes its place or the grace period ends.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import TracebackType

from avatar import telemetry
from avatar.errors import (
    ConnectionLost,
    InvalidField,
    SessionBusy,
    SessionClosed,
    SessionNotFound,
    StoreUnavailable,
)
from avatar.rpc.status import reason_of
from avatar.settings import GatewaySettings
from avatar.store.sessions import LOCK_TTL_S, SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.worker.v1 import audio_pb2, types_pb2, vae_pb2
from services.gateway.access.quotas import Quotas
from services.gateway.options import Choices, choices_of
from services.gateway.stages import Opening, open_stages
from services.gateway.stream.live_stream import Conversation
from services.gateway.stream.outbox import Item, Write
from services.gateway.workers import Workers

logger = logging.getLogger(__name__)

# A gateway's record is at most a block old, and what it had sent was on its way for no longer than a client waits.
MAX_FRAMES_APART = 500
# What ends a connection and leaves its conversation as it is.
OF_A_CONNECTION = (ConnectionLost.reason, StoreUnavailable.reason)


class Held:
    """One conversation that is open, with or without a connection.

    opened: what opened it. init_segment: what comes before all frames.
    over: done when it has ended, with what ended it.
    """

    def __init__(self, opened: pb.OpenAvatar, conversation: Conversation, init_segment: bytes) -> None:
        self.opened = opened
        self.conversation = conversation
        self.init_segment = init_segment
        loop = asyncio.get_running_loop()
        self.over: asyncio.Future[None] = loop.create_future()
        # Looked at only where there is a connection; do not warn that nobody did.
        self.over.add_done_callback(lambda over: over.exception())
        self.is_drained = asyncio.Event()
        self.serving = asyncio.Lock()
        self._failure: asyncio.Future[None] = loop.create_future()
        self._lost = asyncio.Event()
        self._taken_over: asyncio.Future[None] | None = None

    def take_over(self) -> None:
        """End the connection that there may be."""
        if self._taken_over and not self._taken_over.done():
            self._taken_over.set_result(None)

    def attach(self) -> asyncio.Future[None]:
        """A connection is there; done when another takes its place."""
        self._lost.clear()
        self._taken_over = asyncio.get_running_loop().create_future()
        self.conversation.attach()
        return self._taken_over

    def detach(self) -> None:
        """The connection is lost."""
        self.conversation.attached.clear()
        self._lost.set()

    def fail(self, error: BaseException) -> None:
        """End the conversation."""
        if not (self.over.done() or self._failure.done()):
            self._failure.set_exception(error)

    async def failure(self) -> None:
        """Raise what the conversation is to end with."""
        await self._failure

    async def abandoned(self, resume_s: float) -> None:
        """Raise ConnectionLost once there was no connection for so long."""
        while True:
            await self._lost.wait()
            try:
                async with asyncio.timeout(resume_s):
                    await self.conversation.attached.wait()
            except TimeoutError as error:
                raise ConnectionLost(f"the connection broke, and nobody resumed in {resume_s:g} s") from error


class Conversations:
    """All conversations that are open at this gateway."""

    def __init__(self, settings: GatewaySettings, store: SessionStore, workers: Workers, quotas: Quotas) -> None:
        self._settings = settings
        self._store = store
        self._workers = workers
        self._quotas = quotas
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()
        self._held: dict[str, Held] = {}

    async def __aenter__(self) -> "Conversations":
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._running:
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    def get(self, session_id: str) -> Conversation | None:
        """The session's conversation, if one is open here."""
        held = self._held.get(session_id)
        return held.conversation if held else None

    def go_away(self) -> None:
        """Tell every client that the gateway stops."""
        within_s = self._settings.drain_s
        for held in self._held.values():
            held.conversation.tell(pb.Notice.KIND_GOING_AWAY, "the gateway stops", within_s)

    async def begin(self, opened: pb.OpenAvatar) -> Held:
        """Begin a session's conversation, or go on with it where another gateway was. Raises what stands in the way."""
        choices = choices_of(opened)
        session = await self._store.session(opened.session_id)
        begun: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        task = self._tasks.create_task(self._hold(opened, choices, session, begun))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await begun
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise

    async def resume(self, opened: pb.OpenAvatar) -> Held:
        """The conversation that a client goes on with. Raises what stands in the way."""
        held = self._held.get(opened.session_id)
        if held is None:
            return await self._resume_from_elsewhere(opened)
        for name in ("audio", "mode", "output", "return_audio"):
            given, first = getattr(opened, name), getattr(held.opened, name)
            if given and given != first and given != type(given)():
                raise InvalidField.at(f"open.{name}", "is not as it was opened first; leave it out")
        held.conversation.outbox.kept_from(opened.resume.next_frame)
        return held

    async def _resume_from_elsewhere(self, opened: pb.OpenAvatar) -> Held:
        """Go on with a session that was at another gateway: from its record, with the same format of everything."""
        position = await self._store.position(opened.session_id)
        if position.is_closed or not position.opened:
            raise SessionClosed(f"session {opened.session_id!r} waits for nobody; create another session")
        next_frame = opened.resume.next_frame
        if abs(next_frame - position.next_frame) > MAX_FRAMES_APART:
            raise InvalidField.at("open.resume.next_frame", f"{next_frame}, about {position.next_frame} is the next")
        first = pb.OpenAvatar.FromString(position.opened)
        first.resume.CopyFrom(opened.resume)
        return await self.begin(first)

    async def serve(
        self,
        held: Held,
        describe: Callable[[str], Awaitable[pb.AvatarOpened]],
        requests: AsyncIterator[pb.StreamAvatarRequest],
        write: Write,
        next_frame: int | None,
    ) -> None:
        """Be the conversation's connection until all is sent. ConnectionLost if it breaks, or another takes its place.

        describe: what a session of this name is told when it is opened. next_frame: the first frame that is sent, if
        not the next.
        """
        held.take_over()
        async with held.serving:
            taken_over = held.attach()
            try:
                outbox = held.conversation.outbox
                if next_frame is not None:
                    outbox.again_from(next_frame)
                opened = await describe(held.opened.session_id)
                opened.init_segment = held.init_segment
                heard = held.conversation.heard
                opened.num_samples, opened.num_messages = heard.num_samples, heard.num_messages
                await write(pb.StreamAvatarResponse(opened=opened))
                async with asyncio.TaskGroup() as tasks:
                    beside = [
                        tasks.create_task(_read(held, requests)),
                        tasks.create_task(self._send(held, write)),
                        tasks.create_task(_until_taken_over(taken_over)),
                    ]
                    await asyncio.wait({held.over})
                    held.over.result()
                    for task in beside:
                        task.cancel()
            except BaseException as error:
                held.detach()
                if reason_of(error) not in OF_A_CONNECTION or not self._settings.resume_s:
                    held.fail(error if isinstance(error, Exception) else ConnectionLost("the client is gone"))
                    await asyncio.wait({held.over})
                raise

    async def _send(self, held: Held, write: Write) -> None:
        await held.conversation.outbox.drain(write, self._settings.max_unread_s)
        held.is_drained.set()

    async def _hold(
        self, opened: pb.OpenAvatar, choices: Choices, session: types_pb2.Session, begun: "asyncio.Future[Held]"
    ) -> None:
        """A conversation from its beginning to its end, with what it needs."""
        held: Held | None = None
        error: Exception | None = None
        try:
            is_resumed = opened.HasField("resume")
            async with (
                self._claimed(session.id, takes_over=is_resumed) as owner,
                self._quotas.streaming(session.id),
            ):
                position = await self._store.position(session.id)
                if position.is_closed:
                    raise SessionClosed(f"the stream of session {session.id!r} has ended; create another session")
                if opened.HasField("resume"):
                    _go_on(position, opened.resume.next_frame, session, choices)
                elif position.opened:
                    raise SessionClosed(f"a stream of session {session.id!r} was open; resume it")
                conditions = await self._store.conditions(session.id, position.conditions)
                async with open_stages(self._workers, _opening(session, choices, position), self._settings) as streams:
                    conversation = Conversation(streams, choices, session, position, conditions, self._settings)
                    if position.coming_conditions:
                        coming = await self._store.conditions(session.id, position.coming_conditions)
                        conversation.versions.keep(coming)
                    position.opened = opened.SerializeToString()
                    held = self._held[session.id] = Held(opened, conversation, streams.init_segment)
                    try:
                        if not begun.done():  # who began it may be gone
                            begun.set_result(held)
                        await self._run(held, session, owner)
                    finally:
                        if self._held.get(session.id) is held:
                            del self._held[session.id]
                        conversation.versions.end()
        except Exception as caught:
            error = caught  # not for this task, but for who is connected
        except asyncio.CancelledError:
            error = ConnectionLost("the gateway stops")
            raise
        finally:
            if error and not begun.done():
                begun.set_exception(error)
            if held and not held.over.done():
                held.over.set_exception(error) if error else held.over.set_result(None)

    async def _run(self, held: Held, session: types_pb2.Session, owner: str) -> None:
        conversation = held.conversation
        is_elsewhere = False
        try:
            async with asyncio.TaskGroup() as tasks:
                beside = [
                    tasks.create_task(self._keep(session, owner, conversation)),
                    tasks.create_task(held.abandoned(self._settings.resume_s)),
                    tasks.create_task(held.failure()),
                ]
                await conversation.run()
                await self._close(session.id, conversation)
                closed = pb.AvatarClosed(num_blocks=conversation.num_blocks, stages=conversation.usage())
                conversation.outbox.put(Item([pb.StreamAvatarResponse(closed=closed)]))
                conversation.outbox.finish()
                await held.is_drained.wait()
                for task in beside:
                    task.cancel()
        except BaseException as error:
            # A client may go on at another gateway where this one stops, and has where the claim is another's.
            is_elsewhere = isinstance(error, asyncio.CancelledError) or reason_of(error) == SessionBusy.reason
            raise
        finally:
            if not is_elsewhere:
                await self._close(session.id, conversation)

    async def _close(self, session_id: str, conversation: Conversation) -> None:
        position = conversation.position
        if position.is_closed and position.next_frame == conversation.outbox.next_frame:
            return
        conversation.note().is_closed = True
        with suppress(StoreUnavailable, SessionNotFound):
            await self._store.renew(session_id, position)

    async def _keep(self, session: types_pb2.Session, owner: str, conversation: Conversation) -> None:
        """Renew the session with every block, and the claim on it. SessionNotFound ends the stream if it is gone.

        A stream that runs outlives its store: the workers have what they need. What the store has forgotten when it is
        back is written again.
        """
        session_id, was_away = session.id, False
        while True:
            # Not asyncio.wait_for: before Python 3.12 it swallows a cancellation that comes with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(LOCK_TTL_S / 3):
                    await conversation.advanced.wait()
            has_advanced, position = conversation.advanced.is_set(), conversation.note()
            conversation.advanced.clear()
            try:
                while was_away or not await self._store.renew_lock(
                    session_id, owner, position if has_advanced else None
                ):
                    await self._store.acquire_lock(session_id, owner)
                    await self._store.restore(session, conversation.versions.kept, position)
                    was_away = False
            except StoreUnavailable:
                was_away = True
                if has_advanced:  # which is still to be written, though no other block may come
                    conversation.advanced.set()
                logger.warning("session not renewed", extra={"session": telemetry.tag(session_id)})
                await asyncio.sleep(1)

    @asynccontextmanager
    async def _claimed(self, session_id: str, *, takes_over: bool) -> AsyncGenerator[str, None]:
        """Be the session's only stream; gives the name it is claimed under. SessionBusy if there is another stream.

        takes_over: the gateway of the other one is lost, or will see that the claim is no longer its own.
        """
        owner = secrets.token_hex(8)
        await self._store.acquire_lock(session_id, owner, take_over=takes_over)
        telemetry.SESSIONS_ACTIVE.add(1, {"service": "gateway"})
        started, reason = time.monotonic(), "CLOSED"
        try:
            yield owner
        except BaseException as error:
            reason = reason_of(error)
            raise
        finally:
            telemetry.SESSIONS_ACTIVE.add(-1, {"service": "gateway"})
            telemetry.SESSIONS_CLOSED.add(1, {"reason": reason})
            duration_s = round(time.monotonic() - started, 3)
            logger.info(
                "stream ended", extra={"session": telemetry.tag(session_id), "reason": reason, "duration_s": duration_s}
            )
            with suppress(StoreUnavailable):
                await self._store.release_lock(session_id, owner)


def _go_on(position: types_pb2.Position, next_frame: int, session: types_pb2.Session, choices: Choices) -> None:
    """Bring a record to what the client has: it may have had more frames than were written down.

    Offline all of them show sound, which is not said again. Live they may have been idle.
    """
    missed = max(0, next_frame - position.next_frame) if not choices.is_live else 0
    num_samples = missed * choices.rate_hz // session.frame_rate_hz
    position.next_frame = next_frame
    position.num_samples += num_samples
    position.num_turn_samples += num_samples


async def _read(held: Held, requests: AsyncIterator[pb.StreamAvatarRequest]) -> None:
    """Hear what the client sends, until it closes. ConnectionLost if it stops without."""
    async for request in requests:
        if await held.conversation.hear(request):
            return
        await held.conversation.outbox.until_few()
    raise ConnectionLost("the stream ended without close")


async def _until_taken_over(taken_over: "asyncio.Future[None]") -> None:
    await asyncio.wait({taken_over})
    raise ConnectionLost("another connection resumed this session")


def _opening(session: types_pb2.Session, choices: Choices, position: types_pb2.Position) -> Opening:
    """What a session's streams are opened with."""
    sound = audio_pb2.OpenEncode(
        session_id=session.id,
        traceparent=telemetry.session_span(session.id),
        encoding=choices.encoding,
        rate_hz=choices.rate_hz,
        num_channels=choices.num_channels,
        is_live=choices.is_live,
    )
    if session.HasField("audio_right_frames"):
        sound.right_frames = session.audio_right_frames
    video = vae_pb2.OpenDecode(
        session_id=session.id, encoding=choices.video, quality=choices.quality, is_live=choices.is_live
    )
    return Opening(sound, video, position.next_block, position.statistics)
