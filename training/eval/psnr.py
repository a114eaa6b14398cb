"""Reconstruction quality of a codec: PSNR of frames, and the box around the lips.

Axes: c channels, f frames, h w height and width.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Height and width of the box around the lips, in pixels of a picture 128 high.
MOUTH_BOX = (28, 36)
BOX_PICTURE = 128


def psnr(squared_error: Tensor) -> float:
    """Return the PSNR in dB of squared errors of frames in [-1, 1], a range of 2."""
    return -10 * math.log10(float(squared_error.mean()) / 4)


def mouth_boxes(values: Tensor, lips: NDArray[np.float32]) -> Tensor:
    """Cut the box around the lips out of every frame: (c, f, h, w) and lips (f, 2) -> (f, c, box height, width).

    The box is MOUTH_BOX in pictures up to 128 high, and in proportion in larger ones.
    """
    height, width = (round(side * max(1.0, values.shape[2] / BOX_PICTURE)) for side in MOUTH_BOX)
    boxes = []
    for frame, (row, column) in zip(values.unbind(1), lips.tolist(), strict=True):
        top = min(max(round(row - height / 2), 0), frame.shape[1] - height)
        left = min(max(round(column - width / 2), 0), frame.shape[2] - width)
        boxes.append(frame[:, top : top + height, left : left + width])
    return torch.stack(boxes)
