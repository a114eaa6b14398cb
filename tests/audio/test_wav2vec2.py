import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from avatar.audio import whole_file
from avatar.audio.model import AudioModel, interpolate
from avatar.audio.statistics import AudioStatistics
from avatar.audio.wav2vec2 import Wav2Vec2, Wav2Vec2Config, large
from avatar.types import AudioPiece, Session


@pytest.fixture(scope="module")
def encoder() -> Wav2Vec2:
    torch.manual_seed(0)
    return Wav2Vec2.tiny()


def test_with_full_context_a_stream_equals_the_whole_file(session: Session, speech: Tensor) -> None:
    """With windows that hold everything and the file's statistics, only the placement in time differs, by intent."""
    torch.manual_seed(0)
    network = Wav2Vec2.tiny().config.network
    encoder = Wav2Vec2(Wav2Vec2Config(network=network, left_frames=400, right_frames=200))
    model, audio = AudioModel(encoder), speech[0, : 16000 * 3]
    mean, variance = float(audio.mean()), float(audio.var(correction=0))
    state = model.open(session)
    state.statistics = AudioStatistics(count=1e30, mean=mean, m2=1e30 * variance)  # more samples change nothing
    blocks = model.step(AudioPiece(audio[None], 16000, is_last=True), state)
    assert len(blocks) == 7
    for block in blocks:
        silence = model.grid.window_end(block.index, right_frames=200) - len(audio)
        states = encoder.hidden_states(F.pad(whole_file.normalise(audio), (0, silence), value=-mean / variance**0.5))
        expected = interpolate(states[:, : 24 * (block.index + 1)], block.index, model.grid)
        torch.testing.assert_close(block.features, expected, atol=2e-5, rtol=1e-4)


def test_config_fields_other_than_sizes_are_ignored(encoder: Wav2Vec2) -> None:
    """A config.json may name attention code of a hub, or the masking of training."""
    published = {**encoder.config.network, "_attn_implementation": "some/kernel", "mask_time_prob": 0.05, "vocab": 33}
    assert Wav2Vec2(Wav2Vec2Config(network=published)).config.network == encoder.config.network


def test_negative_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="left_frames must be 0 to 1500, got -1"):
        Wav2Vec2Config(network={}, left_frames=-1)


def test_the_large_one_has_25_states_of_width_1024() -> None:
    with torch.device("meta"):
        encoder = Wav2Vec2(large())
    assert (encoder.num_states, encoder.width) == (25, 1024)
    assert isinstance(encoder.network, nn.Module)
    assert round(sum(p.numel() for p in encoder.network.parameters()) / 1e6) == 315
