"""Encode clips for the network: `python -m training.prepare --data runs/data --out runs/latents`.

The checkpoint's own codec and audio encoder turn frames into latents and audio into features once, as a session's
stream would.

    CLIP.latents.npy   (c, t, h, w) float16: the clip's latents, whole blocks
    CLIP.motion.npy    (c, t, h, w) float16: the portrait as a still video; latent 0 is the reference latent
    CLIP.features.npy  (l, d, f) float16: audio features of each pixel frame
    CLIP.heard.npy     (l, d, f) float16: those of the other person's audio; missing where it is dropped or unknown
    CLIP.lips.npy, CLIP.jaw.npy and other truth  as in training.data; optional
    CLIP.text.npy      (n, d) float16: the prompt's embedding; optional
    CLIP.json          as in training.data, and space_stride: pixels on a side of a latent

Shards keep their names. Existing ones are kept, so every call prepares only new shards. Each training shard also gets
an augmented twin: mirrored, recoloured, and with augmented audio. Frames that are a multiple of the checkpoint's
picture size are averaged down to it.
"""

import argparse
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from avatar.audio import model as audio_model
from avatar.audio.model import AudioModel
from avatar.checkpoints.files import DTYPES
from avatar.checkpoints.layouts import open_part
from avatar.types import AudioPiece, HeardAudio, Session
from avatar.vae import vae as vae_model
from avatar.vae.vae import Vae
from training.codec.crops import recolour, to_pixels
from training.data import AUDIO_RATE_HZ, SHARE_HELP, SPLITS, Clip, StoredClip, parse_share, read_shard, write_shard
from training.synthetic.speech.augment_audio import augment_audio

# Truth that is copied, and the signs of its components in a mirrored clip.
MIRRORED = {
    **dict.fromkeys(("jaw", "blink", "brow", "smile", "gap", "nod", "speaking"), (1,)),
    "pose": (1, -1, -1),
    "reference_pose": (1, -1, -1),
    "gaze": (-1, 1),
}


def scale_of(clip: StoredClip, vae: Vae[Any]) -> int:
    """Return the factor by which a clip's frames are larger than the checkpoint's pictures, at least 1."""
    rule = vae.config.picture
    height, width, _ = clip.array("reference").shape
    if not rule.height or not rule.width or height % rule.height or height * rule.width != width * rule.height:
        return 1
    return int(max(1, height // rule.height))


def shrink(frames: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Average frames (f, h, w, 3) over squares of scale x scale pixels."""
    if scale == 1:
        return frames
    means = reduce(frames.astype(np.float32), "f (h i) (w j) c -> f h w c", "mean", i=scale, j=scale)
    return np.rint(means).astype(np.uint8)


def truth_of(clip: StoredClip, scale: int) -> dict[str, NDArray[Any]]:
    """Return a clip's truth, and its prompt's embedding, at the size of frames divided by scale."""
    arrays = {name: np.array(clip.array(name)) for name in ("lips", "text", *MIRRORED) if clip.has(name)}
    return {name: array / np.float32(scale) if name in ("lips", "gap") else array for name, array in arrays.items()}


def mirror(arrays: dict[str, NDArray[Any]], width: int) -> dict[str, NDArray[Any]]:
    """Mirror the truth of a clip whose frames have a width."""
    mirrored = {name: array * np.array(MIRRORED.get(name, 1), array.dtype) for name, array in arrays.items()}
    if "lips" in arrays:
        # Rows stay, columns are counted from the other side.
        mirrored["lips"] = np.array((0, width - 1), np.float32) + arrays["lips"] * np.array((1, -1), np.float32)
    return mirrored


def latents_of(frames: NDArray[np.uint8], vae: Vae[Any]) -> Tensor:
    """Encode whole blocks of frames (f, h, w, 3) to latents (c, t, h, w), as in the middle of a stream.

    A stream's first latent stands for one frame, so the first frame is prepended once and its latent dropped.
    """
    pixels = to_pixels(frames[: len(frames) // vae.block_frames * vae.block_frames])
    with torch.inference_mode():
        latents: Tensor = vae.codec.encode(torch.cat([pixels[:, :1], pixels], dim=1)[None])[0, :, 1:]
    return latents.float().cpu()


def audio_of(clip: StoredClip, name: str = "sound") -> NDArray[np.float32]:
    """Return all audio of a clip, or of the other person with the name `other`: (s,) at 16 kHz in [-1, 1]."""
    return np.array(clip.array(name), np.float32) / np.float32(32767)


def features_of(
    clip: StoredClip, audio: AudioModel, num_frames: int, rng: Generator | None = None
) -> dict[str, NDArray[Any]]:
    """Encode the audio, which starts before the clip's frames, to the arrays `features` and `heard` of its frames.

    rng: augments the audio; None: as it is. ValueError if the audio after the clip's last frame is too short for the
    encoder's look-ahead, or the audio before its first is no whole blocks.
    """
    first, rest = divmod(clip.info["lead_frames"], audio.grid.frames)
    if rest:
        raise ValueError(
            f"clip {clip.name} of {clip.shard} starts after {clip.info['lead_frames']} frames of audio, expected whole "
            f"blocks of {audio.grid.frames}; make the data with --block-frames {audio.grid.frames}"
        )

    def samples(name: str) -> Tensor:
        audio = audio_of(clip, name)
        return torch.from_numpy(augment_audio(audio, rng) if rng and audio.any() else audio)[None]

    piece = AudioPiece(samples("sound"), AUDIO_RATE_HZ)
    names = ("features", "heard") if clip.is_heard else ("features",)
    if "heard" in names:
        piece = replace(piece, heard=[HeardAudio(samples("other"), AUDIO_RATE_HZ, 0)])
    state = audio.open(Session(clip.name, 0, torch.empty(0)), names[1:])
    count = num_frames // audio.grid.frames
    blocks = audio.step(piece, state)[first : first + count]
    if len(blocks) < count:
        raise ValueError(f"clip {clip.name} of {clip.shard} has audio for {len(blocks)} of its {count} blocks")
    return {name: torch.cat([getattr(block, name) for block in blocks], dim=-1).half().numpy() for name in names}


def encode_frames(frames: NDArray[np.uint8], reference: NDArray[np.uint8], vae: Vae[Any]) -> dict[str, NDArray[Any]]:
    """Return the arrays `latents` and `motion` of a clip."""
    motion = vae.encode_picture(torch.from_numpy(np.array(reference)))
    return {"latents": latents_of(frames, vae).half().numpy(), "motion": motion.half().numpy()}


def prepare_clip(clip: StoredClip, vae: Vae[Any], audio: AudioModel) -> Clip:
    """Encode a clip to latents and features."""
    scale = scale_of(clip, vae)
    frames = shrink(clip.frames(), scale)
    arrays: dict[str, NDArray[Any]] = {
        **encode_frames(frames, shrink(clip.array("reference")[None], scale)[0], vae),
        **features_of(clip, audio, len(frames)),
        **truth_of(clip, scale),
    }
    return Clip(clip.name, arrays, {**clip.info, "space_stride": vae.codec.space_stride})


def augment_clip(clip: StoredClip, vae: Vae[Any], audio: AudioModel) -> Clip:
    """Encode a clip mirrored, recoloured and with augmented audio."""
    rng = np.random.default_rng(zlib.crc32(clip.name.encode()))
    scale = scale_of(clip, vae)
    frames = shrink(np.concatenate([clip.frames(), clip.array("reference")[None]]), scale)
    pixels = recolour(to_pixels(frames).flip(3), rng)
    frames = rearrange(((pixels + 1) * 127.5).round().to(torch.uint8), "c f h w -> f h w c").numpy()
    arrays = {
        **encode_frames(frames[:-1], frames[-1], vae),
        **features_of(clip, audio, len(frames) - 1, rng),
        **mirror(truth_of(clip, scale), frames.shape[2]),
    }
    return Clip(f"{clip.name}-mirrored", arrays, {**clip.info, "space_stride": vae.codec.space_stride})


@dataclass(frozen=True)
class Encoders:
    """The place and dtype in which codec and audio encoder of a checkpoint run.

    block_latents: latent frames of the blocks that features are encoded for; None: of the checkpoint's.
    """

    checkpoint: Path
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    block_latents: int | None = None

    def load(self) -> tuple[Vae[Any], AudioModel]:
        """Load both models."""
        vae, audio = (
            replace(part, block_latents=self.block_latents or part.block_latents)
            for part in (open_part(self.checkpoint, name) for name in ("vae", "audio"))
        )
        return (
            vae_model.load(vae, self.device, self.dtype),
            audio_model.load(audio, device=self.device, dtype=self.dtype),
        )


def prepare(data: Path, out: Path, encoders: Encoders, share: tuple[int, int] = (0, 1)) -> int:
    """Prepare the shards that `out` lacks; return their number of clips. ValueError if `data` has no shards.

    share: (i, n): take every nth shard from the ith on, so that n programs can share the work.
    """
    vae, audio = encoders.load()
    shards = [path for split in reversed(SPLITS) for path in sorted((data / split).glob("*.tar"))]
    if not shards:
        raise ValueError(f"no shards in {data}; make some: python -m training.make_data --out {data}")
    mine = shards[share[0] :: share[1]]
    missing = [path for path in mine if not (out / path.relative_to(data)).exists()]
    count = 0
    for path in tqdm(missing, unit="shard", mininterval=10):
        clips = read_shard(path)
        # The twin first, because a shard is prepared once its own file exists.
        if path.parent.name == "train":
            twins = [augment_clip(clip, vae, audio) for clip in clips]
            write_shard(out / "train" / f"{path.stem}-mirrored.tar", twins)
        write_shard(out / path.relative_to(data), [prepare_clip(clip, vae, audio) for clip in clips])
        count += len(clips)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", type=Path, required=True, help="shards that training.make_data wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the prepared shards")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("models/tiny"),
        help="codec and audio encoder to use",
    )
    parser.add_argument("--block-latents", type=int, help="latents of a block of the network (default: checkpoint's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of codec and encoder (default float32)")
    parser.add_argument("--share", type=parse_share, default="0/1", help=SHARE_HELP)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    encoders = Encoders(flags.checkpoint, flags.device, DTYPES[flags.dtype], flags.block_latents)
    print(f"prepared {prepare(flags.data, flags.out, encoders, flags.share)} clips")


if __name__ == "__main__":
    main()
