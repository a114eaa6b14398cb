"""The client's handling of responses that a gateway does not send on demand."""

import pytest

from avatar.client import Frame, Item, Notice, NoticeKind, PlaybackFinished, PlaybackStarted, WordStarted, connect
from avatar.errors import AvatarError, ResumeImpossible, SessionBusy, StageLost
from avatar.v1 import avatar_service_pb2 as pb
from tests.client.scripted import CLOSED, Call, frames, notice, scripted


async def items_of(*calls: Call) -> list[Item]:
    """All items of a stream over a gateway with this script."""
    async with scripted(*calls) as (target, _), connect(target) as avatar:
        session = await avatar.create(b"face")
        async with session.stream(live=True) as stream:
            return [item async for item in stream]


async def test_notices_are_typed_and_unknown_kinds_of_notices_and_events_are_harmless() -> None:
    going_away = notice(0, kind=pb.Notice.KIND_GOING_AWAY, message="bye", within_s=3.5)
    unknown = pb.StreamAvatarResponse(event=pb.AvatarEvent(number=2))
    assert await items_of([going_away, notice(1, kind=99), unknown, CLOSED]) == [
        Notice(0, 0.0, NoticeKind.GOING_AWAY, "bye", 3.5, 0),
        Notice(1, 0.0, NoticeKind.UNKNOWN, "", 0.0, 0),
    ]


async def test_words_and_what_was_spoken_are_typed() -> None:
    word = pb.WordStarted(turn=1, word="day.", first_char=5, position_us=250_000, is_estimated=True)
    end = pb.PlaybackFinished(turn=1, position_us=500_000, next_frame=9, spoken="Good day.")
    responses = [
        pb.StreamAvatarResponse(event=pb.AvatarEvent(number=0, pts_us=370_000, word_started=word)),
        pb.StreamAvatarResponse(event=pb.AvatarEvent(number=1, pts_us=400_000, playback_finished=end)),
        notice(2, kind=pb.Notice.KIND_TEXT_UNSPOKEN, message="slow", reason="VOICE_FAILED", turn=0),
    ]
    assert await items_of([*responses, CLOSED]) == [
        WordStarted(0, 0.37, 1, "day.", 5, 0.25, is_estimated=True),
        PlaybackFinished(1, 0.4, 1, 0.5, was_interrupted=False, next_frame=9, spoken="Good day."),
        Notice(2, 0.0, NoticeKind.TEXT_UNSPOKEN, "slow", 0.0, 0, "VOICE_FAILED", 0),
    ]


@pytest.mark.parametrize("refusal", [SessionBusy, StageLost])
async def test_a_gateway_that_cannot_resume_yet_is_asked_again(refusal: type[AvatarError]) -> None:
    """It has not noticed the broken connection, or has not found its workers."""
    items = await items_of(frames(3, 4, 5), refusal("not yet"), refusal("not yet"), [*frames(5, 6), CLOSED])
    assert [item.index for item in items if isinstance(item, Frame)] == [3, 4, 5, 6]


async def test_what_another_gateway_repeats_about_a_turn_arrives_once_and_what_is_new_arrives() -> None:
    started = [
        pb.AvatarEvent(number=0, playback_started=pb.PlaybackStarted(turn=0)),
        pb.AvatarEvent(number=1, word_started=pb.WordStarted(turn=0, word="Good")),
        pb.AvatarEvent(number=2, word_started=pb.WordStarted(turn=0, word="day.", first_char=5)),
    ]
    first = [pb.StreamAvatarResponse(event=event) for event in started]
    for event in started:
        event.number += 3
    started += [
        pb.AvatarEvent(number=6, word_started=pb.WordStarted(turn=0, word="Ada.", first_char=10)),
        pb.AvatarEvent(number=7, playback_finished=pb.PlaybackFinished(turn=0)),
        pb.AvatarEvent(number=8, word_started=pb.WordStarted(turn=1, word="And")),
    ]
    async with (
        scripted(first, [*(pb.StreamAvatarResponse(event=event) for event in started), CLOSED]) as (target, gateway),
        connect(target) as avatar,
    ):
        session = await avatar.create(b"face")
        async with session.stream(live=True) as stream:
            items = [item async for item in stream]
    words = [item.word for item in items if isinstance(item, WordStarted)]
    assert words == ["Good", "day.", "Ada.", "And"]
    assert [type(item) for item in items if not isinstance(item, WordStarted)] == [PlaybackStarted, PlaybackFinished]
    assert [each.resume.next_event for each in gateway.opened] == [0, 3]


async def test_frames_that_are_no_longer_kept_end_the_stream() -> None:
    with pytest.raises(ResumeImpossible):
        await items_of(frames(3), ResumeImpossible("those frames are no longer kept"))


async def test_token_prompt_and_notice_are_passed_on() -> None:
    async with scripted() as (target, gateway), connect(target, token="secret") as avatar:
        await avatar.capabilities()
        session = await avatar.create(b"face")
        assert session.notice == await avatar.check_portrait(b"face") == "not a face"
        assert await session.update(prompt="smiling") == 7
    assert session.info.prompt == "smiling"
    assert gateway.metadata["authorization"] == "Bearer secret"


async def test_calls_about_a_session_name_it_for_a_router() -> None:
    async with scripted([CLOSED]) as (target, gateway), connect(target) as avatar:
        session = await avatar.create(b"face")
        await session.update(ttl_s=9)
        async with session.stream() as stream:
            assert [item async for item in stream] == []
        await session.delete()
    assert gateway.sessions == ["session"] * 3


async def test_half_of_a_surrogate_pair_is_refused_and_the_stream_goes_on() -> None:
    async with scripted([*frames(3), CLOSED]) as (target, _), connect(target) as avatar:
        session = await avatar.create(b"face")
        async with session.stream() as stream:
            with pytest.raises(ValueError, match="surrogates not allowed"):
                await stream.say("\ud800")
            assert [item.index async for item in stream.frames()] == [3]
