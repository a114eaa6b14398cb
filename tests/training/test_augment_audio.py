"""Facts about sound from another room."""

import numpy as np

from training.data import SOUND_RATE_HZ
from training.synthetic.augment_audio import PEAK_DB, from_another_room


def clicks(seconds: float = 2.0) -> np.ndarray:
    """Bursts of noise, loud and soft by turns, as syllables are."""
    rng = np.random.default_rng(7)
    times = np.arange(round(seconds * SOUND_RATE_HZ)) / SOUND_RATE_HZ
    return (0.2 * rng.standard_normal(len(times)) * (np.sin(2 * np.pi * 4 * times) > 0)).astype(np.float32)


def test_a_room_follows_from_its_seed() -> None:
    one, again, other = (from_another_room(clicks(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.allclose(one, other)


def test_syllables_are_where_they_were() -> None:
    """Neither echo nor filter makes lips late: loudness goes with the true one best at no lag, within 10 ms."""
    step = SOUND_RATE_HZ // 100
    true = np.abs(clicks()).reshape(-1, step).mean(1)
    lags = range(-10, 11)
    agreement = np.zeros(len(lags))
    for seed in range(20):
        loud = np.abs(from_another_room(clicks(), np.random.default_rng(seed))).reshape(-1, step).mean(1)
        agreement += [np.corrcoef(np.roll(loud, -lag), true)[0, 1] for lag in lags]
    assert abs(lags[int(agreement.argmax())]) <= 1


def test_peaks_are_within_their_range() -> None:
    for seed in range(20):
        heard = from_another_room(clicks(), np.random.default_rng(seed))
        assert heard.shape == clicks().shape
        assert heard.dtype == np.float32
        assert -PEAK_DB[1] - 0.1 <= 20 * np.log10(np.abs(heard).max()) <= -PEAK_DB[0] + 0.1


def test_silence_stays_silent() -> None:
    for seed in range(5):
        assert not from_another_room(np.zeros(8000, np.float32), np.random.default_rng(seed)).any()
