"""The listening metric of frames that a suite streamed."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from avatar.aio import background
from avatar.client import Avatar, Stream, connect
from avatar.settings import GatewaySettings
from avatar.store.sessions import SessionStore
from services.local.suite import suite
from training.data import Clip, StoredClip, read_shard, write_shard
from training.eval import inference
from training.eval.behaviour import listening_metric
from training.eval.held_out import RenderedClip, render_clip, score, session_seed
from training.eval.metrics import Metric
from training.eval.readers.eyes import EyeReader
from training.eval.readers.face_curves import NOSE_TIP
from training.eval.readers.landmarks import LEFT_EYE, NUM_POINTS, Landmarks

ROOT = Path(__file__).parents[2]
TINY, PORTRAIT = ROOT / "models/tiny", ROOT / "assets/portraits/1.png"
NUM_FRAMES, FRAME_SAMPLES = 96, 640
SEED = 5
GREY = np.full((64, 64, 3), 128, np.uint8)


class BrightFaces:
    """Landmarks that take brightness for the height of the nose, and a reader of eyes that takes it for raised brows.

    The eyes are 20 apart.
    """

    def points(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        points = np.zeros((len(frames), NUM_POINTS, 2), np.float32)
        points[:, LEFT_EYE, 0] = 20
        points[:, NOSE_TIP, 1] = frames.mean((1, 2, 3)) / 10
        return points

    def read(
        self, frames: NDArray[np.uint8], _: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return np.zeros(len(frames), np.float32), frames.mean((1, 2, 3), dtype=np.float32)


def dialogue(folder: Path, reference: NDArray[np.uint8] = GREY) -> StoredClip:
    """Write and read a clip: the person speaks for a second, then listens; nods and brows are in brightness."""
    rng = np.random.default_rng(1)
    frames = np.arange(NUM_FRAMES)
    nod = np.zeros(NUM_FRAMES, np.float32)
    for start in (45, 75):
        nod[start : start + 12] = 0.1 * np.hanning(12)
    sound, other = rng.integers(-9999, 9999, (2, (NUM_FRAMES + 16) * FRAME_SAMPLES), np.int16)
    arrays = {
        "frames": np.broadcast_to((900 * nod + 20).astype(np.uint8)[:, None, None, None], (NUM_FRAMES, 64, 64, 3)),
        "reference": reference,
        "sound": sound,
        "other": other,
        "nod": nod,
        "brow": 10 * nod,
        "speaking": np.stack([frames < 25, frames >= 25], 1).astype(np.float32),
    }
    write_shard(folder / "0.tar", [Clip("0", arrays, {"lead_frames": 0})])
    [clip] = read_shard(folder / "0.tar")
    return clip


async def streamed(avatar: Avatar, clip: StoredClip, num_frames: int, *, is_heard: bool = True) -> NDArray[np.uint8]:
    """Return a clip's first frames (f, H, W, 3), rendered by a suite over gRPC from the audio of both people."""
    file = io.BytesIO()
    Image.fromarray(np.array(clip.array("reference"))).save(file, "PNG")
    session = await avatar.create(file.getvalue(), seed=session_seed(clip, SEED))

    async def send(stream: Stream) -> None:
        if is_heard:
            await stream.listen(clip.array("other").tobytes())
        await stream.push(clip.array("sound").tobytes())
        await stream.close()

    async with session.stream() as stream, background(send(stream)):
        frames = [np.frombuffer(frame.data, np.uint8) async for frame in stream.frames()]
    return np.stack(frames[:num_frames]).reshape(num_frames, session.video.height, session.video.width, 3)


def listening(clip: RenderedClip) -> Metric:
    """Return the metric as an evaluation of a checkpoint reads it."""
    faces = BrightFaces()
    behaviour = score(clip, cast(Landmarks, faces), eyes=cast(EyeReader, faces)).behaviour
    assert behaviour
    return listening_metric([behaviour])


@pytest.mark.slow
async def test_the_listening_metric_of_streamed_frames_is_that_of_an_evaluation(
    listening_checkpoint: Path, store: SessionStore, tmp_path: Path
) -> None:
    """The weights are random and the reader of faces is a stand-in: a dialogue passes through gRPC and is measured."""
    clip = dialogue(tmp_path)
    local = render_clip(inference.load(listening_checkpoint), clip, SEED)
    num_frames = len(local.rendered)
    async with (
        suite(listening_checkpoint, store, GatewaySettings(listen="127.0.0.1:0")) as target,
        connect(target) as avatar,
    ):
        both = [
            replace(local, rendered=await streamed(avatar, clip, num_frames, is_heard=is_heard))
            for is_heard in (True, False)
        ]
    heard, unheard = map(listening, both)
    assert heard == listening(local)
    for name in ("nod", "brow"):
        assert re.search(rf"{name} -?0\.\d\d of 1, true frames 1\.00", heard.note)
    assert heard.value != unheard.value


@pytest.mark.slow
async def test_the_embedded_default_listens_through_grpc_as_in_its_evaluation(
    store: SessionStore, tmp_path: Path
) -> None:
    """So the figures of `training.evaluate` are those of frames that a suite streams."""
    clip = dialogue(tmp_path, np.array(Image.open(PORTRAIT)))
    local = render_clip(inference.load(TINY), clip, SEED)
    num_frames = len(local.rendered)
    async with suite(TINY, store, GatewaySettings(listen="127.0.0.1:0")) as target, connect(target) as avatar:
        heard, unheard = [await streamed(avatar, clip, num_frames, is_heard=is_heard) for is_heard in (True, False)]
    assert np.array_equal(heard, local.rendered)
    assert not np.array_equal(unheard, heard)
