"""The contract and the chaos tests, over a checkpoint with blocks of one latent: 160 ms."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["contract", "chaos"])
def test_everything_holds_for_blocks_of_one_latent(folder: str) -> None:
    """A process of its own: its checkpoint is made anew."""
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / folder)]
    ran = subprocess.run(
        program, cwd=TESTS.parent, env={**os.environ, "TEST_BLOCK_LATENTS": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
