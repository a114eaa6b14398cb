"""Draw portraits of people who do not exist: `python -m training.portraits --out assets/portraits NUMBER ...`.

A person is a number; training has met those of its clips, and none from training.make_data.FIRST_HELD_OUT on. Runs
where training.make_data does. The shipped ones are this program's, their numbers in assets/README.md.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from training.synthetic.face import Face
from training.synthetic.head import Head, read_pack, shape_indexes
from training.synthetic.person import person_of
from training.synthetic.renderer import Stage

# What a portrait shows besides a face at rest.
TRACES = {"mouthSmile": 0.08, "eyeWide": 0.08}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.portraits", description=(__doc__ or "").split(":")[0])
    parser.add_argument("numbers", type=int, nargs="+", help="of the people")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for 1.png, 2.png, ... in the order of the numbers"
    )
    parser.add_argument("--size", type=int, default=256, help="height and width, pixels")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    head = Head(read_pack())
    weights = np.zeros(len(head.shape_names), np.float32)
    for name, weight in TRACES.items():
        weights[shape_indexes(head.shape_names, name)] = weight
    stage = Stage(head, flags.size)
    for place, number in enumerate(flags.numbers, 1):
        stage.show(Face(head, person_of(head, number)))
        picture, _ = stage.draw(weights, np.zeros(3, np.float32), np.zeros(2, np.float32))
        Image.fromarray(np.ascontiguousarray(picture)).save(flags.out / f"{place}.png", optimize=True)


if __name__ == "__main__":
    main()
