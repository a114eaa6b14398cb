import gc
import json
import math
import weakref
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from avatar.audio.model import ENCODERS, AudioModel, AudioState, interpolate, load
from avatar.audio.statistics import AudioStatistics
from avatar.checkpoints.files import save
from avatar.checkpoints.part import Part
from avatar.types import AudioPiece, Block, Session
from tests.audio.conftest import with_short_blocks


def pieces(samples: Tensor, piece_samples: int, rate_hz: int = 16000) -> list[AudioPiece]:
    """Cut audio (a, s) into equal pieces and an empty last one."""
    starts = range(0, samples.shape[1], piece_samples)
    parts = [AudioPiece(samples[:, start : start + piece_samples], rate_hz) for start in starts]
    return [*parts, AudioPiece(samples[:, :0], rate_hz, is_last=True)]


def stream(model: AudioModel, session: Session, audio: list[AudioPiece]) -> list[Block]:
    state = model.open(session)
    return list(chain.from_iterable(model.step(piece, state) for piece in audio))


def features(blocks: list[Block]) -> Tensor:
    return torch.cat([block.features for block in blocks], dim=2)


def whole(model: AudioModel, audio: Tensor) -> Tensor:
    """Encode every block from its own window, cut from all the audio (s,), with statistics computed anew."""
    encoder, blocks = model.encoder, []
    num_blocks = -(-len(audio) // model.grid.samples)
    audio = F.pad(audio, (0, model.grid.window_end(num_blocks - 1, encoder.right_frames) - len(audio)))
    for index in range(num_blocks):
        end = model.grid.window_end(index, encoder.right_frames)
        statistics = AudioStatistics().with_samples(audio[:end])
        for earlier in range(index):
            _, measured = encoder.encode(window(model, audio, earlier), AudioStatistics(), encoder.right_frames)
            statistics = statistics.with_peak(measured.peak)
        states, _ = encoder.encode(window(model, audio, index), statistics, encoder.right_frames)
        blocks.append(interpolate(states, index, model.grid))
    return torch.cat(blocks, dim=2)


def window_samples(model: AudioModel) -> int:
    return model.encoder.left_samples + model.grid.window_end(0, model.encoder.right_frames)


def window(model: AudioModel, audio: Tensor, index: int) -> Tensor:
    start = index * model.grid.samples - model.encoder.left_samples
    return audio[max(0, start) : model.grid.window_end(index, model.encoder.right_frames)]


@with_short_blocks
def test_blocks_are_numbered_and_have_the_encoders_shape(model: AudioModel, session: Session, speech: Tensor) -> None:
    blocks = stream(model, session, pieces(speech[:, : 5 * model.grid.samples + 100], 1600))
    assert [block.index for block in blocks] == list(range(6))
    for block in blocks:
        assert block.features.shape == (model.encoder.num_states, model.encoder.width, model.grid.frames)
        assert block.features.dtype == torch.float32
        assert block.features.isfinite().all()
        assert block.latent is None


@with_short_blocks
def test_streamed_equals_whole(model: AudioModel, session: Session, speech: Tensor) -> None:
    seconds = 2 if model.grid.latents == 3 else 1
    audio = F.pad(
        speech[:, : 16000 * seconds], (0, 16000 * seconds)
    )  # the silence shows what is kept beyond the window
    torch.testing.assert_close(features(stream(model, session, pieces(audio, 640))), whole(model, audio[0]))


@pytest.mark.parametrize("rate_hz", [16000, 44100])  # test_resample.py has others
def test_pieces_do_not_change_features(rate_hz: int, model: AudioModel, session: Session, speech: Tensor) -> None:
    audio = speech[:, : int(rate_hz * 0.7)]
    expected = features(stream(model, session, [AudioPiece(audio, rate_hz, is_last=True)]))
    for piece_samples in (17, 320, 1600, 7680):
        assert torch.equal(features(stream(model, session, pieces(audio, piece_samples, rate_hz))), expected)


@with_short_blocks
def test_a_block_comes_with_its_last_sample(model: AudioModel, session: Session, speech: Tensor) -> None:
    state, received = model.open(session), 0
    for index in range(8):
        end = model.grid.window_end(index, model.encoder.right_frames)
        assert end == round((index + 1) * model.grid.samples + model.lookahead_s * 16000)
        assert model.step(AudioPiece(speech[:, received : end - 1], 16000), state) == []
        assert [block.index for block in model.step(AudioPiece(speech[:, end - 1 : end], 16000), state)] == [index]
        received = end


@with_short_blocks
def test_interleaved_equals_alone(model: AudioModel, session: Session, speech: Tensor) -> None:
    voices = [pieces(audio, 640) for audio in (speech[:, :24000], 0.3 * speech.flip(1)[:, :24000])]
    alone = [stream(model, session, voice) for voice in voices]
    states: list[AudioState] = [model.open(session) for _ in voices]
    together: list[list[Block]] = [[] for _ in voices]
    for pair in zip(*voices, strict=True):
        for piece, state, blocks in zip(pair, states, together, strict=True):
            blocks += model.step(piece, state)
    for expected, blocks in zip(alone, together, strict=True):
        assert torch.equal(features(blocks), features(expected))


@with_short_blocks
def test_closing_a_stream_frees_state(model: AudioModel, session: Session, speech: Tensor) -> None:
    state = model.open(session)
    model.step(AudioPiece(speech[:, :14700], 44100), state)
    left: list[weakref.ref[Any]] = [weakref.ref(x) for x in (state, state.window, state.resampler)]
    del state
    gc.collect()
    assert [reference() for reference in left] == [None, None, None]


def test_a_minute_of_audio_keeps_no_more_than_one_window(model: AudioModel, session: Session, speech: Tensor) -> None:
    state = model.open(session)
    num_blocks = len(model.step(AudioPiece(speech.repeat(1, 7)[:, : 60 * 16000], 16000), state))
    assert num_blocks == (60 * 16000 - round(model.lookahead_s * 16000)) // model.grid.samples
    assert state.window.untyped_storage().nbytes() == 4 * window_samples(model)


def test_the_end_equals_continued_silence(model: AudioModel, session: Session, speech: Tensor) -> None:
    audio, block = speech[:, :20_000], model.grid.samples
    ended = stream(model, session, pieces(audio, 1600))
    state = model.open(session)
    going_on = model.step(AudioPiece(F.pad(audio, (0, 20_000)), 16000), state)
    assert len(ended) == -(-20_000 // block)
    assert torch.equal(features(ended), features(going_on[: len(ended)]))


@with_short_blocks
@pytest.mark.parametrize(("past", "num_blocks"), [((0, 0), 0), ((0, 1), 1), ((1, 0), 1), ((1, 1), 2), ((3, 0), 3)])
def test_the_end_completes_a_started_block(
    past: tuple[int, int], num_blocks: int, model: AudioModel, session: Session, speech: Tensor
) -> None:
    state, num_samples = model.open(session), past[0] * model.grid.samples + past[1]
    blocks = model.step(AudioPiece(speech[:, :num_samples], 16000), state)
    blocks += model.step(AudioPiece(torch.zeros(1, 0), 16000, is_last=True), state)
    assert len(blocks) == num_blocks


def test_audio_after_the_last_piece_is_refused(model: AudioModel, session: Session, speech: Tensor) -> None:
    state = model.open(session)
    model.step(AudioPiece(speech[:, :100], 16000, is_last=True), state)
    with pytest.raises(ValueError, match="has ended"):
        model.step(AudioPiece(speech[:, :100], 16000), state)


def test_refused_audio_leaves_the_state_unchanged(model: AudioModel, session: Session, speech: Tensor) -> None:
    state, blocks = model.open(session), []
    for piece in pieces(speech[:, :16000], 1600):
        for bad in (
            AudioPiece(piece.samples, 3000),
            AudioPiece(piece.samples, 24000 if state.resampler else 50000, is_last=True),
            AudioPiece(torch.full((1, 10), torch.nan), 16000),
            AudioPiece(torch.zeros(3, 10), 16000, is_last=True),
            AudioPiece(torch.full((1, 10), 1000.0), 16000),
        ):
            with pytest.raises(ValueError, match="audio"):
                model.step(bad, state)
        blocks += model.step(piece, state)
    assert torch.equal(features(blocks), features(stream(model, session, pieces(speech[:, :16000], 1600))))


@with_short_blocks
@pytest.mark.parametrize("rate_hz", [16000, 24000, 44100])
@pytest.mark.parametrize("is_live", [False, True])
def test_history_and_statistics_resume_a_stream(
    model: AudioModel, session: Session, rate_hz: int, is_live: bool
) -> None:
    """Each piece is a block, so that the pieces sent again start with a block."""
    block = rate_hz * model.grid.frames // 25
    num_blocks = 12 if model.grid.latents == 3 else 20
    samples = torch.randn(1, num_blocks * block, generator=torch.Generator().manual_seed(0)) * 0.1
    audio = [
        AudioPiece(samples[:, start : start + block], rate_hz, completes=index if is_live else None)
        for index, start in enumerate(range(0, samples.shape[1], block))
    ]
    blocks = stream(model, session, audio)
    for first_answer in (1, 5, len(blocks) - 1):
        first_block = max(0, first_answer - round(model.history_s * 25 / model.grid.frames))
        state = model.resume(session, first_block, first_answer, blocks[first_answer - 1].statistics)
        rebuilt = list(chain.from_iterable(model.step(piece, state) for piece in audio[first_block:]))
        assert [each.index for each in rebuilt] == list(range(first_answer, len(blocks)))
        assert torch.equal(features(rebuilt), features(blocks[first_answer:]))
        assert [each.statistics for each in rebuilt] == [each.statistics for each in blocks[first_answer:]]


def test_a_stream_cannot_resume_after_its_first_answer(model: AudioModel, session: Session) -> None:
    with pytest.raises(ValueError, match="start at block 3 to answer from block 2"):
        model.resume(session, 3, 2, b"")
    with pytest.raises(ValueError, match="32 bytes, got 1"):
        model.resume(session, 1, 2, b"?")


@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_encoder_loads_with_equal_features(name: str, tmp_path: Path, session: Session, speech: Tensor) -> None:
    torch.manual_seed(1)
    encoder = ENCODERS[name].tiny()
    encoder.save(tmp_path)
    expected, actual = (
        stream(model, session, pieces(speech, 7680)) for model in (AudioModel(encoder), load(Part.read(tmp_path)))
    )
    assert torch.equal(features(actual), features(expected))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "encoder is None, expected one of whisper, wav2vec2"),
        ({"encoder": "hubert"}, "encoder is 'hubert'"),
        ({"encoder": "whisper"}, "missing field network"),
        ({"encoder": "whisper", "network": {"d_model": 0}}, "config.json: network.d_model must be 1 to 1048576, got 0"),
        ({"encoder": "whisper", "network": {"d_model": 37}}, "config.json: .*divisible by"),
        ({"encoder": "whisper", "network": {"encoder_layers": 10**9}}, "network.encoder_layers must be 1 to 1024"),
        ({"encoder": "whisper", "network": {"activation_function": "x"}}, "network.activation_function must be an"),
        ({"encoder": "whisper", "network": {}, "window_frames": 10**9}, "window_frames must be 1 to 30000"),
        ({"encoder": "whisper", "network": {}, "window_frames": 4}, "window_frames must be 35 to 1500"),
        ({"encoder": "whisper", "network": 3}, "network must be an object, got 3"),
        ({"encoder": "wav2vec2", "network": {"hidden_size": "x"}}, "network.hidden_size must be a whole number"),
        ({"encoder": "wav2vec2", "network": {"num_attention_heads": 7}}, "config.json: .*divisible by num_heads"),
        ({"encoder": "wav2vec2", "network": {"conv_stride": [5] * 7}}, "must give frames of 400 samples every 320"),
        ({"encoder": "wav2vec2", "network": {"conv_dim": [8]}}, "network: .*conv_dim"),
        ({"encoder": "wav2vec2", "network": {"layer_norm_eps": -1}}, "network.layer_norm_eps must be 1e-12 to 1.0"),
        ({"encoder": "wav2vec2", "network": {}, "left_frames": 10**9}, "left_frames must be 0 to 1500"),
    ],
)
def test_an_invalid_config_is_refused(config: dict[str, object], message: str, tmp_path: Path) -> None:
    save(tmp_path, config, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=message):
        load(Part.read(tmp_path))


@pytest.mark.parametrize("name", ENCODERS)
def test_unknown_fields_are_ignored_and_named(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = ENCODERS[name].tiny()
    encoder.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    network = {**config["network"], "depth": 3}
    (tmp_path / "config.json").write_text(json.dumps({**config, "network": network, "context": 3}))
    assert load(Part.read(tmp_path)).encoder.width == encoder.width
    assert "ignored unknown fields of a checkpoint: context; known are encoder, network" in caplog.text
    # wav2vec2's configuration is another tool's, of which most fields are for training.
    assert ("network.depth" in caplog.text) is (name == "whisper")


@with_short_blocks
@pytest.mark.parametrize("rate_hz", [16000, 44100, 11025])
def test_blocks_completed_with_their_right_context_equal_the_streams(
    model: AudioModel, session: Session, rate_hz: int
) -> None:
    """Live and offline streams get the same features; a resampler that starts anew differs until it settles."""
    block = rate_hz * model.grid.frames // 25
    samples = torch.randn(1, 5 * block, generator=torch.Generator().manual_seed(0)) * 0.1
    streamed = model.step(AudioPiece(samples, rate_hz), model.open(session))
    state = model.open(session)
    behind = math.ceil(model.lookahead_s * rate_hz) + rate_hz // 25
    given = []
    for index in range(4):
        start, end = index * block, (index + 1) * block
        piece = AudioPiece(samples[:, start:end], rate_hz, completes=index, behind=samples[:, end : end + behind])
        given += model.step(piece, state)
    assert [each.index for each in given] == [0, 1, 2, 3]
    for one, other in zip(given, streamed, strict=False):
        if rate_hz == 16000:
            assert torch.equal(one.features, other.features)
        else:
            torch.testing.assert_close(one.features, other.features, atol=2e-3, rtol=2e-3)


@with_short_blocks
def test_without_right_context_a_block_sees_silence_and_the_next_starts_at_its_end(
    model: AudioModel, session: Session
) -> None:
    block = model.grid.samples
    samples = torch.randn(1, 2 * block, generator=torch.Generator().manual_seed(0)) * 0.1
    state = model.open(session)
    first = model.step(AudioPiece(samples[:, :block], 16000, completes=0), state)
    second = model.step(AudioPiece(samples[:, block:], 16000, is_last=True), state)
    alone = model.step(AudioPiece(samples[:, :block], 16000, is_last=True), model.open(session))
    assert torch.equal(first[0].features, alone[0].features)
    assert [block.index for block in second] == [1]


@with_short_blocks
def test_a_block_cannot_be_completed_by_too_little_audio_or_too_much(model: AudioModel, session: Session) -> None:
    for num_samples in (100, 3 * model.grid.samples):
        with pytest.raises(ValueError, match="block 0 cannot be completed"):
            model.step(AudioPiece(torch.zeros(1, num_samples), 16000, completes=0), model.open(session))
