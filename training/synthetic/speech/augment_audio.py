"""Audio augmentation: reverb, a microphone's frequency response or a telephone line, background noise, and gain.

Training voices are synthetic and cleaner than any recording; the augmentation makes lips independent of that.

Axes: s samples at 16 kHz.
"""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from training.data import AUDIO_RATE_HZ

Floats = NDArray[np.float32]

# Probabilities of reverb, of a telephone line, and of noise.
REVERB, LINE, NOISE = 0.5, 0.3, 0.7
# Ranges: the reverb's decay time to -60 dB and its energy relative to the direct signal; gain of the frequency
# response, noise below the signal, and peak below full scale, in dB.
REVERB_S, REVERB_ENERGY = (0.1, 0.6), (0.02, 0.5)
RESPONSE_DB = 8.0
NOISE_DB, PEAK_DB = (5.0, 35.0), (3.0, 30.0)
# Frequencies at which the response is drawn, and the band of a telephone line.
KNOTS_HZ = (60.0, 250.0, 1000.0, 3000.0, 7000.0)
LINE_HZ = (300.0, 3400.0)


def augment_audio(audio: Floats, rng: Generator) -> Floats:
    """Augment audio (s,) in [-1, 1] without delaying it."""
    tail = round(REVERB_S[1] * AUDIO_RATE_HZ)
    size = len(audio) + tail
    frequencies = np.fft.rfftfreq(size, 1 / AUDIO_RATE_HZ)
    knots_db = rng.uniform(-RESPONSE_DB, RESPONSE_DB, len(KNOTS_HZ))
    transfer = 10 ** (np.interp(np.log(frequencies + 1), np.log(KNOTS_HZ), knots_db) / 20)
    if rng.random() < LINE:
        # Slopes of a sixth of an octave to either side, so that the band-pass does not ring.
        edges = np.array([LINE_HZ[0] / 1.12, LINE_HZ[0] * 1.12, LINE_HZ[1] / 1.12, LINE_HZ[1] * 1.12])
        transfer = transfer * np.interp(frequencies, edges, (0.0, 1.0, 1.0, 0.0))
    recorded = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(reverb(tail, rng), size) * transfer, size)
    recorded = recorded[: len(audio)]
    if rng.random() < NOISE:
        recorded = recorded + background_noise(recorded, rng)
    peak = float(np.abs(recorded).max())
    gain = 10 ** (-rng.uniform(*PEAK_DB) / 20) / peak if peak else 1.0
    return (gain * recorded).astype(np.float32)


def reverb(length: int, rng: Generator) -> NDArray[np.float64]:
    """Draw a room's impulse response (length,): the direct signal, and with some probability a decaying noise tail."""
    response = np.zeros(length)
    response[0] = 1.0
    if rng.random() < REVERB:
        decay_s, energy = rng.uniform(*REVERB_S), rng.uniform(*REVERB_ENERGY)
        tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / (decay_s * AUDIO_RATE_HZ))
        tail[0] = 0.0
        response += tail * np.sqrt(energy / np.square(tail).sum())
    return response


def background_noise(audio: NDArray[np.float64], rng: Generator) -> NDArray[np.float64]:
    """Draw noise (s,) between white and brown, at a random level below the audio's."""
    frequencies = np.fft.rfftfreq(len(audio), 1 / AUDIO_RATE_HZ)
    spectrum = np.fft.rfft(rng.standard_normal(len(audio))) / (frequencies + 50.0) ** rng.uniform(0.0, 1.0)
    noise: NDArray[np.float64] = np.fft.irfft(spectrum, len(audio))
    level = float(np.sqrt(np.square(audio).mean())) * 10 ** (-rng.uniform(*NOISE_DB) / 20)
    return noise * (level / float(np.sqrt(np.square(noise).mean())))
