"""Make synthetic clips for the tiny avatar: `python -m training.make_data --out runs/data`.

Runs in an environment of its own (training/requirements-data.txt), with LP_NUM_THREADS=0 and OPENBLAS_NUM_THREADS=1.
Each clip shows a different person with a different utterance and depends on its number alone. Held-out clips have
people, sentences and voices that training clips never have. Existing shards are kept, so a stopped run resumes.
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
    AUDIO_RATE_HZ,
    FRAME_RATE_HZ,
    FRAME_SAMPLES,
    SHARE_HELP,
    SPLITS,
    Clip,
    ClipShape,
    parse_share,
    write_shard,
)
from training.synthetic.face import Face
from training.synthetic.head import Head, read_pack
from training.synthetic.motion import motion_of, portrait_of
from training.synthetic.person import person_of
from training.synthetic.sentences import sentence
from training.synthetic.voices import PAUSE, Engines, Speech, Voice, choose_voice, patch_piper

if TYPE_CHECKING:
    from training.synthetic.renderer import Renderer

# As in avatar.types, which needs torch.
BLOCK_FRAMES = 12
SHARD_CLIPS = 25
# Held-out clips are numbered from here on.
FIRST_HELD_OUT = 1 << 20
PAUSES_S = (0.0, 0.1, 0.3, 0.7)


@dataclass(frozen=True)
class Plan:
    """The clips to make.

    num_clips: of each split. deadline: seconds of time.monotonic. share: (i, n): make every nth shard from the ith on.
    """

    folder: Path
    num_clips: dict[str, int]
    deadline: float
    share: tuple[int, int] = (0, 1)


def make_utterance(
    engines: Engines, voice: Voice, duration_s: float, is_held_out: bool, rng: Generator
) -> tuple[Speech, str]:
    """Speak random sentences with pauses, cut to a duration; return the speech and its text."""
    text_rng = random.Random(int(rng.integers(1 << 62)))
    tempo = rng.uniform(0.9, 1.15)
    pitch = rng.uniform(0.95, 1.05) if voice.engine == "espeak" else rng.uniform(0.86, 1.18)
    samples = [np.zeros(int(rng.uniform(0, 0.5) * AUDIO_RATE_HZ), np.float32)]
    onsets, phones, texts = [0.0], [PAUSE], list[str]()
    while (start := sum(map(len, samples)) / AUDIO_RATE_HZ) < duration_s:
        texts.append(sentence(text_rng, is_held_out))
        speech = engines.speak(texts[-1], voice, tempo, pitch)
        onsets += [start + onset for onset in speech.onsets]
        phones += speech.phones
        onsets.append(start + len(speech.samples) / AUDIO_RATE_HZ)
        phones.append(PAUSE)
        samples += [speech.samples, np.zeros(int(rng.choice(PAUSES_S) * AUDIO_RATE_HZ), np.float32)]
    whole = np.concatenate(samples)[: round(duration_s * AUDIO_RATE_HZ)]
    whole *= rng.uniform(0.3, 0.9) / max(float(np.abs(whole).max()), 1e-3)
    kept = [i for i, onset in enumerate(onsets) if onset < duration_s]
    return Speech(whole, [onsets[i] for i in kept], [phones[i] for i in kept]), " ".join(texts)


def make_clip(number: int, head: Head, renderer: "Renderer", engines: Engines) -> Clip:
    """Make the clip of a number; held out from FIRST_HELD_OUT on."""
    is_held_out = number >= FIRST_HELD_OUT
    rng = np.random.default_rng((number, 1))
    voice = choose_voice(rng, is_held_out)
    shape = ClipShape()
    # A clip lies some blocks into a stream, or at its start.
    lead_frames = BLOCK_FRAMES * max(0, int(rng.integers(-1, shape.max_lead_frames // BLOCK_FRAMES + 1)))
    num_frames = lead_frames + shape.num_frames + shape.tail_frames
    clip_span = slice(lead_frames, lead_frames + shape.num_frames)
    speech, text = make_utterance(engines, voice, num_frames / FRAME_RATE_HZ, is_held_out, rng)
    motion = motion_of(speech, head.shape_names, num_frames, rng)
    renderer.set_face(Face(head, person_of(head, number)))
    drawn = [renderer.draw(*frame) for frame in list(motion.frames())[clip_span]]
    [(reference, _)] = [renderer.draw(*frame) for frame in portrait_of(motion, head.shape_names, rng).frames()]
    jaw = motion.weights[clip_span, head.shape_names.index("jawOpen")]
    assert len(speech.samples) == num_frames * FRAME_SAMPLES
    arrays: dict[str, NDArray[Any]] = {
        "frames": np.stack([picture for picture, _ in drawn]),
        "reference": reference,
        "sound": (speech.samples * 32767).astype(np.int16),
        "lips": np.array([lips for _, lips in drawn], np.float32),
        "jaw": jaw.astype(np.float32),
    }
    info = {"person": number, "voice": f"{voice.engine} {voice.name}", "text": text, "lead_frames": lead_frames}
    return Clip(f"{number:08d}", arrays, info)


def missing_shards(plan: Plan) -> Iterator[tuple[Path, range]]:
    """Yield the shards that do not exist yet, and the numbers of their clips."""
    for split in reversed(SPLITS):
        first = FIRST_HELD_OUT if split == "held_out" else 0
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
    renderer = Renderer(head)
    shards = list(missing_shards(plan))
    with tqdm(total=sum(len(numbers) for _, numbers in shards), unit="clip", mininterval=10) as progress:
        for path, numbers in shards:
            if time.monotonic() > plan.deadline:
                return
            # New engines for each shard, because the state of Piper's random generator advances from call to call.
            engines = Engines(piper, seed=numbers.start)
            clips = []
            for number in numbers:
                clips.append(make_clip(number, head, renderer, engines))
                progress.update()
            write_shard(path, clips)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.make_data", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the splits train and held_out")
    parser.add_argument("--clips", type=int, default=2500, help="training clips of 2.4 s (default 2500)")
    parser.add_argument("--held-out", type=int, default=50, help="held-out clips (default 50)")
    parser.add_argument("--voices", type=Path, default=Path("runs/voices"), help="folder for the patched Piper voice")
    parser.add_argument("--minutes", type=float, default=600, help="start no shard after this time (default 600)")
    parser.add_argument("--share", type=parse_share, default="0/1", help=SHARE_HELP)
    flags = parser.parse_args()
    num_clips = {"train": flags.clips, "held_out": flags.held_out}
    make(Plan(flags.out, num_clips, time.monotonic() + 60 * flags.minutes, flags.share), patch_piper(flags.voices))


if __name__ == "__main__":
    main()
