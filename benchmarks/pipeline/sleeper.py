"""A bare process that wakes every 480 ms: `python -m benchmarks.pipeline.sleeper SECONDS` prints the times, as JSON.

The variation of its intervals is the machine's, not the suite's.
"""

import json
import sys
import time

from avatar.types import BLOCK_S


def main() -> None:
    started = time.monotonic()
    woke: list[float] = []
    while time.monotonic() - started < float(sys.argv[1]):
        time.sleep(max(0.0, started + (len(woke) + 1) * BLOCK_S - time.monotonic()))
        woke.append(time.monotonic())
    json.dump(woke, sys.stdout)


if __name__ == "__main__":
    main()
