"""A voice, a session, and a small model of every encoder."""

import wave
from pathlib import Path

import pytest
import torch
from torch import Tensor

from avatar.audio.model import ENCODERS, AudioModel
from avatar.types import Session
from tests.audio.recordings import KINDS, encode, voice

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="session")
def speech() -> Tensor:
    """8.9 s of a voice at 16 kHz, (1, s)."""
    with wave.open(str(ASSETS / "speech.wav")) as file:
        pcm = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
    return pcm.float()[None] / 32768


@pytest.fixture(scope="session")
def session() -> Session:
    return Session(id="audio", seed=0, motion=torch.zeros(16, 1, 2, 2))


@pytest.fixture(scope="session", params=ENCODERS)
def model(request: pytest.FixtureRequest) -> AudioModel:
    torch.manual_seed(0)
    return AudioModel(ENCODERS[request.param].tiny())


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A second of voice as every kind of file."""
    return {kind: encode(voice(1.0), kind) for kind in KINDS}
