"""Memory of this process that is not mapped from files, and its peak."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_S = 0.001


def anonymous_bytes() -> int:
    """Return the process's anonymous memory (Linux: RssAnon). The kernel reclaims mapped files when it needs to."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Give a list whose only number becomes the largest anonymous memory while the body runs."""
    peak, done = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            peak[0] = max(peak[0], anonymous_bytes())

    sampling = threading.Thread(target=sample)
    sampling.start()
    try:
        yield peak
    finally:
        done.set()
        sampling.join()
        peak[0] = max(peak[0], anonymous_bytes())
