from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from avatar.audio.model import AudioModel, load
from avatar.audio.statistics import AudioStatistics
from avatar.audio.whisper import Whisper, compress, tiny_en
from avatar.checkpoints.layouts import open_part
from avatar.types import AudioPiece, Session

TINY = Path(__file__).parents[2] / "models" / "tiny"


@pytest.fixture(scope="module")
def encoder() -> Whisper:
    torch.manual_seed(0)
    return Whisper.tiny()


def test_log_mel_equals_the_feature_extractor(encoder: Whisper, speech: Tensor) -> None:
    import transformers

    audio = speech[0, : 16000 * 3]
    extractor = transformers.WhisperFeatureExtractor(  # type: ignore[no-untyped-call]
        feature_size=len(encoder.filters), chunk_length=3
    )
    expected = torch.from_numpy(extractor(audio.numpy(), sampling_rate=16000).input_features[0])
    # Whole files are centred with reflection, and their last frame is dropped; windows have real audio there.
    mel = encoder.log_mel(F.pad(audio[None], (200, 200), mode="reflect")[0])[:, :-1]
    torch.testing.assert_close(compress(mel, float(mel.max())), expected, atol=1e-6, rtol=0)


def test_hidden_states_equal_transformers_module(encoder: Whisper) -> None:
    mel = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    expected = encoder.network(mel[None], output_hidden_states=True)
    states = encoder.hidden_states(mel)
    torch.testing.assert_close(states, rearrange(list(expected.hidden_states), "l 1 t d -> l t d"))
    torch.testing.assert_close(states[-1], expected.last_hidden_state[0])


def test_a_slice_of_frames_equals_the_slice_of_all(encoder: Whisper) -> None:
    mel = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder.hidden_states(mel, slice(20, 45)), encoder.hidden_states(mel)[:, 20:45])


def test_frames_are_centred_on_their_first_sample(encoder: Whisper) -> None:
    """A click at the window's frame 24 k + 5 shows most in the input of the layers at that frame."""
    window = torch.zeros(encoder.left_samples + 7680 + 80 + 4 * 320)
    window[encoder.left_samples + 5 * 320] = 1.0
    silent, _ = encoder.encode(torch.zeros_like(window), AudioStatistics(), encoder.right_frames)
    clicked, _ = encoder.encode(window, AudioStatistics(), encoder.right_frames)
    change = (clicked[0] - silent[0]).square().sum(dim=1)
    assert change.shape == (25,)
    assert change.argmax() == 1 + 5


def test_silence_stays_at_the_floor_set_by_speech(encoder: Whisper, speech: Tensor) -> None:
    _, statistics = encoder.encode(speech[0, 8000:30000], AudioStatistics(), encoder.right_frames)
    assert statistics.peak > AudioStatistics().peak
    silent, kept = encoder.encode(torch.full((30000,), 1e-6), statistics, encoder.right_frames)
    assert kept.peak == statistics.peak
    floor = torch.full((16, 128), (statistics.peak - 8 + 4) / 4)
    torch.testing.assert_close(silent, encoder.hidden_states(floor)[:, -4 - 25 : -4])


def test_silence_is_encoded_once_for_a_peak(encoder: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    silence, states_of = torch.zeros(30000), encoder.hidden_states
    counted = Mock(side_effect=states_of)
    monkeypatch.setattr(encoder, "hidden_states", counted)
    floor = AudioStatistics().with_peak(1.25)
    first, kept = encoder.encode(silence, floor, encoder.right_frames)
    again, _ = encoder.encode(silence[:100], floor, encoder.right_frames)
    assert (counted.call_count, kept) == (1, floor)
    assert torch.equal(first, again)
    total = encoder.left_samples + encoder.grid.window_end(0, encoder.right_frames)
    mel = encoder.log_mel(torch.zeros(total))
    torch.testing.assert_close(first, states_of(compress(mel, 1.25))[:, -4 - 25 : -4])
    other, _ = encoder.encode(silence, AudioStatistics().with_peak(2.0), encoder.right_frames)
    assert counted.call_count == 2
    assert not torch.equal(first, other)


def test_a_stream_starts_as_if_after_silence(encoder: Whisper, session: Session, speech: Tensor) -> None:
    model, audio = AudioModel(encoder), speech[:, 8000:40000]
    first = model.step(AudioPiece(audio, 16000), model.open(session))
    # Five blocks keep the phase of pixel frames on the grid.
    later = model.step(AudioPiece(F.pad(audio, (5 * 7680, 0)), 16000), model.open(session))[5:]
    for early, late in zip(first, later, strict=True):
        torch.testing.assert_close(early.features, late.features)


@pytest.mark.parametrize(("window_frames", "right_frames"), [(28, 4), (1501, 10), (150, -1)])
def test_a_window_that_cannot_hold_a_block_is_refused(window_frames: int, right_frames: int) -> None:
    with pytest.raises(ValueError, match=r"window_frames must be|right_frames must be 0 to"):
        Whisper(replace(tiny_en(), window_frames=window_frames, right_frames=right_frames))


def test_a_short_window_holds_short_blocks_only() -> None:
    config = replace(Whisper.tiny().config, window_frames=16, right_frames=4)
    assert Whisper(config, block_latents=1).left_samples == 4 * 320 + 200
    with pytest.raises(ValueError, match="must be 21 to 64 with right_frames 4 and blocks of 2 latents, got 16"):
        Whisper(config, block_latents=2)


def test_the_embedded_encoder_tells_speech_from_noise(session: Session, speech: Tensor) -> None:
    model = load(open_part(TINY, "audio"))
    assert isinstance(model.encoder, Whisper)
    assert model.encoder.config == replace(tiny_en(), window_frames=50, right_frames=5)

    def features(audio: Tensor) -> Tensor:
        [first, *_] = model.step(AudioPiece(audio, 16000), model.open(session))
        return first.features

    voice = features(speech[:, 8000:19000])
    assert voice.shape == (5, 384, 4)
    # Noise of a tenth of its loudness changes a voice's features far less than other audio does.
    noise = torch.randn(1, 11000, generator=torch.Generator().manual_seed(0)) * speech.std()
    noisy, other = features(speech[:, 8000:19000] + 0.1 * noise), features(noise)

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a[-1] - b[-1]).square().mean().sqrt())

    assert distance(noisy, voice) < 0.6 * distance(other, voice)


def test_tiny_en_looks_a_fifth_of_a_second_ahead() -> None:
    model = AudioModel(Whisper(tiny_en()))
    assert model.lookahead_s == 0.205
    assert model.history_s == 2.88  # six blocks: the window starts in the fifth before, and a resampler settles
