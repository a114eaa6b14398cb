"""A stage in another process: the client of one worker's stream. Relays messages and never opens a tensor."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from avatar.aio import background
from avatar.errors import REASONS, AvatarError, ConfigMismatch, InvalidField, StageFailed, StageLost
from avatar.rpc.status import ENDED_EARLY, CallStatus, error_details
from avatar.rpc.wire import Parts, RelayedBlock, block_field, parse_part, serialize_field
from avatar.worker.v1 import audio_pb2, denoiser_pb2, types_pb2, vae_pb2, voice_pb2

Relayable: TypeAlias = types_pb2.Block | RelayedBlock
Item = TypeVar("Item", bound=Message | RelayedBlock)
Answer = TypeVar("Answer", bound=Message | RelayedBlock)

# Opening a stream does not wait for the worker's device, but it sends the session's motion latents.
OPEN_S = 5.0
# A worker ends a call right after its last message.
END_S = 0.5
# Statuses of a call whose worker is gone. OK is one of them: a stream that ends properly ends with `closed`.
GONE = (
    grpc.StatusCode.OK,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


class RemoteStage(Generic[Item, Answer]):
    """One session's stream at a worker: open it, then call it with the stream of items.

    stage: name that errors carry. closed: the worker's report, once the stream has ended.
    """

    def __init__(
        self, stage: str, connection: grpc.aio.Channel, method: MethodDescriptor, item: str, answer: str
    ) -> None:
        """method: of the worker's service. item, answer: the fields of its requests and responses that hold items."""
        self.stage = stage
        self.closed = types_pb2.Closed()
        self._request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        path = f"/{method.containing_service.full_name}/{method.name}"
        # The generated stub could only send whole messages, and not bytes that are joined from serialized parts.
        block = block_field(method.output_type)
        parse = partial(parse_part, message=response, block=block) if block else response.FromString
        open_call: Any = connection.stream_stream(path, None, parse)
        self._call = open_call()
        self._status = CallStatus(self._call)
        fields = method.input_type.fields_by_name
        self._open, self._item = fields["open"].number, fields[item].number
        self._prefill = fields["prefill"].number if "prefill" in fields else 0
        self._answer = answer

    async def open(self, message: Message, session: Parts = ()) -> Any:
        """Open the stream; return the worker's `opened`. Raises the worker's error, or StageLost.

        session: that field of the message, from `serialize_session`, if the message is without it.
        """
        is_open = False
        try:
            async with asyncio.timeout(OPEN_S):
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # reading raises the call's status
                    await self._call.write(b"".join(serialize_field(self._open, message, session)))
                # Reading would wait for these too, and swallow a cancellation meanwhile (grpc.aio awaits a task there).
                await self._call.initial_metadata()
                opened = (await self._read()).opened
            is_open = True
            return opened
        except TimeoutError as error:
            late = f"{self.stage} did not open a stream in {OPEN_S:g} s"
            raise StageLost(late, metadata={"stage": self.stage}) from error
        finally:
            if not is_open:
                self.cancel()

    async def __call__(self, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Answer, None]:
        """Yield the worker's answers until it has answered all items. If `items` fails, its error is raised.

        Conditions among the items are sent ahead of their blocks, and not answered.
        """
        async with background(self._feed(items)) as feeding:
            try:
                async for response in self._call:
                    if response is None:
                        raise self._unreadable()
                    if isinstance(response, RelayedBlock):
                        yield cast(Answer, response)
                        continue
                    match response.WhichOneof("part"):
                        case "closed":
                            self.closed = response.closed
                            await self._until_ended()
                            return
                        case "chunk":
                            for answer in response.chunk.frames:
                                yield answer
                        case _:
                            yield getattr(response, self._answer)
                raise self._ended_early()
            except grpc.aio.AioRpcError as error:
                raise await self._error(error) from error
            except asyncio.CancelledError:
                # A failure of `items` cancels the call, not this task. Distinguish it from a cancellation of this task.
                task = asyncio.current_task()
                is_cancelled = task is not None and task.cancelling() > 0
                if not is_cancelled and feeding.done() and not feeding.cancelled() and (failure := feeding.exception()):
                    raise failure from None
                raise
            finally:
                self.cancel()

    def cancel(self) -> None:
        """End the stream at once; does nothing if it has ended."""
        self._call.cancel()

    async def _until_ended(self) -> None:
        """Wait a moment for the call's status. The worker would count a call without it as cancelled."""
        with suppress(TimeoutError, StopAsyncIteration, grpc.aio.AioRpcError):
            async with asyncio.timeout(END_S):
                await anext(aiter(self._call))

    async def _feed(self, items: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    is_ahead = isinstance(item, types_pb2.Conditions)
                    field = self._prefill if is_ahead else self._item
                    await self._call.write(b"".join(serialize_field(field, item)))
            await self._call.write(self._request(close={}).SerializeToString())
            await self._call.done_writing()
        except BaseException:
            self.cancel()  # does nothing after a failed write: the call has ended, and reading raises its status
            raise

    async def _read(self) -> Any:
        try:
            response = await anext(aiter(self._call))
        except StopAsyncIteration:
            raise self._ended_early() from None
        except grpc.aio.AioRpcError as error:
            if (task := asyncio.current_task()) and task.cancelling():  # grpc.aio swallows it while a call starts
                raise asyncio.CancelledError from error
            raise await self._error(error) from error
        if response is None:
            raise self._unreadable()
        return response

    async def _error(self, error: grpc.aio.AioRpcError) -> AvatarError:
        return stage_error(self.stage, await self._status.instead_of(error))

    def _unreadable(self) -> StageFailed:
        """Return the error of an answer that cannot be parsed, for which grpc.aio logs the reason and returns None."""
        text = f"{self.stage} answered with bytes that are no message; do the gateway and its workers have one version?"
        return StageFailed(text, metadata={"stage": self.stage})

    def _ended_early(self) -> StageLost:
        return StageLost(f"{self.stage}: {ENDED_EARLY}", metadata={"stage": self.stage}, retry_s=1.0)


def remote_audio(channel: grpc.aio.Channel) -> RemoteStage[audio_pb2.AudioPiece, RelayedBlock]:
    method = audio_pb2.DESCRIPTOR.services_by_name["AudioService"].methods_by_name["Encode"]
    return RemoteStage("audio", channel, method, "piece", "block")


def remote_denoiser(channel: grpc.aio.Channel, level: int) -> RemoteStage[Relayable, RelayedBlock]:
    method = denoiser_pb2.DESCRIPTOR.services_by_name["DenoiserService"].methods_by_name["Denoise"]
    return RemoteStage(f"denoiser-{level}", channel, method, "block", "block")


def remote_vae(channel: grpc.aio.Channel) -> RemoteStage[Relayable, types_pb2.Frame]:
    method = vae_pb2.DESCRIPTOR.services_by_name["VaeService"].methods_by_name["Decode"]
    return RemoteStage("vae", channel, method, "block", "frame")


def remote_voice(channel: grpc.aio.Channel) -> RemoteStage[voice_pb2.TextPiece, voice_pb2.SpokenPiece]:
    method = voice_pb2.DESCRIPTOR.services_by_name["VoiceService"].methods_by_name["Speak"]
    return RemoteStage("voice", channel, method, "text", "speech")


def stage_error(stage: str, error: grpc.aio.AioRpcError, *, is_request: bool = False) -> AvatarError:
    """Return the error that a worker's status means to the caller of the whole pipeline, with the stage's name.

    Errors that the client can act on pass through; a defect of the worker is StageFailed, its absence StageLost.
    is_request: the worker's input came from the client; its input was not a block.
    """
    details = error_details(error)
    reason, violations, retry_s = details.reason, details.violations, details.retry_s
    text = error.details() or error.code().name
    kind: type[AvatarError]
    if reason == InvalidField.reason and not is_request:
        # A block that a worker cannot use is our defect, not the client's.
        kind, violations = StageFailed, ()
    elif reason in REASONS and reason != AvatarError.reason:
        kind = REASONS[reason]
    elif error.code() in GONE:
        kind, retry_s = StageLost, 1.0
    elif error.code() is grpc.StatusCode.UNIMPLEMENTED:
        kind = ConfigMismatch
    else:
        kind = StageFailed
    # The field that a client sent is subject enough; which stage reads it is no concern of the client's.
    message = text if kind is InvalidField else f"{stage}: {text}"
    return kind(message, metadata={**details.metadata, "stage": stage}, violations=violations, retry_s=retry_s)
