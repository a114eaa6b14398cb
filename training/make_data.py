"""Draw and speak the clips that the tiny avatar learns from: `python -m training.make_data --out runs/data`.

Runs in an environment of its own (training/requirements-data.txt), with LP_NUM_THREADS=0 and OPENBLAS_NUM_THREADS=1.
Every clip is another person and another utterance, and follows from its number alone. Held-out clips have people,
sentences and voices that training never meets. A shard that is there is kept, so that a stopped run goes on where it
was.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from tqdm import tqdm

from training.data import (
    FRAME_RATE_HZ,
    FRAME_SAMPLES,
    PARTS,
    SHARE_HELP,
    SOUND_RATE_HZ,
    Clip,
    ClipShape,
    a_share,
    write_shard,
)
from training.synthetic.face import Face
from training.synthetic.head import Head, read_pack
from training.synthetic.motion import motion_of, portrait_of
from training.synthetic.person import person_of
from training.synthetic.sentences import sentence
from training.synthetic.voices import PAUSE, Engines, Speech, Voice, choose_voice, patch_piper

if TYPE_CHECKING:
    from training.synthetic.renderer import Stage

BLOCK_FRAMES = 12
SHARD_CLIPS = 25
# Numbers of held-out people begin here; training never gets this far.
FIRST_HELD_OUT = 1 << 20
PAUSES_S = (0.0, 0.1, 0.3, 0.7)


@dataclass(frozen=True)
class Plan:
    """What is wanted: where, how many clips of each part, and until when (seconds of time.monotonic).

    share: (i, n): of the shards that are wanted, every nth from the ith, so that n programs share the work.
    """

    folder: Path
    num_clips: dict[str, int]
    deadline: float
    share: tuple[int, int] = (0, 1)


def utterance(
    engines: Engines, voice: Voice, duration_s: float, is_held_out: bool, rng: Generator
) -> tuple[Speech, str]:
    """Sentences one after the other, with pauses, cut to a duration; and their text."""
    words = random.Random(int(rng.integers(1 << 62)))
    tempo, pitch = (
        rng.uniform(0.9, 1.15),
        rng.uniform(0.86, 1.18) if voice.engine != "espeak" else rng.uniform(0.95, 1.05),
    )
    samples, onsets, sounds, texts = (
        [np.zeros(int(rng.uniform(0, 0.5) * SOUND_RATE_HZ), np.float32)],
        [0.0],
        [PAUSE],
        [],
    )
    while (start := sum(map(len, samples)) / SOUND_RATE_HZ) < duration_s:
        texts.append(sentence(words, is_held_out))
        speech = engines.speak(texts[-1], voice, tempo, pitch)
        onsets += [start + onset for onset in speech.onsets]
        sounds += speech.sounds
        onsets.append(start + len(speech.samples) / SOUND_RATE_HZ)
        sounds.append(PAUSE)
        samples += [speech.samples, np.zeros(int(rng.choice(PAUSES_S) * SOUND_RATE_HZ), np.float32)]
    whole = np.concatenate(samples)[: round(duration_s * SOUND_RATE_HZ)]
    whole *= rng.uniform(0.3, 0.9) / max(float(np.abs(whole).max()), 1e-3)
    heard = [i for i, onset in enumerate(onsets) if onset < duration_s]
    return Speech(whole, [onsets[i] for i in heard], [sounds[i] for i in heard]), " ".join(texts)


def make_clip(number: int, head: Head, stage: "Stage", engines: Engines) -> Clip:
    """The clip of a number; held out from FIRST_HELD_OUT on."""
    is_held_out = number >= FIRST_HELD_OUT
    rng = np.random.default_rng((number, 1))
    voice = choose_voice(rng, is_held_out)
    shape = ClipShape()
    # A clip is some way into a stream, or at its start.
    lead_frames = BLOCK_FRAMES * max(0, int(rng.integers(-1, shape.most_lead // BLOCK_FRAMES + 1)))
    num_frames = lead_frames + shape.frames + shape.tail
    pictured = slice(lead_frames, lead_frames + shape.frames)
    speech, text = utterance(engines, voice, num_frames / FRAME_RATE_HZ, is_held_out, rng)
    motion = motion_of(speech, head.shape_names, num_frames, rng)
    stage.show(Face(head, person_of(head, number)))
    shown = [stage.draw(*moment) for moment in list(motion.frames())[pictured]]
    (reference, _), *_ = [stage.draw(*moment) for moment in portrait_of(motion, head.shape_names, rng).frames()]
    jaw = motion.weights[pictured, head.shape_names.index("jawOpen")]
    assert len(speech.samples) == num_frames * FRAME_SAMPLES
    arrays: dict[str, NDArray[Any]] = {
        "frames": np.stack([picture for picture, _ in shown]),
        "reference": reference,
        "sound": (speech.samples * 32767).astype(np.int16),
        "lips": np.array([lips for _, lips in shown], np.float32),
        "jaw": jaw.astype(np.float32),
    }
    info = {"person": number, "voice": f"{voice.engine} {voice.name}", "text": text, "lead_frames": lead_frames}
    return Clip(f"{number:08d}", arrays, info)


def wanted_shards(plan: Plan) -> Iterator[tuple[Path, range]]:
    """Files that are not there yet, and the numbers of their clips."""
    for part in reversed(PARTS):
        first = FIRST_HELD_OUT if part == "held_out" else 0
        for start in range(0, plan.num_clips[part], SHARD_CLIPS):
            index = start // SHARD_CLIPS
            path = plan.folder / part / f"{index:06d}.tar"
            if index % plan.share[1] == plan.share[0] and not path.exists():
                yield path, range(first + start, first + min(start + SHARD_CLIPS, plan.num_clips[part]))


def make(plan: Plan, piper: Path) -> None:
    """Make what is missing, until the deadline; a shard that is not finished then is begun anew the next time."""
    # Imported here, because it needs OpenGL, and choosing and speaking clips does not.
    from training.synthetic.renderer import Stage

    head = Head(read_pack())
    stage = Stage(head)
    shards = list(wanted_shards(plan))
    with tqdm(total=sum(len(numbers) for _, numbers in shards), unit="clip", mininterval=10) as progress:
        for path, numbers in shards:
            if time.monotonic() > plan.deadline:
                return
            # Opened anew for each shard, because the randomness inside Piper goes on from call to call.
            engines = Engines(piper, seed=numbers.start)
            clips = []
            for number in numbers:
                clips.append(make_clip(number, head, stage, engines))
                progress.update()
            write_shard(path, clips)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.make_data", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the parts train and held_out")
    parser.add_argument("--clips", type=int, default=2500, help="how many clips of 2.4 s to train on")
    parser.add_argument("--held-out", type=int, default=50, help="how many clips to hold out")
    parser.add_argument("--voices", type=Path, default=Path("runs/voices"), help="folder for the patched Piper voice")
    parser.add_argument("--minutes", type=float, default=600, help="begin no shard after this long")
    parser.add_argument("--share", type=a_share, default="0/1", help=SHARE_HELP)
    flags = parser.parse_args()
    num_clips = {"train": flags.clips, "held_out": flags.held_out}
    make(Plan(flags.out, num_clips, time.monotonic() + 60 * flags.minutes, flags.share), patch_piper(flags.voices))


if __name__ == "__main__":
    main()
