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


# Encoders, and latent frames of a block.
BLOCKS_OF_3, BLOCKS_OF_1 = ([(name, latents) for name in ENCODERS] for latents in (3, 1))
with_short_blocks = pytest.mark.parametrize(
    "model", BLOCKS_OF_3 + BLOCKS_OF_1, indirect=True, ids="{0[0]}-{0[1]}".format
)


@pytest.fixture(scope="session", params=BLOCKS_OF_3, ids="{0[0]}".format)
def model(request: pytest.FixtureRequest) -> AudioModel:
    torch.manual_seed(0)
    name, block_latents = request.param
    return AudioModel(ENCODERS[name].tiny(block_latents))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A second of voice as every kind of file."""
    return {kind: encode(voice(1.0), kind) for kind in KINDS}
