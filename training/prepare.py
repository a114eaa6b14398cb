"""Encode clips for the network: `python -m training.prepare --data runs/data --out runs/latents`.

The checkpoint's own codec and audio encoder turn frames into latents and audio into features once, as a session's
stream would.

    CLIP.latents.npy   (c, t, h, w) float16: the clip's latents, whole blocks
    CLIP.motion.npy    (c, t, h, w) float16: the portrait as a still video; latent 0 is the reference latent
    CLIP.features.npy  (l, d, f) float16: audio features of each pixel frame
    CLIP.lips.npy, CLIP.jaw.npy and other truth  as in training.data; optional
    CLIP.text.npy      (n, d) float16: the prompt's embedding; optional
    CLIP.json          as in training.data, and space_stride: pixels on a side of a latent

Shards keep their names. Existing ones are kept, so every call prepares only new shards. Each training shard also gets
an augmented twin: mirrored, recoloured, and with augmented audio. Frames that are a multiple of the checkpoint's
picture size are averaged down to it.
"""

import argparse
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from avatar.audio import model as audio_model
from avatar.audio.model import AudioModel
from avatar.checkpoints.layouts import open_part
from avatar.types import AudioPiece, Session
from avatar.vae import vae as vae_model
from avatar.vae.vae import Vae
from training.codec.crops import recolour, to_pixels
from training.data import AUDIO_RATE_HZ, SHARE_HELP, SPLITS, Clip, StoredClip, parse_share, read_shard, write_shard
from training.synthetic.speech.augment_audio import augment_audio

# Truth that is copied, and the signs of its components in a mirrored clip.
MIRRORED = {
    **dict.fromkeys(("jaw", "blink", "brow", "smile", "gap", "nod", "speaking"), (1,)),
    "pose": (1, -1, -1),
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


def audio_of(clip: StoredClip) -> NDArray[np.float32]:
    """Return all audio of a clip, (s,) at 16 kHz in [-1, 1]."""
    return np.array(clip.array("sound"), np.float32) / np.float32(32767)


def features_of(clip: StoredClip, samples: NDArray[np.float32], num_blocks: int, audio: AudioModel) -> Tensor:
    """Encode audio (s,), which starts before the clip's frames, to features (l, d, f) of its blocks.

    ValueError if the audio after the clip's last frame is too short for the encoder's look-ahead, or the audio before
    its first is no whole blocks.
    """
    first, rest = divmod(clip.info["lead_frames"], audio.grid.frames)
    if rest:
        raise ValueError(
            f"clip {clip.name} of {clip.shard} starts after {clip.info['lead_frames']} frames of audio, expected whole "
            f"blocks of {audio.grid.frames}; make the data with --block-frames {audio.grid.frames}"
        )
    state = audio.open(Session(clip.name, 0, torch.empty(0)))
    blocks = audio.step(AudioPiece(torch.from_numpy(samples)[None], AUDIO_RATE_HZ), state)[first : first + num_blocks]
    if len(blocks) < num_blocks:
        raise ValueError(f"clip {clip.name} of {clip.shard} has audio for {len(blocks)} of its {num_blocks} blocks")
    return torch.cat([block.features for block in blocks], dim=-1)


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
        "features": features_of(clip, audio_of(clip), len(frames) // vae.block_frames, audio).half().numpy(),
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
    features = features_of(clip, augment_audio(audio_of(clip), rng), (len(frames) - 1) // vae.block_frames, audio)
    arrays = {
        **encode_frames(frames[:-1], frames[-1], vae),
        "features": features.half().numpy(),
        **mirror(truth_of(clip, scale), frames.shape[2]),
    }
    return Clip(f"{clip.name}-mirrored", arrays, {**clip.info, "space_stride": vae.codec.space_stride})


def prepare(data: Path, out: Path, checkpoint: Path, share: tuple[int, int] = (0, 1)) -> int:
    """Prepare the shards that `out` lacks; return their number of clips. ValueError if `data` has no shards.

    share: (i, n): take every nth shard from the ith on, so that n programs can share the work.
    """
    vae, audio = vae_model.load(open_part(checkpoint, "vae")), audio_model.load(open_part(checkpoint, "audio"))
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
    parser.add_argument("--share", type=parse_share, default="0/1", help=SHARE_HELP)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    print(f"prepared {prepare(flags.data, flags.out, flags.checkpoint, flags.share)} clips")


if __name__ == "__main__":
    main()
