"""What is sent again, and what is not."""

import time

import pytest

from avatar.client import sent
from avatar.client.sent import Sent
from avatar.errors import ConnectionLost
from avatar.v1 import avatar_service_pb2 as pb

INTERRUPT = pb.StreamAvatarRequest(interrupt=pb.InterruptAvatar())
END = pb.StreamAvatarRequest(end_turn=pb.EndTurn())


def audio(data: bytes) -> pb.StreamAvatarRequest:
    return pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data))


def written(*requests: pb.StreamAvatarRequest) -> Sent:
    kept = Sent(sample_bytes=2)
    for request in requests:
        kept.add(request)
        kept.take()
    return kept


def rest(kept: Sent) -> list[pb.StreamAvatarRequest]:
    return [kept.take() for _ in iter(kept.has_next, False)]


@pytest.mark.parametrize(
    ("arrived", "again"),
    [
        (0, [audio(b"abcd"), END, audio(b"efgh")]),
        (1, [audio(b"cd"), END, audio(b"efgh")]),
        (2, [END, audio(b"efgh")]),
        (3, [audio(b"gh")]),
        (4, []),
    ],
)
def test_what_did_not_arrive_is_sent_again(arrived: int, again: list[pb.StreamAvatarRequest]) -> None:
    kept = written(audio(b"abcd"), END, audio(b"efgh"))
    kept.rewind(arrived, heard_at=0.0)
    assert rest(kept) == again


@pytest.mark.parametrize(("later_s", "again"), [(0.1, [END]), (1.0, [])])
def test_a_turn_ends_again_unless_the_gateway_was_heard_since(
    later_s: float, again: list[pb.StreamAvatarRequest]
) -> None:
    kept = written(audio(b"abcd"), END)
    kept.rewind(2, heard_at=time.monotonic() + later_s)
    assert rest(kept) == again


def test_an_interrupt_takes_the_place_of_what_was_not_written() -> None:
    kept = written(audio(b"abcd"))
    kept.add(audio(b"efgh"))
    kept.add(INTERRUPT)
    kept.add(audio(b"ij"))
    assert (rest(kept), kept.num_samples) == ([INTERRUPT, audio(b"ij")], 3)


def test_what_an_interrupt_dropped_on_its_way_is_not_missed() -> None:
    kept = written(audio(b"abcd"), INTERRUPT, audio(b"ef"))
    kept.rewind(1, heard_at=0.0)
    assert (rest(kept), kept.num_samples) == ([INTERRUPT, audio(b"ef")], 2)


def test_sound_that_is_no_longer_kept_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent, "MAX_KEPT_BYTES", 4)
    kept = written(audio(b"ab"), audio(b"cd"), audio(b"ef"))
    kept.rewind(1, heard_at=0.0)
    assert rest(kept) == [audio(b"cd"), audio(b"ef")]
    with pytest.raises(ConnectionLost, match="1 samples"):
        kept.rewind(0, heard_at=0.0)
