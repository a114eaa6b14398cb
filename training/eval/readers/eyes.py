"""A reader of lids and brows, trained on the truth: `python -m training.eval.readers.eyes --data runs/data256`.

The face mesh cannot read drawn eyes: painted shut they read as nine tenths open, and its brows follow the head's pitch.
A small network reads how far the lids are closed and the brows raised, in crops that the mesh's eye corners place.
`--out` is the file that evaluation reads (`training.evaluate --eye-reader`).

Axes: f frames, b crops, n mesh points, h w height and width of crops, e curves: lids, brows.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from training.data import StoredClip, read_clips
from training.eval.metrics import correlation
from training.eval.readers.landmarks import Floats, Landmarks, has_face

TRUTH = ("blink", "brow")
# Outer and inner corner of both eyes.
CORNERS = ((33, 133), (263, 362))
# Height and width of a crop; its width in distances between the corners, and the row of the eye's middle.
CROP, REACH, EYE_ROW = (40, 36), 1.8, 27
# Frames of a clip that are learnt from: a third with lids or brows above these values each, and a third with neither.
FRAMES_OF_CLIP, ACTIVE = 24, (0.1, 0.15)
# Held-out clips in which a curve has a smaller range are left out of its r.
MOVED = 0.15
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 1000, 64, 3e-3


class EyeNetwork(nn.Sequential):
    """Crops (b, 1, h, w) to the logits of how far lids are closed and brows raised, (b, e)."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Flatten()),
            nn.Linear(32 * CROP[0] * CROP[1] // 16, len(TRUTH)),
        )


class EyeReader:
    """Reads lids and brows."""

    def __init__(self, network: EyeNetwork) -> None:
        self._network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path) -> "EyeReader":
        """Load a reader that was trained. ValueError if there is none."""
        if not path.exists():
            raise ValueError(f"no {path}; train it: python -m training.eval.readers.eyes --data DATA --out {path}")
        network = EyeNetwork()
        network.load_state_dict(load_file(path))
        return cls(network)

    def read(self, frames: NDArray[np.uint8], points: Floats) -> Floats:
        """Return how far the lids are closed and the brows raised, (e, f) 0 to 1.

        frames: (f, h, w, 3). points: (f, n, 2) of the mesh, without NaN.
        """
        crops = torch.cat([eye_crops(frame, each) for frame, each in zip(frames, points, strict=True)])
        read = torch.sigmoid(self._network(crops)).reshape(len(frames), 2, len(TRUTH)).mean(1)
        curves: Floats = read.T.numpy()
        return curves


def eye_crops(frame: NDArray[np.uint8], points: Floats) -> Tensor:
    """Cut both eyes and brows out of a frame (h, w, 3): (2, 1, h, w), upright, outer corner left, of mean 0.

    points: (n, 2) of the mesh.
    """
    height, width = CROP
    image, crops = Image.fromarray(frame).convert("L"), []
    for outer, inner in CORNERS:
        middle, along = (points[outer] + points[inner]) / 2, (points[inner] - points[outer]) * REACH / width
        down = np.array((-along[1], along[0])) * np.sign(along[0] or 1)
        corner = middle - along * width / 2 - down * EYE_ROW
        onto = (along[0], down[0], corner[0], along[1], down[1], corner[1])
        crop = image.transform((width, height), Image.Transform.AFFINE, onto, Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.asarray(crop, np.float32))
        crops.append((values - values.mean()) / values.std().clamp(min=4.0))
    return torch.stack(crops)[:, None]


def examples(clips: Sequence[StoredClip], landmarks: Landmarks, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return crops (b, 1, h, w) of clips and their truth, (b, e)."""
    crops, truth = [], []
    for clip in tqdm(clips, "clips", mininterval=10):
        curves = np.stack([np.array(clip.array(name), np.float32) for name in TRUTH], 1)
        active = curves > ACTIVE
        for frames in (*active.T, ~active.any(1)):
            for index in rng.permutation(frames.nonzero()[0])[: FRAMES_OF_CLIP // 3].tolist():
                frame = clip.frames(slice(index, index + 1))
                points = landmarks.points(frame)
                if has_face(points)[0]:
                    crops.append(eye_crops(frame[0], points[0]))
                    truth.append(curves[[index, index]])
    if not crops:
        raise ValueError("no face was found in the clips")
    return torch.cat(crops), torch.from_numpy(np.concatenate(truth))


def train(crops: Tensor, truth: Tensor, seed: int = 0) -> EyeNetwork:
    """Train a network on crops (b, 1, h, w) and truth (b, e)."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = EyeNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.05)
    for step in range(NUM_STEPS):
        batch = torch.randint(len(crops), (BATCH_SIZE,), generator=random)
        # Rendered eyes are softer and placed less exactly than drawn ones.
        pictures = crops[batch].roll(torch.randint(-2, 3, (2,), generator=random).tolist(), (2, 3))
        if torch.rand((), generator=random) < 0.5:
            pictures = functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
        loss = functional.binary_cross_entropy_with_logits(network(pictures), truth[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / NUM_STEPS)
        optimizer.step()
    return network


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.eval.readers.eyes", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="shards that training.make_data wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/eyes.safetensors"), help="file to write")
    parser.add_argument("--clips", type=int, default=300, help="training clips to learn from (default 300)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    landmarks = Landmarks()
    crops, truth = examples(read_clips(flags.data, "train")[: flags.clips], landmarks, np.random.default_rng(0))
    network = train(crops, truth)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), flags.out)
    reader, found = EyeReader(network), {name: list[float]() for name in TRUTH}
    for clip in read_clips(flags.data, "held_out"):
        frames = clip.frames()
        points = landmarks.points(frames)
        if has_face(points).all():
            for name, curve in zip(TRUTH, reader.read(frames, points), strict=True):
                if np.ptp(clip.array(name)) > MOVED:
                    found[name].append(correlation(curve, clip.array(name)))
    for name, values in found.items():
        print(f"{name}: r {np.mean(values):.2f} with the truth of {len(values)} held-out clips")
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    main()
