"""A bare process that wakes every 480 ms: `python -m benchmarks.pipeline.sleeper SECONDS` prints when it did, as JSON.

What its intervals vary is the machine's, not ours.
"""

import json
import sys
import time

from avatar.types import BLOCK_S


def main() -> None:
    began = time.monotonic()
    woke: list[float] = []
    while time.monotonic() - began < float(sys.argv[1]):
        time.sleep(max(0.0, began + (len(woke) + 1) * BLOCK_S - time.monotonic()))
        woke.append(time.monotonic())
    json.dump(woke, sys.stdout)


if __name__ == "__main__":
    main()
