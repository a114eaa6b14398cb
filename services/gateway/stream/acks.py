"""The client messages whose effect has been delivered, so that another gateway can say what has to be sent again."""

from collections import deque
from dataclasses import dataclass

from avatar.worker.v1 import types_pb2


@dataclass(slots=True)
class _Group:
    """Consecutive messages of one kind that are done together.

    num_samples: of each channel in them, or of their text's audio. ended_turn: the turn that they end.
    is_open: more audio of their text may come.
    """

    kind: str
    num_samples: int
    ended_turn: int | None
    is_open: bool
    num_messages: int = 1


class Acks:
    """Acknowledgement of one session's client messages, counted from its creation; `open` is not counted.

    num_messages: messages received. num_samples: samples of each channel in them, or that their text has become.
    skip: samples at the start of the next audio that were delivered before the client sent them again.
    num_pending: groups of messages that are not done.
    """

    def __init__(self, position: types_pb2.Position, group_samples: int) -> None:
        """group_samples: pieces of audio are grouped up to so many samples of each channel."""
        self.num_messages = self._num_done = position.num_messages
        self.num_samples = self._num_done_samples = position.num_message_samples
        self.skip = position.num_samples - position.num_message_samples
        self._group_samples = group_samples
        self._pending: deque[_Group] = deque()

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def received(
        self, kind: str, num_samples: int = 0, ended_turn: int | None = None, *, is_open: bool = False
    ) -> None:
        """Count a message of a kind, with so many samples, or one that ends a turn.

        is_open: text to speak, whose samples are added later.
        """
        self.num_messages += 1
        self.num_samples += num_samples
        last = self._pending[-1] if self._pending else None
        # Messages that end a turn stay apart: sent again together, they would end turns that are over.
        is_like_last = last is not None and last.kind == kind and last.is_open == is_open and ended_turn is None
        is_empty = kind in ("audio", "say", "listen") and not num_samples and not is_open
        if last and (is_empty or (is_like_last and (is_open or last.num_samples + num_samples <= self._group_samples))):
            last.num_samples, last.num_messages = last.num_samples + num_samples, last.num_messages + 1
        else:
            self._pending.append(_Group(kind, num_samples, ended_turn, is_open))

    def spoken(self, num_samples: int) -> None:
        """Count audio of the oldest text that is not spoken to its end."""
        self.num_samples += num_samples
        next(group for group in self._pending if group.is_open).num_samples += num_samples

    def finish_text(self) -> None:
        """Record that no more audio of the oldest text comes that is not spoken to its end."""
        next(group for group in self._pending if group.is_open).is_open = False

    def finish_texts(self) -> None:
        """Record that no more audio of any text comes."""
        for group in self._pending:
            group.is_open = False

    def record(self, position: types_pb2.Position, num_delivered: int) -> None:
        """Write into the position how many messages are done.

        num_delivered: samples whose frames were delivered. `position.turn` has to be the oldest unfinished turn.
        """
        while self._pending:
            group = self._pending[0]
            is_delivered = not group.is_open and self._num_done_samples + group.num_samples <= num_delivered
            if not is_delivered or (group.ended_turn is not None and group.ended_turn >= position.turn):
                break
            self._pending.popleft()
            self._num_done += group.num_messages
            self._num_done_samples += group.num_samples
        position.num_messages, position.num_message_samples = self._num_done, self._num_done_samples
        position.num_samples = max(num_delivered, self._num_done_samples)
