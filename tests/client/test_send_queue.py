"""The client's send queue: which requests are sent again after a connection broke."""

import pytest

from avatar.client import send_queue
from avatar.client.items import Frame, PlaybackFinished
from avatar.client.send_queue import AudioLead, SendQueue
from avatar.errors import ConnectionLost
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types

INTERRUPT = pb.StreamAvatarRequest(interrupt=pb.InterruptAvatar())
END = pb.StreamAvatarRequest(end_turn=pb.EndTurn())


def audio(data: bytes) -> pb.StreamAvatarRequest:
    return pb.StreamAvatarRequest(audio=pb.AudioPiece(data=data))


def written(*requests: pb.StreamAvatarRequest) -> SendQueue:
    """A queue whose requests were all written."""
    queue = SendQueue()
    for request in requests:
        queue.add(request)
        queue.take()
    return queue


def pending(queue: SendQueue) -> list[pb.StreamAvatarRequest]:
    return [queue.take() for _ in iter(queue.has_next, False)]


@pytest.mark.parametrize("num_received", range(4))
def test_undelivered_requests_are_sent_again(num_received: int) -> None:
    requests = [audio(b"abcd"), END, audio(b"efgh")]
    queue = written(*requests)
    queue.rewind(num_received)
    assert pending(queue) == requests[num_received:]


def test_a_connection_that_breaks_twice_loses_nothing() -> None:
    queue = written(audio(b"ab"), END, audio(b"cd"))
    queue.rewind(1)
    queue.take()
    queue.add(END)
    queue.rewind(1)
    assert pending(queue) == [END, audio(b"cd"), END]


def test_an_interrupt_replaces_pending_requests() -> None:
    queue = written(audio(b"abcd"))
    discarded = queue.add(audio(b"efgh"))
    queue.add(INTERRUPT)
    queue.add(audio(b"ij"))
    assert discarded.is_done
    assert pending(queue) == [INTERRUPT, audio(b"ij")]


def test_an_interrupt_leaves_what_the_avatar_listens_to() -> None:
    queue = SendQueue()
    heard = pb.StreamAvatarRequest(listen=pb.HeardAudio(data=b"ab"))
    kept = queue.add(heard)
    queue.add(audio(b"cd"))
    queue.add(INTERRUPT)
    assert not kept.is_done
    assert pending(queue) == [heard, INTERRUPT]


def test_requests_before_an_interrupt_are_not_sent_again() -> None:
    queue = written(audio(b"abcd"), audio(b"ef"), INTERRUPT, audio(b"gh"))
    queue.rewind(1)
    assert pending(queue) == [INTERRUPT, audio(b"gh")]
    queue.rewind(2)
    assert pending(queue) == [audio(b"gh")]


def test_undelivered_audio_that_was_dropped_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_queue, "MAX_KEPT_BYTES", 2 * (send_queue.REQUEST_BYTES + 2))
    queue = written(audio(b"ab"), audio(b"cd"), audio(b"ef"))
    with pytest.raises(ConnectionLost, match="1 messages"):
        queue.rewind(0)
    queue.rewind(1)
    assert pending(queue) == [audio(b"cd"), audio(b"ef")]


def test_frames_of_a_turn_of_text_show_no_audio() -> None:
    opening = pb.OpenAvatar(audio=types.AudioFormat(rate_hz=25000), mode=pb.OpenAvatar.MODE_LIVE)
    video = types.VideoFormat(frame_rate_hz=25)
    lead = AudioLead(opening, pb.GetCapabilitiesResponse(video=video, block_frames=5, max_live_ahead_s=1.2))
    lead.say()
    lead.end_turn()
    lead.add(25000)
    assert not lead.has_room(1000)
    for index in range(20):
        lead.update(Frame(index, 0.0, b"", is_idle=False, is_key=True, num_frames=1))
    assert not lead.has_room(1000), "they show the text"
    lead.update(PlaybackFinished(0, 0.0, 0, 0.8, was_interrupted=False, next_frame=20))
    assert not lead.has_room(1000)
    lead.update(Frame(20, 0.0, b"", is_idle=False, is_key=True, num_frames=1))
    assert lead.has_room(1000)
