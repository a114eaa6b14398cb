"""The open sessions of this gateway, each in a task of its own.

start or resume -> LiveSession -> serve -> (the connection breaks) -> resume -> serve -> ... -> ended
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from types import TracebackType

from avatar import telemetry
from avatar.aio import Attempts
from avatar.errors import REASONS, ConnectionLost, InvalidField, NoCapacity, SessionClosed, StoreUnavailable
from avatar.rpc.status import reason_of
from avatar.settings import GatewaySettings
from avatar.store.claims import CLAIM_TTL_S, Claim, no_session
from avatar.store.references import Latents, SharedLatents
from avatar.store.sessions import SessionRecord, SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.worker.v1 import types_pb2
from services.gateway.access.quotas import Quotas
from services.gateway.cell import Cell
from services.gateway.live_session import LiveSession
from services.gateway.options import StreamOptions, stream_options
from services.gateway.stages import SessionStages, open_stages
from services.gateway.stream.in_flight import FIRST_FRAME
from services.gateway.stream.live_stream import LiveStream
from services.gateway.stream.outbox import notice
from services.gateway.workers import Workers

logger = logging.getLogger(__name__)

# A lost gateway's record is at most a block old, and what it had sent was in transit for no longer than a client waits.
MAX_FRAMES_APART = 500
# The reason of a stream that ended as its client asked, in logs and metrics.
CLOSED = "CLOSED"
# Time for room at full workers, where the slots of the stream that a session was taken from are not to be had.
SLOTS_S, SLOTS_RETRY_S = 1.0, 0.05
RECONNECT_S = 1.0


class LiveSessions:
    """All sessions that are open at this gateway. A context; its end ends them."""

    def __init__(
        self, settings: GatewaySettings, store: SessionStore, workers: Workers, quotas: Quotas, cell: Cell
    ) -> None:
        self._settings = settings
        self._store = store
        self._workers = workers
        self._quotas = quotas
        self._cell = cell
        self._latents = SharedLatents(store.references)
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()
        self._sessions: dict[str, LiveSession] = {}
        for reason in (CLOSED, *REASONS):
            telemetry.SESSIONS_CLOSED.add(0, {"reason": reason})
        # By session: more than one while a stream takes over from another one here.
        self._claims: dict[str, set[Claim]] = {}

    async def __aenter__(self) -> "LiveSessions":
        await self._tasks.__aenter__()
        self._running.add(self._tasks.create_task(self._follow_changes()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._running:
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    def get(self, session_id: str) -> LiveSession | None:
        """Return an open session, None if it is not open at this gateway."""
        return self._sessions.get(session_id)

    def announce_stop(self) -> None:
        """Notify every client that the gateway stops."""
        for session in self._sessions.values():
            going_away = notice(pb.Notice.KIND_GOING_AWAY, "the gateway stops", within_s=self._settings.drain_s)
            session.stream.outbox.put(going_away)

    async def start(self, opened: pb.OpenAvatar) -> LiveSession:
        """Open a session, or go on with one that was open at another gateway. Raises the error that prevents it."""
        if not opened.HasField("resume"):
            self._cell.check_not_drained()
        options = stream_options(opened)
        started: asyncio.Future[LiveSession] = asyncio.get_running_loop().create_future()
        task = self._tasks.create_task(self._run(opened, options, started))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await started
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise

    async def resume(self, opened: pb.OpenAvatar) -> LiveSession:
        """Return the session that a client goes on with. Raises the error that prevents it."""
        if opened.resume.next_frame < FIRST_FRAME:
            message = f"{opened.resume.next_frame}, the first frame has number {FIRST_FRAME}"
            raise InvalidField.at("open.resume.next_frame", message)
        session = self._sessions.get(opened.session_id)
        if session is None:
            return await self._resume_from_record(opened)
        for name in ("audio", "mode", "output", "return_audio", "listen"):
            given, first = getattr(opened, name), getattr(session.opened, name)
            if given and given != first and given != type(given)():
                raise InvalidField.at(f"open.{name}", "differs from the first `open`; leave it out")
        session.stream.outbox.kept_from(opened.resume.next_frame)
        return session

    async def _resume_from_record(self, opened: pb.OpenAvatar) -> LiveSession:
        """Go on with a session that was open at another gateway, with the options of its first `open`."""
        position = await self._store.position(opened.session_id)
        if position.is_closed or not position.opened:
            raise SessionClosed(f"session {opened.session_id!r} has no stream to resume; create another session")
        next_frame = opened.resume.next_frame
        if abs(next_frame - position.next_frame) > MAX_FRAMES_APART:
            raise InvalidField.at("open.resume.next_frame", f"{next_frame}, expected about {position.next_frame}")
        first = pb.OpenAvatar.FromString(position.opened)
        first.resume.CopyFrom(opened.resume)
        return await self.start(first)

    async def _run(self, opened: pb.OpenAvatar, options: StreamOptions, started: "asyncio.Future[LiveSession]") -> None:
        """Run a session from its start to its end. `started` gets it, or the error that prevents it."""
        live: LiveSession | None = None
        error: Exception | None = None
        try:
            async with (
                self._claimed(opened.session_id, take_over=opened.HasField("resume")) as (claim, record),
                self._quotas.streaming(claim),
                AsyncExitStack() as stack,
            ):
                session, position = record.session, _start(opened, options, record)
                stages, latents = await self._opened(stack, claim, session, options, position)
                conditions = record.conditions(position.conditions, latents.sink)
                stream = LiveStream(stages, options, session, position, conditions, self._settings)
                if self._workers.voice:
                    stream.take_text(self._workers.voice, self._quotas.audio_meter())
                stack.callback(stream.versions.close)
                if position.coming_conditions:
                    stream.versions.add(record.conditions(position.coming_conditions, latents.sink))
                del record
                position.opened = opened.SerializeToString()
                position.workers[:] = stages.workers
                await claim.commit(position)
                claim.wake_with(stream.advanced)
                live = LiveSession(opened, session, stream, stages.decoding, self._store, self._settings)
                self._sessions[session.id] = live
                try:
                    if not started.done():  # the caller may be gone
                        started.set_result(live)
                    await live.run(claim, latents)
                finally:
                    if self._sessions.get(session.id) is live:
                        del self._sessions[session.id]
        except Exception as caught:
            error = caught  # for the connection, and not for this task
        except asyncio.CancelledError:
            error = ConnectionLost("the gateway stops")
            raise
        finally:
            if error and not started.done():
                started.set_exception(error)
            if live and not live.ended.done():
                live.ended.set_exception(error) if error else live.ended.set_result(None)

    async def _opened(
        self,
        stack: AsyncExitStack,
        claim: Claim,
        session: types_pb2.Session,
        options: StreamOptions,
        position: types_pb2.Position,
    ) -> tuple[SessionStages, Latents]:
        """Open a session's stages, until the stack's end; return its latents, too.

        SessionBusy if another stream takes the claim meanwhile, SessionNotFound if the store has no latents.

        Workers that are full give these stages the slots of the stream that the claim was taken from. If they cannot,
        because they are others or are gone, that stream ends first, and room is waited for.
        """
        stages: SessionStages | None = None
        latents: Latents | None = None
        give_up_s = 0.0

        async def read_motion() -> bytes:
            nonlocal latents
            if latents is None and (latents := await self._latents.get(session.reference_id)) is None:
                raise no_session(session.id)
            return latents.motion

        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(_keep(claim))
            while stages is None:
                full: BaseException | None = None
                try:
                    opening = open_stages(
                        self._workers, self._settings, session, read_motion, options, position, claim.acquired_us
                    )
                    stages = await stack.enter_async_context(opening)
                except* NoCapacity as error:
                    full = error
                if full:
                    if not claim.is_taken_over or 0 < give_up_s < time.monotonic():
                        raise full
                    if not give_up_s:
                        await claim.commit()
                        give_up_s = time.monotonic() + SLOTS_S
                    await asyncio.sleep(SLOTS_RETRY_S)
            keeping.cancel()
        assert latents is not None
        return stages, latents

    @asynccontextmanager
    async def _claimed(self, session_id: str, *, take_over: bool) -> AsyncGenerator[tuple[Claim, SessionRecord], None]:
        """Hold a claim on the session for its only stream; yield its record, too. SessionBusy if another stream has it.

        take_over: take it from the other stream. If the body fails before it commits, that stream gets it back.
        """
        claim = self._store.claim(session_id, self._cell.here)
        records = [await self._store.acquire(claim, take_over=take_over)]
        self._claims.setdefault(session_id, set()).add(claim)
        telemetry.SESSIONS_ACTIVE.add(1, {"service": "gateway"})
        started, reason = time.monotonic(), CLOSED
        try:
            yield claim, records.pop()  # the body alone keeps it, as long as it needs its conditions
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
            self._claims[session_id].discard(claim)
            if not self._claims[session_id]:
                del self._claims[session_id]
            with suppress(StoreUnavailable):
                await claim.release()

    async def _follow_changes(self) -> None:
        """Wake the streams of each session whose claim moves or that is deleted, at any gateway.

        Without the store they look for themselves, three times in CLAIM_TTL_S.
        """
        attempts = Attempts(logger, "changes not followed", "changes followed again", expected=StoreUnavailable)
        while True:
            with attempts:
                async with aclosing(self._store.changes()) as changes:
                    async for session_id in changes:
                        for claim in self._claims.get(session_id, ()):
                            claim.changed.set()
            await asyncio.sleep(RECONNECT_S)


async def _keep(claim: Claim) -> None:
    """Renew a claim while its stages open. SessionBusy if another stream takes it."""
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLAIM_TTL_S / 3):
                await claim.changed.wait()
        claim.changed.clear()
        with suppress(StoreUnavailable):
            await claim.renew()


def _start(opened: pb.OpenAvatar, options: StreamOptions, record: SessionRecord) -> types_pb2.Position:
    """Return where a session starts or resumes. SessionClosed if it cannot be opened in this way."""
    session, position = record.session, record.position
    if position.is_closed:
        raise SessionClosed(f"the stream of session {session.id!r} has ended; create another session")
    if opened.HasField("resume"):
        _advance(position, opened.resume, session, options)
    elif position.opened and (position.next_block or position.next_frame > FIRST_FRAME):
        raise SessionClosed(f"a stream of session {session.id!r} was open; resume it")
    return position


def _advance(
    position: types_pb2.Position, resume: pb.ResumeAvatar, session: types_pb2.Session, options: StreamOptions
) -> None:
    """Move a record to the client's next frame and event: the client may have received more than was recorded.

    Offline, every frame shows speech, which need not be sent again. Live, frames may have been idle.
    """
    missed = max(0, resume.next_frame - position.next_frame) if not options.is_live else 0
    num_samples = missed * options.rate_hz // session.frame_rate_hz
    position.next_frame = resume.next_frame
    position.next_event = max(position.next_event, resume.next_event)
    position.num_samples += num_samples
    position.num_turn_samples += num_samples
