"""Text that is refused, or that the voice fails to speak: a notice reports it, and the stream goes on."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint

from avatar.errors import VoiceFailed
from avatar.settings import MAX_TEXT_CHARS
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from services.gateway.stream.incoming import turn_speaker
from tests.product import (
    CLOSE,
    END_TURN,
    Streamed,
    connected,
    finish,
    new_session,
    open_stream,
    opening,
    rest,
    say,
    send,
    stream,
)
from tests.refusals import refused
from tests.services.gateway.test_turn_speaker import LIVE, TEXT, events, talking, until
from tests.services.voice.fakes import ToneEngine
from tests.standin import standin_gateway

REFUSED = (
    (say(""), "say.text: it is empty"),
    (say("x" * (MAX_TEXT_CHARS + 1)), "10001 characters in turns that are not over, at most 10000 are accepted"),
    (say("Later.", turn=99), "turn 99 has not begun, the current one is 2"),
    (say("...", language="en"), "nothing to speak"),
    (say("Guten Tag.", language="de"), "de is not spoken here, only en"),
    (say("Hello.", language="--help"), "is no BCP 47 tag"),
)


async def test_text_that_cannot_be_spoken_is_reported_and_the_stream_goes_on(store: SessionStore) -> None:
    async with talking(store, ToneEngine(["en"])) as (stub, session):
        requests = [each for request, _ in REFUSED for each in (request, END_TURN)]
        streamed = await stream(stub, [opening(session), *requests, say("Good day."), END_TURN, CLOSE])
    notices = {each.turn: each for each in events(streamed, "notice")}
    for turn, (_, message) in enumerate(REFUSED):
        assert (notices[turn].kind, notices[turn].reason) == (pb.Notice.KIND_TEXT_UNSPOKEN, "INVALID_TEXT")
        assert message in notices[turn].message
    assert [each.spoken for each in events(streamed, "playback_finished")] == [""] * len(REFUSED) + ["Good day."]


async def test_text_that_the_engine_makes_no_sound_of_is_reported(store: SessionStore) -> None:
    engine = ToneEngine()
    engine.mute = ["你好。"]
    async with talking(store, engine) as (stub, session):
        requests = [say("你好。"), END_TURN, say(f"你好。{TEXT}"), END_TURN, CLOSE]
        streamed = await stream(stub, [opening(session), *requests])
    (notice,) = events(streamed, "notice")
    assert (notice.turn, notice.reason) == (0, "VOICE_FAILED")
    assert "made no sound: it may not speak the language or script" in notice.message
    assert [each.spoken for each in events(streamed, "playback_finished")] == ["", f"你好。{TEXT}"]
    assert [each.word for each in events(streamed, "word_started")] == TEXT.split()


async def test_a_voice_that_is_away_from_the_start_is_named(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_speaker, "PAUSE_S", 0.01)
    async with (
        standin_gateway(store, voice=("127.0.0.1:1",)) as gateway,
        connected(gateway.target) as stub,
    ):
        session = await new_session(stub, b"picture")
        call, _ = await open_stream(stub, session.id, mode=LIVE)
        await send(call, [say(TEXT), END_TURN])
        notice = await until(call, "notice")
        assert (notice.reason, notice.message) == ("STAGE_LOST", "voice: no worker answers at 127.0.0.1:1")
        await finish(call)


def unspoken(measured: InMemoryMetricReader) -> dict[str, float]:
    """The number of turns whose text was not spoken, by reason."""
    data = measured.get_metrics_data()
    assert data is not None
    return {
        str(point.attributes["reason"]): point.value
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "avatar.text.unspoken"
        for point in metric.data.data_points
        if isinstance(point, NumberDataPoint) and point.attributes  # a test of all metrics counts without a reason
    }


async def test_a_failing_engine_ends_the_turn_and_not_the_stream(
    store: SessionStore, measured: InMemoryMetricReader
) -> None:
    engine = ToneEngine()
    engine.failure, engine.failure_after = VoiceFailed("the speech endpoint refuses the key (status 401)"), 1
    async with talking(store, engine) as (stub, session):
        before = unspoken(measured)
        call, _ = await open_stream(stub, session, mode=LIVE)
        await send(call, [say(TEXT)])
        notice = await until(call, "notice")
        assert unspoken(measured) == {**before, "VOICE_FAILED": before["VOICE_FAILED"] + 1}
        assert (notice.kind, notice.reason, notice.turn) == (pb.Notice.KIND_TEXT_UNSPOKEN, "VOICE_FAILED", 0)
        assert notice.message == "the speech endpoint refuses the key (status 401)"
        engine.failure = None
        await send(call, [say("More of it."), END_TURN, say("Good day."), END_TURN])
        first = await until(call, "playback_finished")
        assert (first.position_us, TEXT.startswith(first.spoken)) == (200_000, True)
        assert (await until(call, "playback_finished")).spoken == "Good day."
        await finish(call)
    assert "More of it." not in engine.sentences


async def test_an_offline_stream_whose_voice_fails_ends_as_one_without_audio(store: SessionStore) -> None:
    engine = ToneEngine()
    engine.failure = VoiceFailed("broken")
    async with talking(store, engine) as (stub, session):
        call, _ = await open_stream(stub, session)
        await send(call, [say(TEXT), END_TURN, CLOSE])
        streamed = Streamed()
        for response in await rest(call):
            streamed.add(response)
    assert [each.reason for each in events(streamed, "notice")] == ["VOICE_FAILED"]
    assert streamed.frames == []


async def test_a_deployment_without_a_voice_refuses_text(store: SessionStore) -> None:
    async with standin_gateway(store) as gateway, connected(gateway.target) as stub:
        capabilities = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
        assert (capabilities.voice, capabilities.max_text_chars) == (False, 0)
        session = await new_session(stub, b"picture")
        async with refused("VOICE_UNSUPPORTED"):
            await stream(stub, [opening(session.id), say(TEXT), CLOSE])
