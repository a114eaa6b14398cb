"""Text of clients, spoken by voice workers over stand-in engines, through the real gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from avatar.rpc.client import remote_voice
from avatar.settings import MAX_TEXT_CHARS
from avatar.store.sessions import SessionStore
from avatar.v1 import avatar_service_pb2 as pb
from avatar.v1 import types_pb2 as types
from services.gateway.stream.incoming import turn_speaker
from tests.product import (
    CLOSE,
    END_TURN,
    INTERRUPT,
    Call,
    Streamed,
    Stub,
    answer,
    connected,
    finish,
    new_session,
    open_stream,
    opening,
    pieces,
    rest,
    say,
    send,
    stream,
)
from tests.refusals import refused
from tests.services.gateway.test_tenant_quotas import AS_ACME, tenants_gateway
from tests.services.voice.fakes import CHAR_S, ToneEngine, pcm16, spoken, voice_worker
from tests.standin import standin_gateway, standin_gateways

LIVE = pb.OpenAvatar.MODE_LIVE
RATE_HZ = 16000
TEXT = "Good day. My name is Ada, and I speak."
SENTENCES = ["Good day.", "My name is Ada, and I speak."]
WAIT_S = 20.0
FIRST_FRAME = 3


@asynccontextmanager
async def talking(
    store: SessionStore, engine: ToneEngine | None = None, voice: dict[str, Any] | None = None, **settings: Any
) -> AsyncGenerator[tuple[Stub, str], None]:
    """A gateway with a voice, and the id of a session. voice: as of `voice_worker`. settings: of the gateway."""
    async with (
        voice_worker(store, engine or ToneEngine(), **(voice or {})) as worker,
        standin_gateway(store, voice=(worker,), **settings) as gateway,
        connected(gateway.target) as stub,
    ):
        yield stub, (await new_session(stub, b"picture")).id


def sound(*sentences: str) -> bytes:
    """The engine's sound of sentences, as PCM16."""
    return b"".join(pcm16(spoken(each)) for each in sentences)


def delivered(*sentences: str) -> bytes:
    """The sound of a session's first sentences as it comes back: from the first frame on."""
    return sound(*sentences)[2 * FIRST_FRAME * RATE_HZ // 25 :]


def returned(streamed: Streamed) -> bytes:
    """The audio that came back, without silence."""
    audio = b"".join(each.data for each in streamed.audio)
    return b"".join(audio[at : at + 2] for at in range(0, len(audio), 2) if audio[at : at + 2] != b"\0\0")


def events(streamed: Streamed, kind: str) -> list[Any]:
    return [getattr(each, kind) for each in streamed.events if each.WhichOneof("kind") == kind]


async def until(call: Call, kind: str, streamed: Streamed | None = None) -> Any:
    """Read up to the next event of a kind and return its content."""
    async with asyncio.timeout(WAIT_S):
        while True:
            response = await answer(call)
            if streamed:
                streamed.add(response)
            if response.event.WhichOneof("kind") == kind:
                return getattr(response.event, kind)


async def test_text_is_spoken_as_the_turns_audio(store: SessionStore) -> None:
    async with talking(store) as (stub, session):
        streamed = await stream(stub, [opening(session, return_audio=True), say(TEXT), END_TURN, CLOSE])
    audio = sound(*SENTENCES)
    assert returned(streamed) == delivered(*SENTENCES)
    (finished,) = events(streamed, "playback_finished")
    assert finished == pb.PlaybackFinished(
        turn=0, position_us=len(audio) // 2 * 1_000_000 // RATE_HZ, next_frame=finished.next_frame, spoken=TEXT
    )
    assert streamed.indexes == list(range(3, 3 + len(streamed.frames)))


async def test_each_word_has_its_time_on_the_media_clock(store: SessionStore) -> None:
    async with talking(store) as (stub, session):
        for each, per_block in ((session, False), ((await new_session(stub, b"picture")).id, True)):
            output = types.VideoOutput(per_block=per_block)
            streamed = await stream(stub, [opening(each, output=output), say(TEXT), END_TURN, CLOSE])
            words = events(streamed, "word_started")
            assert [word.word for word in words] == TEXT.split()
            assert all(TEXT[word.first_char :].startswith(word.word) for word in words)
            times = [event.pts_us for event in streamed.events if event.HasField("word_started")]
            # Nothing is idle offline, and nothing comes before the first frame.
            assert times == [max(word.position_us, FIRST_FRAME * 40_000) for word in words]
            second = next(word for word in words if word.word == "My")
            assert second.position_us == pytest.approx(CHAR_S * len(SENTENCES[0]) * 1e6, abs=1000)
            assert all(word.is_estimated for word in words)


async def test_pieces_of_text_give_the_same_audio_as_all_of_it(store: SessionStore) -> None:
    engine = ToneEngine()
    async with talking(store, engine) as (stub, session):
        streamed = await stream(stub, [opening(session, return_audio=True), *map(say, TEXT), END_TURN, CLOSE])
    assert engine.sentences == SENTENCES
    assert returned(streamed) == delivered(*SENTENCES)


async def test_the_first_sentence_is_spoken_before_the_text_ends(store: SessionStore) -> None:
    async with talking(store) as (stub, session):
        call, _ = await open_stream(stub, session, mode=LIVE)
        await send(call, [say("Good day. And then")])
        assert (await until(call, "playback_started")).turn == 0
        await send(call, [say(" more."), END_TURN])
        assert (await until(call, "playback_finished")).spoken == "Good day. And then more."
        await finish(call)


async def test_audio_follows_text_in_the_next_turn_and_waits_for_it(store: SessionStore) -> None:
    audio = b"\1\0" * 8000
    async with talking(store) as (stub, session):
        requests = [opening(session, return_audio=True), say(TEXT), END_TURN, *pieces(audio), CLOSE]
        streamed = await stream(stub, requests)
    assert returned(streamed) == delivered(*SENTENCES) + audio
    assert [each.turn for each in events(streamed, "playback_finished")] == [0, 1]


async def test_an_interrupt_says_which_words_were_spoken_and_drops_the_rest(store: SessionStore) -> None:
    engine = ToneEngine()
    text = "One two three four five six seven eight nine ten. " * 20
    async with talking(store, engine) as (stub, session):
        call, _ = await open_stream(stub, session, mode=LIVE)
        await send(call, [say(text), END_TURN, say("Never spoken."), END_TURN])
        streamed = Streamed()
        for _ in range(3):
            await until(call, "word_started", streamed)
        await send(call, [INTERRUPT, say("After it."), END_TURN])
        async with asyncio.timeout(WAIT_S):
            while not streamed.interrupted:
                streamed.add(await answer(call))
        await finish(call, streamed=streamed)
    (interrupted,) = streamed.interrupted
    words = [each for each in events(streamed, "word_started") if each.turn == 0]
    assert interrupted.was_speaking
    assert interrupted.spoken == text[: words[-1].first_char + len(words[-1].word)]
    assert words[-1].position_us < interrupted.position_us
    assert "Never spoken." not in engine.sentences
    ends = events(streamed, "playback_finished")
    assert [(each.turn, each.interrupted) for each in ends] == [(0, True), (1, True), (2, True), (3, False)]
    assert [each.spoken for each in ends] == [interrupted.spoken, "", "", "After it."]


async def test_text_of_a_turn_that_is_over_is_discarded(store: SessionStore) -> None:
    engine = ToneEngine()
    async with talking(store, engine) as (stub, session):
        requests = [say("Good day."), END_TURN, say("Too late.", turn=0), say("In time.", turn=1), END_TURN, CLOSE]
        streamed = await stream(stub, [opening(session), *requests])
    assert engine.sentences == ["Good day.", "In time."]
    assert events(streamed, "notice") == []


async def test_a_language_is_spoken_in_the_region_that_the_engine_has(store: SessionStore) -> None:
    engine = ToneEngine(["en-US", "pt-BR"])
    async with talking(store, engine) as (stub, session):
        requests = [
            each for tag in ("en", "EN-us", "en-AU", "pt") for each in (say("Good day.", language=tag), END_TURN)
        ]
        streamed = await stream(stub, [opening(session), *requests, CLOSE])
    assert events(streamed, "notice") == []
    assert engine.spoken_languages == ["en-US", "en-US", "en-US", "pt-BR"]


async def test_text_up_to_the_limit_is_spoken_and_markup_is_text(store: SessionStore) -> None:
    engine = ToneEngine()
    engine.char_s = 0.0005
    first = '<break time="9s"/>Hi.'
    text = f"{first} ".ljust(MAX_TEXT_CHARS, "a")
    async with talking(store, engine) as (stub, session):
        streamed = await stream(stub, [opening(session), say(text), END_TURN, CLOSE])
    (finished,) = events(streamed, "playback_finished")
    assert finished.spoken == text
    assert engine.sentences[0] == first
    assert len("".join(engine.sentences)) == MAX_TEXT_CHARS - len(" ")


async def test_capabilities_describe_the_voice(store: SessionStore) -> None:
    async with talking(store, ToneEngine(["en", "de"])) as (stub, _):
        async with asyncio.timeout(WAIT_S):
            while not (capabilities := await stub.GetCapabilities(pb.GetCapabilitiesRequest())).voice_languages:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # until the registry is read
    assert (capabilities.voice, capabilities.max_text_chars) == (True, MAX_TEXT_CHARS)
    assert list(capabilities.voice_languages) == ["de", "en"]


async def test_a_turn_has_audio_or_text(store: SessionStore) -> None:
    async with talking(store) as (stub, session):
        for requests in ([say(TEXT), *pieces(bytes(640))], [*pieces(bytes(640)), say(TEXT)]):
            async with refused("PROTOCOL_ORDER"):
                await stream(stub, [opening(session), *requests, CLOSE])
            session = (await new_session(stub, b"picture")).id


async def test_a_turn_that_is_not_ended_leaves_its_voice_to_others_and_goes_on(store: SessionStore) -> None:
    engine = ToneEngine()
    async with talking(store, engine, {"capacity": 1, "idle_s": 0.1}) as (stub, session):
        first, _ = await open_stream(stub, session, mode=LIVE)
        await send(first, [say("Good day. And")])
        await until(first, "word_started")
        other = await stream(stub, [opening((await new_session(stub, b"picture")).id), say(TEXT), END_TURN, CLOSE])
        assert [each.spoken for each in events(other, "playback_finished")] == [TEXT]
        await send(first, [say(" then more. ")])
        word = await until(first, "word_started")
        while word.word != "more.":
            word = await until(first, "word_started")
        await send(first, [END_TURN])
        assert (await until(first, "playback_finished")).spoken == "Good day. And then more. "
        await send(first, [say("... "), say("Ada."), END_TURN])
        assert (await until(first, "playback_finished")).spoken == "... Ada."
        await finish(first)
    assert engine.sentences == ["Good day.", *SENTENCES, "And then more.", "Ada."]


async def test_streams_that_end_while_a_turn_waits_for_room_lose_and_repeat_nothing(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def counted(channel: Any) -> Any:
        opened.append(channel)
        return remote_voice(channel)

    monkeypatch.setattr(turn_speaker, "remote_voice", counted)
    monkeypatch.setattr(turn_speaker, "AHEAD_CHARS", 14)
    engine = ToneEngine()
    engine.char_s = 0.02
    sentences = [f"{'a' * 10}{number}." for number in range(3)]
    async with talking(store, engine, {"idle_s": 0.05}, audio_ahead_s=0.05) as (stub, session):
        call, _ = await open_stream(stub, session, mode=LIVE, return_audio=True)
        await send(call, [say(" ".join(sentences)), END_TURN])
        streamed = Streamed()
        await until(call, "playback_finished", streamed)
        await finish(call, streamed=streamed)
    assert len(opened) > 1
    assert returned(streamed) == b"".join(pcm16(spoken(each, char_s=0.02)) for each in sentences)
    assert [each.word for each in events(streamed, "word_started")] == sentences


async def test_the_engine_makes_no_more_than_is_needed_soon(store: SessionStore) -> None:
    engine = ToneEngine()
    async with talking(store, engine, audio_ahead_s=1.0) as (stub, session):
        call, _ = await open_stream(stub, session, mode=LIVE)
        await send(call, [say(("a" * 248 + ". ") * 39), END_TURN])
        await until(call, "playback_started")
        await asyncio.sleep(0.3)
        assert engine.num_parts * 0.2 < 30  # of eight minutes
        await send(call, [INTERRUPT])
        await finish(call)


async def test_another_worker_goes_on_with_a_turn_whose_worker_is_lost(store: SessionStore) -> None:
    first, second = ToneEngine(), ToneEngine()
    reached = asyncio.Event()

    async def stop_in_the_second_sentence() -> None:
        if len(first.sentences) == 2 and first.num_parts > len(spoken(SENTENCES[0])) / RATE_HZ / 0.2 + 2:
            reached.set()
            await asyncio.Event().wait()

    first.before = stop_in_the_second_sentence
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(voice_worker(store, second))
        async with AsyncExitStack() as losing:
            lost = await losing.enter_async_context(voice_worker(store, first, capacity=100))  # the less loaded one
            gateway = await stack.enter_async_context(standin_gateway(store, voice=(lost, target)))
            stub = await stack.enter_async_context(connected(gateway.target))
            session = await new_session(stub, b"picture")
            call, _ = await open_stream(stub, session.id, return_audio=True)
            second.before = None
            await send(call, [say(TEXT), END_TURN, CLOSE])
            streamed = Streamed()
            reading = asyncio.ensure_future(rest(call))
            async with asyncio.timeout(WAIT_S):
                await asyncio.wait({asyncio.ensure_future(reached.wait()), reading}, return_when="FIRST_COMPLETED")
        async with asyncio.timeout(WAIT_S):
            for response in await reading:
                streamed.add(response)
    assert returned(streamed) == delivered(*SENTENCES)
    assert [each.word for each in events(streamed, "word_started")] == TEXT.split()
    assert events(streamed, "notice") == []


async def test_another_gateway_goes_on_with_a_turn(store: SessionStore) -> None:
    engine = ToneEngine()
    text = TEXT
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(voice_worker(store, engine))
        gateways = await stack.enter_async_context(standin_gateways(store, {}, {}, voice=(worker,)))
        here, there = [await stack.enter_async_context(connected(each.target)) for each in gateways]
        session = await new_session(here, b"picture")
        call, _ = await open_stream(here, session.id, mode=LIVE, return_audio=True)
        await send(call, [say(text), END_TURN])
        before = Streamed()
        for _ in range(2):
            await until(call, "word_started", before)
        while (await store.position(session.id)).num_turn_samples < 4000:
            before.add(await answer(call))
        next_frame = before.frames[-1].index + 1
        after = Streamed()
        resume = pb.ResumeAvatar(next_frame=next_frame, next_event=90)
        again, opened = await open_stream(there, session.id, resume=resume)
        assert opened.num_messages == 0
        await send(again, [say(text), END_TURN])
        await finish(again, streamed=after)
    (finished,) = events(after, "playback_finished")
    assert finished.spoken == text
    # A gateway's record may be a block old, so a block may be heard twice; nothing is left out.
    assert finished.position_us == pytest.approx(len(sound(*SENTENCES)) / 2 / RATE_HZ * 1e6, abs=1000)
    words = [each.first_char for each in events(after, "word_started")]
    assert words == sorted(set(words))
    assert text[words[-1] :] == "speak."
    had = {each.first_char for each in events(before, "word_started")}
    assert len(had | {*words}) == len(text.split())
    assert [each.number for each in after.events] == list(range(90, 90 + len(after.events)))


async def test_spoken_text_counts_against_the_tenants_audio(store: SessionStore, redis: str, tmp_path: Path) -> None:
    async with (
        voice_worker(store, ToneEngine()) as worker,
        tenants_gateway(store, redis, tmp_path, "max_audio_s = 2", voice=(worker,)) as (_, stub),
    ):
        reference = (await stub.CreateReference(pb.CreateReferenceRequest(picture=b"picture"), **AS_ACME)).reference
        request = pb.CreateSessionRequest(reference_id=reference.id)
        session = (await stub.CreateSession(request, **AS_ACME)).session
        call = stub.StreamAvatar(**AS_ACME)
        await send(call, [opening(session.id), say("a" * 30 + "."), END_TURN])
        assert (await until(call, "playback_finished")).spoken
        await send(call, [say("a" * 30 + "."), END_TURN])
        async with refused("QUOTA_EXCEEDED"), asyncio.timeout(WAIT_S):
            await rest(call)
