"""The client's offline streams and its calls, over the real suite."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from avatar.client import Frame, connect
from avatar.errors import ConnectionLost, InvalidAudio, InvalidField, ProtocolOrder, SessionNotFound
from tests import product
from tests.conftest import speech

SECONDS = 1.5


async def test_frames_equal_those_of_the_bare_contract(gateway: str, picture: bytes) -> None:
    async with product.connected(gateway) as stub:
        expected = await product.speak(stub, (await product.new_session(stub, picture, seed=7)).id, speech(SECONDS))
    async with connect(gateway) as avatar:
        session = await avatar.create(picture, seed=7)
        async with session.stream(audio=speech(SECONDS)) as stream:
            frames = [frame async for frame in stream.frames()]
    assert [frame.data for frame in frames] == expected.pixels
    assert [frame.index for frame in frames] == list(range(3, 3 + len(frames)))
    assert [frame.pts_s for frame in frames] == pytest.approx([frame.index / 25 for frame in frames])
    assert stream.closed is not None
    assert stream.closed.num_frames == len(frames)


async def test_all_audio_can_be_pushed_before_iterating(gateway: str, picture: bytes) -> None:
    async with connect(gateway) as avatar:
        session = await avatar.create(picture, seed=7)
        async with session.stream(rate_hz=16000) as stream:
            await stream.push(speech(SECONDS))
            await stream.close()
            frames = [item.index async for item in stream if isinstance(item, Frame)]
    assert len(frames) == 45


async def test_audio_may_be_an_async_generator(gateway: str, picture: bytes) -> None:
    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(speech(SECONDS)), 1001 * 2):
            yield speech(SECONDS)[start : start + 1001 * 2]

    async with connect(gateway) as avatar:
        session = await avatar.create(picture, seed=7)
        async with session.stream(audio=pieces()) as stream:
            assert len([frame async for frame in stream.frames()]) == 45


async def test_an_exception_of_the_audio_source_ends_the_iteration(gateway: str, picture: bytes) -> None:
    async def pieces() -> AsyncGenerator[bytes, None]:
        yield speech(0.2)
        raise OSError("the microphone is gone")

    async with connect(gateway) as avatar:
        session = await avatar.create(picture)
        async with session.stream(audio=pieces()) as stream:
            with pytest.raises(OSError, match="microphone"):
                await anext(stream)


async def test_a_portrait_may_be_a_path(gateway: str, picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "face.png").write_bytes(picture)
    async with connect(gateway) as avatar:
        from_bytes, from_path = await avatar.create(picture), await avatar.create(tmp_path / "face.png")
        assert from_bytes.info.reference_id == from_path.info.reference_id
        assert (from_path.video.width, from_path.video.frame_rate_hz) == (64, 25)


async def test_options_reach_the_session(gateway: str, picture: bytes) -> None:
    async with connect(gateway) as avatar:
        session = await avatar.create(picture, seed=5, ttl_s=17.5, sink_update_block=0, sink_distance=(3, 9))
        info = (await avatar.session(session.id)).info
    assert (info.seed, info.ttl.ToMilliseconds(), info.sink_update_block) == (5, 17500, 0)
    assert (info.min_sink_distance, info.max_sink_distance) == (3, 9)


async def test_the_time_to_live_can_be_changed(gateway: str, picture: bytes) -> None:
    async with connect(gateway) as avatar:
        session = await avatar.create(picture)
        assert await session.update(ttl_s=44) is None
        assert session.info.ttl.seconds == (await session.refresh()).ttl.seconds == 44


async def test_leaving_a_stream_early_deletes_its_session(gateway: str, picture: bytes) -> None:
    async with connect(gateway) as avatar:
        session = await avatar.create(picture)
        async with session.stream() as stream:
            await stream.push(speech(SECONDS))
            async for _ in stream:
                break
        with pytest.raises(SessionNotFound):
            await avatar.session(session.id)


async def test_nothing_can_be_sent_after_close(gateway: str, picture: bytes) -> None:
    async with connect(gateway) as avatar, (await avatar.create(picture)).stream() as stream:
        await stream.push(speech(0.1))
        await stream.close()
        await stream.close()
        with pytest.raises(ProtocolOrder, match="was closed"):
            await stream.push(speech(0.1))


async def test_a_partial_sample_is_refused(gateway: str, picture: bytes) -> None:
    async with connect(gateway) as avatar, (await avatar.create(picture)).stream(channels=2) as stream:
        with pytest.raises(ValueError, match="whole samples of 4 bytes, got 6"):
            await stream.push(b"123456")


async def test_errors_carry_reason_and_field(gateway: str, picture: bytes) -> None:
    async with connect(gateway) as avatar:
        with pytest.raises(InvalidField) as caught:
            await avatar.create(b"no picture")
        assert caught.value.reason == "INVALID_FIELD"
        assert [field for field, _ in caught.value.violations] == ["picture"]
        with pytest.raises(InvalidField, match="this checkpoint fixes it"):
            await avatar.create(picture, audio_context_s=0.4)
        session = await avatar.create(picture)
        with pytest.raises(InvalidAudio, match="8000 to 48000"):
            async with session.stream(rate_hz=4000):
                pass
        await session.delete()
        with pytest.raises(SessionNotFound):
            await session.interrupt()


async def test_an_unreachable_gateway_is_a_lost_connection() -> None:
    async with connect("127.0.0.1:1") as avatar:
        with pytest.raises(ConnectionLost):
            await avatar.capabilities()


async def test_an_unknown_option_is_refused_with_the_known_ones(gateway: str, picture: bytes) -> None:
    async with connect(gateway) as avatar:
        with pytest.raises(ValueError, match="fit must be '', 'cover', 'reference', 'face', got 'fill'"):
            await avatar.create(picture, fit="fill")  # type: ignore[arg-type]
        session = await avatar.create(picture)
        for name, value in (("video", "mp4"), ("encoding", "mp3")):
            options: Any = {name: value}
            with pytest.raises(ValueError, match=f"{name} must be '.*', got '{value}'"):
                async with session.stream(**options):
                    pass
