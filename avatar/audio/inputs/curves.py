"""Curves of events, and the packing of states. Times are numbers of pixel frames (25/s), which need not be whole."""

import struct
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from avatar.types import FRAME_RATE_HZ

# A time that is long past.
NEVER = -1e9


def frames(seconds: float) -> float:
    """Return a duration in pixel frames."""
    return seconds * FRAME_RATE_HZ


def ease(progress: float) -> float:
    """Return the minimum-jerk path from 0 to 1 of a progress that is cut to [0, 1]. Source: Flash and Hogan, 1985."""
    x = min(max(progress, 0.0), 1.0)
    return x**3 * (10 - 15 * x + 6 * x**2)


def swell(time: float, start: float, rise: float, hold: float, fall: float) -> float:
    """Return an event that rises from 0 to 1 from `start` on, holds and falls again, at a time."""
    return ease((time - start) / rise) - ease((time - start - rise - hold) / fall)


def hazard(rate_hz: float, refractory_s: float) -> float:
    """Return the probability of an event in a frame, given that the last one is refractory_s ago.

    The refractory time is made up for, so that the mean rate is kept where possible.
    """
    return min(1.0, rate_hz / max(1 - rate_hz * refractory_s, 0.2) / FRAME_RATE_HZ)


def pack(parts: Sequence[Any]) -> bytes:
    """Pack dataclasses of floats and lists of floats as little-endian float64."""
    values = [value for part in parts for each in fields(part) for value in _listed(getattr(part, each.name))]
    return struct.pack(f"<{len(values)}d", *values)


def unpack(data: bytes, parts: Sequence[Any]) -> None:
    """Fill dataclasses from `pack`'s bytes. ValueError if they have another size or hold what is no number."""
    size = len(pack(parts))
    if len(data) != size:
        raise ValueError(f"the state of face motion must have {size} bytes, got {len(data)}")
    values = iter(struct.unpack(f"<{size // 8}d", data))
    for part in parts:
        for each in fields(part):
            old = getattr(part, each.name)
            new = [next(values) for _ in _listed(old)]
            if not all(abs(value) < 1e15 for value in new):
                raise ValueError(f"the state of face motion holds {new} as {each.name}, expected finite numbers")
            setattr(part, each.name, new if isinstance(old, list) else new[0])


def _listed(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]
