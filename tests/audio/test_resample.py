import numpy as np
import pytest
import soxr
import torch
from torch import Tensor

from avatar.audio.resample import MonoResampler, check_piece
from avatar.types import AudioPiece


def resampled(samples: Tensor, rate_hz: int, piece_samples: int) -> Tensor:
    resampler = MonoResampler(rate_hz, block_samples=7680)
    starts = range(0, samples.shape[1], piece_samples)
    parts = [resampler(samples[:, start : start + piece_samples], is_last=False) for start in starts]
    return torch.cat([*parts, resampler(samples[:, :0], is_last=True)])


@pytest.mark.parametrize("rate_hz", [8000, 11025, 12345, 22050, 24000, 44100, 48000])
def test_output_does_not_depend_on_the_pieces(rate_hz: int, speech: Tensor) -> None:
    samples = speech[:, : rate_hz * 3 // 2]
    least = 1 if rate_hz == 8000 else 17  # sample by sample takes seconds
    pieces = [resampled(samples, rate_hz, piece_samples) for piece_samples in (least, 320, 1600, 7680)]
    for other in pieces[1:]:
        assert torch.equal(pieces[0], other)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 12345, 22050, 24000, 44100, 48000])
def test_separately_resampled_blocks_join_without_a_seam(rate_hz: int, speech: Tensor) -> None:
    samples = speech[:, : rate_hz * 3 // 2]
    whole = torch.from_numpy(soxr.resample(samples[0].numpy(), rate_hz, 16000, quality="HQ"))
    assert len(whole) == round(samples.shape[1] * 16000 / rate_hz)
    torch.testing.assert_close(resampled(samples, rate_hz, 1600), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate_hz", [8000, 24000, 44100, 48000])
def test_output_lags_by_at_most_120_ms(rate_hz: int, speech: Tensor) -> None:
    ready = MonoResampler(rate_hz, block_samples=7680)(speech[:, :rate_hz], is_last=False)
    assert 16000 - len(ready) <= 0.12 * 16000


def test_stereo_becomes_the_mean_of_its_channels(speech: Tensor) -> None:
    stereo = torch.stack([speech[0], -0.5 * speech[0]])
    assert torch.equal(MonoResampler(16000, block_samples=7680)(stereo, is_last=False), (stereo[0] + stereo[1]) / 2)


def piece(*shape: int, rate_hz: int = 16000, value: float = 0.0, dtype: torch.dtype = torch.float32) -> AudioPiece:
    samples = torch.zeros(shape, dtype=dtype)
    samples[..., -1:] = value
    return AudioPiece(samples, rate_hz)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (piece(1, 9, rate_hz=3000), "8000 to 48000 Hz, got 3000"),
        (piece(1, 9, rate_hz=96000), "8000 to 48000 Hz, got 96000"),
        (piece(3, 9), r"1 or 2 channels, samples\), got shape \(3, 9\)"),
        (piece(9), "channels"),
        (piece(1, 9, value=np.nan), "finite"),
        (piece(2, 9, value=-np.inf), "finite"),
        (piece(1, 9, value=-20000.0), r"\[-1, 1\], got 20000; divide PCM16"),
        (piece(1, 9, dtype=torch.int16), "float32"),
    ],
)
def test_invalid_audio_is_refused(bad: AudioPiece, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_piece(bad)


@pytest.mark.parametrize("good", [piece(1, 0), piece(2, 0, rate_hz=8000), piece(2, 9, rate_hz=48000, value=1.5)])
def test_empty_pieces_and_slight_overshoot_are_accepted(good: AudioPiece) -> None:
    check_piece(good)
