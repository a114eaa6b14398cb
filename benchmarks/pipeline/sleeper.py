"""A bare process that wakes regularly: `python -m benchmarks.pipeline.sleeper SECONDS INTERVAL` prints when.

The variation of its intervals is the machine's, not the suite's.
"""

import json
import sys
import time


def main() -> None:
    started, (duration_s, interval_s) = time.monotonic(), map(float, sys.argv[1:])
    woke: list[float] = []
    while time.monotonic() - started < duration_s:
        time.sleep(max(0.0, started + (len(woke) + 1) * interval_s - time.monotonic()))
        woke.append(time.monotonic())
    json.dump(woke, sys.stdout)


if __name__ == "__main__":
    main()
