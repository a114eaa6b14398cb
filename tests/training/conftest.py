from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.training.small import write_latents
from training.data import Clip, StoredClip, read_clips, write_shard
from training.synthetic.head import Head, read_pack

# Rendering needs the packages of training/requirements-data.txt and EGL; see training/synthetic/README.md.
collect_ignore = [] if find_spec("moderngl") else ["synthetic/test_renderer.py"]


STARTS_PROCESSES = {"test_evaluate", "test_strategy", "test_base"}
# Modules that the processes of those tests import, which takes seconds.
PRELOADED = [
    *("tests.training.two_processes", "training.evaluate", "torch._dynamo"),
    "transformers.models.whisper.modeling_whisper",
]


@pytest.fixture(scope="module", autouse=True)
def preloaded_forkserver(request: pytest.FixtureRequest) -> None:
    """Start the server that forks the processes of a file's tests, with the modules that they need."""
    if request.path.stem in STARTS_PROCESSES:
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def head() -> Head:
    return Head(read_pack())


def synthetic_clip(number: int, num_frames: int = 21, side: int = 48) -> Clip:
    """A disc that moves and pulses over a still ramp, in place of a face."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:side, 0:side]
    colour, ground = rng.uniform(60, 255, 3), rng.uniform(0, 120, 3)
    centres = 20 + np.cumsum(rng.normal(0, 0.5, (num_frames, 2)), 0)
    jaw = 0.5 + 0.4 * np.sin(np.arange(num_frames) + number)
    frames = [
        np.where(
            (np.hypot(y - row, x - column) < 5 + 4 * opening)[..., None], colour, ground + x[..., None] * 100 / side
        )
        for (row, column), opening in zip(centres, jaw, strict=True)
    ]
    arrays: dict[str, NDArray[Any]] = {
        "frames": np.array(frames).astype(np.uint8),
        "lips": centres.astype(np.float32),
        "jaw": jaw.astype(np.float32),
    }
    return Clip(f"{number:08d}", arrays, {"person": number, "lead_frames": 0})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of shards: six training clips and two held-out clips."""
    write_shard(tmp_path / "data" / "train" / "000000.tar", [synthetic_clip(number) for number in range(6)])
    write_shard(tmp_path / "data" / "held_out" / "000000.tar", [synthetic_clip(number) for number in (90, 91)])
    return tmp_path / "data"


@pytest.fixture
def clips(data: Path) -> list[StoredClip]:
    return read_clips(data, "train")


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared shards: four training clips and two held-out clips. Do not write to it."""
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="session")
def prepared(latents: Path) -> list[StoredClip]:
    """The prepared training clips."""
    return read_clips(latents, "train")
