"""What is sent again, and what is not."""

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
    kept = Sent()
    for request in requests:
        kept.add(request)
        kept.take()
    return kept


def rest(kept: Sent) -> list[pb.StreamAvatarRequest]:
    return [kept.take() for _ in iter(kept.has_next, False)]


@pytest.mark.parametrize("num_arrived", range(4))
def test_what_did_not_arrive_is_sent_again(num_arrived: int) -> None:
    requests = [audio(b"abcd"), END, audio(b"efgh")]
    kept = written(*requests)
    kept.rewind(num_arrived)
    assert rest(kept) == requests[num_arrived:]


def test_a_connection_that_breaks_twice_loses_nothing() -> None:
    kept = written(audio(b"ab"), END, audio(b"cd"))
    kept.rewind(1)
    kept.take()
    kept.add(END)
    kept.rewind(1)
    assert rest(kept) == [END, audio(b"cd"), END]


def test_an_interrupt_takes_the_place_of_what_was_not_written() -> None:
    kept = written(audio(b"abcd"))
    dropped = kept.add(audio(b"efgh"))
    kept.add(INTERRUPT)
    kept.add(audio(b"ij"))
    assert dropped.is_taken
    assert rest(kept) == [INTERRUPT, audio(b"ij")]


def test_what_an_interrupt_dropped_on_its_way_is_not_missed() -> None:
    kept = written(audio(b"abcd"), audio(b"ef"), INTERRUPT, audio(b"gh"))
    kept.rewind(1)
    assert rest(kept) == [INTERRUPT, audio(b"gh")]
    kept.rewind(2)
    assert rest(kept) == [audio(b"gh")]


def test_sound_that_is_no_longer_kept_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent, "MAX_KEPT_BYTES", 4)
    kept = written(audio(b"ab"), audio(b"cd"), audio(b"ef"))
    with pytest.raises(ConnectionLost, match="1 messages"):
        kept.rewind(0)
    kept.rewind(1)
    assert rest(kept) == [audio(b"cd"), audio(b"ef")]
