"""Which of a client's messages are done with, so that another gateway can say what is to be sent again."""

from collections import deque

from avatar.worker.v1 import types_pb2


class Heard:
    """The messages of one session, counted from its beginning; `open` is none of them.

    num_messages: that have arrived. num_samples: of each channel in them.
    skip: samples of the next sound that were shown before it was sent again.
    """

    def __init__(self, position: types_pb2.Position) -> None:
        self.num_messages = self._num_done = position.num_messages
        self.num_samples = self._num_done_samples = position.num_message_samples
        self.skip = position.num_samples - position.num_message_samples
        # With the samples up to the end of each, and the turn that it ends; None where it is sound.
        self._waiting: deque[tuple[int, int | None]] = deque()

    def took(self, num_samples: int, ended_turn: int | None = None) -> None:
        """A message has arrived, with so many samples, or ending a turn."""
        self.num_messages += 1
        self.num_samples += num_samples
        self._waiting.append((self.num_samples, ended_turn))

    def note(self, position: types_pb2.Position, num_shown: int) -> None:
        """Write which are done with when so many samples are shown and `position.turn` is the oldest unfinished."""
        while self._waiting:
            end, ended_turn = self._waiting[0]
            if end > num_shown or (ended_turn is not None and ended_turn >= position.turn):
                break
            self._waiting.popleft()
            self._num_done, self._num_done_samples = self._num_done + 1, end
        position.num_messages, position.num_message_samples = self._num_done, self._num_done_samples
        position.num_samples = max(num_shown, self._num_done_samples)
