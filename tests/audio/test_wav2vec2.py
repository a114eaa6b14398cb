from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from avatar.audio import offline
from avatar.audio.clock import window_end
from avatar.audio.model import AudioModel, place
from avatar.audio.statistics import Statistics
from avatar.audio.wav2vec2 import Wav2Vec2, Wav2Vec2Config, large
from avatar.types import AudioPiece, Session


@pytest.fixture(scope="module")
def encoder() -> Wav2Vec2:
    torch.manual_seed(0)
    return Wav2Vec2.tiny()


def test_the_last_state_is_the_normalised_one(encoder: Wav2Vec2, speech: Tensor) -> None:
    states = encoder.hidden_states(speech[0, :16000])
    assert states.shape == (3, 49, 32)
    torch.testing.assert_close(states[-1], encoder.network(speech[:, :16000]).last_hidden_state[0])
    torch.testing.assert_close(states[-1].mean(dim=1), torch.zeros(49), atol=1e-5, rtol=0)


def test_with_all_context_a_stream_follows_the_rule_for_files(session: Session, speech: Tensor) -> None:
    """With windows that hold everything and the file's statistics, only the placement in time differs, by intent."""
    torch.manual_seed(0)
    network = Wav2Vec2.tiny().config.network
    encoder = Wav2Vec2(Wav2Vec2Config(network=network, left_frames=400, right_frames=200))
    model, sound = AudioModel(encoder), speech[0, : 16000 * 3]
    mean, variance = float(sound.mean()), float(sound.var(correction=0))
    state = model.open(session)
    state.statistics = Statistics(count=1e30, mean=mean, m2=1e30 * variance)  # so many that more change nothing
    blocks = model.step(AudioPiece(sound[None], 16000, is_last=True), state)
    assert len(blocks) == 7
    for block in blocks:
        silence = window_end(block.index, right_frames=200) - len(sound)
        states = encoder.hidden_states(F.pad(offline.normalise(sound), (0, silence), value=-mean / variance**0.5))
        expected = place(states[:, : 24 * (block.index + 1)], block.index)
        torch.testing.assert_close(block.features, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
def test_weights_load_under_their_old_names(prefix: str, encoder: Wav2Vec2, tmp_path: Path, speech: Tensor) -> None:
    encoder.save(tmp_path)
    today = "conv.parametrizations.weight.original"
    old = {
        prefix + name.replace(f"{today}0", "conv.weight_g").replace(f"{today}1", "conv.weight_v"): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    assert sum("weight_" in name for name in old) == 2
    head = {"lm_head.weight": torch.zeros(3, 32), f"{prefix}masked_spec_embed": torch.zeros(32)}
    save_file({**old, **head}, tmp_path / "model.safetensors")
    sound = speech[0, :8000]
    assert torch.equal(Wav2Vec2.load(tmp_path).hidden_states(sound), encoder.hidden_states(sound))


def test_weights_that_do_not_fit_are_refused(encoder: Wav2Vec2, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit.*encoder\.layer_norm\.weight"):
        Wav2Vec2.load(tmp_path)


def test_negative_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Wav2Vec2Config(network={}, left_frames=-1)


def test_the_large_one_has_25_states_of_width_1024() -> None:
    with torch.device("meta"):
        encoder = Wav2Vec2(large())
    assert (encoder.num_states, encoder.width) == (25, 1024)
    assert isinstance(encoder.network, nn.Module)
    assert round(sum(p.numel() for p in encoder.network.parameters()) / 1e6) == 315
