"""Text to speech by an operator's command line, such as `flite -t {text} -o {wav}`."""

import asyncio
import shlex
import tempfile
from pathlib import Path

import av
from av.audio.frame import AudioFrame

MAX_TEXT = 500
SYNTHESIS_S = 30.0


class SpeechError(Exception):
    """The command made no speech."""


class Resampler:
    """Converts audio of any rate and number of channels to mono PCM16 of one rate."""

    def __init__(self, rate_hz: int) -> None:
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=rate_hz)

    def __call__(self, frame: AudioFrame | None) -> bytes:
        """Convert a frame, or flush the rest with None."""
        return b"".join(bytes(each.planes[0])[: each.samples * 2] for each in self._resampler.resample(frame))


class Synthesiser:
    """A command that receives `{text}` and writes the audio file `{wav}`. It runs without a shell.

    Raises ValueError if the command lacks one of the two.
    """

    def __init__(self, command: str, rate_hz: int) -> None:
        self._parts = shlex.split(command)
        self._rate_hz = rate_hz
        if missing := [name for name in ("{text}", "{wav}") if not any(name in part for part in self._parts)]:
            raise ValueError(f"the speech command must contain {' and '.join(missing)}, got {command!r}")

    async def speak(self, text: str) -> bytes:
        """Return speech as mono PCM16. Raises SpeechError if the command fails, writes nothing, or takes too long."""
        # A text that starts with a dash must not become an option of the command, and arguments cannot hold NUL.
        printable = "".join(each for each in " ".join(text.split()) if each.isprintable())
        words = printable.lstrip("- ")[:MAX_TEXT]
        if not words:
            raise SpeechError("there is nothing to say")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.wav"
            await self._run([part.replace("{wav}", str(path)).replace("{text}", words) for part in self._parts])
            return await asyncio.to_thread(read_pcm16, path, self._rate_hz)

    async def _run(self, arguments: list[str]) -> None:
        quiet = asyncio.subprocess.DEVNULL
        try:
            process = await asyncio.create_subprocess_exec(*arguments, stdin=quiet, stdout=quiet, stderr=quiet)
        except OSError as error:
            raise SpeechError(f"the speech command cannot be run: {error.strerror}") from error
        try:
            async with asyncio.timeout(SYNTHESIS_S):
                status = await process.wait()
        except TimeoutError as error:
            raise SpeechError(f"the speech command took longer than {SYNTHESIS_S:g} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if status:
            raise SpeechError(f"the speech command ended with status {status}")


def read_pcm16(path: Path, rate_hz: int) -> bytes:
    """Return an audio file as mono PCM16. Raises SpeechError if it is none."""
    try:
        with av.open(str(path)) as file:
            resample = Resampler(rate_hz)
            return b"".join([*map(resample, file.decode(audio=0)), resample(None)])
    except (av.FFmpegError, IndexError, OSError) as error:
        raise SpeechError("the speech command wrote no audio file") from error
