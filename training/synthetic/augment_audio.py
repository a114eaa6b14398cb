"""The same words from another room: echo, another microphone or a telephone line, noise, and another distance.

Voices for training are synthesised, and clean as no recording is; lips have not to mind.

Axes: s samples at 16 kHz.
"""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.data import SOUND_RATE_HZ

Floats = NDArray[np.float32]

# Chances that there is an echo, a narrow line, and noise.
ECHO, NARROW, NOISE = 0.5, 0.3, 0.7
# Ranges of what is drawn: seconds until an echo has fallen by 60 dB and its energy beside the direct sound's; decibels
# by which a microphone lifts or takes away; noise below the sound, and peak below full scale, in decibels.
ECHO_S, ECHO_ENERGY = (0.1, 0.6), (0.02, 0.5)
COLOUR_DB = 8.0
NOISE_DB, PEAK_DB = (5.0, 35.0), (3.0, 30.0)
# Frequencies in Hz at which a microphone's colour is drawn, and which a telephone line passes.
KNOTS_HZ = (60.0, 250.0, 1000.0, 3000.0, 7000.0)
LINE_HZ = (300.0, 3400.0)


def from_another_room(sound: Floats, rng: Generator) -> Floats:
    """Sound (s,) in [-1, 1] as it may have been recorded; no later than it was."""
    reach = round(ECHO_S[1] * SOUND_RATE_HZ)
    size = len(sound) + reach
    frequencies = np.fft.rfftfreq(size, 1 / SOUND_RATE_HZ)
    colour_db = np.interp(np.log(frequencies + 1), np.log(KNOTS_HZ), rng.uniform(-COLOUR_DB, COLOUR_DB, len(KNOTS_HZ)))
    transfer = 10 ** (colour_db / 20)
    if rng.random() < NARROW:
        # Sixth of an octave to either side, so that the line does not ring.
        edges = np.array([LINE_HZ[0] / 1.12, LINE_HZ[0] * 1.12, LINE_HZ[1] / 1.12, LINE_HZ[1] * 1.12])
        transfer = transfer * np.interp(frequencies, edges, (0.0, 1.0, 1.0, 0.0))
    recorded = np.fft.irfft(np.fft.rfft(sound, size) * np.fft.rfft(echo(reach, rng), size) * transfer, size)
    recorded = recorded[: len(sound)]
    if rng.random() < NOISE:
        recorded = recorded + noise_beside(recorded, rng)
    peak = float(np.abs(recorded).max())
    louder = 10 ** (-rng.uniform(*PEAK_DB) / 20) / peak if peak else 1.0
    return (louder * recorded).astype(np.float32)


def echo(reach: int, rng: Generator) -> NDArray[np.float64]:
    """(reach,) what a room makes of a click: the click, and by chance a tail of noise that dies away."""
    response = np.zeros(reach)
    response[0] = 1.0
    if rng.random() < ECHO:
        fallen_s, energy = rng.uniform(*ECHO_S), rng.uniform(*ECHO_ENERGY)
        tail = rng.standard_normal(reach) * 10 ** (-3 * np.arange(reach) / (fallen_s * SOUND_RATE_HZ))
        tail[0] = 0.0
        response += tail * np.sqrt(energy / np.square(tail).sum())
    return response


def noise_beside(sound: NDArray[np.float64], rng: Generator) -> NDArray[np.float64]:
    """(s,) noise between white and brown, so much weaker than the sound."""
    frequencies = np.fft.rfftfreq(len(sound), 1 / SOUND_RATE_HZ)
    spectrum = np.fft.rfft(rng.standard_normal(len(sound))) / (frequencies + 50.0) ** rng.uniform(0.0, 1.0)
    noise: NDArray[np.float64] = np.fft.irfft(spectrum, len(sound))
    wanted = float(np.sqrt(np.square(sound).mean())) * 10 ** (-rng.uniform(*NOISE_DB) / 20)
    return noise * (wanted / float(np.sqrt(np.square(noise).mean())))
