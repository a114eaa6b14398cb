"""A reader of lids, trained on the truth about blinks: `python -m training.eval.readers.blinks --data runs/data256`.

The face mesh cannot read drawn lids: eyes that are painted shut read as nine tenths open. A small network reads how
far the lids are closed in crops of both eyes that the mesh's eye corners place. `--out` is the file that evaluation
reads (`training.evaluate --blink-reader`).

Axes: f frames, b crops, n mesh points, h w height and width of crops.
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

from training.data import FRAME_RATE_HZ, StoredClip, read_clips
from training.eval.metrics import Curve, Metric, correlation
from training.eval.readers.landmarks import Floats, Landmarks, has_face

# Corners of the eyes: outer and inner, of both sides.
CORNERS = ((33, 133), (263, 362))
# Height and width of a crop, and its width in distances between the corners of an eye.
CROP, REACH = (24, 36), 1.7
# Lids that are closed at least so far blink; a clip's frames that are learnt from, half of them of blinks.
BLINK, FRAMES_OF_CLIP = 0.5, 24
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 600, 64, 3e-3


class BlinkNetwork(nn.Sequential):
    """Crops (b, 1, h, w) to how far the lids are closed, (b,) as logits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 12, 5, 2, 2), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(24 * CROP[0] * CROP[1] // 16, 1), nn.Flatten(0),
        )  # fmt: skip


class BlinkReader:
    """Reads how far lids are closed."""

    def __init__(self, network: BlinkNetwork) -> None:
        self._network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path) -> "BlinkReader":
        """Load a reader that was trained. ValueError if there is none."""
        if not path.exists():
            raise ValueError(f"no {path}; train it: python -m training.eval.readers.blinks --data DATA --out {path}")
        network = BlinkNetwork()
        network.load_state_dict(load_file(path))
        return cls(network)

    def closed(self, frames: NDArray[np.uint8], points: Floats) -> Floats:
        """Return how far the lids are closed, (f,) 0 to 1, in frames (f, h, w, 3) with mesh points (f, n, 2).

        Frames without a face are interpolated; NaN if most have none.
        """
        seen = has_face(points)
        if seen.mean() < 0.5:
            return np.full(len(frames), np.nan, np.float32)
        crops = torch.cat([eye_crops(frames[i], points[i]) for i in seen.nonzero()[0]])
        read = torch.sigmoid(self._network(crops)).reshape(-1, 2).mean(1).numpy()
        closed: Floats = np.interp(np.arange(len(frames)), seen.nonzero()[0], read).astype(np.float32)
        return closed


def eye_crops(frame: NDArray[np.uint8], points: Floats) -> Tensor:
    """Cut both eyes out of a frame (h, w, 3), upright, outer corner left, without mean and contrast: (2, 1, h, w)."""
    height, width = CROP
    crops = []
    for outer, inner in CORNERS:
        middle, along = (points[outer] + points[inner]) / 2, (points[inner] - points[outer]) * REACH / width
        down = np.array((-along[1], along[0])) * np.sign(along[0] or 1)
        corner = middle - along * width / 2 - down * height / 2
        onto = (along[0], down[0], corner[0], along[1], down[1], corner[1])
        image = Image.fromarray(frame).convert("L")
        crop = image.transform((width, height), Image.Transform.AFFINE, onto, Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.asarray(crop, np.float32))
        crops.append((values - values.mean()) / values.std().clamp(min=4.0))
    return torch.stack(crops)[:, None]


def blink_rate(closed: Curve) -> float:
    """Return the blinks a minute of a curve (f,) of how far lids are closed."""
    rises = (closed[1:] >= BLINK) & (closed[:-1] < BLINK)
    return float(rises.sum()) * 60 * FRAME_RATE_HZ / len(closed)


def blink_metric(curves: Sequence[tuple[Curve, Curve]]) -> Metric:
    """Return the blinks of rendered clips over those of the true ones; curves: (rendered, true), (f,) each."""
    if not curves:
        return Metric(None, "no reader of blinks: give one with --blink-reader, see training.eval.readers.blinks")
    rendered, true = (float(np.mean([blink_rate(curve) for curve in each])) for each in zip(*curves, strict=True))
    note = f"{rendered:.0f} a minute, true frames {true:.0f}"
    return Metric(rendered / true, note) if true else Metric(None, "nobody blinks in the true frames")


def examples(clips: Sequence[StoredClip], landmarks: Landmarks, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return crops (b, 1, h, w) and how far the lids are closed in them, (b,), of clips with the truth about that."""
    crops, truth = [], []
    for clip in tqdm(clips, "clips", mininterval=10):
        closed = np.array(clip.array("blink"), np.float32)
        for frames in ((closed > 0.1).nonzero()[0], (closed <= 0.1).nonzero()[0]):
            for index in rng.permutation(frames)[: FRAMES_OF_CLIP // 2].tolist():
                frame = clip.frames(slice(index, index + 1))
                points = landmarks.points(frame)
                if has_face(points)[0]:
                    crops.append(eye_crops(frame[0], points[0]))
                    truth.append(np.full(2, closed[index], np.float32))
    if not crops:
        raise ValueError("no face was found in the clips")
    return torch.cat(crops), torch.from_numpy(np.concatenate(truth))


def train(crops: Tensor, truth: Tensor, seed: int = 0) -> BlinkNetwork:
    """Train a network on crops (b, 1, h, w) and truth (b,)."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = BlinkNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.05)
    for step in range(NUM_STEPS):
        batch = torch.randint(len(crops), (BATCH_SIZE,), generator=random)
        # Rendered eyes are softer and placed less exactly than drawn ones.
        shift = torch.randint(-2, 3, (2,), generator=random).tolist()
        pictures = crops[batch].roll(shift, (2, 3))
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
        prog="python -m training.eval.readers.blinks", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="shards that training.make_data wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/blinks.safetensors"), help="file to write")
    parser.add_argument("--clips", type=int, default=300, help="training clips to learn from (default 300)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    landmarks = Landmarks()
    crops, truth = examples(read_clips(flags.data, "train")[: flags.clips], landmarks, np.random.default_rng(0))
    network = train(crops, truth)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), flags.out)
    reader, pairs = BlinkReader(network), []
    for clip in read_clips(flags.data, "held_out")[:10]:
        frames = clip.frames()
        pairs.append((reader.closed(frames, landmarks.points(frames)), np.array(clip.array("blink"), np.float32)))
    rates = np.mean([[blink_rate(curve) for curve in pair] for pair in pairs], axis=0)
    r = np.mean([correlation(*pair) for pair in pairs if np.isfinite(pair[0]).all()])
    print(f"held-out clips: r {r:.2f}, {rates[0]:.1f} blinks a minute read, {rates[1]:.1f} true; wrote {flags.out}")


if __name__ == "__main__":
    main()
