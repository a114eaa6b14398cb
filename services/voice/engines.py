"""Speech engines behind one interface, and the one that runs a command."""

import asyncio
import math
import os
import shlex
import shutil
import signal
import stat
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from avatar.errors import VoiceFailed
from avatar.settings import unusable
from services.voice.sound import PcmReader, Samples

# A sentence's sound: no command writes more, unless something is wrong.
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Sound:
    """A part of a sentence's sound.

    samples: (s,) float32 in [-1, 1] at rate_hz. is_last: nothing more of the sentence follows.
    words_s: starts of the sentence's further words, in seconds, where the engine has them.
    """

    samples: Samples
    rate_hz: int
    is_last: bool = False
    words_s: Sequence[float] = ()


class Engine(Protocol):
    """Speaks sentences. name: of its kind. languages: BCP 47 tags; empty if it takes any."""

    name: str
    languages: Sequence[str]

    def speak(self, sentence: str, language: str) -> AsyncGenerator[Sound, None]:
        """Yield a sentence's sound as it is made. Raises VoiceFailed.

        sentence: one line, with a letter or digit. language: a BCP 47 tag; empty for the default.
        """


class Command:
    """An operator's command line that speaks `{text}` into the WAV file `{wav}`, a process for each sentence.

    `{language}` is the language's tag. `{words}` is a file that the command may write the words' times to: the start of
    each word that has a letter or digit, in seconds, a line each. No shell is involved.
    """

    name = "command"

    def __init__(self, command: str, languages: Sequence[str], timeout_s: float) -> None:
        """timeout_s: for one sentence. ValueError if the command lacks `{text}` or `{wav}`, or cannot be run."""
        self.languages = languages
        self._timeout_s = timeout_s
        self._parts = _parts(command)

    async def speak(self, sentence: str, language: str) -> AsyncGenerator[Sound, None]:
        """Yield a sentence's whole sound. Raises VoiceFailed."""
        # A text that begins with a dash must not become an option of the command.
        values = {"{text}": f" {sentence}" if sentence.startswith("-") else sentence, "{language}": language}
        with tempfile.TemporaryDirectory(prefix="avatar-voice-") as folder:
            values |= {"{wav}": f"{folder}/speech.wav", "{words}": f"{folder}/words.txt"}
            await self._run([_filled(part, values) for part in self._parts])
            sound = await asyncio.to_thread(_read, Path(values["{wav}"]), Path(values["{words}"]))
        yield sound

    async def _run(self, arguments: list[str]) -> None:
        quiet = asyncio.subprocess.DEVNULL
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise VoiceFailed(f"the speech command cannot be run: {getattr(error, 'strerror', error)}") from error
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await process.wait()
        except TimeoutError as error:
            raise VoiceFailed(f"the speech command took longer than {self._timeout_s:g} s") from error
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
                await process.wait()
        if status:
            raise VoiceFailed(f"the speech command ended with status {status}")


def _parts(command: str) -> list[str]:
    """Return the parts of a command line. ValueError if it cannot speak."""
    try:
        parts = shlex.split(command)
    except ValueError as error:
        raise unusable("voice_command", command, f"balanced quotes ({error})") from error
    if missing := [name for name in ("{text}", "{wav}") if not any(name in part for part in parts)]:
        raise unusable("voice_command", command, f"{' and '.join(missing)}, as in `flite -t {{text}} -o {{wav}}`")
    if not shutil.which(parts[0]):
        raise unusable("voice_command", command, f"a program in the path; there is no executable {parts[0]!r}")
    return parts


def _filled(part: str, values: dict[str, str]) -> str:
    """Return a part of a command with its placeholders filled; text is never searched for placeholders."""
    for name in ("{wav}", "{words}", "{language}"):
        part = part.replace(name, values[name])
    return part.replace("{text}", values["{text}"])


def _read(wav: Path, words: Path) -> Sound:
    """Read a command's files. VoiceFailed if there is no such sound."""
    reader = PcmReader()
    try:
        samples = reader.read(_contents(wav))
    except FileNotFoundError as error:
        raise VoiceFailed("the speech command wrote no WAV file") from error
    if not reader.rate_hz:
        raise VoiceFailed("the speech command wrote no WAV file")
    words_s: list[float] = []
    with suppress(FileNotFoundError):
        try:
            words_s = [float(line) for line in _contents(words).split()]
        except ValueError as error:
            raise VoiceFailed("the speech command wrote times of words that are no numbers") from error
    if not all(0 <= each < math.inf for each in words_s):
        raise VoiceFailed("the speech command wrote times of words that are not seconds from the sentence's start")
    return Sound(samples, reader.rate_hz, is_last=True, words_s=words_s)


def _contents(path: Path) -> bytes:
    """Return the content of a command's file. VoiceFailed if it is none, such as a pipe, which may never end."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise VoiceFailed(f"the speech command made {path.name} no regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise VoiceFailed(f"the speech command wrote more than {MAX_FILE_BYTES >> 20} MB")
        return path.read_bytes()
    except PermissionError as error:
        raise VoiceFailed(f"the speech command made {path.name} unreadable") from error
