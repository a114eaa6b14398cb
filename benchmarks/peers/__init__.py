"""Other ways to connect the same stages with the same messages: lower bounds and alternatives to compare with.

    python -m benchmarks.peers {gloo,grpc,loop,zeromq} --step-s SECONDS

reads one job per line and writes one report per line, both JSON:

    {"pace": "alone", "num_blocks": 100}  ->  {"sent_s": [...], "arrived_s": [...], "wrong": 0, "cpu_s": 1.5}

Pace is `alone`: one block at a time; `full`: as fast as possible; or `live`: a block's audio every 480 ms.
"""

# Number of times a block is handed on, including its audio and its picture where they are.
HOPS = {"gloo": 5, "grpc": 7, "loop": 5, "zeromq": 6}
NAMES = tuple(HOPS)
