"""What others do between stages, with the same stages and messages: the floor and the neighbours of our figures.

    python -m benchmarks.peers {gloo,loop,zeromq} --step-s SECONDS

reads a job a line and writes a report a line, both JSON:

    {"pace": "alone", "num_blocks": 100}  ->  {"sent_s": [...], "came_s": [...], "wrong": 0, "cpu_s": 1.5}

Pace is `alone`: one block at a time; `full`: as fast as it goes; or `live`: a block's sound every 480 ms.
"""

# How many times a block is handed on, its sound and its picture included where they are.
HOPS = {"gloo": 5, "loop": 5, "zeromq": 6}
NAMES = tuple(HOPS)
