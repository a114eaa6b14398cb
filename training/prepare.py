"""Clips as the network sees them: `python -m training.prepare --data runs/data --out runs/latents`.

Pictures become latents and sound becomes features, once, by the checkpoint's own codec and audio encoder: a prepared
clip holds what a session's stream would hold.

    CLIP.latents.npy   (c, t, h, w) float16: the clip, whole blocks
    CLIP.motion.npy    (c, t, h, w) float16: the portrait held still; latent 0 is the reference latent
    CLIP.features.npy  (l, d, f) float16: what each pixel frame hears
    CLIP.lips.npy, CLIP.jaw.npy  as in training.data, where they are known
    CLIP.text.npy      (n, d) float16: the prompt's embedding, where the checkpoint knows text

Shards keep their names; one that is there is kept, and new ones are taken in at every call. Training shards get a twin,
seen in a mirror and in other colours, and heard in another room.
"""

import argparse
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from avatar.audio import model as audio_model
from avatar.audio.model import AudioModel
from avatar.checkpoints.layouts import open_part
from avatar.types import BLOCK_FRAMES, AudioPiece, Session
from avatar.vae import vae as vae_model
from avatar.vae.vae import Vae
from training.codec.crops import recoloured, to_pixels
from training.data import PARTS, SHARE_HELP, SOUND_RATE_HZ, Clip, StoredClip, a_share, read_shard, write_shard
from training.synthetic.augment_audio import from_another_room


def latents_of(frames: NDArray[np.uint8], vae: Vae[Any]) -> Tensor:
    """Latents (c, t, h, w) of whole blocks of frames (f, h, w, 3), as in the middle of a stream.

    A stream's first latent stands for one frame: the first frame goes in front once more, and its latent is dropped.
    """
    pixels = to_pixels(frames[: len(frames) // BLOCK_FRAMES * BLOCK_FRAMES])
    with torch.inference_mode():
        latents: Tensor = vae.codec.encode(torch.cat([pixels[:, :1], pixels], dim=1)[None])[0, :, 1:]
    return latents.float().cpu()


def sound_of(clip: StoredClip) -> NDArray[np.float32]:
    """All sound of a clip, (s,) in [-1, 1]."""
    return np.array(clip.array("sound"), np.float32) / np.float32(32767)


def features_of(clip: StoredClip, heard: NDArray[np.float32], num_blocks: int, audio: AudioModel) -> Tensor:
    """Features (l, d, f) of the clip's pictured blocks, with the sound (s,) that went before them.

    ValueError if the clip has not enough sound behind its last frame for the encoder to look ahead.
    """
    sound = torch.from_numpy(heard)
    first = clip.info["lead_frames"] // BLOCK_FRAMES
    state = audio.open(Session(clip.name, 0, torch.empty(0)))
    blocks = audio.step(AudioPiece(sound[None], SOUND_RATE_HZ), state)[first : first + num_blocks]
    if len(blocks) < num_blocks:
        raise ValueError(f"clip {clip.name} of {clip.shard} has sound for {len(blocks)} of its {num_blocks} blocks")
    return torch.cat([block.features for block in blocks], dim=-1)


def pictured(frames: NDArray[np.uint8], reference: NDArray[np.uint8], vae: Vae[Any]) -> dict[str, NDArray[Any]]:
    motion = vae.encode_picture(torch.from_numpy(np.array(reference)))
    return {"latents": latents_of(frames, vae).half().numpy(), "motion": motion.half().numpy()}


def prepared(clip: StoredClip, vae: Vae[Any], audio: AudioModel) -> Clip:
    """A clip's latents and features."""
    frames = clip.array("frames")
    arrays: dict[str, NDArray[Any]] = {
        **pictured(frames, clip.array("reference"), vae),
        "features": features_of(clip, sound_of(clip), len(frames) // BLOCK_FRAMES, audio).half().numpy(),
        **{name: np.array(clip.array(name)) for name in ("lips", "jaw", "text") if clip.has(name)},
    }
    return Clip(clip.name, arrays, clip.info)


def mirrored(clip: StoredClip, plain: StoredClip, vae: Vae[Any], audio: AudioModel) -> Clip:
    """The same words from somebody else, somewhere else: in a mirror, in other colours, from another room.

    plain: the clip as it was prepared.
    """
    rng = np.random.default_rng(zlib.crc32(clip.name.encode()))
    frames = np.concatenate([clip.array("frames"), clip.array("reference")[None]])
    pixels = recoloured(to_pixels(frames).flip(3), rng)
    frames = rearrange(((pixels + 1) * 127.5).round().to(torch.uint8), "c f h w -> f h w c").numpy()
    features = features_of(clip, from_another_room(sound_of(clip), rng), (len(frames) - 1) // BLOCK_FRAMES, audio)
    arrays = {
        **pictured(frames[:-1], frames[-1], vae),
        "features": features.half().numpy(),
        **{name: np.array(plain.array(name)) for name in ("jaw", "text") if plain.has(name)},
    }
    if plain.has("lips"):
        turned = np.array((1, -1), np.float32)
        arrays["lips"] = np.array((0, frames.shape[2] - 1), np.float32) + plain.array("lips") * turned
    return Clip(f"{clip.name}-mirrored", arrays, clip.info)


def prepare(data: Path, out: Path, checkpoint: Path, share: tuple[int, int] = (0, 1)) -> int:
    """Write what is missing of `out`; returns how many clips that was. ValueError if there is nothing to prepare.

    share: (i, n): of all shards every nth from the ith, so that n programs share the work.
    """
    vae, audio = vae_model.load(open_part(checkpoint, "vae")), audio_model.load(open_part(checkpoint, "audio"))
    shards = [path for part in reversed(PARTS) for path in sorted((data / part).glob("*.tar"))]
    if not shards:
        raise ValueError(f"no shards in {data}; make some: python -m training.make_data --out {data}")
    mine = shards[share[0] :: share[1]]
    missing = [path for path in mine if not (out / path.relative_to(data)).exists()]
    count = 0
    for path in tqdm(missing, unit="shard", mininterval=10):
        clips = [prepared(clip, vae, audio) for clip in read_shard(path)]
        write_shard(out / path.relative_to(data), clips)
        count += len(clips)
        if path.parent.name == "train":
            pairs = zip(read_shard(path), read_shard(out / path.relative_to(data)), strict=True)
            write_shard(out / "train" / f"{path.stem}-mirrored.tar", [mirrored(*pair, vae, audio) for pair in pairs])
    return count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards, as training.make_data makes it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the prepared shards")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/tiny"), help="whose codec and audio encoder")
    parser.add_argument("--share", type=a_share, default="0/1", help=SHARE_HELP)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    print(f"prepared {prepare(flags.data, flags.out, flags.checkpoint, flags.share)} clips")


if __name__ == "__main__":
    main()
