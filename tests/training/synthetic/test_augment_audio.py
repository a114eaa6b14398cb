import numpy as np

from training.data import AUDIO_RATE_HZ
from training.synthetic.speech.augment_audio import PEAK_DB, augment_audio


def syllables(seconds: float = 2.0) -> np.ndarray:
    """Return bursts of noise with pauses, like syllables."""
    rng = np.random.default_rng(7)
    times = np.arange(round(seconds * AUDIO_RATE_HZ)) / AUDIO_RATE_HZ
    return (0.2 * rng.standard_normal(len(times)) * (np.sin(2 * np.pi * 4 * times) > 0)).astype(np.float32)


def test_augmentation_depends_on_its_seed_alone() -> None:
    one, again, other = (augment_audio(syllables(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.allclose(one, other)


def test_augmentation_does_not_delay_syllables() -> None:
    """The loudness correlates best with the original's at no lag, within 10 ms."""
    step = AUDIO_RATE_HZ // 100
    true = np.abs(syllables()).reshape(-1, step).mean(1)
    lags = range(-10, 11)
    correlations = np.zeros(len(lags))
    for seed in range(20):
        loud = np.abs(augment_audio(syllables(), np.random.default_rng(seed))).reshape(-1, step).mean(1)
        correlations += [np.corrcoef(np.roll(loud, -lag), true)[0, 1] for lag in lags]
    assert abs(lags[int(correlations.argmax())]) <= 1


def test_peaks_are_within_their_range() -> None:
    for seed in range(20):
        augmented = augment_audio(syllables(), np.random.default_rng(seed))
        assert augmented.shape == syllables().shape
        assert augmented.dtype == np.float32
        assert -PEAK_DB[1] - 0.1 <= 20 * np.log10(np.abs(augmented).max()) <= -PEAK_DB[0] + 0.1


def test_silence_stays_silent() -> None:
    for seed in range(5):
        assert not augment_audio(np.zeros(8000, np.float32), np.random.default_rng(seed)).any()
