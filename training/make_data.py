"""Make synthetic clips for the tiny avatar: `python -m training.make_data --out runs/data`.

Runs in an environment of its own (training/requirements-data.txt), with LP_NUM_THREADS=0 and OPENBLAS_NUM_THREADS=1.
Each clip shows a different person who speaks, listens to another voice, or both, and depends on its number alone; ten
consecutive clips are a mixture of all kinds. Clips for evaluation have people, sentences and voices that training clips
never have: those of `held_out` guide choices, those of `test` are used once. Existing shards are kept, so a stopped run
resumes.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from training.data import (
    FRAME_RATE_HZ,
    FRAME_SAMPLES,
    SHARE_HELP,
    Clip,
    ClipShape,
    encode_jpeg,
    parse_share,
    write_shard,
)
from training.synthetic.face import Face
from training.synthetic.head import Head, read_pack
from training.synthetic.motion.performance import perform, portrait_of
from training.synthetic.person import person_of
from training.synthetic.photo import photo_of
from training.synthetic.speech.dialogue import DROPPED, KINDS, choose_voices, make_dialogue
from training.synthetic.speech.voices import Engines, Speech, patch_piper

if TYPE_CHECKING:
    from training.synthetic.renderer import Renderer

# Pixel frames of blocks of 1, 2 and 3 latents.
BLOCK_FRAMES = (4, 8, 12)
SHARD_CLIPS = 10
# Clips of the split `held_out` are numbered from here on, those of `test` from there on.
FIRST_HELD_OUT, FIRST_TEST = 1 << 20, (1 << 20) + (1 << 19)
ORDER = ("held_out", "train", "test")
FIRST = {"train": 0, "held_out": FIRST_HELD_OUT, "test": FIRST_TEST}


@dataclass(frozen=True)
class Plan:
    """The clips to make.

    num_clips: of each split. deadline: seconds of time.monotonic. size: height and width of frames in pixels.
    num_frames: of a clip, whole blocks of block_frames. share: (i, n): make every nth shard from the ith on.
    """

    folder: Path
    num_clips: dict[str, int]
    deadline: float
    size: int = 256
    num_frames: int = 120
    block_frames: int = BLOCK_FRAMES[-1]
    share: tuple[int, int] = (0, 1)


def make_clip(
    number: int, head: Head, renderer: "Renderer", engines: Engines, num_frames: int, block_frames: int
) -> Clip:
    """Make the clip of a number; for evaluation from FIRST_HELD_OUT on."""
    is_held_out = number >= FIRST_HELD_OUT
    rng = np.random.default_rng((number, 1))
    voices, kind = choose_voices(rng, is_held_out), KINDS[number % len(KINDS)]
    shape = ClipShape(num_frames)
    # A clip lies some blocks into a stream, or at its start.
    lead_frames = block_frames * max(0, int(rng.integers(-1, shape.max_lead_frames // block_frames + 1)))
    total_frames = lead_frames + num_frames + shape.tail_frames
    span = slice(lead_frames, lead_frames + num_frames)
    dialogue = make_dialogue(engines, voices, kind, total_frames / FRAME_RATE_HZ, is_held_out, rng)
    performance = perform(dialogue, head.shape_names, total_frames, rng)
    motion, photo = performance.motion, photo_of(rng, renderer.size, number, not is_held_out)
    renderer.set_face(Face(head, person_of(head, number)))
    drawn = [renderer.draw(*frame) for frame in list(motion.frames())[span]]
    at_rest = portrait_of(motion, head.shape_names, rng)
    [portrait] = [renderer.draw(*frame) for frame in at_rest.frames()]
    # The person reacts to what the network does not hear: it learns to do without.
    is_dropped = bool(rng.random() < DROPPED) and not is_held_out and kind != "speak"
    assert len(dialogue.person.samples) == len(dialogue.other.samples) == total_frames * FRAME_SAMPLES
    arrays: dict[str, NDArray[Any]] = {
        "reference": photo.develop(portrait.pixels, num_frames),
        "reference_pose": at_rest.turn[0].astype(np.float32),
        "sound": (dialogue.person.samples * 32767).astype(np.int16),
        "other": (dialogue.other.samples * (0 if is_dropped else 32767)).astype(np.int16),
        "lips": np.array([picture.lips for picture in drawn], np.float32),
        "gap": np.array([picture.gap for picture in drawn], np.float32),
        "jaw": motion.weights[span, head.shape_names.index("jawOpen")].astype(np.float32),
        **{name: curve[span].astype(np.float32) for name, curve in performance.truth.items()},
    }
    info = {
        "kind": kind,
        "person": number,
        "voice": str(voices[0]),
        "other_voice": str(voices[1]),
        "text": dialogue.texts[0],
        "other_text": dialogue.texts[1],
        "other_is_dropped": is_dropped,
        "lead_frames": lead_frames,
        "phones": phones_of(dialogue.person, lead_frames),
    }
    jpegs = [encode_jpeg(photo.develop(picture.pixels, frame)) for frame, picture in enumerate(drawn)]
    return Clip(f"{number:08d}", arrays, info, jpegs)


def phones_of(speech: Speech, lead_frames: int) -> list[tuple[float, str]]:
    """Return the phones of speech and their onsets in seconds from the first frame, which lead frames precede."""
    start = lead_frames / FRAME_RATE_HZ
    return [(round(onset - start, 3), phone) for onset, phone in zip(speech.onsets, speech.phones, strict=True)]


def missing_shards(plan: Plan) -> Iterator[tuple[Path, range]]:
    """Yield the shards that do not exist yet, and the numbers of their clips: held out, for training, for the test."""
    for split in sorted(plan.num_clips, key=ORDER.index):
        first = FIRST[split]
        for start in range(0, plan.num_clips[split], SHARD_CLIPS):
            index = start // SHARD_CLIPS
            path = plan.folder / split / f"{index:06d}.tar"
            if index % plan.share[1] == plan.share[0] and not path.exists():
                yield path, range(first + start, first + min(start + SHARD_CLIPS, plan.num_clips[split]))


def make(plan: Plan, piper: Path) -> None:
    """Make the missing shards; none is started after the deadline."""
    # Imported here, because it needs OpenGL, which the rest of this module does not.
    from training.synthetic.renderer import Renderer

    head = Head(read_pack())
    renderer = Renderer(head, plan.size)
    shards = list(missing_shards(plan))
    with tqdm(total=sum(len(numbers) for _, numbers in shards), unit="clip", mininterval=10) as progress:
        for path, numbers in shards:
            if time.monotonic() > plan.deadline:
                return
            # New engines for each shard, because the state of Piper's random generator advances from call to call.
            engines = Engines(piper, seed=numbers.start)
            clips = []
            for number in numbers:
                clips.append(make_clip(number, head, renderer, engines, plan.num_frames, plan.block_frames))
                progress.update()
            write_shard(path, clips)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.make_data", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the splits train, held_out and test")
    parser.add_argument("--clips", type=int, default=3000, help="training clips (default 3000)")
    parser.add_argument("--held-out", type=int, default=50, help="held-out clips (default 50)")
    parser.add_argument("--test", type=int, default=50, help="clips for the last evaluation (default 50)")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (default 256)")
    parser.add_argument("--frames", type=int, default=120, help="length of a clip, whole blocks (default 120)")
    parser.add_argument("--block-frames", type=int, choices=BLOCK_FRAMES, default=12, help="of a block (default 12)")
    parser.add_argument("--voices", type=Path, default=Path("runs/voices"), help="folder for the patched Piper voice")
    parser.add_argument("--minutes", type=float, default=600, help="start no shard after this time (default 600)")
    parser.add_argument("--share", type=parse_share, default="0/1", help=SHARE_HELP)
    flags = parser.parse_args()
    if flags.frames <= 0 or flags.frames % flags.block_frames:
        parser.error(f"--frames must be whole blocks of {flags.block_frames}, got {flags.frames}")
    num_clips = {"train": flags.clips, "held_out": flags.held_out, "test": flags.test}
    deadline = time.monotonic() + 60 * flags.minutes
    plan = Plan(flags.out, num_clips, deadline, flags.size, flags.frames, flags.block_frames, flags.share)
    make(plan, patch_piper(flags.voices))


if __name__ == "__main__":
    main()
