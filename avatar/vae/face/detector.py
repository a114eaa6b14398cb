"""Face detection with BlazeFace, run by LiteRT on one thread.

    RGB image --halved scales, overlapping windows--> candidates --each at three sizes--> faces

BlazeFace looks at 128x128 pixels and finds faces that take an eighth of them or more. The picture is therefore searched
at up to four scales, so that a face is found from a fiftieth of the longer side on. A candidate counts as a face if the
model is sure of it at three sizes: single windows also score coins and galaxies at up to 0.83.

Source of the model: README.md in this folder. Axes: a anchors, h w height and width of images; boxes are (a, 4): left,
top, right, bottom.
"""

import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avatar.vae.face.crop import Face

Floats = NDArray[np.float32]

MODEL = Path(__file__).with_name("face_detection_short_range.tflite")
SHA256 = "3bc182eb9f33925d9e58b5c8d59308a760f4adea8f282370e428c51212c26633"
# Side of the model's input, and its grids: (cell size in pixels, anchors per cell). Source: MediaPipe's
# face_detection_short_range.
SIDE = 128
GRIDS = ((8, 2), (16, 6))
# Longer side of the searched scales, in windows. Each finds faces half as large as the one before.
SCALES = (1, 2, 4, 8)
# A scale may enlarge a picture by this factor.
MAX_ENLARGEMENT = 4 / 3
# Part of a window after which the next one starts: a face of up to a third of a window is whole in one of them.
STRIDE = 2 / 3
# Least score of a candidate, and candidates of a scale that are examined, best first.
CANDIDATE_SCORE, MAX_CANDIDATES = 0.5, 12
# Sides of the windows in which a candidate is examined, in units of its own, and the least mean of its scores there.
# Measured: faces score 0.84 and more, photographs and textures without faces at most 0.71.
VIEWS = (1.4, 1.8, 2.2)
MIN_SCORE = 0.78
# A face is upright unless it scores so much more after a quarter or half turn. Measured: upside down 0.19 and more.
TURN_MARGIN = 0.05
# Intersection over union from which two boxes are of one face. Source: MediaPipe.
SAME_FACE = 0.3


def find_faces(image: Image.Image) -> list[Face]:
    """Return the upright faces in an image of mode RGB, L or CMYK, largest first.

    The search goes from the whole picture to its parts and ends one scale after the first face: a face that is four
    times smaller than another one is in the background.
    """
    model, faces, is_last = blazeface(), list[Face](), False
    for scaled, factor in scales(image):
        for candidate in model.candidates(scaled, factor):
            face = None if any(each.contains(candidate) for each in faces) else model.examine(image, candidate)
            if face is not None and not any(each.contains(face) for each in faces):
                faces.append(face)
        if is_last:
            break
        is_last = bool(faces)
    return sorted(faces, key=lambda face: -face.side)


def scales(image: Image.Image) -> list[tuple[Image.Image, float]]:
    """Return the image at each scale, coarsest first, and the factor from its pixels to the image's."""
    longer = max(image.size)
    sides = [SIDE * scale for scale in SCALES if scale == 1 or SIDE * scale <= longer * MAX_ENLARGEMENT]
    scaled, result = image, []
    for side in reversed(sides):
        width, height = (max(1, round(length * side / longer)) for length in image.size)
        scaled = scaled.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        result.append((scaled, longer / side))
    return result[::-1]


class BlazeFace:
    """The detector's model."""

    def __init__(self) -> None:
        """RuntimeError if the model's file is not the expected one."""
        from ai_edge_litert.interpreter import Interpreter

        content = MODEL.read_bytes()
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise RuntimeError(f"{MODEL.name} is damaged: expected the sha256 {SHA256}; install avatar again")
        self._interpreter: Any = Interpreter(model_content=content, num_threads=1)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._outputs = [output["index"] for output in self._interpreter.get_output_details()]
        self._anchors = anchors()

    def candidates(self, image: Image.Image, factor: float) -> list[Face]:
        """Return what may be faces in an image, best first, at most MAX_CANDIDATES, in pixels times `factor`."""
        pixels = np.asarray(image.convert("RGB"))
        found = []
        for top in starts(pixels.shape[0]):
            for left in starts(pixels.shape[1]):
                boxes, scores = self.detect(window(pixels, left, top))
                boxes += np.array([left, top, left, top], np.float32)
                found.append((boxes, scores))
        boxes, scores = (np.concatenate(each) for each in zip(*found, strict=True))
        return [face_of(box * factor, score) for box, score in merge(boxes, scores)][:MAX_CANDIDATES]

    def examine(self, image: Image.Image, candidate: Face) -> Face | None:
        """Return the upright face that a candidate is, found again at several sizes; None if it is none."""
        boxes, scores = [], []
        for view in VIEWS:
            side = max(1, round(candidate.side * view))
            left, top = round(candidate.x - side / 2), round(candidate.y - side / 2)
            # Pillow's crop is black outside the image.
            square = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            pixels = np.asarray(square.convert("RGB"))
            box, score = self._central(pixels, view)
            boxes.append(box * (side / SIDE) + np.array([left, top, left, top], np.float32))
            scores.append(score)
        if np.mean(scores) < MIN_SCORE:
            return None
        # The model also finds most faces that lie on their side or stand on their head, and takes them for upright.
        turned = max(self._central(np.rot90(pixels, turn), view)[1] for turn in (1, 2, 3))
        if turned > scores[-1] + TURN_MARGIN:
            return None
        return face_of(np.mean(boxes, axis=0), float(np.mean(scores)))

    def _central(self, pixels: NDArray[np.uint8], view: float) -> tuple[Floats, float]:
        """Return the box and the score of a face that takes about 1 / view of pixels (SIDE, SIDE, 3), in the middle."""
        half = SIDE / view / 2
        centre = np.array([SIDE / 2 - half] * 2 + [SIDE / 2 + half] * 2, np.float32)
        boxes, scores = self.detect(pixels)
        same = overlap(centre, boxes) > SAME_FACE
        return next(iter(merge(boxes[same], scores[same])), (centre, 0.0))

    def detect(self, pixels: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Return boxes (a, 4) in pixels, and scores (a,), of anchors that see a face in pixels (SIDE, SIDE, 3)."""
        self._interpreter.set_tensor(self._input, (pixels / np.float32(127.5) - 1)[None])
        self._interpreter.invoke()
        regressed, logits = (self._interpreter.get_tensor(output)[0] for output in self._outputs)
        scores = 1 / (1 + np.exp(-logits[:, 0].clip(-80, 80)))
        sees = scores > CANDIDATE_SCORE
        centres, sizes = regressed[sees, :2] + self._anchors[sees], regressed[sees, 2:4]
        return np.concatenate([centres - sizes / 2, centres + sizes / 2], 1), scores[sees]


@cache
def blazeface() -> BlazeFace:
    """Return the model, loaded once per process."""
    return BlazeFace()


def anchors() -> Floats:
    """Return the centres of the model's anchors, (a, 2) in pixels of its input."""
    centres = []
    for cell, count in GRIDS:
        line = (np.arange(SIDE // cell, dtype=np.float32) + 0.5) * cell
        centres.append(np.stack(np.meshgrid(line, line), -1).reshape(-1, 2).repeat(count, axis=0))
    return np.concatenate(centres)


def starts(length: int) -> list[int]:
    """Return the starts of windows that cover a length; a window that is longer is centred and starts below 0."""
    if length <= SIDE:
        return [(length - SIDE) // 2]
    count = math.ceil((length - SIDE) / (SIDE * STRIDE))
    return [round(index * (length - SIDE) / count) for index in range(count + 1)]


def window(pixels: NDArray[np.uint8], left: int, top: int) -> NDArray[np.uint8]:
    """Return the window (SIDE, SIDE, 3) of pixels (h, w, 3), black outside them."""
    height, width, _ = pixels.shape
    result = np.zeros((SIDE, SIDE, 3), np.uint8)
    rows = slice(max(top, 0), min(top + SIDE, height))
    columns = slice(max(left, 0), min(left + SIDE, width))
    part = pixels[rows, columns]
    result[rows.start - top :, columns.start - left :][: part.shape[0], : part.shape[1]] = part
    return result


def overlap(box: Floats, boxes: Floats) -> Floats:
    """Return the intersection over union (a,) of a box (4,) with boxes (a, 4)."""
    shared = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    result: Floats = shared / ((box[2:] - box[:2]).prod() + areas - shared).clip(1e-6)
    return result


def merge(boxes: Floats, scores: Floats) -> list[tuple[Floats, float]]:
    """Merge the boxes (a, 4) of each face by weighted non-maximum suppression; best first, with the best score.

    Source: MediaPipe's NonMaxSuppressionCalculator, WEIGHTED.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, scores = boxes[order], scores[order]
    merged = []
    while len(boxes):
        same = overlap(boxes[0], boxes) > SAME_FACE
        same[0] = True
        merged.append((np.average(boxes[same], axis=0, weights=scores[same]), float(scores[0])))
        boxes, scores = boxes[~same], scores[~same]
    return merged


def face_of(box: Floats, score: float) -> Face:
    """Return the face of a box (4,)."""
    left, top, right, bottom = box.tolist()
    return Face((left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top), score)
