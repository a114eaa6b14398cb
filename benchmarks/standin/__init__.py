"""Stand-in workers: they speak the real worker contract, wait a given time per block, and change each block exactly.

    python -m benchmarks.standin STAGE --listen HOST:PORT --step-s SECONDS [--level N]

The rest of a block's time is the system's overhead, on any machine. Only all levels in their order produce the expected
change, so a block's picture proves the path that the block took.
"""
