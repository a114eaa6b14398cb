"""Tests of services.gateway.stream.acks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avatar.worker.v1 import types_pb2
from services.gateway.stream.acks import Acks

MESSAGES = st.lists(st.sampled_from([("audio", 0), ("audio", 1), ("audio", 9), ("audio", 40), ("interrupt", 0)]))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(MESSAGES, st.floats(0, 1))
def test_messages_that_are_done_are_counted_with_their_samples(messages: list[tuple[str, int]], share: float) -> None:
    acks, position = Acks(types_pb2.Position(), group_samples=20), types_pb2.Position()
    for kind, num_samples in messages:
        acks.received(kind, num_samples)
    num_delivered = round(share * acks.num_samples)
    acks.record(position, num_delivered)
    done = messages[: position.num_messages]
    assert position.num_message_samples == sum(num_samples for _, num_samples in done) <= num_delivered
    assert position.num_samples == num_delivered
    assert num_delivered - position.num_message_samples < 20 + 40, "what is sent again is little"


def test_tiny_messages_are_acknowledged_together() -> None:
    acks = Acks(types_pb2.Position(), group_samples=20)
    for _ in range(40):
        acks.received("audio", 1)
    for _ in range(100):
        acks.received("audio")
        acks.received("interrupt")
    for turn in range(3):
        acks.received("end_turn", turn=turn)
        acks.received("audio")
    assert acks.num_pending == 2 + 1 + 3


def test_text_is_done_once_all_its_speech_is_delivered() -> None:
    acks, position = Acks(types_pb2.Position(), group_samples=20), types_pb2.Position(turn=1)
    for _ in range(3):
        acks.received("say", turn=0, is_open=True)
    acks.received("say")  # one that is refused
    acks.received("end_turn", turn=0)
    acks.received("audio", 5)
    acks.spoken(100)
    acks.record(position, 100)
    assert (position.num_messages, position.num_samples) == (0, 100), "more speech may come"
    acks.spoken(50)
    acks.finish_text(0)
    acks.record(position, 149)
    assert (position.num_messages, position.num_message_samples) == (0, 0)
    acks.record(position, 150)
    assert (position.num_messages, position.num_message_samples) == (5, 150)
    acks.record(position, 155)
    assert position.num_messages == acks.num_messages == 6
    assert position.num_message_samples == acks.num_samples == 155


def test_text_is_done_only_once_its_turn_is_over() -> None:
    acks, position = Acks(types_pb2.Position(), group_samples=20), types_pb2.Position(turn=0)
    acks.received("say", turn=0, is_open=True)
    acks.spoken(100)
    acks.received("end_turn", turn=0)
    acks.finish_text(0)
    acks.record(position, 100)
    assert (position.num_messages, position.num_samples) == (0, 100)
    position.turn = 1
    acks.record(position, 100)
    assert (position.num_messages, position.num_message_samples) == (2, 100)


def test_only_the_resumed_turn_is_skipped() -> None:
    acks = Acks(types_pb2.Position(turn=3, num_samples=150, num_message_samples=50), group_samples=20)
    acks.received("say", turn=3, is_open=True)
    acks.received("end_turn", turn=3)
    assert acks.skip(4, 70) == 0, "audio after the text comes before its speech"
    acks.received("audio", 70)
    assert [acks.skip(3, 60), acks.skip(3, 60), acks.skip(3, 60)] == [60, 40, 0]


@pytest.mark.parametrize("end", ["speech", "end_turn", "interrupt"])
def test_a_resumed_turn_that_is_shorter_now_does_not_end_the_next_one_early(end: str) -> None:
    position = types_pb2.Position(turn=3, num_samples=150, num_message_samples=50)
    acks = Acks(position, group_samples=20)
    if end == "speech":
        acks.received("say", turn=3, is_open=True)
        acks.spoken(acks.skip(3, 60))
        acks.received("end_turn", turn=3)
        acks.finish_text(3)
    else:
        acks.received("audio", acks.skip(3, 60))
        if end == "interrupt":
            acks.interrupt()
            acks.received("interrupt")
        else:
            acks.received("end_turn", turn=3)
    position.turn = 4
    assert acks.skip(4, 30) == 0
    acks.received("audio", 30)
    acks.record(position, 150)
    assert (position.num_messages, position.num_message_samples) == (2, 150)
    acks.record(position, 180)
    assert (position.num_messages, position.num_message_samples) == (3, 180)
