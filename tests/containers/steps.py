"""Steps of a run, each printed as a line with its time."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Print a line with the body's time and notes; end the program if it fails."""
    started_s, notes = time.monotonic(), list[str]()
    try:
        yield notes
    except (RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
        print(f"FAILED   {name}: {error}")
        sys.exit(1)
    print(f"{time.monotonic() - started_s:7.1f} s  {name}" + "".join(f"; {each}" for each in notes), flush=True)
