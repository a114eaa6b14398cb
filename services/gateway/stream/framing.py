"""The messages that a client receives, built from a block's frames and audio.

Frame of the VAE stage + StartedBlock -> items for the outbox
"""

from avatar.v1 import avatar_service_pb2 as api
from avatar.v1 import types_pb2 as api_types
from avatar.worker.v1 import types_pb2
from services.gateway.options import StreamOptions
from services.gateway.stream.in_flight import SpokenWord, StartedBlock, Turn
from services.gateway.stream.outbox import Item
from services.gateway.stream.timeline import US


class Framer:
    """Frames of one session on their way into messages: one each, those that are ready together, or a block's."""

    def __init__(self, options: StreamOptions) -> None:
        self._options = options
        self.drop()

    def add(self, frame: types_pb2.Frame, block: StartedBlock, *, is_discontinuity: bool) -> list[Item]:
        """Add a frame of a block; return the message that it completes, if any, as items.

        A turn's first frame follows the event that the turn starts; with `returns_audio`, frames follow their audio.
        Words follow the message with their frame.
        is_discontinuity: the picture may jump before the message's first frame.
        """
        is_followed = frame.is_followed and self._options.takes_chunks
        is_complete = frame.is_last or not (is_followed or self._options.is_per_block)
        is_alone = is_complete and not (self._num_frames or self._options.is_per_block)
        data, num_frames = frame.data, frame.num_frames or 1
        # In its place: protobuf copies a message into another by serializing and parsing it.
        shown = self._message.frame if is_alone else self._message.chunk.frames.add()
        shown.data, shown.num_frames, shown.is_idle = data, num_frames, block.turn is None
        shown.is_key = frame.is_key or self._options.is_always_key
        self._num_frames += num_frames
        self._num_bytes += len(data)
        if not is_complete:
            return []
        first = self._message.frame if is_alone else self._message.chunk.frames[0]
        first.is_discontinuity = is_discontinuity
        item = Item([self._message], self._num_frames, num_bytes=self._num_bytes)
        self.drop()
        start = len(block.boundaries) - 1 - block.num_frames
        start_sample, end_sample = block.boundaries[start], block.boundaries[start + item.num_frames]
        if self._options.returns_audio:
            size = self._options.sample_bytes
            audio = api_types.AvatarAudio(data=block.data[start_sample * size : end_sample * size])
            item.messages.insert(0, api.StreamAvatarResponse(audio=audio))
            item.num_bytes += len(audio.data)
        if (turn := block.turn) is None:
            return [item]
        num_samples = min(block.num_samples, end_sample)
        item.turn, item.num_samples = turn.number, block.turn_offset + num_samples
        item.num_delivered = block.stream_offset + num_samples
        items = [item]
        if turn.text:
            span = block.turn_offset + start_sample, block.turn_offset + end_sample
            items += [self._word(turn, word, *span) for word in turn.text.shown_until(item.num_samples)]
        if turn.is_started:
            return items
        turn.is_started = True
        return [playback_started(turn), *items]

    def finish_turn(self, turn: Turn) -> list[Item]:
        """Return the event that a turn has ended, after its words that had no frame: another gateway showed theirs."""
        words = turn.text.shown_until(turn.num_samples + 1) if turn.text and not turn.text.is_cut else ()
        left = [self._word(turn, word, word.start, word.start) for word in words]
        return [*left, playback_finished(turn, interrupted=False)]

    def _word(self, turn: Turn, word: SpokenWord, start: int, end: int) -> Item:
        """Return the event that a word begins. start, end: samples of the turn's audio that the frames show."""
        assert turn.text
        started = api.WordStarted(
            turn=turn.number,
            word=turn.text.text[word.first_char : word.end_char],
            first_char=word.first_char,
            position_us=word.start * US // self._options.rate_hz,
            is_estimated=word.is_estimated,
        )
        # The outbox adds the time of the next frame.
        pts_us = (max(word.start, start) - end) * US // self._options.rate_hz
        event = api.AvatarEvent(pts_us=pts_us, word_started=started)
        return Item([api.StreamAvatarResponse(event=event)], turn=turn.number, num_samples=word.start)

    def drop(self) -> None:
        """Forget the frames of an incomplete message."""
        self._message, self._num_frames, self._num_bytes = api.StreamAvatarResponse(), 0, 0


def playback_started(turn: Turn) -> Item:
    """Return the event that a turn's first frame follows."""
    event = api.AvatarEvent(playback_started=api.PlaybackStarted(turn=turn.number))
    return Item([api.StreamAvatarResponse(event=event)], turn=turn.number)


def playback_finished(turn: Turn, *, interrupted: bool) -> Item:
    """Return the event that a turn has ended; the outbox fills in how far it was delivered."""
    event = api.AvatarEvent(playback_finished=api.PlaybackFinished(turn=turn.number, interrupted=interrupted))
    message = api.StreamAvatarResponse(event=event)
    return Item([message], turn=turn.number, num_samples=turn.num_samples, text=turn.text)
