"""Goldens of audio: loading, placement of features in time, and wav2vec2 from samples to the network's input."""

import tempfile
import wave
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from avatar.audio import whole_file
from avatar.audio.model import load as load_model
from avatar.audio.wav2vec2 import Wav2Vec2
from avatar.checkpoints.layouts import AUDIO_FOLDER, open_part
from avatar.media import read_audio
from tests.parity.goldens import Golden, Report, published


def audio_load(golden: Golden, report: Report) -> None:
    """Audio files of several rates, to mono at 16 kHz."""
    for case in golden.info["cases"]:
        pcm = golden.tensors[f"{case['name']}/pcm16"]
        audio = whole_file.to_16khz(*read(pcm, case["sr"]))
        expected = golden.tensors[f"{case['name']}/y16k"]
        report.compare(case["name"], audio, expected, max_abs=golden.info["tolerance"])


def read(pcm: Tensor, rate_hz: int) -> tuple[Tensor, int]:
    """Write samples (s, a) int16 to a file, and read them with the library."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audio.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(pcm.shape[1])
            file.setsampwidth(2)
            file.setframerate(rate_hz)
            file.writeframes(pcm.numpy().tobytes())
        samples, read_hz = read_audio(path)
    return torch.from_numpy(samples), read_hz


def audio_bucket(golden: Golden, report: Report) -> None:
    """States at 50 Hz to the 30 Hz grid, and the grid to the pixel frames of whole clips."""
    info, tensors = golden.info, golden.tensors
    for case in info["cases"]:
        name = case["name"]
        frames = whole_file.bucket(tensors[f"{name}/z"], case["fps"], case["batch_frames"], case["m"])
        report.exact(f"{name} clips", len(frames), case["num_repeat"] * case["batch_frames"])
        report.compare(name, frames, tensors[f"{name}/bucket"], max_abs=info["tolerance_bucket"])
        report.compare(
            f"{name} input",
            whole_file.model_input(frames),
            tensors[f"{name}/model_input"],
            max_abs=info["tolerance_bucket"],
        )
    for case in info["interp"]:
        name = f"interp_T{case['T50']}"
        if case["out_len"]:
            grid = whole_file.to_grid(tensors[f"{name}/in"])
            report.compare(name, grid, tensors[f"{name}/out"], max_abs=info["tolerance_interp"])
        else:
            report.exact(name, refuses(lambda: whole_file.to_grid(torch.zeros(1, case["T50"], 4))), True)  # noqa: B023
    for name, indices in tensors.items():
        if name.startswith("indices_fps"):
            frame_rate, count = map(int, name.removeprefix("indices_fps").split("_n"))
            # A grid that holds its own indexes shows which of them were selected.
            length = int(indices.max()) + 1
            grid = rearrange(torch.arange(length), "t -> 1 t 1")
            taken = whole_file.bucket(grid, frame_rate, clip_frames=count)[:count, 0, 0]
            report.exact(name, taken, indices)


def refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


def wav2vec2_tiny_e2e(golden: Golden, report: Report) -> None:
    """PCM to the network's input, and the isolated blocks of the reference's endless generator."""
    info, tensors = golden.info, golden.tensors
    encoder = load(golden)
    samples = tensors["pcm16"].float()[None] / 32768
    fps, clip_frames = info["fps"], info["infer_frames"]

    def compare(what: str, actual: Tensor) -> None:
        report.compare(what, actual, tensors[what], max_abs=info["tolerance"])

    audio = whole_file.normalise(whole_file.to_16khz(samples, info["sampling_rate"]))
    states = encoder.hidden_states(audio)
    grid = whole_file.to_grid(states)
    frames = whole_file.bucket(grid, fps, clip_frames)
    compare("input_values", audio[None])
    report.exact("states", len(states), sum(name.startswith("hidden_states/") for name in tensors))
    for i, state in enumerate(states):
        compare(f"hidden_states/{i}", state[None])
    compare("z30", grid)
    compare("bucket", frames)
    compare("model_input", whole_file.model_input(frames))
    compare("z30_last_layer_only", whole_file.to_grid(states[-1:]))
    for name in tensors:
        if name.startswith("isolated_block_"):
            num_frames = tensors[name].shape[-1]
            block_samples = num_frames * info["sampling_rate"] // fps
            index = int(name.split("/")[0].removeprefix("isolated_block_"))
            alone = whole_file.to_16khz(samples[:, index * block_samples :][:, :block_samples], info["sampling_rate"])
            grid = whole_file.to_grid(encoder.hidden_states(whole_file.normalise(alone)))
            compare(name, whole_file.model_input(whole_file.bucket(grid, fps, clip_frames)[:num_frames]))


def load(golden: Golden) -> Wav2Vec2:
    """Load the golden's weights from a published folder, under their own names."""
    prefix = golden.info["weight_prefix"]
    weights = {k.removeprefix(prefix): v for k, v in golden.tensors.items() if k.startswith(prefix)}
    with published(AUDIO_FOLDER, golden.info["config"]) as checkpoint:
        save_file(weights, checkpoint / AUDIO_FOLDER / "model.safetensors")
        model = load_model(open_part(checkpoint, "audio"))
    assert isinstance(model.encoder, Wav2Vec2)
    return model.encoder


RUNNERS: dict[str, Callable[[Golden, Report], None]] = {
    "audio_load": audio_load,
    "audio_bucket": audio_bucket,
    "wav2vec2_tiny_e2e": wav2vec2_tiny_e2e,
}
