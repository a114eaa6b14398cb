"""The client messages whose effect has been delivered, so that another gateway can say what has to be sent again."""

from collections import deque

from avatar.worker.v1 import types_pb2


class Acks:
    """Acknowledgement of one session's client messages, counted from its creation; `open` is not counted.

    num_messages: messages received. num_samples: samples of each channel in them.
    skip: samples at the start of the next audio that were delivered before the client sent them again.
    """

    def __init__(self, position: types_pb2.Position) -> None:
        self.num_messages = self._num_done = position.num_messages
        self.num_samples = self._num_done_samples = position.num_message_samples
        self.skip = position.num_samples - position.num_message_samples
        # For each message that is not done: the sample at its end, and the turn that it ends, None if it is audio.
        self._pending: deque[tuple[int, int | None]] = deque()

    def received(self, num_samples: int, ended_turn: int | None = None) -> None:
        """Count a message of so many samples, or one that ends a turn."""
        self.num_messages += 1
        self.num_samples += num_samples
        self._pending.append((self.num_samples, ended_turn))

    def record(self, position: types_pb2.Position, num_delivered: int) -> None:
        """Write into the position how many messages are done.

        num_delivered: samples whose frames were delivered. `position.turn` has to be the oldest unfinished turn.
        """
        while self._pending:
            end, ended_turn = self._pending[0]
            if end > num_delivered or (ended_turn is not None and ended_turn >= position.turn):
                break
            self._pending.popleft()
            self._num_done, self._num_done_samples = self._num_done + 1, end
        position.num_messages, position.num_message_samples = self._num_done, self._num_done_samples
        position.num_samples = max(num_delivered, self._num_done_samples)
