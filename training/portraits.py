"""Draw portraits of synthetic people: `python -m training.portraits --out assets/portraits NUMBER ...`.

A number stands for a person. Training uses the numbers of its clips, and none from training.make_data.FIRST_HELD_OUT
on. Runs in the environment of training.make_data. assets/README.md lists the numbers of the shipped portraits.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from training.synthetic.face import Face
from training.synthetic.head import Head, read_pack, shape_indexes
from training.synthetic.person import person_of
from training.synthetic.renderer import Renderer

# The expression of a portrait, on top of a face at rest.
EXPRESSION = {"mouthSmile": 0.08, "eyeWide": 0.08}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.portraits", description=(__doc__ or "").split(":")[0])
    parser.add_argument("numbers", type=int, nargs="+", help="numbers of the people")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for 1.png, 2.png, ... in the order of the numbers"
    )
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (default 256)")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    head = Head(read_pack())
    weights = np.zeros(len(head.shape_names), np.float32)
    for name, weight in EXPRESSION.items():
        weights[shape_indexes(head.shape_names, name)] = weight
    renderer = Renderer(head, flags.size)
    for index, number in enumerate(flags.numbers, 1):
        renderer.set_face(Face(head, person_of(head, number)))
        picture = renderer.draw(weights, np.zeros(3, np.float32), np.zeros(2, np.float32))
        Image.fromarray(np.ascontiguousarray(picture.pixels)).save(flags.out / f"{index}.png", optimize=True)


if __name__ == "__main__":
    main()
