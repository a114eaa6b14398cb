"""The process that draws the values of face motion of a stream, block by block.

Axes: m values in the order of `avatar.types.FACE_MOTION`, f pixel frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from avatar.audio.inputs.curves import frames, pack, unpack
from avatar.audio.inputs.eyes import BLINKS, Gaze, Lids
from avatar.audio.inputs.head_pose import NOD_PROBABILITY, HeadPose, Manner
from avatar.audio.inputs.voice import Voice

# A reaction follows the other's phrases by this time in seconds: its mean, deviation, least and greatest.
LATENCY_S, LATENCY_DEVIATION_S, LATENCY_RANGE_S = 0.5, 0.12, (0.3, 1.0)


@dataclass
class Clock:
    """frame: number of the next pixel frame."""

    frame: float = 0.0


class FaceMotion:
    """The state of a stream's face motion, from its first frame on.

    It depends on the seed, the number of the frame and the loudness of both voices up to it.
    """

    def __init__(self, seed: int, state: bytes = b"") -> None:
        """seed: the session's. state: from `to_bytes`, to go on from; empty: the beginning. ValueError if it is not."""
        self._seed = seed
        person = Random(f"{seed}/face_motion")
        self._blinks = person.uniform(*BLINKS)
        self._manner = Manner(person.uniform(0.3, 1.0), person.uniform(0.05, 0.14), person.uniform(1.6, 2.6))
        self._clock, self._own, self._heard = Clock(), Voice(), Voice()
        self._head, self._gaze, self._lids = HeadPose(), Gaze(), Lids()
        if state:
            unpack(state, self._parts)

    def to_bytes(self) -> bytes:
        """Return the state: its size is constant."""
        return pack(self._parts)

    def advance(self, own: Sequence[float], heard: Sequence[float]) -> Tensor:
        """Return the values (m, f) of the next frames. own, heard: the level of each, from `voice.levels`."""
        rows = [self._frame(*levels) for levels in zip(own, heard, strict=True)]
        return torch.tensor(rows, dtype=torch.float32).T.contiguous()

    @property
    def _parts(self) -> list[object]:
        return [self._clock, self._own, self._heard, self._head, self._gaze, self._lids]

    def _frame(self, own_level: float, heard_level: float) -> tuple[float, ...]:
        frame = int(self._clock.frame)
        self._clock.frame += 1
        own, heard, head, gaze = self._own, self._heard, self._head, self._gaze
        own.advance(frame, own_level)
        heard.advance(frame, heard_level)
        if heard.has_ended(frame):
            rng = self._random("nod", frame)
            head.nod_at = reaction(rng, heard.ended) if rng.random() < NOD_PROBABILITY else head.nod_at
        if heard.has_begun():
            gaze.look_at = reaction(self._random("look", frame), heard.began)
        pose = head.advance(self._random("head", frame), frame, self._manner, own, heard)
        directions = gaze.advance(self._random("gaze", frame), frame, own, heard)
        jump = max(gaze.jumped, head.moved)
        blink = self._lids.advance(self._random("lids", frame), frame, self._blinks, [own, heard], jump)
        return blink, *pose, *directions

    def _random(self, part: str, frame: int) -> Random:
        """Return the random numbers of a part in a frame: what one part draws changes no other."""
        return Random(f"{self._seed}/face_motion/{part}/{frame}")


def reaction(rng: Random, moment: float) -> float:
    """Draw the frame in which the person reacts to a moment."""
    low, high = LATENCY_RANGE_S
    return float(round(moment + frames(min(max(rng.gauss(LATENCY_S, LATENCY_DEVIATION_S), low), high))))
