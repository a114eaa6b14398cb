"""Text to frames through all services of one process, with a command as the voice."""

from pathlib import Path

from avatar.client import Audio, Frame, PlaybackFinished, Stream, WordStarted, connect
from avatar.settings import GatewaySettings, VoiceSettings
from avatar.store.sessions import SessionStore
from services.local.suite import suite
from tests.services.voice.fakes import command, spoken_by

TEXT = "Good day. I am Ada."


async def spoken(stream: Stream) -> tuple[list[bytes], bytes, list[str], str]:
    """Frames, audio, words and the text that was spoken."""
    frames, audio, words, text = [], b"", [], ""
    async for item in stream:
        match item:
            case Frame():
                frames.append(item.data)
            case Audio():
                audio += item.data
            case WordStarted():
                words.append(item.word)
            case PlaybackFinished():
                text += item.spoken
    return frames, audio, words, text


async def test_text_gives_the_frames_that_its_speech_gives(
    checkpoint: Path, picture: bytes, store: SessionStore, tmp_path: Path
) -> None:
    line = command(tmp_path)
    voice = VoiceSettings(voice_command=line)
    speech = await spoken_by(line, "Good day.", "I am Ada.")
    async with (
        suite(checkpoint, store, GatewaySettings(listen="127.0.0.1:0"), voice=voice) as target,
        connect(target) as avatar,
    ):
        assert (await avatar.capabilities()).voice
        session = await avatar.create(picture, seed=7)
        async with session.stream(return_audio=True) as stream:
            for piece in ("Good da", "y. I am", " Ada."):
                await stream.say(piece)
            await stream.end_turn()
            await stream.close()
            frames, audio, words, text = await spoken(stream)
        again = await avatar.create(picture, seed=7)
        async with again.stream(audio=speech, return_audio=True) as stream:
            assert (frames, audio, [], "") == await spoken(stream)
    assert (words, text) == (TEXT.split(), TEXT)
    assert len(frames) > 20
