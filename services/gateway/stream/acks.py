"""The client messages whose effect has been delivered, so that another gateway can say what has to be sent again."""

from collections import deque
from dataclasses import dataclass

from avatar.worker.v1 import types_pb2


@dataclass(slots=True)
class _Group:
    """Consecutive messages of one kind that are done together.

    num_samples: of each channel in them, or of their text's audio. turn: the one that has to be over first, which they
    end or whose text they have. is_open: more audio of their text may come.
    """

    kind: str
    num_samples: int
    turn: int | None
    is_open: bool
    num_messages: int = 1


class Acks:
    """Acknowledgement of one session's client messages, counted from its creation; `open` is not counted.

    num_messages: messages received. num_samples: samples of each channel in them, or that their text has become.
    num_pending: groups of messages that are not done.
    """

    def __init__(self, position: types_pb2.Position, group_samples: int) -> None:
        """group_samples: pieces of audio are grouped up to so many samples of each channel."""
        self.num_messages = self._num_done = position.num_messages
        self.num_samples = self._num_done_samples = position.num_message_samples
        # Samples of the resumed turn that another gateway has delivered and that are still to come again.
        self._resumed_turn, self._to_skip = position.turn, position.num_samples - position.num_message_samples
        self._group_samples = group_samples
        self._pending: deque[_Group] = deque()

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def skip(self, turn: int, num_samples: int) -> int:
        """Return how many of a turn's next samples were delivered before the client sent them again."""
        num_skipped = min(self._to_skip, num_samples) if turn == self._resumed_turn else 0
        self._to_skip -= num_skipped
        return num_skipped

    def received(self, kind: str, num_samples: int = 0, turn: int | None = None, *, is_open: bool = False) -> None:
        """Count a message of a kind, with so many samples.

        turn: the one that the message ends, or whose text it has. is_open: text to speak, whose samples are added
        later.
        """
        if turn == self._resumed_turn and not is_open and not any(group.is_open for group in self._pending):
            num_samples += self._take_missing()
        self.num_messages += 1
        self.num_samples += num_samples
        last = self._pending[-1] if self._pending else None
        # Messages that end a turn stay apart: sent again together, they would end turns that are over.
        is_like_last = last and last.kind == kind and last.is_open == is_open and (turn is None or is_open)
        is_empty = kind in ("audio", "say", "listen") and not num_samples and not is_open
        if last and (is_empty or (is_like_last and (is_open or last.num_samples + num_samples <= self._group_samples))):
            last.num_samples, last.num_messages = last.num_samples + num_samples, last.num_messages + 1
        else:
            self._pending.append(_Group(kind, num_samples, turn, is_open))

    def spoken(self, num_samples: int) -> None:
        """Count audio of the oldest text that is not spoken to its end."""
        self.num_samples += num_samples
        next(group for group in self._pending if group.is_open).num_samples += num_samples

    def finish_text(self, turn: int) -> None:
        """Record that no more audio of the oldest text comes that is not spoken to its end, that of a turn."""
        text = next(group for group in self._pending if group.is_open)
        text.is_open = False
        if turn == self._resumed_turn:
            missing = self._take_missing()
            text.num_samples, self.num_samples = text.num_samples + missing, self.num_samples + missing

    def interrupt(self) -> None:
        """Record that no more audio comes of what was received."""
        for group in self._pending:
            group.is_open = False
        missing = self._take_missing()
        self.num_samples += missing
        if self._pending:
            self._pending[-1].num_samples += missing
        else:
            self._num_done_samples += missing

    def _take_missing(self) -> int:
        """Return the samples by which the resumed turn, at its end, is shorter than what was delivered of it.

        Speech that is made again may be. They count as part of it, or all later audio would seem delivered too early.
        """
        missing, self._to_skip = self._to_skip, 0
        return missing

    def record(self, position: types_pb2.Position, num_delivered: int) -> None:
        """Write into the position how many messages are done.

        num_delivered: samples whose frames were delivered. `position.turn` has to be the oldest unfinished turn.
        """
        while self._pending:
            group = self._pending[0]
            is_delivered = not group.is_open and self._num_done_samples + group.num_samples <= num_delivered
            if not is_delivered or (group.turn is not None and group.turn >= position.turn):
                break
            self._pending.popleft()
            self._num_done += group.num_messages
            self._num_done_samples += group.num_samples
        position.num_messages, position.num_message_samples = self._num_done, self._num_done_samples
        position.num_samples = max(num_delivered, self._num_done_samples)
